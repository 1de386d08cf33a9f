"""Synapses: pruning of single weights, through the masks of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune

from nns_plugin.errors import PruningError
from nns_plugin.models.layers import Convolution, weight_of
from nns_plugin.synapses.snapshot import WeightSnapshot

SYNAPSES = (nn.Linear, Convolution)


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


def significance(model: nn.Module, snapshot: WeightSnapshot) -> dict[str, Tensor]:
    """Weight significance factor of every synapse: how far training has moved it.

    Args:
        model: As it is now; left as it is.
        snapshot: Its weights before training, or at any earlier checkpoint.

    Returns:
        For the name of each linear and convolutional layer |w(t) - w(0)| of its weight, of the weight's shape, float64
        on the CPU. A masked weight counts as what lies behind the mask. Biases are no synapses.

    Raises:
        SnapshotError: If the snapshot is of another architecture.
        PruningError: If a layer's weight is no parameter, but computed from others.

    Source:
        Bulin and Smidl, "Optimization of Neural Network": WSF(k) = |w_k(t_f) - w_k(0)|.
    """
    movement = snapshot.movement(model)
    layers = synapse_layers(model)
    computed = [name for name in layers if f"{name}.weight" not in movement]
    if computed:
        raise PruningError(
            f"the weights of {', '.join(computed)} are computed from other parameters, as by weight_norm, so that "
            "their synapses cannot be masked; make them plain parameters first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)"
        )
    return {name: movement[f"{name}.weight"] for name in layers}


def synapse_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with synapses, by name.

    The output layers of attention are left out: they never run as layers, so that masks would not be renewed.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SYNAPSES) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def prune_synapses(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    amount: float | int | None = None,
    threshold: float | None = None,
    global_pruning: bool = False,
) -> dict[str, int]:
    """Mask the synapses that score lowest, through ``torch.nn.utils.prune``.

    Synapses that are masked already stay masked, and do not count.

    Args:
        model: Changed in place.
        scores: For each layer's name a score of every synapse, of its weight's shape; such as :func:`significance`.
        amount: How many of those that are left to mask, in each layer: a share in [0, 1], or a number.
        threshold: Mask the synapses that score less than this, in place of an amount.
        global_pruning: Rank the synapses of all layers together; an amount is then of all of them.

    Returns:
        For each layer the number of synapses that were masked by this call.

    Raises:
        PruningError: If not exactly one of ``amount`` and ``threshold`` is given, an amount is out of range, or scores
            do not fit the layers; nothing is masked then.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1))
        >>> prune_synapses(layer, {"0": torch.tensor([[0.5, 2.0]])}, amount=0.5)
        {'0': 1}
        >>> layer[0].weight_mask
        tensor([[0., 1.]])
    """
    if not scores or (threshold is not None and threshold != threshold):
        raise PruningError(f"there are scores of {len(scores)} layers, and the threshold is {threshold}; expected some")
    if (amount is None) == (threshold is None):
        raise PruningError(f"amount is {amount} and threshold {threshold}; give one of them")
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


def exchange_synapses(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    growth: Mapping[str, Tensor],
    share: float,
    snapshot: WeightSnapshot | None = None,
) -> int:
    """Mask the synapses that score lowest, and bring back as many masked ones, of all layers together.

    Args:
        model: With masked layers; changed in place.
        scores: For each layer's name a score of every synapse; those of masked ones do not matter.
        growth: For each layer's name how much every masked synapse promises, such as :func:`synapse_gradients`; one
            that promises nothing (0 or less) stays masked.
        share: Of the synapses that are there, in [0, 1]; fewer are exchanged where fewer masked ones promise something.
        snapshot: What returning synapses start from; 0 by default.

    Returns:
        How many were exchanged.

    Raises:
        PruningError: If the share is out of range, or scores or growth do not fit the layers; nothing is changed then.

    Source:
        Evci et al., "Rigging the lottery: making all tickets winners", 2020, for growth by gradient.

    Example:
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
            f"share is {share} and growth is of the layers {', '.join(growth)}; expected a share in [0, 1] and the "
            f"layers {', '.join(scores)}"
        )
    there = torch.cat([synapse_mask(module).flatten().cpu() for module in layers.values()])
    rank, promise = (
        torch.cat([values[name].detach().double().cpu().flatten() for name in layers]) for values in (scores, growth)
    )
    candidates = (~there & (promise > 0)).nonzero().flatten()
    left = there.nonzero().flatten()
    count = min(round(share * left.numel()), candidates.numel())
    gone = left[rank[left].argsort(stable=True)[:count]]
    back = candidates[promise[candidates].argsort(descending=True, stable=True)[:count]]
    there[gone], there[back] = False, True
    returned = torch.zeros_like(there)
    returned[back] = True
    if snapshot is not None:
        snapshot.check({f"{name}.weight": scores[name] for name in layers})
    sizes = [score.numel() for score in scores.values()]
    for (name, module), kept, new in zip(layers.items(), there.split(sizes), returned.split(sizes), strict=True):
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
    """Give a masked layer another mask, and its returning synapses the values that they start from."""
    start = torch.zeros_like(weight) if snapshot is None else snapshot.weights[f"{name}.weight"].to(weight)
    weight.copy_(torch.where(new.to(weight.device), start, weight))
    mask = module.weight_mask
    assert isinstance(mask, Tensor)
    mask.copy_(kept)
    module.weight = weight * mask


