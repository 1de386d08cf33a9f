"""Extraction from Python: what the options mean, and the smallest subnet within a budget."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from nns_plugin import Subnet, calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.errors import (  # noqa: E402
    CalibrationError,
    CriterionError,
    LabelError,
    NNSError,
    PruningError,
    RecipeError,
    SelectionError,
    SnapshotError,
)
from nns_plugin.evaluation.evaluation import evaluate  # noqa: E402
from nns_plugin.evaluation.prediction import predict  # noqa: E402
from nns_plugin.jobs.accuracy_search import Judge, smallest_within  # noqa: E402
from nns_plugin.jobs.extraction import extract_subnet  # noqa: E402
from nns_plugin.jobs.training import train_classifier  # noqa: E402
from nns_plugin.labels import LabelSet  # noqa: E402
from nns_plugin.subnets.angles import Angles  # noqa: E402
from nns_plugin.subnets.extraction import Choice, Extraction  # noqa: E402
from nns_plugin.subnets.head import cross_calibrated  # noqa: E402
from nns_plugin.subnets.options import ExtractionOptions  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

LABELS = 4
NAMES = ("ant", "bee", "cat", "dog")


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, LABELS))


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(LABELS, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % LABELS
    inputs = centres[labels] + 0.8 * torch.randn(count, 10, generator=generator)
    return list(zip(inputs.split(100), labels.split(100), strict=True))


@functools.cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = make()
    train_classifier(model, batches(1200, 1), epochs=4, learning_rate=0.01, weight_decay=0.0)
    return model


def extracted(**options: Any) -> Subnet:
    loader = batches(800, 2)
    return extract_subnet(trained(), loader[0][0][:2], loader, **{"label_names": NAMES, **options})


def accuracy(subnet: Subnet, loader: Any) -> float:
    logits, truth = predict(subnet.materialise(make), loader)
    found = evaluate(logits, truth, subnet.labels.outputs, subnet.labels.indices, NAMES).mean_balanced_accuracy
    assert found is not None
    return found


def dense_accuracy(labels: list[int], loader: Any) -> float:
    logits, truth = predict(trained(), loader)
    found = evaluate(logits, truth, (0, 1, 2, 3), labels, NAMES).mean_balanced_accuracy
    assert found is not None
    return found


@pytest.mark.parametrize("criterion", ["semantic", "distinctiveness"])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_the_smallest_subnet_within_a_budget(criterion: str, global_pruning: bool) -> None:
    validation = batches(1000, 3)
    subnet = extracted(
        labels=["bee", "dog"],
        max_balanced_accuracy_drop=0.03,
        validation=validation,
        criterion=criterion,
        global_pruning=global_pruning,
    )
    dense = dense_accuracy([1, 3], validation)
    assert accuracy(subnet, validation) >= dense - 0.03
    trials = subnet.provenance.trials
    assert trials[0].ratio == 0
    assert any(not trial.within for trial in trials)
    for trial in trials:
        assert trial.within == (trial.drop_bound <= 0.03)
        assert trial.drop_bound > dense - trial.balanced_accuracy  # the safe side of the estimate
    size = sum(value.numel() for value in subnet.weights.values())
    assert size == min(trial.parameters for trial in trials if trial.within)
    assert size < trials[0].parameters / 2
    assert len({trial.parameters for trial in trials}) > 3
    again = extracted(labels=[1, 3], ratio=trials[1].ratio, criterion=criterion, global_pruning=global_pruning)
    assert accuracy(again, validation) == pytest.approx(trials[1].balanced_accuracy)


def bound_by_resampling(left: torch.Tensor, right: torch.Tensor, truth: torch.Tensor, labels: list[int]) -> float:
    """The 95th percentile of the drop, from answers, one resample after the other."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        rows = torch.from_numpy(generator.integers(0, len(truth), len(truth)))
        accuracies = []
        for answers in (left[rows], right[rows]):
            each = [
                (
                    (answers == label)[truth[rows] == label].double().mean()
                    + (answers != label)[truth[rows] != label].double().mean()
                )
                / 2
                for label in labels
            ]
            accuracies.append(float(sum(each)) / len(each))
        found.append(accuracies[0] - accuracies[1])
    return float(np.percentile(found, 95))


