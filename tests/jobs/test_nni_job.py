"""Jobs through NNI: the same subnet as through torch-pruning, config lists in recipes, and removal by NNI."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning"), pytest.mark.host("onnxruntime")]
pytest.importorskip("nni")
pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")
pytest.importorskip("pydantic")

from nns_plugin.adapters.nni import NNIBackend, NNIFallbackWarning  # noqa: E402
from nns_plugin.adapters.nni.nni_removal import ModelSpeedup  # noqa: E402
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning  # noqa: E402
from nns_plugin.errors import PruningError, RecipeError, SelectionError  # noqa: E402
from nns_plugin.jobs.loading import load_recipe  # noqa: E402
from nns_plugin.jobs.run import run_job  # noqa: E402

QUICK = {"train.epochs": 1, "measure.samples": 20, "measure.resamples": 0, "round_to": 1}


def job(folder: Path, **overrides: Any) -> dict[str, Any]:
    given = QUICK | {name.replace("__", "."): value for name, value in overrides.items()}
    return run_job(load_recipe(None, given), folder).to_dict()


@pytest.mark.parametrize("choice", [{"ratio": 0.5}, {"zeta": 0.3}, {"ratio": 0.5, "compensation__method": "refit"}])
def test_a_job_through_nni_keeps_the_same_units(tmp_path: Path, choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    speed_up = ModelSpeedup.speedup_model
    monkeypatch.setattr(ModelSpeedup, "speedup_model", lambda self: removed.append(1) or speed_up(self))
    found = job(tmp_path / "nni", framework="nni", **choice)
    expected = job(tmp_path / "tp", **choice)
    assert len(removed) == (0 if "compensation__method" in choice else 1)
    assert found["kept_units"] == expected["kept_units"]
    assert found["subnet"]["evaluation"] == expected["subnet"]["evaluation"]
    assert found["subnet"]["parameters"] == expected["subnet"]["parameters"] < found["baseline"]["parameters"]
    assert found["subnet"]["parity"]["passed"]
    assert json.loads((tmp_path / "nni" / "report.json").read_text())["recipe"]["framework"] == "nni"
    for name in ("baseline.onnx", "subnet.onnx", "subnet.safetensors"):
        assert (tmp_path / "nni" / name).exists()


@pytest.mark.filterwarnings("ignore::nns_plugin.jobs.run.CalibrationDataWarning")
def test_a_budget_and_nothing_to_remove(tmp_path: Path) -> None:
    found = job(tmp_path / "nni", framework="nni", max_balanced_accuracy_drop=0.3, confidence=0.5)
    expected = job(tmp_path / "tp", max_balanced_accuracy_drop=0.3, confidence=0.5)
    assert len(found["trials"]) > 1
    assert found["trials"][0]["ratio"] == 0.0
    assert found["subnet"]["parameters"] < found["baseline"]["parameters"]
    assert abs(found["subnet"]["parameters"] / expected["subnet"]["parameters"] - 1) < 0.2  # shares round differently
    whole = job(tmp_path / "whole", framework="nni", ratio=0.0)
    assert {name: len(kept) for name, kept in whole["kept_units"].items()} == whole["units"]


def test_a_config_list_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
model: {factory: "nns_plugin.jobs.models:digits_classifier"}
data: {factory: "nns_plugin.jobs.data:digits"}
labels: ["3", "5"]
framework: nni
config_list:
  - {op_types: [Conv2d], sparse_ratio: 0.5}
  - {op_types: [Linear], exclude_op_names: ["14"], sparse_ratio: 0.75}
train: {epochs: 1}
measure: {samples: 20, resamples: 0}
"""
    )
    report = run_job(load_recipe(recipe), tmp_path / "out").to_dict()
    shares = {name: len(report["kept_units"][name]) / size for name, size in report["units"].items()}
    model = report["recipe"]["model"]["factory"]
    assert model == "nns_plugin.jobs.models:digits_classifier"
    assert set(shares.values()) == {0.5, 0.25}
    assert [name for name, share in shares.items() if share == 0.25] == list(shares)[-1:]


