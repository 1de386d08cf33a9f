"""A candidate's ONNX file beside its baseline: outputs, labels, accuracy, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import NAMES, TYPES, W, X, linear, parity, quick_compare, tensor, write  # noqa: E402

from nns_plugin.adapters.onnxruntime.comparing import TorchModels  # noqa: E402
from nns_plugin.adapters.onnxruntime.file import FEATURES_KEY, SELECTION_KEY  # noqa: E402
from nns_plugin.errors import ExportError, LabelError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return linear(tmp_path / "dense.onnx", W, NAMES)


# Outputs --------------------------------------------------------------------------------------------------------


def test_errors_of_all_labels_are_those_of_numpy(dense: Path, tmp_path: Path) -> None:
    other = W + np.float32([[0, 0.25, 0, 0], [0, 0, 0, 0], [0, 0, 0.0625, 0]])
    found = quick_compare(dense, linear(tmp_path / "small.onnx", other), X)
    report, (expected, got) = parity(found), (X @ W, X @ other)
    error = np.abs(got - expected)
    levels = report.p50_absolute_error, report.p90_absolute_error, report.p99_absolute_error
    np.testing.assert_allclose(levels, np.percentile(error, (50, 90, 99)), rtol=1e-4, atol=1e-7)
    assert report.max_absolute_error == pytest.approx(error.max(), rel=1e-5)
    assert report.top1_agreement == np.mean(expected.argmax(1) == got.argmax(1)) < 1
    assert not report.passed
    assert report.passing_atol == pytest.approx((error - 1e-3 * np.abs(expected)).max(), rel=1e-4)
    assert report.first_divergence is not None
    assert report.first_divergence.position == tuple(np.argwhere(error > 1e-5 + 1e-3 * np.abs(expected))[0])
    assert (found.labels, found.inputs, found.random_inputs) == (tuple(NAMES), 90, False)
    assert (report.inputs, report.outputs, report.provider) == (90, ("y",), "CPUExecutionProvider")
    assert (found.baseline.path, found.candidate.path) == (str(dense), str(tmp_path / "small.onnx"))
    assert quick_compare(dense, tmp_path / "small.onnx", X, atol=report.passing_atol).parity[0].passed


@pytest.mark.parametrize(
    "labels", [["owl", "other", "cat"], ["pig", "cat"], ["pig", "owl", "dog", "cat"], ["dog", "other"]]
)
def test_labels_are_matched_by_name(labels: list[str], dense: Path, tmp_path: Path) -> None:
    columns = [None if name == "other" else NAMES.index(name) for name in labels]
    weights = np.stack([np.zeros(3) if column is None else W[:, column] for column in columns], 1).astype(np.float32)
    found = quick_compare(dense, linear(tmp_path / "small.onnx", weights, labels), X)
    report = parity(found)
    assert report.passed
    assert report.max_absolute_error < 1e-6
    assert found.labels == tuple(name for name in labels if name != "other")
    said, answers = (X @ W).argmax(1), (X @ weights).argmax(1)
    if "other" in labels:
        same = [
            (NAMES[left] if NAMES[left] in labels else "other") == labels[right]
            for left, right in zip(said, answers, strict=True)
        ]
    else:
        same = [
            NAMES[left] == labels[right] for left, right in zip(said, answers, strict=True) if NAMES[left] in labels
        ]
    assert report.top1_agreement == pytest.approx(np.mean(same))


@pytest.mark.parametrize("labels", [["dog", "cat", "owl", "pig"], ["owl", "cat"]])
def test_a_wrong_order_of_labels_is_found_out(labels: list[str], dense: Path, tmp_path: Path) -> None:
    columns = sorted(NAMES.index(name) for name in labels)
    report = parity(quick_compare(dense, linear(tmp_path / "small.onnx", W[:, columns], labels), X))
    assert not report.passed
    assert (report.top1_agreement or 0) < 0.6


def test_names_are_given_where_the_files_tell_none(tmp_path: Path) -> None:
    dense, small = linear(tmp_path / "dense.onnx", W), linear(tmp_path / "small.onnx", W[:, [2, 0]])
    assert not parity(quick_compare(dense, small, X, candidate_labels=["0", "2"])).passed
    assert parity(quick_compare(dense, small, X, candidate_labels=["2", "0"])).passed
    found = quick_compare(dense, small, X, label_names=NAMES, candidate_labels=["owl", "cat"])
    assert parity(found).passed
    assert found.labels == ("owl", "cat")


def test_scores_that_are_not_as_many_without_names_cannot_be_compared(dense: Path, tmp_path: Path) -> None:
    found = quick_compare(dense, linear(tmp_path / "small.onnx", W[:, :2]), X)
    assert parity(found).incomparable == (
        "output 'y' has 4 scores of the baseline and 2 of the candidate, which does not say for which labels: "
        "name them",
    )
    assert (parity(found).passed, parity(found).top1_agreement, found.labels) == (False, None, ())


@pytest.mark.parametrize(
    ("columns", "labels", "options", "message"),
    [
        ([0, 1], ["cat", "dog"], {"candidate_labels": ["dog", "cat"]}, r"holds the label names .*'dog'\], but"),
        ([0, 1], ["cat", "cow"], {}, r"has the labels \['cat', 'cow'\], the baseline"),
        ([0], ["other"], {}, r"has the labels \['other'\], the baseline"),
        ([0, 1], ["cat"], {}, "returns 2 scores, but there are 1 label names"),
        ([0, 1], ["cat", "cat"], {}, "2 label names, 1 of them distinct"),
        ([0, 1], None, {"candidate_labels": ["cat"]}, "returns 2 scores, but there are 1 label names"),
        ([0, 1, 2, 3], None, {"label_names": ["cat"]}, "holds the label names .* but .* were given; drop"),
    ],
)
def test_labels_that_cannot_be_matched(
    columns: list[int], labels: Any, options: dict[str, Any], message: str, dense: Path, tmp_path: Path
) -> None:
    small = linear(tmp_path / "small.onnx", W[:, columns], labels)
    with pytest.raises(LabelError, match=message) as failure:
        quick_compare(dense, small, X, **options)
    assert len(str(failure.value).splitlines()) == 1


def test_several_outputs_are_matched_by_name(tmp_path: Path) -> None:
    more, off = {"a": W[:, :2], "b": W[:, 2:]}, {"b": W[:, 2:] + np.float32(0.5), "a": W[:, :2]}
    one = linear(tmp_path / "one.onnx", W, more=more)
    assert parity(quick_compare(one, linear(tmp_path / "two.onnx", W, more=dict(reversed(more.items()))), X)).passed
    report = parity(quick_compare(one, linear(tmp_path / "two.onnx", W, more=off), X))
    assert (report.passed, report.outputs, report.worst_output) == (False, ("y", "a", "b"), "b")
    assert report.first_divergence is not None
    assert (report.first_divergence.output, report.top1_agreement) == ("b", 1)
    report = parity(
        quick_compare(one, linear(tmp_path / "two.onnx", W, out="c", more={"d": W[:, :2], "e": W[:, 2:]}), X)
    )
    assert report.passed, "no name is the same: in order"


def test_a_missing_output_is_named_and_nothing_passes(tmp_path: Path) -> None:
    one = linear(tmp_path / "one.onnx", W, more={"a": W})
    report = parity(quick_compare(one, linear(tmp_path / "two.onnx", W), X))
    assert not report.passed
    assert report.incomparable == ("output 'a' is missing from the candidate, which has 'y'",)
    assert (report.max_absolute_error, report.passing_atol) == (0, None)
    assert parity(quick_compare(tmp_path / "two.onnx", one, X)).passed, "more outputs do no harm"


def test_outputs_that_are_all_missing_are_named(tmp_path: Path) -> None:
    one = linear(tmp_path / "one.onnx", W, out="scores")
    report = parity(quick_compare(one, linear(tmp_path / "two.onnx", W, more={"a": W}), X))
    assert not report.passed
    assert report.incomparable == ("output 'scores' is missing from the candidate, which has 'y', 'a'",)


def test_outputs_of_other_shapes_are_named(tmp_path: Path) -> None:
    one, two = (linear(tmp_path / f"{n}.onnx", W, more={"a": W[:, :n]}) for n in (2, 3))
    report = parity(quick_compare(one, two, X))
    assert not report.passed
    assert report.incomparable == ("output 'a' is [64, 2] of the baseline, [64, 3] of the candidate in a batch",)


@pytest.mark.parametrize("row", [1, 6])
def test_an_output_that_is_not_one_an_input_is_compared_whole(row: int, tmp_path: Path) -> None:
    def with_anchors(name: str, anchors: Any) -> Path:
        nodes = [onnx.helper.make_node("Relu", ["x"], ["y"]), onnx.helper.make_node("Identity", ["c"], ["anchors"])]
        outputs = [tensor("y", "n", 3), tensor("anchors", 8, 2)]
        return write(tmp_path / name, [tensor("x", "n", 3)], outputs, nodes, {"c": anchors})

    anchors = np.zeros((8, 2), np.float32)
    other = anchors.copy()
    other[row] = 1
    report = parity(quick_compare(with_anchors("a.onnx", anchors), with_anchors("b.onnx", other), X[:4]))
    assert not report.passed
    assert report.first_divergence is not None
    assert (report.first_divergence.output, report.first_divergence.position) == ("anchors", (row, 0))


# Inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(4, "n"), ("n", 4), (4, 4)])
def test_files_with_a_fixed_batch_answer_all_inputs_once(sides: tuple[Any, Any], tmp_path: Path) -> None:
    inputs = np.zeros((6, 3), np.float32)
    inputs[5, 0] = 1
    other = W.copy()
    other[0, 2] = 3
    one, two = (
        linear(tmp_path / f"{i}.onnx", w, batch=b) for i, (w, b) in enumerate(zip((W, other), sides, strict=True))
    )
    found = quick_compare(one, two, inputs, **{"batches": (4,)})
    report = parity(found)
    assert (report.inputs, report.max_absolute_error) == (6, 3)
    assert report.p50_absolute_error == 0
    assert report.first_divergence is not None
    assert report.first_divergence.position == (5, 2)
    assert report.top1_agreement == pytest.approx(5 / 6)
    assert [each.batch for each in found.latency] == [4]
    with pytest.raises(ExportError, match="takes batches of 4 only, found 1"):
        quick_compare(one, two, inputs)


def test_integer_inputs(tmp_path: Path) -> None:
    inputs = np.arange(24).reshape(8, 3) % 5
    one, two = (linear(tmp_path / f"{kind}.onnx", W, kind=kind) for kind in (TYPES.INT64, TYPES.INT32))
    assert parity(quick_compare(one, two, inputs)).passed
    assert parity(quick_compare(one, two, torch.from_numpy(inputs))).inputs == 8
    assert quick_compare(one, two).random_inputs
    with pytest.raises(ExportError, match=r"takes x int64\[n, 3\], found float32\[90, 3\]; convert it first"):
        quick_compare(one, two, X)


def test_a_float16_candidate_needs_a_wider_tolerance(dense: Path, tmp_path: Path) -> None:
    half = linear(tmp_path / "half.onnx", W, kind=TYPES.FLOAT16)
    report = parity(quick_compare(dense, half, X, rtol=1e-6, atol=0))
    error = np.abs((X.astype(np.float16) @ W.astype(np.float16)).astype(np.float32) - X @ W)
    assert not report.passed
    assert report.max_absolute_error == pytest.approx(error.max(), rel=0.2)
    assert parity(quick_compare(dense, half, X, rtol=0.01, atol=0.01)).passed


def test_random_inputs_are_used_where_none_are_given(dense: Path) -> None:
    found = quick_compare(dense, dense)
    assert (found.random_inputs, found.inputs, parity(found).passed) == (True, 64, True)
    assert quick_compare(dense, dense, **{"batches": (70,)}).inputs == 70


def test_no_batches_are_no_latency(dense: Path) -> None:
    found = quick_compare(dense, dense, X, batches=())
    assert (found.latency, len(found.profiles), parity(found).passed) == ((), 1, True)


def test_a_narrowed_candidate_takes_its_part_of_the_inputs(dense: Path, tmp_path: Path) -> None:
    wide = np.concatenate([X, X], 1)
    one = linear(tmp_path / "wide.onnx", np.concatenate([np.zeros_like(W), W]), NAMES)
    metadata = {FEATURES_KEY: "[3, 4, 5]", SELECTION_KEY: '{"axis": 1, "flat": false, "total": 6}'}
    small = linear(tmp_path / "small.onnx", W, NAMES, metadata=metadata, put="features")
    found = quick_compare(one, small, wide)
    assert parity(found).passed
    assert found.latency[0].batch == 1


def test_inputs_that_every_run_takes_may_have_other_names(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Mul", ["x", "k"], ["y"])]
    path = write(tmp_path / "model.onnx", [tensor("x", "n", 3), tensor("k", 3)], [tensor("y", "n", 3)], nodes)
    for names in (("x", "k"), ("images", "scales")):
        found = quick_compare(path, path, dict(zip(names, (X, np.ones(3)), strict=True)), **{"batches": (1, 4)})
        assert [each.batch for each in found.latency] == [1, 4]


def test_files_alone_take_arrays_that_torch_does_not(dense: Path, tmp_path: Path) -> None:
    fixed = X.copy()
    fixed.flags.writeable = False
    for inputs in (X[::-1], fixed):
        assert parity(quick_compare(dense, dense, inputs)).passed
    nodes = [onnx.helper.make_node("Mul", ["x", "scale"], ["y"])]
    path = write(tmp_path / "scaled.onnx", [tensor("x", "n", 3), tensor("scale")], [tensor("y", "n", 3)], nodes)
    assert parity(quick_compare(path, path, [X, np.array(2, np.float32)])).passed
    assert parity(quick_compare(path, path)).passed, "drawn"


def test_nan_outputs_never_pass_and_agree_with_nothing(tmp_path: Path) -> None:
    inputs = X.copy()
    inputs[:, 2] = np.where(np.arange(90) % 10 == 0, np.inf, 0)  # 0 * inf is NaN
    one, two = (linear(tmp_path / f"{name}.onnx", W) for name in ("one", "two"))
    report = parity(quick_compare(one, two, inputs))
    assert (report.passed, report.passing_rtol, report.passing_atol) == (False, None, None)
    assert report.first_divergence is not None
    assert report.first_divergence.position[0] == 0
    assert report.top1_agreement == pytest.approx(0.9), "what is NaN answers nothing"


def test_a_comparison_with_nan_is_json(dense: Path, tmp_path: Path) -> None:
    broken = linear(tmp_path / "broken.onnx", W * np.float32(np.nan))
    saved = json.loads(json.dumps(quick_compare(dense, broken, X).to_dict(), allow_nan=False))
    assert saved["parity"][0]["max_absolute_error"] is None
    assert saved["candidate"]["path"] == str(broken)


# Torch models ---------------------------------------------------------------------------------------------------


def test_torch_models_must_answer_as_their_files_and_masked_units_as_none(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    wide(torch.randn(64, 3) * 2 + 1)
    small = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    kept = [0, 2, 3, 5]
    with torch.no_grad():
        for name, value in wide.state_dict().items():
            narrow = (
                value[:, kept] if name == "3.weight" else value[kept] if value.dim() and name != "3.bias" else value
            )
            small.state_dict()[name].copy_(narrow)
    masked = nn.Sequential(*wide[:3], nn.Linear(6, 4))
    masked[3].load_state_dict(wide[3].state_dict())
    with torch.no_grad():
        masked[3].weight[:, [1, 4]] = 0
    found = quick_compare(
        wide, small, X, torch_models=TorchModels(masked=masked), label_names=NAMES, candidate_labels=NAMES
    )
    kinds = ["torch against ONNX"] * 2 + ["masked against removed", "dense against pruned"]
    assert [report.kind for report in found.parity] == kinds
    assert [report.passed for report in found.parity] == [True, True, True, False]
    assert found.labels == tuple(NAMES)
    assert not Path(found.baseline.path).exists()
    found = quick_compare(wide, small, X, torch_models=TorchModels(masked=wide))
    assert [report.passed for report in found.parity] == [True, True, False, False]
    wide.eval()
    with torch.no_grad():
        error = (wide(torch.from_numpy(X)) - small.eval()(torch.from_numpy(X))).abs().max()
    assert parity(found).max_absolute_error == pytest.approx(float(error), rel=1e-3)


def test_torch_models_of_files_must_answer_as_they_do(dense: Path) -> None:
    model, other = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(W.T))
    given = TorchModels(baseline=model, candidate=other, masked=model)
    found = quick_compare(dense, dense, X, torch_models=given)
    assert [report.passed for report in found.parity] == [True, False, False, True]
    with pytest.raises(ExportError, match="pass its torch model too"):
        quick_compare(dense, dense, X, torch_models=TorchModels(baseline=model, masked=model))
    report, _ = quick_compare(dense, dense, torch_models=TorchModels(candidate=model)).parity
    assert (report.kind, report.passed) == ("torch against ONNX", True)


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, r"batches is \[0\]; expected sizes of at least 1"),
        ({"batches": (True,)}, "expected sizes of at least 1"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"resamples": 99}, "resamples 99"),
        ({"profile_runs": -1}, "profile_runs -1"),
        ({"rtol": -1.0}, "rtol is -1.0"),
        ({"torch_models": TorchModels(masked=nn.Linear(3, 4))}, "masked is compared with a candidate in torch"),
        ({"candidate": nn.Linear(3, 4), "inputs": None}, "the candidate is a torch model, which needs inputs"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, dense: Path) -> None:
    with pytest.raises(ExportError, match=message):
        quick_compare(**({"baseline": dense, "candidate": dense, "inputs": X} | options))
