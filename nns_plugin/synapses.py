"""Synapses: pruning of single weights, through the masks of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nns_plugin.errors import PruningError


def over_mean(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which synapses reach the layer's mean magnitude: the mean-weight threshold.

    Args:
        weight: Weights of any shape.
        mask: Of the same shape, 0 where a synapse is gone already: it stays gone and does not count for the mean.

    Returns:
        Bool, of the same shape.

    Source:
        "The Pruning Methods for feed-forward network and Convolutional Neural Network", section 2.2, after Han et al.,
        "Learning both weights and connections for efficient neural networks", 2015.

    Example:
        >>> over_mean(torch.tensor([[1.0, -4.0], [0.5, 3.0]]))
        tensor([[False,  True],
                [False,  True]])
    """
    there = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.bool()
    magnitude = weight.detach().abs().double()
    if not bool(there.any()):
        return there
    # A mean of equal magnitudes may be rounded to just over them; all of them stay.
    threshold = magnitude[there].mean() * (1 - 1e-12)
    return there & (magnitude >= threshold)


def prune_under_mean(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Mask the synapses of linear layers that lie under their layer's mean magnitude.

    The masks are those of ``torch.nn.utils.prune``: weights stay at 0 through training, a second call takes the mean
    of those that are left, and ``torch.nn.utils.prune.remove`` makes them permanent.

    Args:
        model: Changed in place.
        layers: Names of ``nn.Linear`` modules.

    Returns:
        For each layer the number of synapses that were masked by this call.

    Raises:
        PruningError: If a name is no linear layer; nothing is masked then.
    """
    found: dict[str, nn.Linear] = {}
    for name in layers:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise PruningError(f"there is no module {name!r} in the model; name linear layers") from error
        if not isinstance(module, nn.Linear):
            raise PruningError(f"{name!r} is a {type(module).__name__}; the mean-weight rule is for linear layers")
        found[name] = module
    removed = {}
    for name, module in found.items():
        mask: Tensor | None = getattr(module, "weight_mask", None)
        kept = over_mean(getattr(module, "weight_orig", module.weight), mask)
        before = kept.numel() if mask is None else int(mask.sum())
        prune.custom_from_mask(module, "weight", kept.to(module.weight.dtype))
        removed[name] = before - int(kept.sum())
    return removed
