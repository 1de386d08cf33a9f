"""torch-pruning's dependency graph as unit groups, and structural removal of units through it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.checks import misread
from nns_plugin.adapters.torch_pruning.tracing import TracedGroup, is_consumer, name_of, owns, ports_of, trace_group
from nns_plugin.errors import GroupError, PruningError
from nns_plugin.models.inputs import device_of, map_tensors, run_model
from nns_plugin.models.layers import axis_length
from nns_plugin.models.preserve import preserved
from nns_plugin.units import Port, UnitGroup, complement, role_ports

ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)

__all__ = [
    "TracedGraph",
    "TracedGroup",
    "UncheckedGroupsWarning",
    "UnusableGroupWarning",
    "build_graph",
    "carriers",
    "graph_groups",
    "groups_with_parameters",
    "output_layers",
    "remove_units",
    "resolve_layers",
    "sound_groups",
    "trace_group",
    "unit_groups",
    "writes_output",
]


class UnusableGroupWarning(UserWarning):
    """A group was left out because its ports are malformed or its host cannot remove its units."""


class UncheckedGroupsWarning(UserWarning):
    """Gradients could not tell whether units are read where the host says."""


def unit_groups(
    model: nn.Module, example_inputs: Any, ignored_layers: Iterable[nn.Module | str] | None = None
) -> tuple[UnitGroup, ...]:
    """Find the units of a model that can be removed.

    Groups that write the model's output (the labels) are no units and are left out. A group whose ports are
    malformed, or that is read elsewhere than torch-pruning thinks, is left out and named in an
    :class:`UnusableGroupWarning`. The model is left as it was found.

    Args:
        model: The model; frozen parameters are no obstacle.
        example_inputs: A tensor, or a tuple or mapping of tensors, that the model can run on.
        ignored_layers: Modules, or names of modules, whose outputs must stay whole.

    Returns:
        The groups, in the order of their first producers in the model.

    Raises:
        GroupError: If the model cannot run on the example inputs, or an ignored layer does not exist.
    """
    ignored = resolve_layers(model, ignored_layers or ())
    return graph_groups(build_graph(model, example_inputs), ignored)


class TracedGraph(tp.DependencyGraph):
    """A dependency graph that remembers the inputs it was traced on."""

    example_inputs: Any


def build_graph(model: nn.Module, example_inputs: Any) -> TracedGraph:
    """Trace a model into a fresh dependency graph, leaving the model as it was found.

    Raises:
        GroupError: If the model cannot run on the example inputs or cannot be traced.
    """
    graph = TracedGraph()
    with preserved(model), _no_hooks_left(model), torch.inference_mode(False), torch.enable_grad():
        # A frozen parameter would cut the graph that torch-pruning reads.
        for parameter in model.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        try:
            # Tensors of inference mode, which clone() makes ordinary, have no gradients.
            graph.example_inputs = map_tensors(example_inputs, lambda value: value.to(device_of(model)).clone())
            # Without forward_fn, the host takes a batch apart and calls the model on its inputs as if they were many.
            graph.build_dependency(
                model, graph.example_inputs, forward_fn=run_model, output_transform=_own_operations, verbose=False
            )
        except Exception as error:
            raise GroupError(
                f"the model cannot be traced on example inputs of shape {_shapes(example_inputs)}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
    return graph


def graph_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> tuple[UnitGroup, ...]:
    """The unit groups of a graph; see :func:`unit_groups`."""
    groups = sound_groups(graph, ignored)
    if isinstance(graph, TracedGraph):
        for name, reason in _misread(graph, groups).items():
            _leave_out(f"group of {name!r}: {reason}")
            groups = tuple(group for group in groups if group.name != name)
    return groups


def sound_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> tuple[UnitGroup, ...]:
    """The same, taking the host's word for where units are read."""
    with torch.inference_mode(False):  # no tensors of inference mode in what is kept
        groups = _sound_groups(graph, ignored)
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def _sound_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module]) -> list[UnitGroup]:
    groups = []
    for host_group in _host_groups(graph, ignored):
        if writes_output(host_group):
            if any(is_consumer(graph, item.dep) for item in host_group):
                name = name_of(graph, host_group[0].dep)
                _leave_out(f"group of {name!r}: its units are an output of the model, besides being read in it")
            continue
        try:
            groups.append(trace_group(host_group).group)
        except GroupError as error:
            _leave_out(str(error))
    return groups


