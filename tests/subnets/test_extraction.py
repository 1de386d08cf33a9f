"""Extraction from Python: what the options mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from animals import NAMES, accuracy, batches, extracted, make, trained  # noqa: E402

from nns_plugin import Subnet, calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.errors import (  # noqa: E402
    CalibrationError,
    CriterionError,
    LabelError,
    NNSError,
    PruningError,
    RecipeError,
    SnapshotError,
)
from nns_plugin.jobs.extraction import extract_subnet  # noqa: E402
from nns_plugin.subnets.angles import Angles  # noqa: E402
from nns_plugin.subnets.options import ExtractionOptions  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402


def test_a_calibrated_head_is_best_on_the_validation_data() -> None:
    validation = batches(1000, 3)
    plain = extracted(labels=[0, 2], ratio=0.8)
    moved = extracted(labels=[0, 2], ratio=0.8, calibrate_head=True, validation=validation)
    assert accuracy(moved, validation) >= accuracy(plain, validation)
    differing = [name for name, value in plain.weights.items() if not torch.equal(value, moved.weights[name])]
    assert differing == ["4.bias"]
    assert torch.equal(plain.weights["4.bias"][:2], moved.weights["4.bias"][:2])


def test_statistics_are_used_in_place_of_the_loader() -> None:
    loader = batches(800, 2)
    statistics = calibrate(trained(), loader, unit_groups(trained(), loader[0][0][:2]), labels=NAMES, gram=True)
    for options in ({"criterion": "semantic"}, {"criterion": "distinctiveness", "compensation": "least_squares"}):
        left = extracted(labels=[0, 2], ratio=0.6, head="open", **options)
        right = extracted(labels=[0, 2], ratio=0.6, head="open", statistics=statistics, label_names=None, **options)
        assert right.labels.names == NAMES
        for name, value in left.weights.items():
            assert torch.allclose(value, right.weights[name], atol=1e-6), name


def test_labels_without_names_are_numbers() -> None:
    loader = batches(200, 2)
    subnet = extract_subnet(trained(), loader[0][0][:2], loader, labels=[3], ratio=0.5)
    assert subnet.labels.names == ("0", "1", "2", "3")
    assert subnet.output_names == ("3", "other")


def test_a_subnet_of_all_labels_needs_no_other() -> None:
    subnet = extracted(labels=list(NAMES), ratio=0.5)
    assert subnet.output_names == NAMES
    assert subnet.head_layer is None


def test_labels_may_be_integers_of_any_kind() -> None:
    left, right = extracted(labels=[1, 2], ratio=0.5), extracted(labels=[np.int64(2), torch.tensor(1)], ratio=0.5)
    assert left.labels.outputs == right.labels.outputs == (1, 2, None)


def test_numbers_may_be_of_numpy(tmp_path: Path) -> None:
    plain = extracted(labels=[1], ratio=0.25, round_to=2)
    subnet = extracted(labels=[1], ratio=np.float32(0.25), round_to=np.int64(2))
    assert subnet.provenance == plain.provenance
    assert Subnet.load(subnet.save(tmp_path / "subnet.safetensors")).provenance == plain.provenance
    angles = Angles(np.float32(20), np.int64(160))
    assert type(angles.similar) is type(angles.complementary) is float
    options = ExtractionOptions(target_speedup=np.float32(2), roundings=(np.int64(8),))
    assert json.dumps(options.selection) == '{"target_speedup": 2.0, "roundings": [8]}'


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter(batches(100, 1)), "the loader is an iterator, which yields once"),
        (5, "the loader is a int; expected batches"),
        ("digits", "the loader is a str; expected batches"),
    ],
)
@pytest.mark.parametrize("criterion", ["semantic", "distinctiveness"])
def test_a_loader_that_cannot_be_used_is_told(loader: Any, message: str, criterion: str) -> None:
    with pytest.raises((CalibrationError, PruningError), match=message):
        extract_subnet(trained(), batches(2, 0)[0][0], loader, labels=[1], ratio=0.5, criterion=criterion)


def test_validation_that_cannot_be_used_is_told() -> None:
    with pytest.raises(CalibrationError, match="is a int; expected batches"):
        extracted(labels=[1], ratio=0.5, calibrate_head=True, validation=5)


def test_example_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(RecipeError, match="example_inputs: RuntimeError"):
        extract_subnet(trained(), torch.randn(2, 3), batches(100, 1), labels=[1])


def test_validation_that_the_head_cannot_be_calibrated_on_is_told() -> None:
    inside = [(inputs[labels < 2], labels[labels < 2]) for inputs, labels in batches(100, 3)]
    with pytest.raises(CalibrationError, match="expected some of each, and some others"):
        extracted(labels=[0, 1], calibrate_head=True, validation=inside)
    wide = [(torch.randn(8, 3), torch.arange(8) % 4)]
    with pytest.raises(RecipeError, match="extraction: RuntimeError"):
        extracted(labels=[0, 1], calibrate_head=True, validation=wide)


def test_the_model_is_left_as_it_was(zoo: Any) -> None:
    snapshot = zoo.Snapshot(trained())
    extracted(labels=[1], ratio=0.5, criterion="distinctiveness", global_pruning=True)
    snapshot.check()
    with pytest.raises(LabelError):
        extracted(labels=["fox"], ratio=0.5)
    snapshot.check()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": ["fox"]}, LabelError, "label 'fox' does not exist"),
        ({"labels": []}, RecipeError, "option 'labels'"),
        ({"ratio": 0.5, "zeta": 0.4}, RecipeError, "ratio and zeta exclude each other"),
        ({"ratio": 1.0}, RecipeError, "option 'ratio': found 1.0"),
        ({"max_balanced_accuracy_drop": 0.1}, PruningError, "need validation data; pass validation"),
        ({"calibrate_head": True, "labels": [1]}, PruningError, "need validation data; pass validation"),
        ({"labels": "02"}, RecipeError, "option 'labels': found '02'; expected a list"),
        ({"labels": 2}, RecipeError, "option 'labels': found 2; expected a list"),
        ({"ignored_layers": "0"}, RecipeError, "option 'ignored_layers': found '0'; expected a list"),
        ({"label_names": ("a", "b")}, LabelError, "there are 4 outputs and the label names"),
        ({"label_names": ("a", "b", "c", "c")}, LabelError, "expected one for each, distinct"),
        ({"labels": [1], "calibrate_head": True, "validation": iter([])}, PruningError, "validation is an iterator"),
        ({"head": "closed"}, RecipeError, "head 'closed' needs labels"),
        ({"criterion": ["semantic"]}, RecipeError, r"option 'criterion': found \['semantic'\]; expected its name"),
        (
            {"framework": "nni", "config_list": ["all"]},
            RecipeError,
            "option 'config_list': found 'all'; expected a map",
        ),
        ({"criterion": "magic"}, RecipeError, "option 'criterion': found 'magic'; expected one of distinctiveness"),
        ({"compensation": "magic"}, RecipeError, "option 'compensation': found 'magic'"),
        (
            {"criterion": "semantic", "criterion_options": {"speed": 1}},
            RecipeError,
            "found 'speed'; 'semantic' has the options",
        ),
        ({"speed": 1}, RecipeError, "there is no option 'speed'; the options are labels, label_names"),
        ({"options": {"measure": "mean"}}, RecipeError, "expected ExtractionOptions"),
        (
            {"labels": [1], "head": "closed", "max_balanced_accuracy_drop": 0.1, "validation": batches(100, 1)},
            LabelError,
            "one label with a closed head cannot be mistaken",
        ),
    ],
)
def test_what_is_wrong_is_told(options: dict[str, Any], error: type[NNSError], message: str) -> None:
    with pytest.raises(error, match=message):
        extracted(**options)


@pytest.mark.parametrize("head", ["open", "keep"])
def test_units_by_how_far_training_moved_their_synapses(head: Any) -> None:
    """Scored on the dense model: what a shrunk head has lost counts, too."""
    torch.manual_seed(0)
    start = make()
    before = WeightSnapshot(start)
    subnet = extracted(
        labels=[1, 3], criterion="wsf", criterion_options={"reduction": "sum"}, ratio=0.5, head=head, snapshot=before
    )
    old, new = (
        {name: value.detach().double().numpy() for name, value in each.named_parameters()}
        for each in (start, trained())
    )
    moved = {name: np.abs(new[name] - old[name]) for name in new}
    for name, consumer in (("0", "2"), ("2", "4")):
        scores = moved[f"{name}.weight"].sum(1) + moved[f"{consumer}.weight"].sum(0)
        assert subnet.kept[name].tolist() == sorted(np.argsort(scores)[12:])
    with pytest.raises(CriterionError, match=r"'wsf' needs the weights before training: pass a snapshot"):
        extracted(labels=[1, 3], criterion="wsf")
    with pytest.raises(
        CriterionError, match="'switcher' needs factors, which an extraction cannot provide; use its importance class"
    ):
        extracted(labels=[1, 3], criterion="switcher")
    with pytest.raises(SnapshotError, match="does not fit the model"):
        extracted(labels=[1, 3], criterion="wsf", snapshot=WeightSnapshot(nn.Linear(2, 2)))


WITHOUT_EXTRAS = """
import sys

EXTRAS = "pydantic", "yaml", "sklearn", "typer", "rich", "matplotlib", "onnx", "onnxruntime", "onnxscript", "nni"
sys.modules.update(dict.fromkeys(EXTRAS))
import torch
from nns_plugin.jobs.extraction import extract_subnet

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
loader = [(torch.randn(90, 4), torch.arange(90) % 3)]
for settings in (
    {"labels": [0, 2], "ratio": 0.5},
    {"criterion": "distinctiveness", "labels": [0], "zeta": 0.1},
    {"labels": [1], "max_balanced_accuracy_drop": 0.9, "confidence": 0.5, "validation": loader},
):
    print(extract_subnet(model, torch.randn(2, 4), loader, **settings).output_names)
"""


def test_no_extra_is_needed() -> None:
    """In a fresh process in which the modules of all extras are missing."""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["('0', '2', 'other')", "('0', 'other')", "('1', 'other')"]
