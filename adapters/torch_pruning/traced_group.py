"""Translate a group of torch-pruning into a unit group: its ports, and which positions form one unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.index_mapping import _SliceIndexMapping

from nns_plugin.errors import GroupError
from nns_plugin.models.layers import Convolution, TransposedConvolution, channel_groups, is_depthwise
from nns_plugin.units import Port, UnitGroup, check_group, check_port

CONSUMERS = (Convolution, nn.Linear, nn.LSTM)
PRODUCERS = (Convolution, nn.Linear, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True, eq=False)
class TracedGroup:
    """A unit group as found in a dependency graph.

    Attributes:
        group: The unit group, named after its first producer (the first that it does not share with other groups);
            units are numbered by their first position on it, then on the others, whatever root the host chose.
        unit_of_root: ``[n]`` int64, the unit of each position of the host's root.
    """

    group: UnitGroup
    unit_of_root: Tensor


def trace_group(host_group: tp.dependency.Group) -> TracedGroup:
    """Translate a full group of torch-pruning into a unit group.

    Raises:
        GroupError: If a port is malformed or the host cannot remove the units correctly.
    """
    try:
        return _trace_group(host_group)
    except GroupError as error:
        raise GroupError(f"group of {name_of(host_group._DG, host_group[0].dep)!r}: {error}") from None


def _trace_group(host_group: tp.dependency.Group) -> TracedGroup:
    graph = host_group._DG
    roots = len(host_group[0].idxs)
    if any(index is None for item in host_group for index in (*item.idxs, *(item.root_idxs or ()))):
        raise GroupError("some positions have no root; key/value heads that several queries share are not supported")
    if sorted(host_group[0].idxs) != list(range(roots)):
        raise GroupError(f"the root lists {roots} positions, but not 0..{roots - 1}; pass a full group")
    for item in host_group:
        module = item.dep.target.module
        if isinstance(module, TransposedConvolution) and module.groups > 1 and not is_depthwise(module):
            raise GroupError(
                f"torch-pruning prunes {name_of(graph, item.dep)!r} wrongly, a grouped transposed convolution"
            )
        if _is_parametrized(item.dep.target.module):
            raise GroupError(f"{name_of(graph, item.dep)!r} computes its weight from others and cannot be pruned")
    ports = [port for item in host_group for port in ports_of(graph, item)]
    if not any(role == "out" for role, _ in ports):
        raise GroupError("no layer writes its units; they are inputs of the model")
    links = [link for item in host_group for link in _offset_links(graph, item)]
    unit_of_root = _components(roots, links)
    if any(role == "in" for role, _ in ports) and _unread(ports, unit_of_root):
        # Only V of a fused q/k/v projection has a reader; seen from there, each q/k/v triple is connected.
        links += [
            link for item in host_group if is_consumer(graph, item.dep) for link in _consumer_links(host_group, item)
        ]
        unit_of_root = _components(roots, links)
    return _canonical(graph, ports, unit_of_root, any(_is_attention(item.dep) for item in host_group))


def ports_of(graph: tp.DependencyGraph, item: Any) -> list[tuple[str, Port]]:
    """The ports of one item of a host's group: none for a pass-through, two for an attention layer."""
    dep = item.dep
    module = dep.target.module
    reads, writes = is_consumer(graph, dep), _is_producer(graph, dep)
    if isinstance(module, nn.LSTM) and graph.is_out_channel_pruning_fn(dep.handler):
        raise GroupError("torch-pruning cannot remove hidden units of an LSTM")
    length = None
    if not isinstance(module, nn.Parameter):
        get_length = graph.get_in_channels if reads else graph.get_out_channels
        length = get_length(dep.target)
    port = Port(name_of(graph, dep), torch.tensor(item.idxs), torch.tensor(item.root_idxs))
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
    number: Tensor = label.unique(return_inverse=True)[1]
    return number


def _offset_links(graph: tp.DependencyGraph, item: Any) -> list[tuple[Tensor, Tensor]]:
    """Links between root positions: equal offsets in groups, heads or chunks form one unit."""
    module = item.dep.target.module
    coupled = _coupled_groups(graph, item.dep)
    if coupled == 1:
        return []
    if isinstance(module, tp.ops._SplitOp):
        whole = sum(module.split_sizes)
    else:
        whole = (graph.get_in_channels if is_consumer(graph, item.dep) else graph.get_out_channels)(item.dep.target)
    index, root = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
    if index.numel() != whole:
        raise GroupError(
            f"it owns {index.numel()} of {whole} positions of {name_of(graph, item.dep)!r}, whose {coupled} groups "
            "must stay equally large; units of several groups would have to be removed together"
        )
    by_offset = root[index.argsort()].reshape(coupled, -1)
    return [(by_offset[0].repeat(coupled - 1), by_offset[1:].flatten())]


