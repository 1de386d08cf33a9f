"""Evaluation of a classifier for a label set on held-out data, and a subnet's drop against its dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from nns_plugin.evaluation.decisions import Decisions
from nns_plugin.evaluation.intervals import Interval, bootstrap, interval
from nns_plugin.evaluation.metrics import Array, log_probabilities

Outputs: TypeAlias = tuple[ArrayLike, Sequence[int | None]]
"""``[N, outputs]`` logits of a model, and the label of each output; ``None`` for "other"."""


@dataclass(frozen=True)
class LabelResult:
    """How well one label is recognised, against all other inputs that were evaluated.

    Attributes:
        label: Name of the label.
        inputs: Number of inputs of the label.
        recall: Share of the label's inputs for which it is predicted.
        false_positive_rate: Share of all other inputs for which it is predicted; ``None`` if there are none.
        precision: Share of its predictions that are correct; ``None`` if it is never predicted.
        f1: Harmonic mean of precision and recall.
        balanced_accuracy: Mean of recall and 1 - false-positive rate; ``None`` if there are no other inputs.
        auroc: Area under the ROC curve of the label's probability; ``None`` if there are no other inputs.
        intervals: 95 % bootstrap intervals by name of the field; empty unless requested.
    """

    label: str
    inputs: int
    recall: float
    false_positive_rate: float | None
    precision: float | None
    f1: float
    balanced_accuracy: float | None
    auroc: float | None
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one model for a label set.

    Attributes:
        labels: One result per label of the set.
        inputs: Number of inputs evaluated.
        closed_set_accuracy: Accuracy on the inputs of the set, choosing among its labels.
        open_set_accuracy: Accuracy on all inputs, where every other label counts as "other"; ``None`` for a closed
            head.
        mean_balanced_accuracy: Mean over the labels; ``None`` if one of them has none.
        worst_label: Name of the label with the lowest balanced accuracy, or recall if it has none.
        intervals: 95 % bootstrap intervals of the three accuracies by name of the field; empty unless requested.
    """

    labels: tuple[LabelResult, ...]
    inputs: int
    closed_set_accuracy: float
    open_set_accuracy: float | None
    mean_balanced_accuracy: float | None
    worst_label: str
    intervals: dict[str, Interval] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Open-set accuracy; closed-set accuracy for a closed head."""
        return self.closed_set_accuracy if self.open_set_accuracy is None else self.open_set_accuracy


def evaluate(
    logits: ArrayLike,
    truth: ArrayLike,
    outputs: Sequence[int | None],
    labels: Sequence[int],
    names: Sequence[str],
    resamples: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model's outputs for a label set.

    Args:
        logits: ``[N, outputs]``.
        truth: ``[N]`` integer true labels.
        outputs: The label of each output; ``None`` for "other".
        labels: The labels of the set; each must have an output.
        names: Name of every label.
        resamples: Number of bootstrap resamples of the inputs for the intervals; 0 for none.
        seed: Seed of the resamples.

    Returns:
        The evaluation: on all inputs if the outputs can answer something other than the set (another label, or
        "other") or the set is all there is; on the inputs of the set alone otherwise (a closed head).

    Raises:
        CalibrationError: If logits are not finite.
        LabelError: If a label is out of range, or one of the set has no output or no test input.

    Example:
        >>> found = evaluate([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]], [0, 1, 1], (0, 1), (0, 1), ("cat", "dog"))
        >>> [label.recall for label in found.labels]
        [1.0, 0.5]
    """
    decisions = Decisions.of(logits, truth, outputs, labels, names)
    inputs = decisions.truth.size
    estimates = {name: float(value[0]) for name, value in decisions.metrics(np.ones((1, inputs))).items()}
    samples = bootstrap(decisions.metrics, inputs, resamples, seed) if resamples else {}
    results = []
    for label in decisions.labels:
        result = _label_result(names[label], int((decisions.truth == label).sum()), estimates, f"{label}.")
        results.append(replace(result, intervals=_intervals(samples, f"{label}.", result)))
    found = Evaluation(
        labels=tuple(results),
        inputs=int(decisions.evaluated.sum()),
        closed_set_accuracy=estimates["closed_set_accuracy"],
        open_set_accuracy=estimates.get("open_set_accuracy"),
        mean_balanced_accuracy=_defined(estimates["mean_balanced_accuracy"]),
        worst_label=min(results, key=_quality).label,
    )
    return replace(found, intervals=_intervals(samples, "", found))


