"""Per-label evaluation of a classifier on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import CalibrationError, LabelError
from nns_plugin.forward import device_of, parse_batch, run_model, to_device
from nns_plugin.preserve import preserved


@dataclass(frozen=True)
class LabelResult:
    """How well one label is recognised, as one against all other inputs that were evaluated.

    Attributes:
        label: Its name.
        inputs: Number of inputs of the label.
        recall: Share of the label's inputs answered with it.
        false_positive_rate: Share of all other inputs answered with it; ``None`` where there are none.
        precision: Share of the answers with it that are right; ``None`` where it was never answered.
        balanced_accuracy: Mean of recall and 1 - false-positive rate; ``None`` where that is.
        auroc: Area under the ROC curve of the label's probability; ``None`` where there are no other inputs.
    """

    label: str
    inputs: int
    recall: float
    false_positive_rate: float | None
    precision: float | None
    balanced_accuracy: float | None
    auroc: float | None


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
    """

    labels: tuple[LabelResult, ...]
    inputs: int
    closed_set_accuracy: float
    open_set_accuracy: float | None
    mean_balanced_accuracy: float | None
    worst_label: str


def predict(model: nn.Module, loader: Iterable[Any], progress: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and labels of a whole loader; the model is left as it was found.

    Returns:
        ``[N, outputs]`` float32 logits and ``[N]`` int64 labels, on the CPU.

    Raises:
        CalibrationError: If the loader yields no labelled inputs, or the model gives no finite ``[N, outputs]``.
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
    return joined, torch.cat(labels)


def evaluate(
    logits: Tensor, labels: Tensor, outputs: Sequence[int | None], chosen: Sequence[int], names: Sequence[str]
) -> Evaluation:
    """Evaluate outputs for a label set.

    Args:
        logits: ``[N, outputs]``.
        labels: ``[N]`` int64 true labels.
        outputs: The label of each output; ``None`` for "other".
        chosen: The labels of the set; each must have an output.
        names: Name of every label.

    Returns:
        The evaluation: on all inputs if the outputs can answer something else than the set (another label, or
        "other") or the set is all there is; on the inputs of the set alone otherwise (a closed head).

    Raises:
        LabelError: If a label is out of range, or one of the set has no output or no test input.
    """
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
    is_open = len(outputs) > len(chosen) or bool(inside.all())
    answers = np.array([-1 if label is None else label for label in outputs])[probability.argmax(1)]
    among = np.asarray(chosen)[probability[:, [column[label] for label in chosen]].argmax(1)]
    rows = np.ones_like(inside) if is_open else inside
    results = tuple(
        _label_result(names[label], label, truth[rows], answers[rows], probability[rows, column[label]])
        for label in chosen
    )
    balanced = [result.balanced_accuracy for result in results]
    seen = np.where(np.isin(truth, chosen), truth, -1)
    said = np.where(np.isin(answers, chosen), answers, -1)
    return Evaluation(
        labels=results,
        inputs=int(rows.sum()),
        closed_set_accuracy=float((among[inside] == truth[inside]).mean()),
        open_set_accuracy=float((seen == said).mean()) if is_open else None,
        mean_balanced_accuracy=None if None in balanced else float(np.mean([value or 0.0 for value in balanced])),
        worst_label=min(results, key=_badness).label,
    )


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
    return logits[:, [list(outputs).index(label) for label in chosen]], tuple(chosen)


def _probabilities(outputs: Tensor) -> Tensor:
    """Softmax of logits; outputs of a model that ends in a softmax are probabilities already."""
    sums = bool((outputs.sum(1) - 1).abs().max() < 1e-4)
    return outputs if sums and bool((outputs >= 0).all()) and outputs.shape[1] > 1 else outputs.softmax(1)


def _badness(result: LabelResult) -> float:
    return result.recall if result.balanced_accuracy is None else result.balanced_accuracy


def _label_result(
    name: str, label: int, truth: NDArray[Any], answers: NDArray[Any], score: NDArray[Any]
) -> LabelResult:
    is_label = truth == label
    (true_negative, false_positive), (false_negative, true_positive) = confusion_matrix(
        is_label, answers == label, labels=[False, True]
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
        balanced_accuracy=None if rate is None else (recall + 1 - rate) / 2,
        auroc=float(roc_auc_score(is_label, score)) if others else None,
    )
