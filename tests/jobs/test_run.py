"""The main job from recipe to files, on the digits and on a model and data of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nns_plugin import Subnet
from nns_plugin.errors import CriterionError, LabelError, NNSError

pytestmark = pytest.mark.host("onnxruntime")
pytest.importorskip("pydantic", reason="the extra cli is not installed")

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CENTRES = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 3

def model(hidden=32, outputs=4):
    torch.manual_seed(1)
    layers = nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)

def flat():
    return nn.Sequential(nn.Linear(12, 4))

def loader(count, seed, nan=False):
    labels = torch.arange(count) % 4
    inputs = CENTRES[labels] + torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    if nan:
        inputs[0, 0] = torch.nan
    return DataLoader(TensorDataset(inputs, labels), 32)

def data(**changes):
    made = {
        "calibration": loader(256, 1), "test": loader(128, 2), "train": loader(256, 3), "validation": loader(256, 4),
        "example_inputs": torch.randn(2, 12), "label_names": ["ant", "bee", "cat", "dog"],
    }
    return {**made, **changes}

def data_nan():
    return data(calibration=loader(64, 1, nan=True))

def data_empty():
    return data(calibration=[])

def data_wide():
    return data(example_inputs=torch.randn(2, 13))

def data_bare():
    return data(calibration=[torch.randn(8, 12)])

def data_odd():
    return data(calibration=[("a", "b", "c")])

def data_untrained():
    return data(train=None)

def data_unseen():
    inputs, labels = loader(256, 1).dataset.tensors
    keep = labels != 2
    return data(calibration=DataLoader(TensorDataset(inputs[keep], labels[keep]), 32))

def data_many():
    return data(calibration=[(torch.randn(8, 12), torch.full((8,), 9))])

def data_keys():
    return {"calibration": [], "tests": []}

def data_none():
    return None

def data_generator():
    return data(calibration=(batch for batch in loader(64, 1)))

def data_train_generator():
    return data(train=(batch for batch in loader(64, 1)))

def only(whole, chosen=(1, 3)):
    inputs, labels = whole.dataset.tensors
    keep = torch.isin(labels, torch.tensor(chosen))
    return DataLoader(TensorDataset(inputs[keep], labels[keep]), 32)

def data_inside():
    return data(test=only(loader(128, 2)))

def data_undecided():
    return data(validation=None)

def data_no_test():
    return data(test=[])

def data_counted():
    return data(label_names=4)

def data_train_wrong():
    return data(train=[(torch.randn(8, 12), torch.full((8,), -1))])

def data_test_wrong():
    return data(test=[(torch.randn(8, 12), torch.tensor([0, 1, 2, 3, 9, 1, 3, 3]))])

def data_other_shape():
    return data(calibration=[(torch.randn(8, 5), torch.arange(8) % 4)])

def data_missing_file():
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, place):
            raise FileNotFoundError(2, "No such file", "image.png")
    return data(calibration=DataLoader(Images(), 4))

def data_numbered():
    return data(label_names=["3", "1", "0", "2"])

def data_exit():
    raise SystemExit(0)

def normed():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes recipes for the factories above; training is short, measuring shorter."""
    from nns_plugin.jobs.recipe import Recipe

    (tmp_path / "user_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "user_factories", raising=False)

    def make(**changes: Any) -> Recipe:
        content: dict[str, Any] = {
            "model": {"factory": "user_factories:model"},
            "data": {"factory": "user_factories:data"},
            "labels": ["bee", "dog"],
            "ratio": 0.5,
            "train": {"epochs": 3},
            "measure": {"samples": 20},
        }
        return Recipe.model_validate({**content, **changes})

    return make


@pytest.fixture(scope="module")
def digits_job(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from nns_plugin.jobs.loading import load_recipe
    from nns_plugin.jobs.run import run_job

    output = tmp_path_factory.mktemp("digits") / "out"
    recipe = load_recipe(None, {"measure.samples": 100})
    return run_job(recipe, output), recipe, output


def onnx_answers(path: Path, inputs: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0].argmax(1)


def test_the_default_job_keeps_its_promise(digits_job: Any) -> None:
    report, _, _ = digits_job
    dense, subnet = report.baseline, report.subnet
    assert subnet.parameters <= dense.parameters / 2
    drops = [
        100 * (before.balanced_accuracy - after.balanced_accuracy)
        for before, after in zip(dense.evaluation.labels, subnet.evaluation.labels, strict=True)
    ]
    assert sum(drops) / len(drops) <= 3
    assert max(drops) <= 5
    assert dense.parity.passed
    assert subnet.parity.passed
    assert subnet.outputs == ("3", "5", "other")


def test_the_four_files_and_nothing_else(digits_job: Any) -> None:
    report, _, output = digits_job
    assert sorted(file.name for file in output.iterdir()) == [
        "baseline.onnx",
        "report.json",
        "subnet.onnx",
        "subnet.safetensors",
    ]
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert report.subnet.file_bytes == (output / "subnet.onnx").stat().st_size
    subnet = Subnet.load(output / "subnet.safetensors")
    counted = [value.numel() for name, value in subnet.weights.items() if "running" not in name and "num_" not in name]
    assert sum(counted) == report.subnet.parameters
    assert subnet.output_names == report.subnet.outputs == ("3", "5", "other")
    assert {name: tuple(units.tolist()) for name, units in subnet.kept.items()} == report.kept_units
    from nns_plugin.jobs.models import digits_classifier

    small = subnet.materialise(digits_classifier)
    inputs = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        answers = onnx_answers(output / "subnet.onnx", inputs)
        assert torch.equal(small(inputs).argmax(1), torch.from_numpy(answers))


def test_the_report_names_three_kinds_of_parity_and_what_it_was_measured_on(digits_job: Any) -> None:
    import hashlib
    import os

    import onnxruntime

    from nns_plugin.jobs.data import digits

    report, recipe, output = digits_job
    kinds = [report.baseline.parity.kind, report.subnet.parity.kind, report.removal.kind, report.pruning.kind]
    assert kinds == ["torch against ONNX", "torch against ONNX", "masked against removed", "dense against pruned"]
    assert report.removal.passed
    assert report.removal.max_absolute_error < 1e-3
    assert not report.pruning.passed, "what was removed is missing from the logits"
    data = digits()
    images = torch.cat([inputs for inputs, _ in data.test])
    dense, small = (onnx_answers(output / f"{name}.onnx", images) for name in ("baseline", "subnet"))
    answered = np.where(dense == 3, 0, np.where(dense == 5, 1, 2))
    assert report.pruning.top1_agreement == pytest.approx(np.mean(answered == small), abs=0.003)
    assert report.pruning.inputs == len(images) == 540
    for name, model in (("baseline", report.baseline), ("subnet", report.subnet)):
        file = f"{name}.onnx"
        assert model.sha256 == {file: hashlib.sha256((output / file).read_bytes()).hexdigest()}
    assert report.environment["machine"]["cores"] == os.cpu_count()
    assert report.environment["onnxruntime"]["onnxruntime"] == onnxruntime.__version__
    assert recipe.measure.threads == report.latency.threads


def test_reported_numbers_are_those_of_the_files_on_held_out_data(digits_job: Any) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    report, _, output = digits_job
    pixels, labels = load_digits(return_X_y=True)
    _, inputs, _, truth = train_test_split(pixels, labels, test_size=0.3, stratify=labels, random_state=0)
    images = torch.tensor(inputs, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    dense = onnx_answers(output / "baseline.onnx", images)
    subnet = np.array([3, 5, -1])[onnx_answers(output / "subnet.onnx", images)]
    for answers, model in ((dense, report.baseline), (subnet, report.subnet)):
        for result in model.evaluation.labels:
            digit = int(result.label)
            assert result.recall == pytest.approx((answers[truth == digit] == digit).mean())
            assert result.false_positive_rate == pytest.approx((answers[truth != digit] == digit).mean())
        expected = np.where(np.isin(truth, [3, 5]), truth, -1) == np.where(np.isin(answers, [3, 5]), answers, -1)
        assert model.evaluation.open_set_accuracy == pytest.approx(expected.mean())


def test_the_label_map_travels_in_the_onnx_file(digits_job: Any) -> None:
    import onnx

    _, _, output = digits_job
    metadata = {entry.key: entry.value for entry in onnx.load(output / "subnet.onnx").metadata_props}
    assert json.loads(metadata["nns.labels"]) == ["3", "5", "other"]


def extraction_from(dense: Any, data: Any, checked: Any) -> Any:
    """The extraction of a recipe from a model and data that are there."""
    from nns_plugin.jobs.job import Job
    from nns_plugin.jobs.run import extract_in_job
    from nns_plugin.labels import LabelSet

    options = checked.to_options()
    return extract_in_job(Job(checked, options, data, LabelSet.of(data.label_names, options.labels), dense))[0]


def pruned(
    recipe: Any, chosen: list[int] | None = None, factory: str = "user_factories:data", **changes: Any
) -> tuple[Any, Any]:
    """The pruned model of a recipe and its evaluation, without the cost of exporting it."""
    from nns_plugin.evaluation.evaluation import evaluate
    from nns_plugin.evaluation.prediction import predict
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory
    from nns_plugin.jobs.training import train_classifier

    checked = recipe(**changes)
    data = Datasets.parse(call_factory("data", factory, {}), "")
    dense = call_factory("model", "user_factories:model", {})
    train_classifier(dense, data.train, epochs=3, learning_rate=0.003, weight_decay=0.01)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    result = extraction_from(dense, data, checked)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    logits, labels = predict(result.model, data.test)
    label_set = list(range(4)) if chosen is None else chosen
    return result, evaluate(logits, labels, result.labels.outputs, label_set, data.label_names)


def test_the_same_seed_gives_the_same_subnet(recipe: Any) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # of the caller: the training order comes from the data, not from here
        results.append(pruned(recipe, [1, 3]))
    (first, one), (second, two) = results
    assert {name: units.tolist() for name, units in first.kept.items()} == {
        name: units.tolist() for name, units in second.kept.items()
    }
    assert one == two


def test_kept_units_are_the_best_by_the_criterion(recipe: Any) -> None:
    """A brute-force reading of eq. 1 on the dense model picks the same units."""
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory

    checked = recipe(train={"epochs": 0})
    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    dense = call_factory("model", "user_factories:model", {})
    kept = extraction_from(dense, data, checked).kept
    with torch.no_grad():
        inputs, labels = data.calibration.dataset.tensors
        hidden = {"0": dense[:2](inputs), "2": dense[:4](inputs)}
    for name, activation in hidden.items():
        means = torch.stack([activation[labels == label].abs().mean(0) for label in (1, 3)])
        scores = (means / means.amax(1, keepdim=True)).amax(0)
        assert kept[name].tolist() == sorted(scores.argsort(descending=True)[:16].tolist())


@pytest.mark.parametrize(("head", "outputs"), [("keep", (0, 1, 2, 3)), ("closed", (1, 3)), ("open", (1, 3, None))])
def test_every_head(recipe: Any, head: str, outputs: tuple[int | None, ...]) -> None:
    result, evaluation = pruned(recipe, [1, 3], head=head, fine_tune={"epochs": 1})
    assert result.labels.outputs == outputs
    assert evaluation.closed_set_accuracy > 0.9
    assert (evaluation.open_set_accuracy is None) == (head == "closed")


def test_without_labels_all_are_kept(recipe: Any) -> None:
    result, evaluation = pruned(recipe, None, labels=None)
    assert result.labels.outputs == (0, 1, 2, 3)
    assert [label.label for label in evaluation.labels] == ["ant", "bee", "cat", "dog"]


def test_without_labels_survivors_take_over(recipe: Any) -> None:
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory

    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    dense = call_factory("model", "user_factories:model", {})
    inputs = data.test.dataset.tensors[0]
    errors = {}
    for method in (None, "none"):
        result = extraction_from(dense, data, recipe(labels=None, ratio=0.6, compensation={"method": method}))
        assert result.model[0].out_features == 13
        with torch.no_grad():
            errors[method] = float((result.model(inputs) - dense(inputs)).square().mean())
    assert errors[None] < 0.2 * errors["none"]


def test_with_labels_and_distinctiveness_units_count_for_what_the_kept_labels_do_with_them(recipe: Any) -> None:
    """A unit that only a dropped label uses goes, and one that a kept label uses stays."""
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory

    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    dense = call_factory("model", "user_factories:model", {"hidden": 8})
    with torch.no_grad():
        dense[4].weight.zero_()
        for unit, label in enumerate([0, 0, 1, 2, 2, 3, 0, 2]):
            dense[4].weight[label, unit] = 1.0
    checked = recipe(criterion={"name": "distinctiveness", "options": {"mode": "span"}}, ratio=0.7, head="closed")
    result = extraction_from(dense, data, checked)
    assert {2, 5} <= set(result.kept["2"].tolist())
    assert result.labels.outputs == (1, 3)


@pytest.mark.parametrize("head", ["keep", "closed", "open"])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_distinctiveness_with_every_head(recipe: Any, head: str, global_pruning: bool) -> None:
    criterion = {"name": "distinctiveness", "options": {"mode": "span"}}
    result, evaluation = pruned(
        recipe, [1, 3], head=head, criterion=criterion, ratio=0.7, global_pruning=global_pruning
    )
    assert result.labels.outputs == {"keep": (0, 1, 2, 3), "closed": (1, 3), "open": (1, 3, None)}[head]
    assert result.model[4].out_features == len(result.labels.outputs)
    assert evaluation.closed_set_accuracy > 0.95
    if head == "open":
        assert evaluation.open_set_accuracy > 0.9


@pytest.mark.parametrize("merge", ["none", "add", "scaled"])
def test_units_may_go_by_angles(recipe: Any, merge: str) -> None:
    result, _ = pruned(
        recipe, None, labels=None, ratio=None, angle={"similar": 60, "complement": "both", "merge": merge}
    )
    assert all(1 <= units.numel() < 32 for units in result.kept.values())


@pytest.mark.parametrize("method", ["least_squares", "merge", "mean", "refit"])
def test_any_criterion_may_be_compensated(recipe: Any, method: str) -> None:
    result, evaluation = pruned(recipe, [1, 3], compensation={"method": method}, ratio=0.7)
    assert result.labels.outputs == (1, 3, None)
    assert evaluation.closed_set_accuracy > 0.9


def test_turns_go_on_until_accuracy_falls(recipe: Any) -> None:
    """Each turn removes a third of what is left; kept units are counted from the dense model."""
    changes = {"ratio": 1 / 3, "fine_tune": {"epochs": 1}}
    once, _ = pruned(recipe, [1, 3], **changes)
    result, evaluation = pruned(recipe, [1, 3], iterative={"max_rounds": 3, "max_drop": 0.5}, **changes)
    assert [result.kept[name].numel() for name in ("0", "2")] == [10, 10]  # 32 -> 22 -> 15 -> 10
    assert [result.model[place].out_features for place in (0, 2, 4)] == [10, 10, 3]
    assert set(result.kept["0"].tolist()) <= set(range(32))
    assert set(result.kept["0"].tolist()) <= set(once.kept["0"].tolist())
    assert result.kept["0"].max() > 10
    assert evaluation.mean_balanced_accuracy > 0.9
    rows = result.kept["0"]
    assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_a_head_is_calibrated_to_what_training_has_made_of_it(recipe: Any, turns: bool, rejected: bool) -> None:
    """On the data that decides there is nothing left to gain, whatever came last."""
    from nns_plugin.evaluation.prediction import predict
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory
    from nns_plugin.subnets.head import balancing_shift

    changes: dict[str, Any] = {"ratio": 0.96 if rejected else 0.6, "calibrate_head": True}
    if turns:
        changes["iterative"] = {"max_rounds": 2, "max_drop": 0.0 if rejected else 0.5}
    rate = 1e-9 if rejected else 0.01
    result, _ = pruned(recipe, [1, 3], fine_tune={"epochs": 1, "learning_rate": rate}, **changes)
    assert turns is False or bool(result.kept) != rejected
    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    logits, labels = predict(result.model, data.decisive)
    shift = balancing_shift(logits, result.labels.outputs, labels)
    moved = logits + torch.tensor([0.0, 0.0, shift])
    assert torch.equal(moved.argmax(1), logits.argmax(1))


def test_decisions_on_calibration_data_are_told(recipe: Any) -> None:
    from nns_plugin.jobs.run import CalibrationDataWarning

    with pytest.warns(CalibrationDataWarning, match="there is no validation data"):
        pruned(recipe, [1, 3], "user_factories:data_undecided", ratio=None, max_balanced_accuracy_drop=0.5)


def test_figures_that_cannot_be_drawn_do_not_cost_the_job(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nns_plugin.jobs.run import FigureWarning, run_job

    pytest.importorskip("matplotlib", reason="the extra figures is not installed")
    checked = recipe(head="closed", data={"factory": "user_factories:data_inside"})
    run_job(checked, tmp_path / "one", figures=True)  # test data of the set alone is enough
    drawn = {file.name for file in (tmp_path / "one").glob("*.png")}
    assert {"overlap.png", "size.png", "activity-0.png"} <= drawn

    def failing(*_: object) -> Any:
        raise LabelError("nothing to see")
        yield

    monkeypatch.setattr("nns_plugin.jobs.run.job_figures", failing)
    with pytest.warns(FigureWarning, match="some figures are left out: nothing to see"):
        run_job(checked, tmp_path / "two", figures=True)
    assert {"report.json", "subnet.onnx"} <= {file.name for file in (tmp_path / "two").iterdir()}


def test_a_figure_that_is_a_folder_is_found_before_anything_is_moved(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.jobs.run import run_job

    pytest.importorskip("matplotlib", reason="the extra figures is not installed")
    (tmp_path / "out" / "size.png").mkdir(parents=True)
    with pytest.raises(NNSError, match="size.png' is a folder"):
        run_job(recipe(), tmp_path / "out", figures=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["size.png"]


def test_a_turn_that_costs_accuracy_is_taken_back(recipe: Any) -> None:
    result, _ = pruned(
        recipe,
        [1, 3],
        ratio=0.96,
        iterative={"max_rounds": 5, "max_drop": 0.01},
        fine_tune={"epochs": 1, "learning_rate": 1e-9},
    )
    assert result.kept == {}
    assert result.model[0].out_features == 32
    assert result.labels.outputs == (1, 3, None)


def test_synapses_stay_masked_through_fine_tuning(recipe: Any) -> None:
    changes: dict[str, Any] = {"ratio": 0.0, "fine_tune": {"epochs": 1}}
    result, evaluation = pruned(recipe, [1, 3], synapses={}, **changes)
    for place in (0, 2):
        weight = result.model[place].weight
        assert type(weight) is torch.nn.Parameter
        assert 0.3 < (weight == 0).float().mean() < 0.8
    assert bool((result.model[4].weight != 0).all())  # the head
    assert evaluation.closed_set_accuracy > 0.9
    assert not hasattr(result.model[0], "weight_mask")
    only, _ = pruned(recipe, [1, 3], synapses={"layers": ["2"]}, **changes)
    assert bool((only.model[0].weight != 0).all())
    assert bool((only.model[2].weight == 0).any())


def test_zeta_and_rounding(recipe: Any) -> None:
    result, _ = pruned(recipe, [1, 3], ratio=None, zeta=0.3, round_to=8)
    assert all(units.numel() % 8 == 0 for units in result.kept.values())


def test_an_ignored_layer_stays_whole(recipe: Any) -> None:
    result, _ = pruned(recipe, [1, 3], ignored_layers=["2"])
    assert set(result.kept) == {"0"}
    assert result.model[2].out_features == 32


def test_a_checkpoint_is_used(recipe: Any, tmp_path: Path) -> None:
    import user_factories

    from nns_plugin.jobs.run import run_job

    weights = {name: value * 0 for name, value in user_factories.model().state_dict().items()}
    weights["4.bias"] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    save_file(weights, tmp_path / "weights.safetensors")
    section = {"factory": "user_factories:model", "checkpoint": tmp_path / "weights.safetensors"}
    state = torch.get_rng_state()
    report = run_job(recipe(model=section, train={"epochs": 0}, head="keep"), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert [result.recall for result in report.baseline.evaluation.labels] == [1.0, 0.0]  # it always answers "bee"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"factory": "user_factories:data_nan"}}, "NaN, infinite or overflowing activations in batch 0"),
        ({"data": {"factory": "user_factories:data_empty"}}, "yielded no inputs"),
        ({"data": {"factory": "user_factories:data_wide"}}, "cannot run on the example inputs"),
        ({"data": {"factory": "user_factories:data_bare"}}, "no labels"),
        ({"data": {"factory": "user_factories:data_odd"}}, "has 3 parts"),
        ({"data": {"factory": "user_factories:data_unseen"}, "labels": ["cat"]}, "'cat' was never seen"),
        ({"data": {"factory": "user_factories:data_many"}}, r"labels 9\.\.9; expected 0\.\.3"),
        ({"data": {"factory": "user_factories:data_keys"}}, "returned the keys"),
        ({"data": {"factory": "user_factories:data_none"}}, "returned a NoneType"),
        ({"data": {"factory": "user_factories:data_generator"}}, "generator for 'calibration'"),
        ({"data": {"factory": "user_factories:data_train_generator"}}, "generator for 'train'"),
        ({"data": {"factory": "user_factories:data_no_test"}}, "the test loader yielded no inputs"),
        ({"data": {"factory": "user_factories:data_counted"}}, "label_names=4; expected a list"),
        ({"data": {"factory": "user_factories:data_train_wrong"}, "train": {"epochs": 1}}, r"has labels -1\.\.-1"),
        ({"data": {"factory": "user_factories:data_test_wrong"}}, r"the test data has labels 0\.\.9"),
        ({"data": {"factory": "user_factories:data_other_shape"}}, "data.calibration: RuntimeError"),
        ({"data": {"factory": "user_factories:data_missing_file"}}, "data.calibration: FileNotFoundError"),
        ({"data": {"factory": "user_factories:data_exit"}}, "raised SystemExit"),
        ({"criterion": {"name": "semantic", "options": {"labels": [2]}}}, "criterion.options: found 'labels'"),
        ({"criterion": {"name": "semantic", "options": {"statistics": 1}}}, "criterion.options: found 'statistics'"),
        ({"data": {"factory": "user_factories:data_untrained"}}, "train.epochs: the data factory returned no train"),
        ({"model": {"factory": "user_factories:flat"}}, "nothing in this model can be pruned"),
        ({"model": {"factory": "user_factories:data"}}, "expected a torch module"),
        ({"model": {"factory": "user_factories:model", "arguments": {"outputs": 5}}}, r"expected \[N, 4\]"),
        ({"model": {"factory": "user_factories:model", "checkpoint": "none.safetensors"}}, "there is no file"),
        ({"model": {"factory": "user_factories:model", "checkpoint": __file__}}, "not a safetensors file"),
        ({"labels": ["fox"]}, "label 'fox' does not exist"),
        ({"labels": [7]}, "label 7 does not exist"),
        ({"labels": [3], "data": {"factory": "user_factories:data_numbered"}}, "label 3 is ambiguous"),
        ({"ignored_layers": ["nowhere"]}, "ignored layer 'nowhere' is not in the model"),
        ({"criterion": {"name": "semantic", "options": {"measure": "size"}}}, "measure is 'size'"),
        ({"criterion": {"name": "semantic", "options": {"size": 1}}}, "criterion.options"),
        ({"measure": {"samples": 20, "provider": "cuda"}}, "CUDAExecutionProvider"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_left(
    recipe: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from nns_plugin.errors import NNSError
    from nns_plugin.jobs.run import run_job

    quick = {"train": {"epochs": 0}} if "untrained" not in str(changes) else {}
    with pytest.raises(NNSError, match=message):
        run_job(recipe(**{**quick, **changes}), tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


def test_a_closed_head_is_compared_on_the_same_inputs(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.jobs.run import run_job

    report = run_job(recipe(head="closed", train={"epochs": 1}), tmp_path / "out")
    dense, subnet = report.baseline.evaluation, report.subnet.evaluation
    assert (dense.inputs, subnet.inputs) == (64, 64)
    assert [label.inputs for label in dense.labels] == [label.inputs for label in subnet.labels]
    assert dense.open_set_accuracy is None
    assert report.baseline.outputs == ("ant", "bee", "cat", "dog")


def test_a_layer_with_a_computed_weight_is_left_alone() -> None:
    """torch-pruning itself fails on it in the middle of a removal."""
    import warnings

    from nns_plugin.adapters.torch_pruning.groups import unit_groups

    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.ReLU(),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 6)),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 2),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert unit_groups(model, torch.randn(2, 4)) == ()
    assert any("computes its weight from others" in str(entry.message) for entry in caught)


def test_names_that_are_numbers_are_names(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.jobs.run import run_job

    section = {"factory": "user_factories:data_numbered"}
    report = run_job(recipe(data=section, labels=["3", "0"], train={"epochs": 0}), tmp_path / "out")
    assert report.subnet.outputs == ("3", "0", "other")


def test_an_output_file_that_is_a_folder_is_found_before_any_work(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.errors import RecipeError
    from nns_plugin.jobs.run import run_job

    (tmp_path / "out" / "report.json").mkdir(parents=True)
    with pytest.raises(RecipeError, match="is a folder"):
        run_job(recipe(data={"factory": "user_factories:never_reached"}), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_checkpoint_that_does_not_fit_names_the_weight(recipe: Any, tmp_path: Path) -> None:
    import user_factories

    from nns_plugin.errors import RecipeError
    from nns_plugin.jobs.run import run_job

    save_file(user_factories.model(hidden=16).state_dict(), tmp_path / "weights.safetensors")
    section = {"factory": "user_factories:model", "checkpoint": tmp_path / "weights.safetensors"}
    with pytest.raises(RecipeError, match=r"'0.weight' is \[16, 12\] in the file and \[32, 12\] in the model"):
        run_job(recipe(model=section), tmp_path / "out")


def test_an_output_that_cannot_be_written_fails_before_any_work(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.errors import RecipeError
    from nns_plugin.jobs.run import run_job

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match="cannot be written"):
        run_job(recipe(data={"factory": "user_factories:never_reached"}), tmp_path / "file" / "out")


def test_earlier_files_survive_a_failure(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.errors import NNSError
    from nns_plugin.jobs.run import run_job

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("of an earlier run")
    with pytest.raises(NNSError):
        run_job(recipe(labels=["fox"]), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "of an earlier run"


def test_wsf_takes_the_weights_before_training_from_the_job_or_from_a_file(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin import Subnet
    from nns_plugin.jobs.loading import call_factory
    from nns_plugin.jobs.run import run_job
    from nns_plugin.synapses.snapshot import WeightSnapshot

    quick: dict[str, Any] = {"criterion": {"name": "wsf"}, "measure": {"samples": 20, "resamples": 0}}
    run_job(recipe(**quick), tmp_path / "job")
    kept = Subnet.load(tmp_path / "job" / "subnet.safetensors").kept
    made = call_factory("model", "user_factories:model", {})
    other = {name: torch.zeros_like(value) for name, value in made.state_dict().items()}
    WeightSnapshot(other).save(tmp_path / "zeros.safetensors")
    section = {"factory": "user_factories:model", "initial": tmp_path / "zeros.safetensors"}
    run_job(recipe(**quick, model=section), tmp_path / "file")
    from_file = Subnet.load(tmp_path / "file" / "subnet.safetensors").kept
    assert {name: units.tolist() for name, units in kept.items()} != {
        name: units.tolist() for name, units in from_file.items()
    }
    with pytest.raises(CriterionError, match=r"let the job train, or give model.initial"):
        run_job(recipe(**quick, train={"epochs": 0}), tmp_path / "none")
    missing = {"factory": "user_factories:model", "initial": tmp_path / "missing.safetensors"}
    with pytest.raises(NNSError, match=r"there is no file .*missing"):
        run_job(recipe(**quick, model=missing), tmp_path / "none")
