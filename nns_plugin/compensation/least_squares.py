"""Mixing: how kept channels replace removed ones, from their Gram matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nns_plugin.errors import StatisticsError
from nns_plugin.statistics.angles import Center, angles, centred, offsets

Merge = Literal["none", "add", "scaled"]
RIDGE = 1e-6


def mixing(gram: Tensor, kept: Tensor, removed: Tensor, *, constant: bool = True, ridge: float = RIDGE) -> Tensor:
    """How all kept channels together replace the removed ones: least squares on the calibration data.

    ``x_R ~ M x_K + m`` with ``[M m] = G[R, K1] inv(G[K1, K1])``, where 1 is the constant.

    Args:
        gram: ``[C + 1, C + 1]`` Gram matrix of the channels and the constant 1, which is last.
        kept: ``[K]`` int64 kept channels.
        removed: ``[R]`` int64 removed channels.
        constant: Whether to use the constant; without it m is 0.
        ridge: Added to the diagonal of the kept channels, relative to its mean.

    Returns:
        ``[R, K + 1]`` float64, m last.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [2.0, 4.0]], dtype=torch.float64)
        >>> x = torch.cat([x, torch.ones(3, 1)], 1)
        >>> mixing(x.T @ x, torch.tensor([0]), torch.tensor([1]), ridge=0.0).round(decimals=6) + 0.0
        tensor([[2., 0.]], dtype=torch.float64)
    """
    last = gram.shape[0] - 1
    basis = torch.cat([kept, torch.tensor([last])]) if constant else kept
    inner = gram[basis][:, basis].double()
    size = kept.numel()
    diagonal = inner.diagonal()[:size]
    mean = float(diagonal.mean()) if size else 0.0
    # A channel that is always 0 cannot help; a 1 on its diagonal keeps the system regular and its share 0.
    boost = torch.where(diagonal > 1e-12 * max(mean, 1e-300), ridge * mean, max(mean, 1.0))
    inner.diagonal()[:size] += boost
    solved = solve_positive(inner, gram[basis][:, removed].double()).T
    return solved if constant else torch.cat([solved, solved.new_zeros(solved.shape[0], 1)], 1)


def means(gram: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    """The mixing ``[R, K + 1]`` that replaces removed channels by their means alone."""
    result = torch.zeros(removed.numel(), kept.numel() + 1, dtype=torch.float64)
    result[:, -1] = gram[removed, -1].double() / gram[-1, -1].double().clamp_min(1)
    return result


def merging(
    gram: Tensor, kept: Tensor, removed: Tensor, survivor: Tensor, *, merge: Merge = "scaled", center: Center = None
) -> Tensor:
    """How single kept channels replace the removed ones, one each.

    ``"scaled"``: ``x_u ~ a x_v + c_u - a c_v`` with ``a = <u - c_u, v - c_v> / |v - c_v|^2``, exact for a pair whose
    centred vectors are parallel. ``"add"``: ``x_u ~ x_v`` for a pair that does the same and ``x_u ~ -x_v`` for one that
    cancels, as if their lengths were equal. ``"none"``: ``x_u ~ 0``.

    Args:
        gram: ``[C + 1, C + 1]`` Gram matrix of the channels and the constant 1, which is last.
        kept: ``[K]`` int64 kept channels, ascending.
        removed: ``[R]`` int64 removed channels.
        survivor: ``[R]`` int64, the kept channel that takes over from each removed one, or -1 for none.
        merge: See above.
        center: Subtracted from the channels' values: ``None``, a number, or ``"mean"`` for their means.

    Returns:
        ``[R, K + 1]`` float64, the constant's share last.

    Source:
        Gedeon, "Indicators of hidden neuron functionality: the weight matrix versus neuron behaviour", 1995, for
        ``"add"`` on outgoing weights.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
        >>> x = torch.cat([x, torch.ones(2, 1)], 1)
        >>> merging(x.T @ x, torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
        tensor([[2., 0.]], dtype=torch.float64)
    """
    result = torch.zeros(removed.numel(), kept.numel() + 1, dtype=torch.float64)
    rows = (survivor >= 0).nonzero().flatten()
    if merge == "none" or not rows.numel():
        return result
    gram, count = gram.double(), float(gram[-1, -1])
    total = gram[:-1, -1]
    inner = centred(gram[:-1, :-1], total, count, center)
    u, v = removed[rows], survivor[rows]
    products, squares = inner[u, v], inner[v, v]
    if merge == "add":
        factor = products.sign()
    else:
        factor = torch.where(squares > 0, products / squares.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        offset = offsets(total, count, center)
        result[rows, -1] = offset[u] - factor * offset[v]
    result[rows, torch.searchsorted(kept, v)] = factor
    return result


def nearest(gram: Tensor, kept: Tensor, removed: Tensor, center: Center) -> Tensor:
    """The kept channel whose vector is nearest to parallel to each removed one's, ``[R]`` int64; -1 if none is kept."""
    if not kept.numel():
        return torch.full_like(removed, -1)
    degrees = angles(centred(gram[:-1, :-1].double(), gram[:-1, -1].double(), float(gram[-1, -1]), center))
    distance = torch.minimum(degrees, 180 - degrees)[removed][:, kept]
    return kept[distance.argmin(1)]


def take_over(weight: Tensor, mix: Tensor, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a consumer whose removed channels are replaced by a mixture of the kept ones.

    Args:
        weight: ``[O, K, C]`` reading matrix (see :func:`nns_plugin.models.layers.consumer_matrices`).
        mix: ``[R, kept + 1]`` from :func:`mixing`.
        kept: ``[kept]`` int64.
        removed: ``[R]`` int64.

    Returns:
        ``[O, K, C]`` new weights, 0 at removed channels, and ``[O]`` to be added to the bias.
    """
    result = torch.zeros_like(weight)
    gone = weight[:, :, removed]
    result[:, :, kept] = weight[:, :, kept] + gone @ mix[:, :-1]
    return result, (gone @ mix[:, -1]).sum(1)


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix X = right`` for a symmetric positive semi-definite matrix; a singular one gets a raised diagonal.

    Raises:
        StatisticsError: If the matrix is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise StatisticsError("a Gram matrix is not finite; calibrate again with finite activations")
    boost = 0.0
    scale = float(matrix.diagonal().abs().mean()) or 1.0
    while True:
        raised = matrix + boost * torch.eye(matrix.shape[0], dtype=matrix.dtype) if boost else matrix
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not int(failed):
            return torch.cholesky_solve(right, factor)
        boost = max(1e-12 * scale, 10 * boost)