def _consumer_links(host_group: tp.dependency.Group, consumer: Any) -> list[tuple[Tensor, Tensor]]:
    """Links between the root positions that reach one position of a consumer."""
    root = host_group[0].dep.target
    again = host_group._DG.get_pruning_group(consumer.dep.target.module, consumer.dep.handler, sorted(consumer.idxs))
    links = []
    for item in again:
        if item.dep.target is root and None not in item.root_idxs:
            index, place = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            first = torch.full((int(place.max()) + 1,), len(host_group[0].idxs)).scatter_reduce_(
                0, place, index, "amin"
            )
            links.append((index, first[place]))
    return links


def _unread(ports: Sequence[tuple[str, Port]], unit_of_root: Tensor) -> bool:
    read = torch.cat([port.unit for role, port in ports if role == "in"])
    return len(set(unit_of_root[read].tolist())) <= int(unit_of_root.max())


def _coupled_groups(graph: tp.DependencyGraph, dep: Any) -> int:
    module = dep.target.module
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.MultiheadAttention):
        return int(module.num_heads)
    if channel_groups(module) > 1 and not is_depthwise(module):
        return channel_groups(module)
    if isinstance(module, tp.ops._SplitOp) and module.split_sizes:
        if "sizes" in dep.target.grad_fn.name().lower():
            raise GroupError(f"it is split into fixed sizes {module.split_sizes}, which removal would not change")
        return len(module.split_sizes)
    if isinstance(module, tp.ops._SliceOp) and any(isinstance(each, _SliceIndexMapping) for each in dep.index_mapping):
        raise GroupError("it is sliced at fixed positions, which removal would not change")
    return 1


def _canonical(
    graph: tp.DependencyGraph, ports: list[tuple[str, Port]], unit_of_root: Tensor, attends: bool
) -> TracedGroup:
    """Name a group and number its units by its first producer, and check it."""
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    units = [(role, Port(port.name, port.index, unit_of_root[port.unit])) for role, port in ports]
    units.sort(key=lambda item: order[item[1].name])
    producers = [port for role, port in units if role == "out"]
    # Several groups may share a producer; the group is named after one that it owns completely.
    name = next((port.name for port in producers if owns(graph, port)), producers[0].name)
    size = int(unit_of_root.max()) + 1
    producers.sort(key=lambda port: port.name != name)
    by_position = torch.cat([port.unit[port.index.argsort()] for port in producers])
    seen = list(dict.fromkeys([*by_position.tolist(), *range(size)]))
    number = torch.empty(size, dtype=torch.int64)
    number[torch.tensor(seen)] = torch.arange(size)
    roles: dict[str, list[Port]] = {"out": [], "in": []}
    for role, port in units:
        position, place = port.index.sort()
        roles[role].append(Port(port.name, position, number[port.unit[place]]))
    # The inputs of nn.MultiheadAttention cannot be observed; its units are observed where they are written.
    group = UnitGroup(name, size, tuple(roles["out"]), () if attends else tuple(roles["in"]))
    check_group(group)
    return TracedGroup(group, number[unit_of_root])


def owns(graph: tp.DependencyGraph, port: Port) -> bool:
    """Whether a port covers all positions that its module writes."""
    module = dict(graph.model.named_modules()).get(port.name)
    return module is not None and graph.get_out_channels(module) == port.index.numel()


def _is_parametrized(module: Any) -> bool:
    """Whether a layer computes its weight from others: weight norm, spectral norm or a mask of torch's pruning."""
    return isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters


def _is_attention(dep: Any) -> bool:
    return isinstance(dep.target.module, nn.MultiheadAttention)


def is_consumer(graph: tp.DependencyGraph, dep: Any) -> bool:
    """Whether the target of a dependency loses input positions only."""
    module = dep.target.module
    passes = graph.is_out_channel_pruning_fn(dep.handler)
    return isinstance(module, CONSUMERS) and graph.is_in_channel_pruning_fn(dep.handler) and not passes


def _is_producer(graph: tp.DependencyGraph, dep: Any) -> bool:
    module = dep.target.module
    if not isinstance(module, PRODUCERS) or not graph.is_out_channel_pruning_fn(dep.handler):
        return False
    return not is_depthwise(module)


def name_of(graph: tp.DependencyGraph, dep: Any) -> str:
    """Name of a dependency's target: that of a module in the model, or the host's name of an operation."""
    return str(graph._module2name.get(dep.target.module, dep.target.name))
