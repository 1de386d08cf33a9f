"""The mean-weight rule: mask the synapses whose magnitude is below their layer's mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nns_plugin.errors import PruningError


def over_mean(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mark the synapses whose magnitude reaches the layer's mean: the mean-weight threshold.

    Args:
        weight: Weights of any shape.
        mask: Of the same shape, 0 where a synapse is already pruned: it stays pruned and does not count for the mean.

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
    left = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.bool()
    magnitude = weight.detach().abs().double()
    if not bool(left.any()):
        return left
    # The mean of equal magnitudes may round to slightly above them; all of them must stay.
    threshold = magnitude[left].mean() * (1 - 1e-12)
    return left & (magnitude >= threshold)


def prune_under_mean(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Mask the synapses of linear layers whose magnitude is below their layer's mean.

    The masks are those of ``torch.nn.utils.prune``: masked weights stay at 0 during training, a second call uses the
    mean of the remaining weights, and ``torch.nn.utils.prune.remove`` makes the masks permanent.

    Args:
        model: Changed in place.
        layers: Names of ``nn.Linear`` modules.

    Returns:
        The number of synapses that this call masked, by layer.

    Raises:
        PruningError: If a name does not belong to a linear layer; nothing is masked then.
    """
    found: dict[str, nn.Linear] = {}
    for name in layers:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise PruningError(f"the model has no module {name!r}; name linear layers") from error
        if not isinstance(module, nn.Linear):
            raise PruningError(
                f"{name!r} is a {type(module).__name__}; the mean-weight rule applies to linear layers only"
            )
        found[name] = module
    removed = {}
    for name, module in found.items():
        mask: Tensor | None = getattr(module, "weight_mask", None)
        kept = over_mean(getattr(module, "weight_orig", module.weight), mask)
        before = kept.numel() if mask is None else int(mask.sum())
        prune.custom_from_mask(module, "weight", kept.to(module.weight.dtype))
        removed[name] = before - int(kept.sum())
    return removed
