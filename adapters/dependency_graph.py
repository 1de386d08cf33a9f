"""torch-pruning's dependency graph as unit groups, and structural removal of units through it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.errors import GroupError, PruningError
from nns_plugin.preserve import preserved
from nns_plugin.units import Port, UnitGroup, check_group, check_port

READERS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)
WRITERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention)
ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)


class UnusableGroupWarning(UserWarning):
    """A group was left out because its ports are malformed or its host cannot remove its units."""


@dataclass(frozen=True, eq=False)
class TracedGroup:
    """A unit group as found in a dependency graph.

    Attributes:
        group: The unit group; units are numbered by their first position on the first producer, whatever root
            the host chose.
        unit_of_root: ``[n]`` int64, the unit that each position of the host's root belongs to.
    """

    group: UnitGroup
    unit_of_root: Tensor


def unit_groups(
    model: nn.Module, example_inputs: Any, ignored_layers: Iterable[nn.Module | str] | None = None
) -> tuple[UnitGroup, ...]:
    """Find the units of a model that can be removed.

    Groups that write the model's output (the labels) are no units and are left out. A group whose ports are
    malformed is left out and named in an :class:`UnusableGroupWarning`. The model is left as it was found.

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


def build_graph(model: nn.Module, example_inputs: Any) -> tp.DependencyGraph:
    """Trace a model into a fresh dependency graph, leaving the model as it was found.

    Raises:
        GroupError: If the model cannot run on the example inputs or cannot be traced.
    """
    with preserved(model), _no_hooks_left(model), torch.inference_mode(False), torch.enable_grad():
        # A frozen parameter would cut the graph that torch-pruning reads.
        for parameter in model.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        try:
            return tp.DependencyGraph().build_dependency(model, example_inputs, verbose=False)
        except Exception as error:
            raise GroupError(
                f"the model cannot be traced on example inputs of shape {_shapes(example_inputs)}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error


def graph_groups(graph: tp.DependencyGraph, ignored: Sequence[nn.Module] = ()) -> tuple[UnitGroup, ...]:
    """The unit groups of a graph; see :func:`unit_groups`."""
    groups = []
    for host_group in graph.get_all_groups(ignored_layers=list(ignored), root_module_types=list(ROOTS)):
        if writes_output(host_group):
            continue
        try:
            groups.append(trace_group(host_group).group)
        except GroupError as error:
            warnings.warn(f"left out: {error}", UnusableGroupWarning, stacklevel=3)
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def resolve_layers(model: nn.Module, layers: Iterable[nn.Module | str]) -> list[nn.Module]:
    """Modules of a model given as such or by name, with everything inside them.

    Raises:
        GroupError: If one is not in the model; types are no layers.
    """
    modules = dict(model.named_modules())
    present = set(modules.values())
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
    graph = host_group._DG
    readers = [item for item in host_group if _is_reader(graph, item.dep)]
    if readers:
        return False
    positions = len(host_group[0].idxs)
    for item in host_group:
        node = item.dep.target
        if node.type == tp.ops.OPTYPE.OUTPUT:
            return positions in tuple(node.module.shape or ())
    return any(not item.dep.target.outputs for item in host_group)


def output_layers(graph: tp.DependencyGraph) -> tuple[str, ...]:
    """Names of the layers whose positions are the model's outputs."""
    return tuple(
        port.name
        for host_group in graph.get_all_groups(ignored_layers=[], root_module_types=list(ROOTS))
        if writes_output(host_group)
        for item in host_group
        for role, port in _ports(graph, item)
        if role == "out"
    )


def trace_group(host_group: tp.dependency.Group) -> TracedGroup:
    """Translate a full group of torch-pruning into a unit group.

    Raises:
        GroupError: If a port is malformed or the host cannot remove the units correctly.
    """
    try:
        return _trace_group(host_group)
    except GroupError as error:
        raise GroupError(f"group of {_name(host_group._DG, host_group[0].dep)!r}: {error}") from None


def _trace_group(host_group: tp.dependency.Group) -> TracedGroup:
    graph = host_group._DG
    roots = len(host_group[0].idxs)
    if any(index is None for item in host_group for index in (*item.idxs, *(item.root_idxs or ()))):
        raise GroupError("some positions have no root; heads that several queries share cannot be followed")
    if sorted(host_group[0].idxs) != list(range(roots)):
        raise GroupError(f"the root lists {roots} positions, but not 0..{roots - 1}; pass a full group")
    ports = [port for item in host_group for port in _ports(graph, item)]
    if not any(role == "out" for role, _ in ports):
        raise GroupError("nothing writes its units; they are inputs of the model")
    links = [link for item in host_group for link in _offset_links(graph, item)]
    unit_of_root = _components(roots, links)
    if any(role == "in" for role, _ in ports) and _unread(ports, unit_of_root):
        # Only V of a fused q/k/v projection is read: seen from its reader, the triples hang together.
        links += [link for item in host_group if _is_reader(graph, item.dep) for link in _reader_links(host_group, item)]
        unit_of_root = _components(roots, links)
    return _canonical(graph, ports, unit_of_root, any(_is_attention(item.dep) for item in host_group))


def remove_units(graph: tp.DependencyGraph, group: UnitGroup, units: Tensor) -> None:
    """Remove units of one group from the graph's model.

    Args:
        graph: Dependency graph of the model, up to date with all earlier removals.
        group: The group, with the producers' present positions.
        units: ``[k]`` int64 units to remove.

    Raises:
        PruningError: If the host would remove something else, or would leave a layer empty. The model is
            untouched then.
    """
    if units.numel() == 0:
        return
    model = graph.model
    port = group.producers[0]
    module = model.get_submodule(port.name)
    positions = port.positions(units).tolist()
    host_group = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, positions)
    _check_removal(graph, group, units, host_group)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        host_group.prune()
    for name, parameter in model.named_parameters():  # the host makes new parameters, all trainable
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))


