"""Exchange synapses: mask the lowest-scoring ones and restore as many masked ones that promise more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nns_plugin.errors import PruningError
from nns_plugin.models.layers import weight_of
from nns_plugin.synapses.masks import mask_synapses, scored_layers, synapse_layers, synapse_mask
from nns_plugin.synapses.snapshot import WeightSnapshot


def exchange_synapses(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    growth: Mapping[str, Tensor],
    share: float,
    snapshot: WeightSnapshot | None = None,
) -> int:
    """Mask the lowest-scoring synapses and restore as many masked ones, across all layers together.

    Args:
        model: With masked layers; changed in place.
        scores: A score for every synapse, by name of the layer; those of masked synapses do not matter.
        growth: How much every masked synapse promises, by name of the layer, such as :func:`synapse_gradients`; a
            synapse that promises nothing (0 or less) stays masked.
        share: Share of the unmasked synapses to exchange, in [0, 1]; fewer are exchanged if too few masked ones promise
            anything.
        snapshot: Weights from which restored synapses start; 0 by default.

    Returns:
        The number of exchanged synapses.

    Raises:
        PruningError: If the share is out of range, or scores or growth do not fit the layers; nothing is changed then.

    Source:
        Evci et al., "Rigging the lottery: making all tickets winners", 2020, for growth by gradient.

    Example:
        >>> from nns_plugin.synapses.masks import prune_synapses
        >>> layer = nn.Sequential(nn.Linear(3, 1))
        >>> _ = prune_synapses(layer, {"0": torch.tensor([[3.0, 2.0, 1.0]])}, amount=1)
        >>> exchange_synapses(layer, {"0": torch.tensor([[3.0, 2.0, 1.0]])}, {"0": torch.ones(1, 3)}, 0.5)
        1
        >>> layer[0].weight_mask
        tensor([[1., 0., 1.]])
    """
    layers = scored_layers(model, scores)
    scored_layers(model, growth)
    if not 0 <= share <= 1 or growth.keys() != scores.keys():
        raise PruningError(
            f"share is {share} and growth covers the layers {', '.join(growth)}; expected a share in [0, 1] "
            f"and the layers {', '.join(scores)}"
        )
    mask = torch.cat([synapse_mask(module).flatten().cpu() for module in layers.values()])
    rank, promise = (
        torch.cat([values[name].detach().double().cpu().flatten() for name in layers]) for values in (scores, growth)
    )
    candidates = (~mask & (promise > 0)).nonzero().flatten()
    left = mask.nonzero().flatten()
    count = min(round(share * left.numel()), candidates.numel())
    removed = left[rank[left].argsort(stable=True)[:count]]
    back = candidates[promise[candidates].argsort(descending=True, stable=True)[:count]]
    mask[removed], mask[back] = False, True
    restored = torch.zeros_like(mask)
    restored[back] = True
    if snapshot is not None:
        snapshot.check({f"{name}.weight": scores[name] for name in layers})
    sizes = [score.numel() for score in scores.values()]
    for (name, module), kept, new in zip(layers.items(), mask.split(sizes), restored.split(sizes), strict=True):
        weight = getattr(module, "weight_orig", None)
        if isinstance(weight, Tensor):
            _remask(module, weight, kept.reshape(weight.shape), new.reshape(weight.shape), snapshot, name)
        elif not bool(kept.all()):
            mask_synapses(module, kept.reshape(scores[name].shape))
    return count


@torch.no_grad()
def _remask(
    module: nn.Module, weight: Tensor, kept: Tensor, new: Tensor, snapshot: WeightSnapshot | None, name: str
) -> None:
    """Replace the mask of a masked layer and set its restored synapses to their start values."""
    start = torch.zeros_like(weight) if snapshot is None else snapshot.weights[f"{name}.weight"].to(weight)
    weight.copy_(torch.where(new.to(weight.device), start, weight))
    mask = module.weight_mask
    assert isinstance(mask, Tensor)
    mask.copy_(kept)
    module.weight = weight * mask


def synapse_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Compute the magnitude of a loss's gradient for every synapse, including masked ones.

    The gradients stored on the model are not touched.

    Args:
        model: Its linear and convolutional layers are used.
        loss: A scalar computed from the model's latest forward pass.

    Returns:
        The magnitudes by name of the layer, of its weight's shape; 0 where the loss does not depend on the layer.
    """
    layers = synapse_layers(model)
    weights = [weight_of(module) for module in layers.values()]
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient.detach().abs()
        for name, weight, gradient in zip(layers, weights, found, strict=True)
    }