def _label_result(name: str, inputs: int, estimates: dict[str, float], prefix: str) -> LabelResult:
    return LabelResult(
        label=name,
        inputs=inputs,
        recall=estimates[f"{prefix}recall"],
        false_positive_rate=_defined(estimates[f"{prefix}false_positive_rate"]),
        precision=_defined(estimates[f"{prefix}precision"]),
        f1=estimates[f"{prefix}f1"],
        balanced_accuracy=_defined(estimates[f"{prefix}balanced_accuracy"]),
        auroc=_defined(estimates[f"{prefix}auroc"]),
    )


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _quality(result: LabelResult) -> float:
    return result.recall if result.balanced_accuracy is None else result.balanced_accuracy


def _intervals(samples: dict[str, Array], prefix: str, result: LabelResult | Evaluation) -> dict[str, Interval]:
    """Intervals of the metrics for which the result has a value."""
    found = {}
    for name in vars(result):
        if prefix + name in samples and getattr(result, name) is not None:
            limits = interval(samples[prefix + name])
            if limits is not None:
                found[name] = limits
    return found


@dataclass(frozen=True, eq=False)
class Drops:
    """What a subnet loses beside its dense model, as shares, in each resample of the inputs that both share.

    Attributes:
        accuracy: ``[resamples]``, of the open-set accuracy; of the closed-set accuracy for closed heads.
        balanced_accuracies: ``[resamples]`` by name of the label; NaN where the label was not drawn.
    """

    accuracy: Array
    balanced_accuracies: dict[str, Array]

    @property
    def mean_balanced_accuracy(self) -> Array:
        """``[resamples]``, of the mean over the labels; NaN where one of them was not drawn."""
        return np.asarray(np.mean(list(self.balanced_accuracies.values()), axis=0))


def drops(
    dense: Outputs,
    subnet: Outputs,
    truth: ArrayLike,
    labels: Sequence[int],
    names: Sequence[str],
    resamples: int,
    seed: int = 0,
) -> Drops:
    """What a subnet loses of its accuracies in bootstrap resamples of the inputs.

    Args:
        dense: Logits and outputs of the dense model, as for :func:`evaluate`.
        subnet: The same of the subnet.
        truth: ``[N]`` integer true labels.
        labels: The labels of the set.
        names: Name of every label.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        CalibrationError: If logits are not finite.
        LabelError: If a label is out of range, or one of the set has no output or no test input.
    """
    before, after = (Decisions.of(logits, truth, outputs, labels, names) for logits, outputs in (dense, subnet))
    of_labels = [names[label] for label in labels]

    def metrics(weights: Array) -> dict[str, Array]:
        balanced = before.balanced_accuracies(weights) - after.balanced_accuracies(weights)
        lost = before.accuracy(weights) - after.accuracy(weights)
        return {"accuracy": lost} | {f"label {name}": each for name, each in zip(of_labels, balanced.T, strict=True)}

    lost = bootstrap(metrics, before.truth.size, resamples, seed)
    return Drops(lost["accuracy"], {name: lost[f"label {name}"] for name in of_labels})


def comparable_outputs(
    logits: ArrayLike, outputs: Sequence[int | None], labels: Sequence[int], subnet_outputs: Sequence[int | None]
) -> Outputs:
    """The outputs with which a model is compared with a subnet: only the set's if the subnet has a closed head.

    Args:
        logits: ``[N, outputs]`` of the model.
        outputs: The label of each output of the model; ``None`` for "other".
        labels: The labels of the set.
        subnet_outputs: The label of each output of the subnet.

    Returns:
        The columns, and the label of each.
    """
    if tuple(subnet_outputs) != tuple(labels):
        return logits, outputs
    columns = [list(outputs).index(label) for label in labels]
    return log_probabilities(np.asarray(logits))[:, columns], tuple(labels)