def test_options_that_do_not_fit_are_told(tmp_path: Path) -> None:
    for overrides, message in (
        ({"framework": "nni", "round_to": 8}, "NNI's masks cannot be rounded"),
        ({"config_list": [{"op_types": ["Linear"], "sparse_ratio": 0.5}]}, "config_list requires framework nni"),
        (
            {"framework": "nni", "angle": {}, "criterion.name": "distinctiveness"},
            "angle requires framework",
        ),
        ({"framework": "tensorflow"}, "field 'framework': found 'tensorflow'"),
        ({"framework": "nni", "config_list": []}, "field 'config_list'"),
        ({"framework": "nni", "global_pruning": True}, "global_pruning ranks units, but NNI ranks shares of weights"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(None, {"round_to": 1, **overrides})
    for config, kind, message in (
        ({"op_types": ["LSTM"], "sparse_ratio": 0.5}, PruningError, "selects no layer"),
        ({"op_names": ["99"], "sparse_ratio": 0.5}, PruningError, "op_names has '99'"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 1.0}, PruningError, "would leave nothing"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 0.0}, SelectionError, "masks no complete unit"),
        ({"op_types": ["Conv2d"], "sparsity": 0.5, "exclude": True}, PruningError, "NNI|selects no layer"),
    ):
        with pytest.raises(kind, match=message):
            job(tmp_path / "none", framework="nni", config_list=[config])
    assert not (tmp_path / "none").exists()


def test_nni_removes_in_place_what_torch_pruning_would(zoo: Any) -> None:
    for case in ("mlp", "conv_norm", "residual", "depthwise", "concat"):
        torch.manual_seed(0)
        model, inputs = zoo.CASES[case].make().eval(), zoo.CASES[case].inputs(4)
        other = copy.deepcopy(model)
        traced, expected = NNIBackend(model, inputs), TorchPruningBackend(other, inputs)
        groups = traced.groups()
        kept = {group.name: torch.arange(0, group.size, 2) for group in groups}
        traced.keep(groups, kept)
        expected.keep(expected.groups(), kept)
        assert traced.model is model
        for (name, value), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(value, wanted), (case, name)
        assert not model.training
        if case not in ("residual", "concat"):  # torch-pruning does not follow NNI's removals through concatenations
            assert [group.size for group in traced.groups()] == [group.size for group in expected.groups()]
        traced.keep(groups, {groups[0].name: torch.arange(groups[0].size)})  # nothing goes


def test_where_nni_cannot_torch_pruning_removes_and_it_is_told(zoo: Any) -> None:
    torch.manual_seed(0)
    model, inputs = zoo.CASES["recurrent"].make().eval(), zoo.CASES["recurrent"].inputs(4)
    traced = NNIBackend(model, inputs)
    with pytest.warns(UnusableGroupWarning):
        groups = traced.groups()
    with (
        pytest.warns(UnusableGroupWarning),
        pytest.warns(NNIFallbackWarning, match="torch-pruning removed the units, NNI did not: "),
    ):
        traced.keep(groups, {groups[0].name: torch.arange(groups[0].size - 1)})
    assert isinstance(model.first, nn.Linear)
    assert model.first.out_features == groups[0].size - 1


@pytest.mark.parametrize(
    "statement",
    [
        "import nns_plugin.adapters.nni",
        "import nns_plugin.adapters.nni_engine.experiment",
        "import nns_plugin.adapters.nni_engine.trial",
        "from nns_plugin.cli import main; main(['run', '--set=framework=nni', '--round-to=1', '--output=out'])",
        "from nns_plugin.cli import main; main(['sweep', 'recipe.yaml', '--output', 'out'])",
    ],
)
def test_without_nni_the_extra_is_named(tmp_path: Path, statement: str) -> None:
    (tmp_path / "recipe.yaml").write_text("sweep: {search: {ratio: [0.5]}}")
    code = f"import sys; sys.modules['nni'] = None; {statement}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode != 0
    assert "'nni' is not installed" in found.stderr
    assert 'pip install "nns-plugin[nni]"' in found.stderr
    if "main" in statement:
        assert found.returncode == 2
        assert len(found.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
