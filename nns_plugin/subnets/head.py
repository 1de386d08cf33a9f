"""Heads of label subnets: the rows of the kept labels, and the output "other" for everything else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError, PruningError


def fit_other(features: Tensor, kept_logits: Tensor, is_other: Tensor, ridge: float = 1.0) -> tuple[Tensor, float]:
    """Fit one more output for inputs of no kept label, by multinomial logistic regression with the others fixed.

    With a = logsumexp of the kept logits and o = w x + b, the log-likelihood of the multinomial model depends on
    (w, b) only through ``log sigmoid(o - a)`` for inputs of other labels and ``log sigmoid(a - o)`` for the rest: a
    convex binary problem with an offset. Both sides weigh the same, since the share of other inputs at run time
    is unknown.

    Args:
        features: ``[N, C]`` inputs of the head.
        kept_logits: ``[N, K]`` outputs of the kept rows.
        is_other: ``[N]`` bool, inputs of no kept label.
        ridge: Weight of the squared norm of w on standardised features, as against the sum over N inputs.

    Returns:
        w ``[C]`` float64 and b.

    Raises:
        CalibrationError: If all inputs are of one side.
    """
    count = int(is_other.sum())
    if count in (0, is_other.numel()):
        raise CalibrationError(
            f"head 'open' needs calibration inputs of kept and of other labels; {count} of {is_other.numel()} are of "
            "other labels"
        )
    x = features.double()
    mean, scale = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(scale > 1e-12, scale, 1.0)
    x = (x - mean) / scale
    offset = torch.logsumexp(kept_logits.double(), 1)
    sign = torch.where(is_other, 1.0, -1.0).double()
    share = torch.where(is_other, 0.5 / count, 0.5 / (is_other.numel() - count)).double()
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        weight[-1] = offset.mean()
    solver = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        other = x @ weight[:-1] + weight[-1]
        penalty = ridge / x.shape[0] * weight[:-1].square().sum() / 2
        value = -(share * nn.functional.logsigmoid(sign * (other - offset))).sum() + penalty
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    fitted = weight.detach()
    if not bool(torch.isfinite(fitted).all()):
        raise CalibrationError("the output 'other' could not be fitted: the logistic regression did not converge")
    unscaled = fitted[:-1] / scale
    return unscaled, float(fitted[-1] - unscaled @ mean)


def balancing_shift(logits: Tensor, outputs: Sequence[int | None], labels: Tensor) -> float:
    """What to add to the logits of "other" so that the mean balanced accuracy of the labels is highest.

    An input is answered with the best of its kept labels where the margin of "other" over it is under 0. Moving the
    threshold of the margins past an input gains 1 / (2 n) of its label's balanced accuracy if that answer is right, n
    inputs of the label, and loses 1 / (2 (N - n)) if it is not: sorted sums find the best threshold of all.

    Args:
        logits: ``[N, K + 1]``.
        outputs: The label of each output; ``None`` for "other".
        labels: ``[N]`` int64 true labels.

    Returns:
        The shift, in the middle of the best interval that is nearest to 0.

    Raises:
        CalibrationError: If a kept label has no inputs, or all of them.
    """
    other = list(outputs).index(None)
    kept = torch.tensor([label for label in outputs if label is not None])
    values = logits.detach().double().cpu()
    columns = [place for place, label in enumerate(outputs) if label is not None]
    best, answer = values[:, columns].max(1)
    counts = (labels[:, None] == kept).sum(0)
    if not bool(torch.isfinite(values).all()):
        raise CalibrationError("the output 'other' cannot be calibrated: some outputs are not finite")
    if bool((counts == 0).any()) or int(counts.sum()) == len(labels):
        raise CalibrationError(
            f"the output 'other' cannot be calibrated: the kept labels have {counts.tolist()} of the "
            f"{len(labels)} validation inputs; expected some of each, and some others"
        )
    right = labels == kept[answer]
    size = counts[answer].double()
    gain = torch.where(right, 1 / size, -1 / (len(labels) - size))
    margin, order = (values[:, other] - best).sort()
    total = torch.cat([gain.new_zeros(1), gain[order].cumsum(0)])  # answered with a label: the first k
    edges = torch.cat([margin[:1] - 2, margin, margin[-1:] + 2])
    # Between margins that single precision does not tell apart there is no threshold.
    possible = edges[1:] - edges[:-1] > 1e-6 * (1 + margin.abs().max())
    middles = (edges[1:] + edges[:-1]) / 2
    winners = possible & (total >= total[possible].max() - 1e-12)
    found = middles[winners]
    return float(-found[found.abs().argmin()])


def cross_calibrated(logits: Tensor, outputs: Sequence[int | None], labels: Tensor) -> Tensor:
    """Logits whose output "other" is shifted, on each half of the inputs, as is best on the other half.

    What a calibrated head reaches on the very inputs that it was calibrated on is more than it reaches on others.

    Args:
        logits: ``[N, K + 1]``.
        outputs: The label of each output; ``None`` for "other".
        labels: ``[N]`` int64 true labels.

    Returns:
        ``[N, K + 1]``.

    Raises:
        CalibrationError: If a kept label has less than two inputs, or there is nothing else.
    """
    first = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in labels.unique():  # half of each label
        rows = (labels == label).nonzero().flatten()
        if label in outputs and rows.numel() < 2:
            raise CalibrationError(
                f"label number {int(label)} has {rows.numel()} validation input; a calibrated head is judged on halves "
                "of each label, which takes at least 2"
            )
        first[rows[torch.randperm(rows.numel(), generator=generator)[: (rows.numel() + 1) // 2]]] = True
    shifted = logits.clone()
    for half in (first, ~first):
        shifted[half, list(outputs).index(None)] += balancing_shift(logits[~half], outputs, labels[~half])
    return shifted


def shift_output(head: nn.Linear, place: int, shift: float) -> None:
    """Add to the bias of one output, in place."""
    with torch.no_grad():
        head.bias[place] += shift


def resize_head(head: nn.Linear, outputs: int, bias: bool) -> None:
    """Give a head another number of outputs, with weights of 0, in place."""
    weight = head.weight.detach().new_zeros(outputs, head.in_features)
    _set(head, weight, weight.new_zeros(outputs) if bias else None)


def close_head(head: nn.Linear, rows: Sequence[int]) -> None:
    """Keep only the given rows of a head, in their order, in place."""
    index = torch.tensor(list(rows), device=head.weight.device)
    _set(head, head.weight.detach()[index], None if head.bias is None else head.bias.detach()[index])


def open_head(head: nn.Linear, weight: Tensor, bias: float) -> None:
    """Append one output to a head, in place."""
    old = head.bias.detach() if head.bias is not None else head.weight.new_zeros(head.out_features)
    row = weight.to(head.weight)[None]
    _set(head, torch.cat([head.weight.detach(), row]), torch.cat([old, old.new_tensor([bias])]))


def linear_head(model: nn.Module, name: str) -> nn.Linear:
    """The head of a model, which must be a linear layer to be shrunk.

    Raises:
        PruningError: If it is something else.
    """
    head = model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise PruningError(f"head {name!r} is a {type(head).__name__}; only nn.Linear can be shrunk: use head 'keep'")
    if "weight" not in head._parameters:
        raise PruningError(f"head {name!r} computes its weight from others and cannot be shrunk: use head 'keep'")
    return head


def _set(head: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    trainable = head.weight.requires_grad
    head.weight = nn.Parameter(weight.clone(), requires_grad=trainable)
    head.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone(), requires_grad=trainable))
    head.out_features = weight.shape[0]
