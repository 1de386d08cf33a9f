"""The unit groups of a model, found in its dependency graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nns_plugin.adapters.torch_pruning.checks import misread
from nns_plugin.adapters.torch_pruning.graph import TracedGraph, build_graph, no_hooks_left
from nns_plugin.adapters.torch_pruning.traced_group import (
    TracedGroup,
    is_consumer,
    name_of,
    ports_of,
    trace_group,
)
from nns_plugin.errors import GroupError
from nns_plugin.models.layers import Convolution
from nns_plugin.models.preserve import preserved
from nns_plugin.units import UnitGroup

ROOTS = (Convolution, nn.Linear, nn.LSTM)


class UnusableGroupWarning(UserWarning):
    """A group was left out because its ports are malformed or its host cannot remove its units."""


class UncheckedGroupsWarning(UserWarning):
    """Gradients could not check whether consumers read units where torch-pruning says."""


def unit_groups(
    model: nn.Module, example_inputs: Any, ignored_layers: Iterable[nn.Module | str] | None = None
) -> tuple[UnitGroup, ...]:
    """Find the units of a model that can be removed.

    Groups that write the model's output (the labels) are left out. A group whose ports are malformed, or whose
    consumers read it at other positions than torch-pruning says, is left out and named in an
    :class:`UnusableGroupWarning`. The model is left as it was found.

    Args:
        model: The model; its parameters may be frozen.
        example_inputs: A tensor, or a tuple or mapping of tensors, that the model can run on.
        ignored_layers: Modules, or names of modules, whose outputs must stay whole.

    Returns:
        The groups, in the order of their first producers in the model.

    Raises:
        GroupError: If the model cannot run on the example inputs, or an ignored layer does not exist.
    """
    ignored = resolve_layers(model, ignored_layers or ())
    return graph_groups(build_graph(model, example_inputs), ignored)


def graph_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> tuple[UnitGroup, ...]:
    """The unit groups of a graph; see :func:`unit_groups`."""
    return checked_groups(graph, sound_groups(graph, ignored))


def sound_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> tuple[UnitGroup, ...]:
    """The unit groups of a graph, without a check of where units are read."""
    return tuple(traced.group for _, traced in followed_groups(graph, ignored))


def checked_groups(graph: tp.DependencyGraph, groups: tuple[UnitGroup, ...]) -> tuple[UnitGroup, ...]:
    """The groups whose consumers read them where torch-pruning says; the others are named in a warning."""
    if isinstance(graph, TracedGraph):
        for name, reason in _misread(graph, groups).items():
            _leave_out(f"group of {name!r}: {reason}")
            groups = tuple(group for group in groups if group.name != name)
    return groups


def followed_groups(
    graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()
) -> list[tuple[tp.dependency.Group, TracedGroup]]:
    """The host's groups whose units can be removed, in the order of their first producers in the model.

    Groups that the host cannot follow are named in a warning; those that write the model's output are left out.
    """
    found = []
    with torch.inference_mode(False):  # the groups must not hold tensors of inference mode
        for host_group in _host_groups(graph, ignored):
            if writes_output(host_group):
                if any(is_consumer(graph, item.dep) for item in host_group):
                    name = name_of(graph, host_group[0].dep)
                    _leave_out(f"group of {name!r}: its units are an output of the model and read inside it")
                continue
            try:
                found.append((host_group, trace_group(host_group)))
            except GroupError as error:
                _leave_out(str(error))
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    return sorted(found, key=lambda pair: order[pair[1].group.name])


def groups_again(graph: tp.DependencyGraph, former: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """The groups of a host's graph that were found before, as they are now.

    Where they are read was checked when they were found; a host's own graph keeps no inputs to check it again.
    """
    known = {group.name for group in former}
    return tuple(group for group in graph_groups(graph) if group.name in known)


def resolve_layers(model: nn.Module, layers: Iterable[nn.Module | str]) -> list[nn.Module]:
    """Modules of a model, given as such or by name, with all their submodules.

    Raises:
        GroupError: If one is not a module of the model; types are not accepted.
    """
    modules = dict(model.named_modules())
    present = set(modules.values())
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise GroupError(f"ignored_layers is {layers!r}; it must be a list of modules or of their names")
    found: list[nn.Module] = []
    for layer in layers:
        module = modules.get(layer) if isinstance(layer, str) else layer
        if not isinstance(module, nn.Module) or module not in present:
            raise GroupError(
                f"ignored layer {layer!r} is not in the model; expected one of its modules or their names, such as "
                f"{', '.join([name for name in modules if name][:5])}"
            )
        found.extend(module.modules())
    return found


def writes_output(host_group: tp.dependency.Group) -> bool:
    """Whether the units of a group are the model's outputs themselves."""
    positions = len(host_group[0].idxs)
    shapes = [item.dep.target.module.shape for item in host_group if item.dep.target.type == tp.ops.OPTYPE.OUTPUT]
    if shapes:
        # A flattened map repeats each unit; a product of two embeddings has contracted the units.
        return any(length and length % positions == 0 for shape in shapes for length in shape)
    if any(is_consumer(host_group._DG, item.dep) for item in host_group):
        return False
    return any(not item.dep.target.outputs for item in host_group)


def output_layers(graph: tp.DependencyGraph) -> tuple[str, ...]:
    """Names of the layers that write the model's outputs."""
    return tuple(
        port.name
        for host_group in _host_groups(graph)
        if writes_output(host_group)
        for item in host_group
        for role, port in ports_of(graph, item)
        if role == "out"
    )


def _host_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> list[tp.dependency.Group]:
    """All full groups of a graph; roots that the host cannot follow are named in a warning."""
    ignored = list(ignored)
    try:
        return list(graph.get_all_groups(ignored_layers=ignored, root_module_types=list(ROOTS)))
    except Exception:  # the host fails in various ways on operations that it does not know
        pass
    for module in [module for module in graph.module2node if isinstance(module, ROOTS) and module not in ignored]:
        pruner = graph.get_pruner_of_module(module)
        try:
            graph.get_pruning_group(module, pruner.prune_out_channels, list(range(pruner.get_out_channels(module))))
        except Exception as error:
            name = graph._module2name.get(module)
            _leave_out(f"group of {name!r}: torch-pruning cannot follow its units: {type(error).__name__}: {error}")
            ignored.append(module)
    return list(graph.get_all_groups(ignored_layers=ignored, root_module_types=list(ROOTS)))


def _misread(graph: TracedGraph, groups: Sequence[UnitGroup]) -> dict[str, str]:
    model = graph.model
    with preserved(model), no_hooks_left(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        try:
            return misread(model, graph.example_inputs, groups)
        except RuntimeError as error:  # operations without gradients, or that overwrite what gradients need
            warnings.warn(
                f"could not check where units are read, so torch-pruning is trusted: {str(error).splitlines()[0]}",
                UncheckedGroupsWarning,
                stacklevel=4,
            )
            return {}


def _leave_out(reason: str) -> None:
    warnings.warn(f"left out: {reason}", UnusableGroupWarning, stacklevel=4)