def test_the_bound_of_a_trial_is_the_95th_percentile_of_the_drop() -> None:
    validation = batches(500, 3)
    subnet = extracted(labels=[1, 3], max_balanced_accuracy_drop=0.05, validation=validation)
    trial = next(trial for trial in subnet.provenance.trials if trial.drop_bound > 0.002)
    again = extracted(labels=[1, 3], ratio=trial.ratio)
    logits, truth = predict(trained(), validation)
    small, _ = predict(again.materialise(trained), validation)
    answers = torch.tensor([1, 3, -1])[small.argmax(1)]
    expected = bound_by_resampling(logits.argmax(1), answers, truth, [1, 3])
    assert trial.drop_bound == pytest.approx(expected, abs=0.005)


def test_more_confidence_keeps_more_and_half_of_it_judges_by_the_estimate() -> None:
    validation = batches(480, 3)

    def searched_with(confidence: float) -> Any:
        return extracted(
            labels=[1, 3],
            max_balanced_accuracy_drop=0.03,
            confidence=confidence,
            validation=validation,
            criterion="distinctiveness",
        )

    dense = dense_accuracy([1, 3], validation)
    sizes = []
    for confidence in (0.5, 0.999):
        subnet = searched_with(confidence)
        sizes.append(sum(value.numel() for value in subnet.weights.values()))
        assert subnet.provenance.selection["confidence"] == confidence
        if confidence == 0.5:
            for trial in subnet.provenance.trials:
                assert trial.drop_bound == pytest.approx(dense - trial.balanced_accuracy, abs=0.002)
    assert sizes[0] < sizes[1]


def test_too_few_validation_inputs_of_a_label_are_told() -> None:
    """75 inputs that are all answered right show a drop of at most 0.02 at 95 %: 1 - 0.95 ** (1 / 75) = 0.04."""
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(1000, 3), strict=True))
    bees = (labels == 1).nonzero().flatten()

    def searched_on(count: int, drop: float = 0.02, confidence: float | None = None) -> None:
        rows = torch.cat([bees[:count], (labels != 1).nonzero().flatten()])
        data = [(inputs[rows], labels[rows])]
        extracted(labels=["bee"], head="keep", max_balanced_accuracy_drop=drop, confidence=confidence, validation=data)

    assert 0.05 ** (1 / 75) >= 1 - 2 * 0.02 > 0.05 ** (1 / 72)
    searched_on(75)
    with pytest.raises(
        LabelError, match=r"'bee' has 74 validation inputs, but at least 75 of each label can show .* 0\.02"
    ):
        searched_on(74)
    with pytest.raises(
        LabelError, match=r"'bee' has 250 validation inputs, but no number of them can show a drop of at most 0"
    ):
        searched_on(250, drop=0.0)
    searched_on(5, drop=0.0, confidence=0.5)


def test_data_that_comes_in_another_order_each_time_is_refused() -> None:
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(1000, 3), strict=True))
    generator = torch.Generator().manual_seed(0)
    shuffled = DataLoader(TensorDataset(inputs, labels), 100, shuffle=True, generator=generator)
    with pytest.raises(CalibrationError, match="pass a loader that does not shuffle"):
        extracted(labels=["bee"], max_balanced_accuracy_drop=0.05, validation=shuffled)


def test_a_search_judges_a_calibrated_head_on_what_it_was_not_calibrated_on() -> None:
    """Against an independent calibration on one half, judged on the other."""
    validation = batches(300, 3)
    options: dict[str, Any] = {"labels": [1, 3], "calibrate_head": True, "validation": validation}
    subnet = extracted(**options, max_balanced_accuracy_drop=0.3, confidence=0.5)
    optimism = []
    for trial in subnet.provenance.trials:
        again = extracted(**options, ratio=trial.ratio)
        logits, truth = predict(again.materialise(trained), validation)
        crossed = cross_calibrated(logits, again.labels.outputs, truth)
        found = evaluate(crossed, truth, again.labels.outputs, again.labels.indices, NAMES).mean_balanced_accuracy
        assert trial.balanced_accuracy == pytest.approx(found, abs=1e-9)
        optimism.append(accuracy(again, validation) - trial.balanced_accuracy)
    assert max(optimism) > 0.005


def test_a_model_that_ends_in_a_softmax_is_searched_as_its_logits_are() -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(trained())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).softmax(1)

    validation, loader = batches(300, 3), batches(800, 2)
    found = [
        extract_subnet(
            model,
            loader[0][0][:2],
            loader,
            labels=[1, 3],
            max_balanced_accuracy_drop=0.2,
            confidence=0.5,
            calibrate_head=True,
            validation=validation,
        ).provenance.trials
        for model in (trained(), Softmax().eval())
    ]
    assert [trial.ratio for trial in found[0]] == [trial.ratio for trial in found[1]]
    for one, other in zip(*found, strict=True):
        assert other.balanced_accuracy == pytest.approx(one.balanced_accuracy, abs=0.01)