def _check_removal(
    graph: tp.DependencyGraph, group: UnitGroup, units: Tensor, host_group: tp.dependency.Group
) -> None:
    found = {(role, port.name): len(port.index) for item in host_group for role, port in _ports(graph, item)}
    expected = {
        (role, port.name): count
        for role, ports in (("out", group.producers), ("in", group.consumers))
        for port in ports
        if (count := port.positions(units).numel())
    }
    if any(found.get(key) != count for key, count in expected.items()):
        raise PruningError(
            f"removing {units.numel()} units of group {group.name!r} should take {expected} positions, "
            f"but torch-pruning would take {found}; trace the model again"
        )
    if not graph.check_pruning_group(host_group):
        raise PruningError(f"removing {units.numel()} units of group {group.name!r} would leave a layer empty")


def _ports(graph: tp.DependencyGraph, item: Any) -> list[tuple[str, Port]]:
    """The ports of one item of a host's group: none for a pass-through, an attention layer writes and reads."""
    dep = item.dep
    module = dep.target.module
    reads, writes = _is_reader(graph, dep), _is_writer(graph, dep)
    if isinstance(module, nn.LSTM) and graph.is_out_channel_pruning_fn(dep.handler):
        raise GroupError("torch-pruning cannot remove hidden units of an LSTM")
    length = None
    if not isinstance(module, nn.Parameter):
        get_length = graph.get_in_channels if reads else graph.get_out_channels
        length = get_length(dep.target)
    port = Port(_name(graph, dep), torch.tensor(item.idxs), torch.tensor(item.root_idxs))
    if isinstance(length, int):
        check_port(port, int(port.unit.max()) + 1, length)
    return [(role, port) for role, applies in (("out", writes), ("in", reads)) if applies]


