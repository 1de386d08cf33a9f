"""Parity of a file with the torch model that it was exported from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import tensor, write  # noqa: E402
from onnx_models import Several, convnet, exported_convnet, one_line  # noqa: E402

from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402
from nns_plugin.errors import ExportError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network and its file, exported from a single example in train mode."""
    return exported_convnet(tmp_path_factory.mktemp("exported"))


def test_a_convnet_with_batch_norm_and_dropout_is_at_parity(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    report = adapter.check_parity(model, path, torch.randn(32, 3, 8, 8))
    assert report.passed
    assert report.max_absolute_error < 1e-5
    assert 0 < report.p50_absolute_error <= report.p90_absolute_error <= report.p99_absolute_error
    assert report.p99_absolute_error <= report.max_absolute_error
    assert report.top1_agreement == 1
    assert (report.inputs, report.batch_sizes) == (32, (1, 32))
    assert (report.rtol, report.atol, report.provider) == (1e-3, 1e-5, "CPUExecutionProvider")
    assert json.loads(json.dumps(asdict(report)))["worst_output"] == report.worst_output


def test_other_weights_fail(exported: tuple[nn.Module, Path]) -> None:
    other = convnet()
    report = adapter.check_parity(other, exported[1], torch.randn(64, 3, 8, 8))
    assert not report.passed
    assert report.max_absolute_error > 1e-2
    assert report.top1_agreement is not None
    assert report.top1_agreement < 1


def test_one_weight_off_by_little_fails_and_tolerances_decide(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    head = model[-1]
    images = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        head.bias[2] += 0.01
    try:
        report = adapter.check_parity(model, path, images)
        assert not report.passed
        assert report.max_absolute_error == pytest.approx(0.01, rel=1e-2)
        assert adapter.check_parity(model, path, images, atol=0.02).passed
    finally:
        with torch.no_grad():
            head.bias[2] -= 0.01


def test_the_worst_output_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.onnx",
        [tensor("left", "batch", 4), tensor("right", "batch", 4)],
        [tensor("total", "batch", 4), tensor("twice", "batch", 4), tensor("rows", "batch")],
        [
            onnx.helper.make_node("Add", ["left", "right"], ["total"]),
            onnx.helper.make_node("Add", ["left", "right"], ["twice"]),
            onnx.helper.make_node("ReduceSum", ["right", "axis"], ["rows"], keepdims=0),
            onnx.helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        ],
    )
    left, right = torch.ones(3, 4), torch.ones(3, 4)
    assert adapter.check_parity(Several(), path, (left, right)).passed
    report = adapter.check_parity(Several(), path, (left, torch.tensor([[1.0], [1.0], [1.5]]).expand(3, 4)))
    assert report.worst_output == "twice"
    assert not report.passed
    assert report.max_absolute_error == 0.5
    assert report.max_relative_error == 0.25
    assert report.p50_absolute_error == 0
    assert report.p99_absolute_error == 0.5


class NotANumber(nn.Module):
    """0 / 0 in the second label of every input that is 0."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / inputs.abs()


def test_a_nan_fails_even_if_both_sides_agree_on_it(tmp_path: Path) -> None:
    path = adapter.export(NotANumber(), torch.randn(2, 3), tmp_path / "model.onnx")
    inputs = torch.ones(4, 3)
    assert adapter.check_parity(NotANumber(), path, inputs).passed
    inputs[3, 1] = 0
    report = adapter.check_parity(NotANumber(), path, inputs)
    assert not report.passed
    assert np.isnan(report.max_absolute_error)
    assert np.isnan(report.max_relative_error)


def test_a_fixed_batch_axis_is_found_out(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    fixed = write(tmp_path / "fixed.onnx", [tensor("x", 4, 3)], [tensor("y", 4, 3)], [node])
    dynamic = write(tmp_path / "dynamic.onnx", [tensor("x", "batch", 3)], [tensor("y", "batch", 3)], [node])
    assert adapter.check_parity(nn.Identity(), dynamic, torch.randn(4, 3)).passed
    with pytest.raises(ExportError, match=r"fixed\.onnx.*cannot run on .*\[1, 3\].*dynamic batch axis") as failure:
        adapter.check_parity(nn.Identity(), fixed, torch.randn(4, 3))
    one_line(failure)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), {}, r"inputs \['x'\], found 2 positional tensors"),
        ({"input": torch.ones(2, 3)}, {}, r"inputs \['x'\], found \['input'\]"),
        (torch.ones(2, 3, dtype=torch.bfloat16), {}, "cannot be converted to NumPy"),
        (torch.ones(2, 4), {}, r"cannot run on .*\[1, 4\]"),
        (torch.ones(2, 3), {"rtol": -1}, "rtol is -1 and atol is 1e-05; expected"),
        (torch.ones(2, 3), {"atol": float("nan")}, "atol is nan; expected"),
    ],
)
def test_inputs_that_do_not_fit_the_file(inputs: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    path = write(tmp_path / "model.onnx", [tensor("x", "batch", 3)], [tensor("y", "batch", 3)], [node])
    model = Several() if isinstance(inputs, tuple) else nn.Identity()
    with pytest.raises(ExportError, match=message) as failure:
        adapter.check_parity(model, path, inputs, **options)
    one_line(failure)


def test_outputs_of_another_model_are_an_error(exported: tuple[nn.Module, Path]) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ExportError, match=r"outputs \[\[1, 5\]\] .*Sequential returns \[\[1, 4\]\]") as failure:
        adapter.check_parity(other, exported[1], torch.randn(2, 3, 8, 8))
    one_line(failure)