def synapse_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Magnitude of a loss's gradient for every synapse, masked ones included; gradients of the model are not touched.

    Args:
        model: Linear and convolutional layers in it are looked at.
        loss: A number that the model's latest forward led to.

    Returns:
        By name of the layer, of its weight's shape; 0 where the loss does not depend on a layer.
    """
    layers = synapse_layers(model)
    weights = [weight_of(module) for module in layers.values()]
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient.detach().abs()
        for name, weight, gradient in zip(layers, weights, found, strict=True)
    }


def synapse_mask(module: nn.Module) -> Tensor:
    """Which synapses of a layer are there, bool of its weight's shape."""
    mask = getattr(module, "weight_mask", None)
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.ones_like(weight_of(module), dtype=torch.bool)


def mask_synapses(module: nn.Module, kept: Tensor) -> None:
    """Mask all but some synapses of a layer, in place; in a mask that is there already, which thereby does not grow.

    Args:
        module: A layer with a weight.
        kept: Bool of its weight's shape; synapses that are masked already stay masked.
    """
    mask, original = getattr(module, "weight_mask", None), getattr(module, "weight_orig", None)
    if not isinstance(mask, Tensor) or not isinstance(original, Tensor):
        prune.custom_from_mask(module, "weight", kept.to(weight_of(module).device))
        return
    mask.mul_(kept.to(mask))
    module.weight = original * mask


def _ranked(scores: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """Scores as torch wants them: it takes the lowest magnitudes, so that what may be negative becomes a rank."""
    joined = torch.cat([score.detach().double().cpu().flatten() for score in scores.values()])
    ranks = (joined.unique(return_inverse=True)[1] + 1).double()
    parts = ranks.split([score.numel() for score in scores.values()])
    return {
        name: part.reshape(score.shape).to(devices[name])
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def scored_layers(model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The layers that scores name.

    Raises:
        PruningError: If a layer is missing, or a score is not finite or not of its weight's shape.
    """
    return {name: _layer(model, name, score) for name, score in scores.items()}


def _layer(model: nn.Module, name: str, score: Tensor) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise PruningError(f"there is no module {name!r} in the model; name its layers") from error
    weight = getattr(module, "weight", None)
    if not isinstance(score, Tensor):
        raise PruningError(f"the scores of {name!r} are a {type(score).__name__}; expected a tensor")
    if not isinstance(weight, Tensor) or weight.shape != score.shape:
        found = list(weight.shape) if isinstance(weight, Tensor) else "missing"
        raise PruningError(f"the scores of {name!r} are {list(score.shape)}, but its weight is {found}")
    if not bool(torch.isfinite(score).all()):
        raise PruningError(f"the scores of {name!r} are not all finite; synapses cannot be ranked by them")
    return module


def _check_amount(amount: float | int | None, total: int | None, left: Mapping[str, Tensor]) -> None:
    if amount is None:
        return
    most = min((int(mask.sum()) for mask in left.values()), default=0) if total is None else total
    share = isinstance(amount, float)
    if isinstance(amount, bool) or not 0 <= amount <= (1 if share else most):
        raise PruningError(
            f"amount is {amount}; expected a share in [0, 1], or a number of synapses up to the {most} that are left"
        )


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
