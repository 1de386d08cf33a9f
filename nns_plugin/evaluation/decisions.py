"""A model's decision for each input, and the metrics of these decisions for a label set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nns_plugin.errors import CalibrationError, LabelError
from nns_plugin.evaluation.metrics import Array, accuracy, label_metrics, probabilities, rates


@dataclass(frozen=True, eq=False)
class Decisions:
    """A model's decisions for N inputs, and the true labels; L labels in the set.

    Attributes:
        labels: Labels of the set.
        truth: ``[N]`` true labels.
        predicted: ``[N]`` predicted labels; -1 for "other".
        predicted_in_set: ``[N]`` labels predicted when only those of the set may be chosen.
        scores: ``[N, L]`` probabilities of the labels of the set.
        in_set: ``[N]`` bool, whether the true label is in the set.
        is_open: Whether the outputs can answer something other than the set, or the set is all there is.
    """

    labels: tuple[int, ...]
    truth: Array
    predicted: Array
    predicted_in_set: Array
    scores: Array
    in_set: Array
    is_open: bool

    @classmethod
    def of(
        cls,
        logits: ArrayLike,
        truth: ArrayLike,
        outputs: Sequence[int | None],
        labels: Sequence[int],
        names: Sequence[str],
    ) -> Decisions:
        """Decide by the largest output; arguments as for :func:`nns_plugin.evaluation.evaluation.evaluate`.

        Raises:
            CalibrationError: If logits are not finite.
            LabelError: If a label is out of range, or one of the set has no output or no test input.
        """
        true_labels, values = np.asarray(truth), np.asarray(logits)
        broken = int((~np.isfinite(values)).any(1).sum())
        if broken:
            raise CalibrationError(f"the logits of {broken} of {len(values)} inputs are not finite; check the model")
        low, high = int(true_labels.min()), int(true_labels.max())
        if low < 0 or high >= len(names):
            raise LabelError(f"the test data has labels {low}..{high}; expected 0..{len(names) - 1}")
        column = {label: place for place, label in enumerate(outputs) if label is not None}
        for label in labels:
            if label not in column:
                raise LabelError(f"label {names[label]!r} has no output")
            if not (true_labels == label).any():
                raise LabelError(f"label {names[label]!r} is not in the test data; every label of the set must be")
        probability = probabilities(values)
        scores = probability[:, [column[label] for label in labels]]
        in_set = np.isin(true_labels, labels)
        return cls(
            labels=tuple(labels),
            truth=true_labels,
            predicted=np.array([-1 if label is None else label for label in outputs])[probability.argmax(1)],
            predicted_in_set=np.asarray(labels)[scores.argmax(1)],
            scores=scores,
            in_set=in_set,
            is_open=len(outputs) > len(labels) or bool(in_set.all()),
        )

    @property
    def evaluated(self) -> Array:
        """``[N]`` bool, the inputs that labels are evaluated on: all, or those of the set for a closed head."""
        return np.ones_like(self.in_set) if self.is_open else self.in_set

    @property
    def _is_correct_open(self) -> Array:
        """``[N]`` bool, whether the answer is correct where all labels outside the set count as one."""
        truth = np.where(self.in_set, self.truth, -1)
        return np.asarray(truth == np.where(np.isin(self.predicted, self.labels), self.predicted, -1))

    @property
    def _is_correct_closed(self) -> Array:
        """``[N]`` bool, whether the answer is correct when only labels of the set may be chosen."""
        return np.asarray(self.predicted_in_set == self.truth)

    def metrics(self, weights: Array) -> dict[str, Array]:
        """All metrics by name, ``[B]`` each, under ``[B, N]`` weights of all inputs.

        Those of a label are named ``"label.metric"``, with the label's index.
        """
        rows, inside = self.evaluated, self.in_set
        values: dict[str, Array] = {}
        for label, score in zip(self.labels, self.scores.T, strict=True):
            of_label = label_metrics(
                weights[:, rows], self.truth[rows] == label, self.predicted[rows] == label, score[rows]
            )
            values |= {f"{label}.{name}": each for name, each in of_label.items()}
        values["closed_set_accuracy"] = accuracy(weights[:, inside], self._is_correct_closed[inside])
        if self.is_open:
            values["open_set_accuracy"] = accuracy(weights, self._is_correct_open)
        balanced = [values[f"{label}.balanced_accuracy"] for label in self.labels]
        values["mean_balanced_accuracy"] = np.mean(balanced, axis=0)
        return values

    def accuracy(self, weights: Array) -> Array:
        """``[B]`` open-set accuracy under ``[B, N]`` weights of all inputs; closed-set accuracy for a closed head."""
        rows = self.evaluated
        return accuracy(weights[:, rows], (self._is_correct_open if self.is_open else self._is_correct_closed)[rows])

    def balanced_accuracies(self, weights: Array) -> Array:
        """``[B, L]`` balanced accuracies of the labels under ``[B, N]`` weights of all inputs."""
        rows, labels = self.evaluated, np.asarray(self.labels)
        return rates(weights[:, rows], self.truth[rows, None] == labels, self.predicted[rows, None] == labels)[
            "balanced_accuracy"
        ]