def _components(count: int, links: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Connected components of ``0..count-1`` under links between equally long index vectors, numbered from 0."""
    label = torch.arange(count)
    while links:
        before = label.clone()
        for left, right in links:
            smallest = torch.minimum(label[left], label[right])
            label.scatter_reduce_(0, left, smallest, "amin")
            label.scatter_reduce_(0, right, smallest, "amin")
        if torch.equal(label, before):
            break
    return label.unique(return_inverse=True)[1]


def _offset_links(graph: tp.DependencyGraph, item: Any) -> list[tuple[Tensor, Tensor]]:
    """Links between root positions: equal offsets in the groups of a convolution or a norm are one unit."""
    coupled = _coupled_groups(graph, item.dep)
    if coupled == 1:
        return []
    whole = (graph.get_in_channels if _is_reader(graph, item.dep) else graph.get_out_channels)(item.dep.target)
    index, root = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
    if index.numel() != whole:
        raise GroupError(
            f"it owns {index.numel()} of {whole} positions of {_name(graph, item.dep)!r}, whose {coupled} groups must "
            "stay equal; units of several groups would have to go together"
        )
    by_offset = root[index.argsort()].reshape(coupled, -1)
    return [(by_offset[0].repeat(coupled - 1), by_offset[1:].flatten())]


def _reader_links(host_group: tp.dependency.Group, reader: Any) -> list[tuple[Tensor, Tensor]]:
    """Links between root positions that belong to one position of a reader."""
    root = host_group[0].dep.target
    again = host_group._DG.get_pruning_group(reader.dep.target.module, reader.dep.handler, sorted(reader.idxs))
    links = []
    for item in again:
        if item.dep.target is root and None not in item.root_idxs:
            index, place = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            first = torch.full((int(place.max()) + 1,), len(host_group[0].idxs)).scatter_reduce_(0, place, index, "amin")
            links.append((index, first[place]))
    return links


def _unread(ports: Sequence[tuple[str, Port]], unit_of_root: Tensor) -> bool:
    read = torch.cat([port.unit for role, port in ports if role == "in"])
    return unit_of_root[read].unique().numel() <= int(unit_of_root.max())


def _coupled_groups(graph: tp.DependencyGraph, dep: Any) -> int:
    module = dep.target.module
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not _is_depthwise(module):
        return module.groups
    return 1


def _canonical(
    graph: tp.DependencyGraph, ports: list[tuple[str, Port]], unit_of_root: Tensor, attends: bool
) -> TracedGroup:
    """Name and number a group by its first producer, and check it."""
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    units = [(role, Port(port.name, port.index, unit_of_root[port.unit])) for role, port in ports]
    units.sort(key=lambda item: order[item[1].name])
    first = next(port for role, port in units if role == "out")
    size = int(unit_of_root.max()) + 1
    by_position = first.unit[first.index.argsort()]
    seen = list(dict.fromkeys(by_position.tolist()))
    seen += [unit for unit in range(size) if unit not in set(seen)]
    number = torch.empty(size, dtype=torch.int64)
    number[torch.tensor(seen)] = torch.arange(size)
    roles: dict[str, list[Port]] = {"out": [], "in": []}
    for role, port in units:
        position, place = port.index.sort()
        roles[role].append(Port(port.name, position, number[port.unit[place]]))
    # What nn.MultiheadAttention reads cannot be observed: its units are observed where they are written.
    group = UnitGroup(first.name, size, tuple(roles["out"]), () if attends else tuple(roles["in"]))
    check_group(group)
    return TracedGroup(group, number[unit_of_root])


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def _is_attention(dep: Any) -> bool:
    return isinstance(dep.target.module, nn.MultiheadAttention)


def _is_reader(graph: tp.DependencyGraph, dep: Any) -> bool:
    module = dep.target.module
    passes = graph.is_out_channel_pruning_fn(dep.handler)
    return isinstance(module, READERS) and graph.is_in_channel_pruning_fn(dep.handler) and not passes


def _is_writer(graph: tp.DependencyGraph, dep: Any) -> bool:
    module = dep.target.module
    if not isinstance(module, WRITERS) or not graph.is_out_channel_pruning_fn(dep.handler):
        return False
    return not _is_depthwise(module)


def _name(graph: tp.DependencyGraph, dep: Any) -> str:
    return str(graph._module2name.get(dep.target.module, dep.target.name))


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
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return ", ".join(_shapes(value) if isinstance(value, Tensor) else type(value).__name__ for value in values)
