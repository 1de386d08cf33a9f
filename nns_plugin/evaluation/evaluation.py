"""Per-label evaluation of a classifier on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import CalibrationError, LabelError, MissingExtraError
from nns_plugin.evaluation.intervals import Array, Interval, bootstrap, interval, label_metrics, rates
from nns_plugin.models.inputs import device_of, parse_batch, run_model, to_device
from nns_plugin.models.preserve import preserved

try:
    from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "sklearn", "cli") from error


@dataclass(frozen=True)
class LabelResult:
    """How well one label is recognised, as one against all other inputs that were evaluated.

    Attributes:
        label: Its name.
        inputs: Number of inputs of the label.
        recall: Share of the label's inputs answered with it.
        false_positive_rate: Share of all other inputs answered with it; ``None`` where there are none.
        precision: Share of the answers with it that are right; ``None`` where it was never answered.
        f1: Harmonic mean of precision and recall.
        balanced_accuracy: Mean of recall and 1 - false-positive rate; ``None`` where that is.
        auroc: Area under the ROC curve of the label's probability; ``None`` where there are no other inputs.
        intervals: 95 % bootstrap intervals by name of the field; empty unless asked for.
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
        labels: One result a label of the set.
        inputs: Number of inputs evaluated.
        closed_set_accuracy: On the inputs of the set, decided among its labels.
        open_set_accuracy: On all inputs, where every other label counts as "other"; ``None`` for a closed head.
        mean_balanced_accuracy: Mean over the labels; ``None`` if one of them has none.
        worst_label: Name of the label with the lowest balanced accuracy, or recall where there is none.
        intervals: 95 % bootstrap intervals of the three shares by name of the field; empty unless asked for.
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
        """Share answered right: open-set where something else than the set can be answered, else closed-set."""
        return self.closed_set_accuracy if self.open_set_accuracy is None else self.open_set_accuracy