def carriers(graph: tp.DependencyGraph) -> dict[str, tuple[Port, ...]]:
    """Where the units of each group stand on out axes: at what writes them, and at what passes them on.

    Returns:
        By name of the group the ports of producers, norms, depthwise convolutions and other modules that have units on
        their out axes, in the order of the host.
    """
    found: dict[str, tuple[Port, ...]] = {}
    for host_group, traced in _followed(graph):
        ports: dict[str, Port] = {}
        for item in host_group:
            name = graph._module2name.get(item.dep.target.module)
            passes = graph.is_out_channel_pruning_fn(item.dep.handler)
            if name is not None and passes and not isinstance(item.dep.target.module, nn.Parameter):
                roots = torch.tensor(item.root_idxs, dtype=torch.int64)
                ports[name] = Port(name, torch.tensor(item.idxs, dtype=torch.int64), traced.unit_of_root[roots])
        found[traced.group.name] = tuple(ports.values())
    return found


def groups_with_parameters(graph: tp.DependencyGraph) -> frozenset[str]:
    """Names of the groups whose units meet a parameter that belongs to no layer: an embedding of positions, a gate."""
    return frozenset(
        traced.group.name
        for host_group, traced in _followed(graph)
        if any(isinstance(item.dep.target.module, nn.Parameter) for item in host_group)
    )


def _followed(graph: tp.DependencyGraph) -> Iterator[tuple[tp.dependency.Group, TracedGroup]]:
    """The host's groups that can be followed; :func:`graph_groups` tells of the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusableGroupWarning)
        host_groups = _host_groups(graph)
    for host_group in host_groups:
        if not writes_output(host_group):
            with suppress(GroupError):
                yield host_group, trace_group(host_group)


def groups_again(graph: tp.DependencyGraph, former: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Those groups of a host's graph that were found before, as they are now.

    Where units are read was checked when the former groups were found; a host's own graph keeps no inputs to check
    new ones with.
    """
    known = {group.name for group in former}
    return tuple(group for group in graph_groups(graph) if group.name in known)


def resolve_layers(model: nn.Module, layers: Iterable[nn.Module | str]) -> list[nn.Module]:
    """Modules of a model given as such or by name, with everything inside them.

    Raises:
        GroupError: If one is not in the model; types are no layers.
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
                f"ignored layer {layer!r} is not in the model; expected a module of it or one of its names, such as "
                f"{', '.join([name for name in modules if name][:5])}"
            )
        found.extend(module.modules())
    return found


def writes_output(host_group: tp.dependency.Group) -> bool:
    """Whether the units of a group are the model's outputs themselves."""
    positions = len(host_group[0].idxs)
    shapes = [item.dep.target.module.shape for item in host_group if item.dep.target.type == tp.ops.OPTYPE.OUTPUT]
    if shapes:
        # A flattened map has them many times over; a product of two embeddings has contracted them.
        return any(length and length % positions == 0 for shape in shapes for length in shape)
    if any(is_consumer(host_group._DG, item.dep) for item in host_group):
        return False
    return any(not item.dep.target.outputs for item in host_group)


def output_layers(graph: tp.DependencyGraph) -> tuple[str, ...]:
    """Names of the layers whose positions are the model's outputs."""
    return tuple(
        port.name
        for host_group in _host_groups(graph)
        if writes_output(host_group)
        for item in host_group
        for role, port in ports_of(graph, item)
        if role == "out"
    )


def remove_units(graph: tp.DependencyGraph, group: UnitGroup, units: Tensor) -> None:
    """Remove units of one group from the graph's model.

    Args:
        graph: Dependency graph of the model, up to date with all earlier removals.
        group: The group as it is now, see :func:`nns_plugin.units.narrow_groups`; removals from other groups do not
            matter.
        units: ``[k]`` int64 units to remove.

    Raises:
        PruningError: If the host would remove something else, or would leave a layer empty. The model is
            untouched then.
    """
    units = units.unique()
    if units.numel() == 0:
        return
    if int(units[0]) < 0 or int(units[-1]) >= group.size:
        raise PruningError(
            f"units {units.tolist()} of group {group.name!r} cannot be removed, it has {group.size} units"
        )
    model, parts = graph.model, _parts(group, units)
    host_groups = [_removal(graph, group, part) for part in parts]
    for role, port in role_ports(group):
        axis = axis_length(model.get_submodule(port.name), role, port.name)
        if port.index.numel() > axis:
            raise PruningError(
                f"group {group.name!r} has {port.index.numel()} positions at {port.name!r}, which has {axis} now; "
                "narrow the group after each removal, or trace the model again"
            )
        if port.positions(units).numel() == axis:
            raise PruningError(
                f"removing {units.numel()} units of group {group.name!r} would leave {port.name!r} empty"
            )
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        host_groups[0].prune()
        gone = parts[0]
        for part in parts[1:]:
            left = complement(group.size, gone)
            _removal(graph, group.narrow(left), torch.searchsorted(left, part)).prune()
            gone = torch.cat([gone, part])
    for name, parameter in model.named_parameters():  # the host makes new parameters, all trainable
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))


