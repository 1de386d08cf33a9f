"""Norms over units, whose channels torch-pruning does not remove correctly: pruners that do.

Measured with torch-pruning 1.6.1. A ``LayerNorm`` that loses more than a quarter of its channels may end up with the
kept weights in another order. Of an ``nn.RMSNorm`` the weight is cut, as a parameter that belongs to no layer, but not
``normalized_shape``, so that the model no longer runs; an ``nn.RMSNorm`` without weight is in no group at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.units import complement

Norm = nn.LayerNorm | nn.RMSNorm
ALWAYS_SORTED = 8  # a set of integers below this is iterated in ascending order; the host relies on it for any


class MisprunedNormWarning(UserWarning):
    """torch-pruning's own step removes the channels of a norm wrongly."""


class NormPruner(tp.pruner.function.BasePruningFunc):
    """Removes channels of a ``LayerNorm`` or ``RMSNorm`` for torch-pruning."""

    def prune_out_channels(self, layer: Norm, idxs: Sequence[int]) -> Norm:
        """Remove channels in place; the others stay in their order, and ``normalized_shape`` follows."""
        kept = complement(layer.normalized_shape[-1], torch.tensor(idxs, dtype=torch.int64))
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(layer, name, self._prune_parameter_and_grad(parameter, kept.to(parameter.device), -1))
        layer.normalized_shape = (*layer.normalized_shape[:-1], kept.numel())
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Norm) -> int:
        """Number of channels."""
        return layer.normalized_shape[-1]

    get_in_channels = get_out_channels


def norm_pruners() -> dict[type[nn.Module], NormPruner]:
    """Return ``customized_pruners=`` for torch-pruning's pruners that remove the channels of norms correctly.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 3))
        >>> pruner = tp.pruner.BasePruner(
        ...     model,
        ...     torch.randn(2, 4),
        ...     importance=tp.importance.MagnitudeImportance(),
        ...     pruning_ratio=0.5,
        ...     ignored_layers=[model[2]],
        ...     customized_pruners=norm_pruners(),
        ... )
        >>> pruner.step()
        >>> model[1]
        RMSNorm((4,), eps=None, elementwise_affine=True)
    """
    return {nn.LayerNorm: NormPruner(), nn.RMSNorm: NormPruner()}


def misprunable_norms(host_group: tp.dependency.Group) -> dict[str, str]:
    """What torch-pruning's own step would do wrongly to the norms of a full group, by name of the norm."""
    names = {module: name for name, module in host_group._DG.model.named_modules()}
    found = {}
    for norm, _ in _norms(host_group):
        if type(norm) in host_group._DG.CUSTOMIZED_PRUNERS:
            continue
        if isinstance(norm, nn.RMSNorm):
            found[names[norm]] = "leaves its normalized_shape as it is, so that the model no longer runs"
        elif norm.elementwise_affine and norm.normalized_shape[-1] > ALWAYS_SORTED:
            found[names[norm]] = "may reorder its weights"
    return found


def unseen_norms(graph: tp.DependencyGraph) -> list[str]:
    """Names of the norms that torch-pruning does not see: ``nn.RMSNorm`` without weight, unless it has a pruner."""
    return [
        name
        for name, module in graph.model.named_modules()
        if isinstance(module, nn.RMSNorm) and module.weight is None and type(module) not in graph.CUSTOMIZED_PRUNERS
    ]


def prune_group(host_group: tp.dependency.Group) -> None:
    """Carry out the removal of a group; norms end up correct, and ``requires_grad`` is preserved."""
    model: nn.Module = host_group._DG.model
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    norms = []
    for norm, removed in _norms(host_group):
        kept = complement(norm.normalized_shape[-1], removed)
        values = {
            name: parameter.detach().index_select(-1, kept.to(parameter.device))
            for name, parameter in norm.named_parameters(recurse=False)
        }
        norms.append((norm, (*norm.normalized_shape[:-1], kept.numel()), values))
    with torch.no_grad():
        host_group.prune()
        for norm, shape, values in norms:
            norm.normalized_shape = shape
            for name, value in values.items():
                norm.get_parameter(name).copy_(value)
    for name, parameter in model.named_parameters():  # the host makes new parameters, all trainable
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))


def _norms(host_group: tp.dependency.Group) -> Iterator[tuple[Norm, Tensor]]:
    """The norms over units that a group passes, and the channels that they lose, ``[k]`` int64."""
    owners = {id(norm.weight): norm for norm in host_group._DG.model.modules() if isinstance(norm, nn.RMSNorm)}
    removed: dict[Norm, list[int]] = {}
    for item in host_group:
        module = owners.get(id(item.dep.target.module), item.dep.target.module)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            removed.setdefault(module, []).extend(item.idxs)
    for norm, positions in removed.items():
        yield norm, torch.tensor(positions, dtype=torch.int64).unique()