def predict(
    model: nn.Module, loader: Iterable[Any], progress: bool = False, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and labels of a whole loader; the model is left as it was found.

    Args:
        model: Gives logits.
        loader: Yields ``(inputs, labels)``.
        progress: Whether to show a progress bar.
        like: Labels that the loader gave before: they must come again, or models cannot be compared.

    Returns:
        ``[N, outputs]`` float32 logits and ``[N]`` int64 labels, on the CPU.

    Raises:
        CalibrationError: If the loader yields no labelled inputs or other ones than before, or the model gives no
            finite ``[N, outputs]``.
    """
    logits, labels = [], []
    device = device_of(model)
    with preserved(model), torch.no_grad():
        model.eval()
        for number, item in enumerate(tqdm(loader, desc="evaluating", disable=not progress, leave=False)):
            batch = parse_batch(item, number)
            if batch.labels is None:
                raise CalibrationError("the test loader yields inputs alone; expected (inputs, labels)")
            output = run_model(model, to_device(batch.inputs, device))
            if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != batch.size:
                raise CalibrationError(f"the model must give a tensor of shape [{batch.size}, outputs]")
            logits.append(output.float().cpu())
            labels.append(batch.labels.cpu())
    if not logits:
        raise CalibrationError("the test loader is empty; it must yield at least one batch")
    joined = torch.cat(logits)
    if not bool(torch.isfinite(joined).all()):
        raise CalibrationError("the model gives outputs that are not finite on the test data")
    truth = torch.cat(labels)
    if like is not None and not torch.equal(truth, like):
        raise CalibrationError(
            "the inputs come in another order, or are others, each time that they are gone through: models cannot be "
            "compared on them; pass a loader that does not shuffle"
        )
    return joined, truth


def evaluate(
    logits: Tensor,
    labels: Tensor,
    outputs: Sequence[int | None],
    chosen: Sequence[int],
    names: Sequence[str],
    resamples: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Evaluate outputs for a label set.

    Args:
        logits: ``[N, outputs]``.
        labels: ``[N]`` int64 true labels.
        outputs: The label of each output; ``None`` for "other".
        chosen: The labels of the set; each must have an output.
        names: Name of every label.
        resamples: Number of bootstrap resamples of the inputs for the intervals; 0 for none.
        seed: Of the resamples.

    Returns:
        The evaluation: on all inputs if the outputs can answer something else than the set (another label, or
        "other") or the set is all there is; on the inputs of the set alone otherwise (a closed head).

    Raises:
        LabelError: If a label is out of range, or one of the set has no output or no test input.
    """
    answered = _answered(logits, labels, outputs, chosen, names)
    rows = answered.rows
    results = [
        _label_result(names[label], answered.truth[rows] == label, answered.said[rows] == label, score[rows])
        for label, score in zip(chosen, answered.scores.T, strict=True)
    ]
    samples = answered.resampled(chosen, resamples, seed) if resamples else {}
    results = [
        replace(result, intervals=_intervals(samples, f"{label}.", result))
        for label, result in zip(chosen, results, strict=True)
    ]
    balanced = [result.balanced_accuracy for result in results]
    inside, right = answered.inside, answered.among == answered.truth
    found = Evaluation(
        labels=tuple(results),
        inputs=int(rows.sum()),
        closed_set_accuracy=float(right[inside].mean()),
        open_set_accuracy=float(answered.is_right(chosen).mean()) if answered.is_open else None,
        mean_balanced_accuracy=None if None in balanced else float(np.mean([value or 0.0 for value in balanced])),
        worst_label=min(results, key=_badness).label,
    )
    return replace(found, intervals=_intervals(samples, "", found))


def drops(
    dense: tuple[Tensor, Sequence[int | None]],
    subnet: tuple[Tensor, Sequence[int | None]],
    labels: Tensor,
    chosen: Sequence[int],
    names: Sequence[str],
    resamples: int,
    seed: int = 0,
) -> Array:
    """What a subnet loses of the mean balanced accuracy in resamples of the inputs that both models share.

    Args:
        dense: Logits and outputs of the dense model, as for :func:`evaluate`.
        subnet: The same of the subnet.
        labels: ``[N]`` true labels.
        chosen: The labels of the set.
        names: Name of every label.
        resamples: Number of bootstrap resamples.
        seed: Of the resamples.

    Returns:
        ``[resamples]``, as shares; NaN where a label was not drawn.
    """
    lost = paired_drops(dense, subnet, labels, chosen, names, resamples, seed)
    return np.asarray(np.mean([lost[names[label]] for label in chosen], axis=0))


ACCURACY = ""  # in the drops of all metrics the key of the accuracy, beside the names of labels


def paired_drops(
    dense: tuple[Tensor, Sequence[int | None]],
    subnet: tuple[Tensor, Sequence[int | None]],
    labels: Tensor,
    chosen: Sequence[int],
    names: Sequence[str],
    resamples: int,
    seed: int = 0,
) -> dict[str, Array]:
    """What a subnet loses of its accuracy, and of each label's balanced accuracy, in resamples that both share.

    Arguments as for :func:`drops`.

    Returns:
        By name of the label ``[resamples]``, as shares, and as :data:`ACCURACY` that of all inputs: of the open-set
        accuracy, or of the closed-set accuracy where the outputs can answer nothing else than the set.
    """
    answered = [_answered(logits, labels, outputs, chosen, names) for logits, outputs in (dense, subnet)]

    def metrics(weights: Array) -> dict[str, Array]:
        left, right = (
            np.column_stack([each.accuracy(chosen, weights), each.balanced_accuracies(chosen, weights)])
            for each in answered
        )
        return dict(zip([ACCURACY, *(names[label] for label in chosen)], (left - right).T, strict=True))

    return bootstrap(metrics, len(labels), resamples, seed)


@dataclass(frozen=True, eq=False)
class _Answered:
    """What a model answered; L labels of the set, N inputs.

    Attributes:
        truth: ``[N]`` true labels.
        said: ``[N]`` answers; -1 for "other".
        among: ``[N]`` answers among the labels of the set.
        scores: ``[N, L]`` probabilities of the labels of the set.
        inside: ``[N]`` bool, inputs of the set.
        is_open: Whether something else than the set can be answered, or there is nothing else.
    """

    truth: Array
    said: Array
    among: Array
    scores: Array
    inside: Array
    is_open: bool

    @property
    def rows(self) -> Array:
        """``[N]`` bool, the inputs that labels are judged on."""
        return np.ones_like(self.inside) if self.is_open else self.inside

    def is_right(self, chosen: Sequence[int]) -> Array:
        """``[N]`` bool, answered right where all labels beside the set are one."""
        seen = np.where(self.inside, self.truth, -1)
        return np.asarray(seen == np.where(np.isin(self.said, chosen), self.said, -1))

    def balanced_accuracies(self, chosen: Sequence[int], weights: Array) -> Array:
        """``[b, L]`` for ``[b, N]`` weights of all inputs."""
        rows, labels = self.rows, np.asarray(chosen)
        found = rates(weights[:, rows], self.truth[rows, None] == labels, self.said[rows, None] == labels)
        return found["balanced_accuracy"]

    def accuracy(self, chosen: Sequence[int], weights: Array) -> Array:
        """``[b]`` for ``[b, N]`` weights of all inputs: open-set where something else can be answered."""
        rows = self.rows
        right = self.is_right(chosen) if self.is_open else self.among == self.truth
        with np.errstate(invalid="ignore"):
            return np.asarray(weights[:, rows] @ right[rows].astype(np.float64) / weights[:, rows].sum(1))

    def resampled(self, chosen: Sequence[int], resamples: int, seed: int) -> dict[str, Array]:
        """Metrics over resamples of all inputs: each label's by ``"label.name"``, and those of the whole set."""

        def metrics(weights: Array) -> dict[str, Array]:
            rows, inside = self.rows, self.inside
            found: dict[str, Array] = {}
            for label, score in zip(chosen, self.scores.T, strict=True):
                of_label = label_metrics(
                    weights[:, rows], self.truth[rows] == label, self.said[rows] == label, score[rows]
                )
                found |= {f"{label}.{name}": values for name, values in of_label.items()}
            with np.errstate(invalid="ignore"):
                right = (self.among == self.truth)[inside]
                found["closed_set_accuracy"] = weights[:, inside] @ right / weights[:, inside].sum(1)
                found["open_set_accuracy"] = weights @ self.is_right(chosen) / weights.sum(1)
            found["mean_balanced_accuracy"] = np.mean([found[f"{label}.balanced_accuracy"] for label in chosen], axis=0)
            return found

        return bootstrap(metrics, self.truth.size, resamples, seed)


def _answered(
    logits: Tensor, labels: Tensor, outputs: Sequence[int | None], chosen: Sequence[int], names: Sequence[str]
) -> _Answered:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise LabelError(f"the test data has labels {low}..{high}; expected 0..{len(names) - 1}")
    truth, probability = labels.numpy(), _probabilities(logits.double()).numpy()
    column = {label: place for place, label in enumerate(outputs) if label is not None}
    for label in chosen:
        if label not in column:
            raise LabelError(f"label {names[label]!r} has no output")
        if not (truth == label).any():
            raise LabelError(f"label {names[label]!r} is not in the test data; every label of the set must be")
    inside = np.isin(truth, chosen)
    scores = probability[:, [column[label] for label in chosen]]
    return _Answered(
        truth=truth,
        said=np.array([-1 if label is None else label for label in outputs])[probability.argmax(1)],
        among=np.asarray(chosen)[scores.argmax(1)],
        scores=scores,
        inside=inside,
        is_open=len(outputs) > len(chosen) or bool(inside.all()),
    )


def _intervals(samples: dict[str, Array], prefix: str, result: object) -> dict[str, Interval]:
    """Intervals of those metrics that the result has a value for."""
    found = {}
    for name in vars(result):
        if prefix + name in samples and getattr(result, name) is not None:
            limits = interval(samples[prefix + name])
            if limits is not None:
                found[name] = limits
    return found


def judged(
    logits: Tensor, outputs: Sequence[int | None], chosen: Sequence[int], answers: Sequence[int | None]
) -> tuple[Tensor, Sequence[int | None]]:
    """The outputs that a model is judged by beside a subnet: if that can answer its labels alone, so can the model.

    Args:
        logits: ``[N, outputs]``.
        outputs: The label of each output of the model; ``None`` for "other".
        chosen: The labels of the set.
        answers: The label of each output of the subnet.

    Returns:
        The columns, and the label of each.
    """
    if tuple(answers) != tuple(chosen):
        return logits, outputs
    return log_probabilities(logits)[:, [list(outputs).index(label) for label in chosen]], tuple(chosen)


def log_probabilities(outputs: Tensor) -> Tensor:
    """Logits, float64, of outputs that are logits or the probabilities of a softmax: of fewer of them, too."""
    return _probabilities(outputs.double()).clamp_min(torch.finfo(torch.float64).tiny).log()


def _probabilities(outputs: Tensor) -> Tensor:
    """Softmax of logits; outputs of a model that ends in a softmax are probabilities already."""
    sums = bool((outputs.sum(1) - 1).abs().max() < 1e-4)
    return outputs if sums and bool((outputs >= 0).all()) and outputs.shape[1] > 1 else outputs.softmax(1)


def _badness(result: LabelResult) -> float:
    return result.recall if result.balanced_accuracy is None else result.balanced_accuracy


def _label_result(name: str, is_label: Array, is_answered: Array, score: Array) -> LabelResult:
    (true_negative, false_positive), (false_negative, true_positive) = confusion_matrix(
        is_label, is_answered, labels=[False, True]
    )
    others, answered = int(true_negative + false_positive), int(true_positive + false_positive)
    recall = float(true_positive / (true_positive + false_negative))
    rate = float(false_positive / others) if others else None
    return LabelResult(
        label=name,
        inputs=int(is_label.sum()),
        recall=recall,
        false_positive_rate=rate,
        precision=float(true_positive / answered) if answered else None,
        f1=float(f1_score(is_label, is_answered, zero_division=0.0)),
        balanced_accuracy=None if rate is None else (recall + 1 - rate) / 2,
        auroc=float(roc_auc_score(is_label, score)) if others else None,
    )