def _parts(group: UnitGroup, units: Tensor) -> list[Tensor]:
    """The units, apart where no producer writes all of them (branches side by side in a concatenation)."""
    if any(bool(torch.isin(units, port.unit).all()) for port in group.producers):
        return [units]
    parts = []
    for port in group.producers:
        mine = torch.isin(units, port.unit)
        if bool(mine.any()):
            parts.append(units[mine])
            units = units[~mine]
    return parts


def _removal(graph: tp.DependencyGraph, group: UnitGroup, units: Tensor) -> tp.dependency.Group:
    """The host's group that removes units which one producer writes, checked."""
    ports = [port for port in group.producers if bool(torch.isin(units, port.unit).all())]
    try:
        # A layer that several groups share may have moved since the group was found, one of its own has not.
        port = max(ports, key=lambda port: owns(graph, port))
        module = graph.model.get_submodule(port.name)
        pruner = graph.get_pruner_of_module(module)
        host_group = graph.get_pruning_group(module, pruner.prune_out_channels, port.positions(units).tolist())
        found = {
            (role, port.name): port.index.sort().values for item in host_group for role, port in ports_of(graph, item)
        }
    except (AttributeError, ValueError) as error:
        raise PruningError(
            f"units of group {group.name!r} cannot be removed, the model is not the one that was traced: {error}"
        ) from error
    expected = {(role, port.name): port.positions(units) for role, port in role_ports(group)}
    for (role, name), positions in expected.items():
        there = found.get((role, name), positions[:0])
        # Other groups' removals may have moved the positions on a shared layer, but not their number.
        if there.numel() != positions.numel():
            raise PruningError(
                f"removing {units.numel()} units of group {group.name!r} should take {positions.numel()} positions of "
                f"{name!r}, but torch-pruning would take {there.numel()}; trace the model again"
            )
    if not graph.check_pruning_group(host_group):
        raise PruningError(f"removing {units.numel()} units of group {group.name!r} would leave a layer empty")
    return host_group


def _host_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> list[tp.dependency.Group]:
    """All full groups of a graph; roots that the host cannot follow are named in a warning."""
    ignored = list(ignored)
    try:
        return list(graph.get_all_groups(ignored_layers=ignored, root_module_types=list(ROOTS)))
    except Exception:  # the host fails in any way on operations that it does not know
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
    with preserved(model), _no_hooks_left(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        try:
            return misread(model, graph.example_inputs, groups)
        except RuntimeError as error:  # operations without gradients, or that overwrite what gradients need
            warnings.warn(
                "where units are read could not be checked, torch-pruning's word is taken for it: "
                f"{str(error).splitlines()[0]}",
                UncheckedGroupsWarning,
                stacklevel=4,
            )
            return {}


def _own_operations(outputs: Any) -> list[Tensor]:
    """Give every output an operation of its own, so that the graph has a node for it."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        if value.requires_grad:
            found.append(value + 0)
        return value

    map_tensors(outputs, keep)
    if not found:
        raise GroupError("no output of the model has a gradient")
    return found


def _leave_out(reason: str) -> None:
    warnings.warn(f"left out: {reason}", UnusableGroupWarning, stacklevel=4)


@contextmanager
def _no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that the host leaves behind when the model's forward raises."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for handle in [handle for handle in module._forward_hooks if handle not in known]:
                del module._forward_hooks[handle]


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return str(list(inputs.shape))
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    )
    return ", ".join(_shapes(value) if isinstance(value, Tensor) else type(value).__name__ for value in values)
