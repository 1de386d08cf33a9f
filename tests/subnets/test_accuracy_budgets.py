"""The smallest subnet within an accuracy budget: the bound of a trial, the search, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from animals import LABELS, NAMES, accuracy, batches, dense_accuracy, extracted, trained  # noqa: E402

from nns_plugin.errors import CalibrationError, LabelError, SelectionError  # noqa: E402
from nns_plugin.evaluation.evaluation import evaluate  # noqa: E402
from nns_plugin.evaluation.prediction import predict  # noqa: E402
from nns_plugin.jobs.accuracy_search import Judge, smallest_within  # noqa: E402
from nns_plugin.jobs.extraction import extract_subnet  # noqa: E402
from nns_plugin.labels import LabelSet  # noqa: E402
from nns_plugin.subnets.extraction import Choice, Extraction  # noqa: E402
from nns_plugin.subnets.head import cross_calibrated  # noqa: E402


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
