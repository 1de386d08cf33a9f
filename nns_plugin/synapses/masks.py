"""Prune synapses (single weights) with the masks of ``torch.nn.utils.prune``."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune

from nns_plugin.errors import PruningError
from nns_plugin.models.layers import is_linear_or_convolution, weight_of


def synapse_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have synapses, by name.

    The output layers of attention are left out: they never run as layers, so their masks would not be applied again.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear_or_convolution(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def prune_synapses(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    amount: float | int | None = None,
    threshold: float | None = None,
    global_pruning: bool = False,
) -> dict[str, int]:
    """Mask the lowest-scoring synapses with ``torch.nn.utils.prune``.

    Synapses that are already masked stay masked and do not count.

    Args:
        model: Changed in place.
        scores: A score for every synapse, by name of the layer and of its weight's shape, such as
            :func:`~nns_plugin.synapses.significance.significance`.
        amount: How many of the remaining synapses to mask in each layer: a share in [0, 1] (float) or a number (int).
        threshold: Mask the synapses that score below this value; an alternative to ``amount``.
        global_pruning: Rank the synapses of all layers together; ``amount`` then refers to all of them.

    Returns:
        The number of synapses that this call masked, by layer.

    Raises:
        PruningError: If not exactly one of ``amount`` and ``threshold`` is given, the amount is out of range, or the
            scores do not fit the layers; nothing is masked then.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1))
        >>> prune_synapses(layer, {"0": torch.tensor([[0.5, 2.0]])}, amount=0.5)
        {'0': 1}
        >>> layer[0].weight_mask
        tensor([[0., 1.]])
    """
    if not scores:
        raise PruningError("scores is empty; expected scores for at least one layer")
    if threshold is not None and math.isnan(threshold):
        raise PruningError("threshold is nan; expected a number")
    if (amount is None) == (threshold is None):
        raise PruningError(f"amount is {amount} and threshold is {threshold}; pass exactly one of them")
    modules = scored_layers(model, scores)
    left = {name: synapse_mask(module) for name, module in modules.items()}
    _check_amount(amount, sum(int(mask.sum()) for mask in left.values()) if global_pruning else None, left)
    ranks = _ranked(scores, {name: weight_of(module).device for name, module in modules.items()})
    if threshold is not None:
        for name, module in modules.items():
            prune.custom_from_mask(module, "weight", scores[name].to(weight_of(module).device) >= threshold)
    elif global_pruning:
        prune.global_unstructured(
            [(module, "weight") for module in modules.values()],
            prune.L1Unstructured,
            importance_scores={(module, "weight"): ranks[name] for name, module in modules.items()},
            amount=amount,
        )
    else:
        for name, module in modules.items():
            prune.l1_unstructured(module, "weight", amount, importance_scores=ranks[name])
    return {name: int(left[name].sum()) - int(synapse_mask(module).sum()) for name, module in modules.items()}


def synapse_mask(module: nn.Module) -> Tensor:
    """Mark the synapses of a layer that are not masked, bool of its weight's shape."""
    mask = getattr(module, "weight_mask", None)
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.ones_like(weight_of(module), dtype=torch.bool)


def mask_synapses(module: nn.Module, kept: Tensor) -> None:
    """Mask all other synapses of a layer, in place.

    An existing mask is updated, so that repeated calls do not stack masks.

    Args:
        module: A layer with a weight.
        kept: Bool of its weight's shape; synapses that are already masked stay masked.
    """
    mask, original = getattr(module, "weight_mask", None), getattr(module, "weight_orig", None)
    if not isinstance(mask, Tensor) or not isinstance(original, Tensor):
        prune.custom_from_mask(module, "weight", kept.to(weight_of(module).device))
        return
    mask.mul_(kept.to(mask))
    module.weight = original * mask


def _ranked(scores: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """Turn scores into ranks: torch prunes the lowest magnitudes, and scores may be negative."""
    joined = torch.cat([score.detach().double().cpu().flatten() for score in scores.values()])
    ranks = (joined.unique(return_inverse=True)[1] + 1).double()
    parts = ranks.split([score.numel() for score in scores.values()])
    return {
        name: part.reshape(score.shape).to(devices[name])
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def scored_layers(model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the layers that the scores name.

    Raises:
        PruningError: If a layer is missing, or its scores are not finite or not of its weight's shape.
    """
    return {name: _layer(model, name, score) for name, score in scores.items()}


def _layer(model: nn.Module, name: str, score: Tensor) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise PruningError(f"the model has no module {name!r}; name its layers") from error
    weight = getattr(module, "weight", None)
    if not isinstance(score, Tensor):
        raise PruningError(f"the scores of {name!r} are a {type(score).__name__}; expected a tensor")
    if not isinstance(weight, Tensor) or weight.shape != score.shape:
        found = list(weight.shape) if isinstance(weight, Tensor) else "missing"
        raise PruningError(f"the scores of {name!r} are {list(score.shape)}, but its weight is {found}")
    if not bool(torch.isfinite(score).all()):
        raise PruningError(f"the scores of {name!r} are not all finite, so they cannot rank its synapses")
    return module


def _check_amount(amount: float | int | None, total: int | None, left: Mapping[str, Tensor]) -> None:
    if amount is None:
        return
    available = min((int(mask.sum()) for mask in left.values()), default=0) if total is None else total
    share = isinstance(amount, float)
    if isinstance(amount, bool) or not 0 <= amount <= (1 if share else available):
        raise PruningError(
            f"amount is {amount}; expected a share in [0, 1] as a float, or at most the {available} remaining synapses "
            "as an int"
        )