def test_a_budget_with_a_closed_head_compares_what_both_can_answer() -> None:
    """The dense model, too, is judged among the labels of the set, on their inputs alone."""
    validation = batches(1000, 3)
    subnet = extracted(labels=[0, 1], head="closed", max_balanced_accuracy_drop=0.01, validation=validation)
    inside = [(inputs[labels < 2], labels[labels < 2]) for inputs, labels in validation]
    logits, truth = predict(trained(), inside)
    answers = logits[:, :2].argmax(1)
    dense = sum(float((answers[truth == label] == label).double().mean()) for label in (0, 1)) / 2
    for trial in subnet.provenance.trials:
        assert trial.within == (trial.drop_bound <= 0.01)
        assert dense - trial.balanced_accuracy <= trial.drop_bound <= dense - trial.balanced_accuracy + 0.03


class Made:
    """Extractions from a model that does not exist, whose accuracy at each share of removed units is made up."""

    def __init__(self, accuracy: Any) -> None:
        self.accuracy = accuracy
        self.finished: list[int] = []

    def keep(self, share: float) -> Choice:
        return Choice({"group": torch.arange(100 - int(100 * share))})

    def finish(self, choice: Choice) -> Any:
        units = choice.kept["group"].numel()
        self.finished.append(units)
        right = round(1000 * self.accuracy(units))
        model = Answering(right)
        model.size = nn.Parameter(torch.zeros(units))
        return Extraction(model, None, (), (), LabelSet.of(("a", "b")), None, False, choice.kept, {})


class Answering(nn.Module):
    """Answers the first inputs of a batch right: input ``[N, 2]`` is its number and its label."""

    def __init__(self, right: int) -> None:
        super().__init__()
        self.right = right
        self.size = nn.Parameter(torch.zeros(100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = torch.where(x[:, 0] < self.right, x[:, 1], 1 - x[:, 1]).long()
        return 5.0 * nn.functional.one_hot(answer, 2)


def searched(accuracy: Any, drop: float) -> tuple[int, Made, Any]:
    made = Made(accuracy)
    labels = torch.arange(2000) % 2
    numbers = torch.arange(2000) // 2  # both labels alike
    loader = [(torch.stack([numbers, labels], 1).float(), labels)]
    best, trials = smallest_within(Judge(Answering(1000), loader, drop), made.keep, made.finish)
    return best.model.size.numel(), made, trials


@pytest.mark.parametrize("least", [3, 17, 42, 99])
def test_the_search_ends_within_a_256th_of_the_smallest(least: int) -> None:
    units, made, trials = searched(lambda units: 1.0 if units >= least else 0.5, 0.1)
    assert units == least
    assert len(made.finished) == len(set(made.finished)) == len(trials)
    assert len(trials) <= 9


def test_of_all_that_was_tried_the_smallest_within_is_kept() -> None:
    """Where accuracy is not monotone, the last point that is within need not be the smallest."""
    good = {100, 50, 25, 13, 7}
    units, _, trials = searched(lambda units: 1.0 if units in good else 0.5, 0.1)
    within = [trial.parameters for trial in trials if trial.within]
    assert units == min(within)


def test_a_larger_budget_allows_a_smaller_subnet() -> None:
    validation = batches(1000, 3)
    sizes = [
        sum(
            value.numel()
            for value in extracted(
                labels=[1], max_balanced_accuracy_drop=drop, validation=validation, criterion="distinctiveness"
            ).weights.values()
        )
        for drop in (0.01, 0.05, 0.2)
    ]
    assert sizes[0] > sizes[1] >= sizes[2]


def test_a_budget_that_nothing_meets_is_told() -> None:
    """An output "other" that was fitted to wrong labels misleads even the subnet with all units."""
    loader = [(inputs, (labels + 1) % LABELS) for inputs, labels in batches(800, 2)]
    with pytest.raises(SelectionError, match=r"with all units, .* drops by at most 0\.[1-9].* more than 0\.05"):
        extract_subnet(
            trained(),
            loader[0][0][:2],
            loader,
            labels=[1],
            max_balanced_accuracy_drop=0.05,
            validation=batches(400, 3),
        )


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
