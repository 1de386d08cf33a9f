"""Compensated steps: torch-pruning decides what goes, and the survivors take over what it contributed."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.adapters.dependency_graph import UnusableGroupWarning, groups_again, trace_group
from nns_plugin.batch_norm import reestimate_batch_norms
from nns_plugin.compensation import RIDGE, means, mixing, take_over
from nns_plugin.consumers import (
    add_to_bias,
    channel_groups,
    has_bias,
    reading_matrices,
    weight_of,
    write_matrices,
)
from nns_plugin.errors import GroupError, PruningError, StaleStatisticsError
from nns_plugin.fingerprint import difference, fingerprint
from nns_plugin.forward import device_of, parse_batch, to_device
from nns_plugin.observe import axis_length, calibrate
from nns_plugin.preserve import in_evaluation, preserved
from nns_plugin.refit import LeastSquares, output_matrix, set_weight_matrix, unfolded, weight_matrix
from nns_plugin.statistics import Layout, Record, Statistics
from nns_plugin.taps import execution_order, tap
from nns_plugin.units import UnitGroup, complement

Method = Literal["refit", "least_squares", "mean", "none"]
Recalibrate = Literal["once", "each_group"]


class CompensationWarning(UserWarning):
    """A consumer was compensated in a weaker way than was asked for."""


@dataclass(frozen=True, eq=False)
class Removal:
    """What a host's step removes from one group.

    Attributes:
        group: The unit group; ``None`` if the host's group could not be followed.
        units: ``[k]`` int64, the units that go.
        root: The host's root module.
        handler: The host's pruning function of the root.
        positions: The root's positions that go.
    """

    group: UnitGroup | None
    units: Tensor
    root: nn.Module
    handler: Any
    positions: list[int]


def compensated_step(
    pruner: tp.pruner.BasePruner,
    statistics: Statistics,
    method: Method = "refit",
    loader: Iterable[Any] | None = None,
    *,
    recalibrate: Recalibrate = "once",
    reestimate: bool = True,
    ridge: float = 1e-4,
    max_unfolded: int = 8192,
    progress: bool = False,
) -> Statistics:
    """Do what ``pruner.step()`` does, and let the kept units take over from the removed ones.

    Works with any importance of torch-pruning, and step by step in iterative pruning: later calls take the same
    ``statistics``, which are narrowed along.

    Args:
        pruner: Any high-level pruner of torch-pruning.
        statistics: Of its model, collected with ``gram=True``.
        method: ``"least_squares"`` mixes the kept channels so that they stand in best for the removed ones, from the
            statistics alone. ``"refit"`` goes on from there: consumer by consumer, in the order in which they run, it
            finds the weights with which the pruned model best repeats the dense model's outputs on the loader's
            data. ``"mean"`` puts the removed channels' means into the biases, ``"none"`` does nothing.
        loader: Yields ``(inputs, labels)`` or ``inputs``, anew each time. Needed by ``"refit"`` and
            ``recalibrate="each_group"``; with one, batch norms are re-estimated, and where a kernel spans several
            positions ``"least_squares"`` is only used if it is better than nothing on this data.
        recalibrate: ``"each_group"`` observes the model anew before each group, so that later consumers see what
            their inputs have become.
        reestimate: Whether to re-estimate batch norms after removal.
        ridge: Of ``"refit"``: pull towards the weights before it, relative to the inputs' energy.
        max_unfolded: Of ``"refit"``: a consumer whose input unfolds to more rows keeps its least-squares weights.
        progress: Whether to show progress bars.

    Returns:
        The statistics of the pruned model, narrowed; exact but for what removal itself changed.

    Raises:
        PruningError: If the method is unknown or the loader is missing.
        StaleStatisticsError: If the statistics do not belong to the model.
    """
    _check_options(method, recalibrate, loader)
    graph, model = pruner.DG, pruner.model
    known = _followed(pruner, statistics)
    dense = copy.deepcopy(model) if method == "refit" else None
    with torch.no_grad():
        removals = planned_removals(pruner)
        if recalibrate == "each_group":
            known = _group_by_group(graph, removals, known, method, loader)
        else:
            _compensate(model, graph, removals, known, method, loader)
            _remove(graph, removals)
            known = known.narrow(_kept(removals, known))
    if reestimate:
        _reestimate(model, loader)
    if dense is not None and loader is not None:
        _refit(dense, model, graph, removals, loader, ridge, max_unfolded, progress)
    _FOLLOWED[pruner] = (statistics, known)
    follow = getattr(pruner.importance, "follow", None)
    if follow is not None:
        follow(graph, known)
    return known


# For each pruner the statistics that it was given and what has become of them.
_FOLLOWED: weakref.WeakKeyDictionary[Any, tuple[Statistics, Statistics]] = weakref.WeakKeyDictionary()


def planned_removals(pruner: tp.pruner.BasePruner) -> list[Removal]:
    """What a step of the pruner removes, in the order of the groups' first producers; nothing is removed yet."""
    graph = pruner.DG
    removals = []
    for host_group in list(pruner.step(interactive=True)):
        dep, positions = host_group[0]
        root, handler = dep.target.module, dep.handler
        is_out = graph.is_out_channel_pruning_fn(handler)
        length = graph.get_out_channels(root) if is_out else graph.get_in_channels(root)
        try:
            traced = trace_group(graph.get_pruning_group(root, handler, list(range(length))))
        except GroupError as error:
            warnings.warn(f"removed without compensation: {error}", UnusableGroupWarning, stacklevel=3)
            removals.append(Removal(None, torch.tensor([]), root, handler, list(positions)))
            continue
        units = traced.unit_of_root[torch.tensor(positions, dtype=torch.int64)].unique()
        removals.append(Removal(traced.group, units, root, handler, list(positions)))
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    return sorted(removals, key=lambda removal: order[removal.group.name] if removal.group else -1)


def _check_options(method: str, recalibrate: str, loader: Iterable[Any] | None) -> None:
    for name, value, kind in (("method", method, Method), ("recalibrate", recalibrate, Recalibrate)):
        if value not in get_args(kind):
            raise PruningError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
    if loader is None and (method == "refit" or recalibrate == "each_group"):
        raise PruningError(f"method {method!r} with recalibrate={recalibrate!r} needs a loader; pass one")


def _followed(pruner: tp.pruner.BasePruner, statistics: Statistics) -> Statistics:
    given, known = _FOLLOWED.get(pruner, (None, statistics))
    if given is statistics:
        return known
    if statistics.fingerprint:
        differs = difference(statistics.fingerprint, fingerprint(pruner.model))
        if differs:
            raise StaleStatisticsError(
                f"the statistics belong to another state of the model: {differs}; calibrate again"
            )
    return statistics


def _kept(removals: Sequence[Removal], statistics: Statistics) -> dict[str, Tensor]:
    observed = {group.name for group in statistics.groups}
    kept = {}
    for removal in removals:
        if removal.group is not None and removal.group.name in observed:
            kept[removal.group.name] = complement(removal.group.size, removal.units)
    return kept


def _remove(graph: tp.DependencyGraph, removals: Sequence[Removal]) -> None:
    for removal in removals:  # rebuilt one by one: positions on a concatenation move with each removal
        graph.get_pruning_group(removal.root, removal.handler, removal.positions).prune()


def _group_by_group(
    graph: tp.DependencyGraph, removals: Sequence[Removal], known: Statistics, method: str, loader: Any
) -> Statistics:
    for removal in removals:
        _compensate(graph.model, graph, [removal], known, method, loader)
        _remove(graph, [removal])
        known = calibrate(graph.model, loader, groups_again(graph, known.groups), labels=known.labels, gram=True)
    return known


def _compensate(
    model: nn.Module,
    graph: tp.DependencyGraph,
    removals: Sequence[Removal],
    statistics: Statistics,
    method: str,
    loader: Iterable[Any] | None,
) -> None:
    """Write compensated weights into the still whole consumers; columns that go are left at 0."""
    if method == "none":
        return
    plans = {}
    for name, gone in _removed_channels(removals, statistics).items():
        module, record = model.get_submodule(name), statistics.records["in", name]
        norm = following_norm(graph, module)
        plan = _plan(module, record, gone, method, has_bias(module) or norm is not None)
        if plan is None:
            warnings.warn(
                f"{name!r} is not compensated: its input has no Gram matrix", CompensationWarning, stacklevel=4
            )
            continue
        plans[name] = (plan, norm)
    if loader is not None:
        worse = _worse_than_nothing(model, {name: plan for name, (plan, _) in plans.items()}, statistics, loader)
        plans = {name: plan for name, plan in plans.items() if name not in worse}
    for name, ((matrices, shift), norm) in plans.items():
        module = model.get_submodule(name)
        write_matrices(module, statistics.records["in", name].layout, matrices)
        add_shift(module, norm, shift)


def _removed_channels(removals: Sequence[Removal], statistics: Statistics) -> dict[str, Tensor]:
    """For each observed consumer the channels that go, ``[k]`` int64."""
    gone: dict[str, list[Tensor]] = {}
    for removal in removals:
        for port in removal.group.consumers if removal.group is not None else ():
            record = statistics.records.get(("in", port.name))
            if record is not None:
                positions = port.index[torch.isin(port.unit, removal.units)]
                gone.setdefault(port.name, []).append(record.layout.channel[positions])
    return {name: torch.cat(parts).unique() for name, parts in gone.items()}


def _plan(
    module: nn.Module, record: Record, gone: Tensor, method: str, constant: bool
) -> tuple[list[Tensor], Tensor] | None:
    """New reading matrices of a consumer and the shift of its outputs, one channel group after the other."""
    matrices = reading_matrices(module, record.layout)
    if matrices is None or record.gram is None:
        return None
    size = record.layout.slot.numel() // channel_groups(module)
    changed, shifts = [], []
    for number, matrix in enumerate(matrices):
        removed = gone[gone // size == number] - number * size
        kept = complement(size, removed)
        gram = record.gram[number]
        if method == "mean":
            mix = means(gram, kept, removed) if constant else torch.zeros(removed.numel(), kept.numel() + 1).double()
        else:
            mix = mixing(gram, kept, removed, constant=constant, ridge=RIDGE)
        weight, shift = take_over(matrix, mix, kept, removed)
        changed.append(weight)
        shifts.append(shift)
    return changed, torch.cat(shifts)


def add_shift(module: nn.Module, norm: nn.Module | None, shift: Tensor) -> None:
    """Let a consumer's outputs rise by a shift ``[O]``: in its bias, or in the batch norm that follows."""
    if has_bias(module):
        add_to_bias(module, shift)
    elif norm is not None:
        running_mean = cast(Tensor, norm.running_mean)
        running_mean.sub_(shift.to(running_mean))


def following_norm(graph: tp.DependencyGraph, module: nn.Module) -> nn.Module | None:
    """The batch norm that alone reads a layer's output and can take up a shift in its running mean."""
    outputs = graph.module2node[module].outputs if module in graph.module2node else []
    while len(outputs) == 1 and isinstance(outputs[0].module, tp.ops._ElementWiseOp):
        # One- and three-dimensional convolutions pass through reshaping nodes before their norm.
        if not any(word in str(outputs[0].module) for word in ("Convolution", "Squeeze", "Unsqueeze", "View")):
            break
        outputs = outputs[0].outputs
    if len(outputs) != 1 or not isinstance(outputs[0].module, nn.modules.batchnorm._BatchNorm):
        return None
    norm = outputs[0].module
    return norm if norm.running_mean is not None else None


def _worse_than_nothing(
    model: nn.Module, plans: Mapping[str, tuple[list[Tensor], Tensor]], statistics: Statistics, loader: Iterable[Any]
) -> set[str]:
    """Consumers whose kernel spans several positions and whose plan errs more on the data than plain removal."""
    risky = {name: plan for name, plan in plans.items() if plan[0][0].shape[1] > 1}
    if not risky:
        return set()
    changes = {}
    for name, (matrices, shift) in risky.items():
        module, layout = model.get_submodule(name), statistics.records["in", name].layout
        before = reading_matrices(module, layout) or []
        taken = [torch.where(new == 0, old, 0.0) for new, old in zip(matrices, before, strict=True)]
        changed = [new - old for new, old in zip(matrices, before, strict=True)]
        changes[name] = (
            _difference(module, layout, changed, shift),
            _difference(module, layout, taken, torch.zeros_like(shift)),
        )
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in changes}
    device = device_of(model)
    with preserved(model), torch.no_grad():
        model.eval()
        for number, item in enumerate(loader):
            inputs = to_device(parse_batch(item, number).inputs, device)
            for name, layers in changes.items():
                reached = tap(model, name, inputs, "in")
                errors[name] += torch.stack([layer(reached).double().square().sum().cpu() for layer in layers])
    return {name for name, (planned, nothing) in errors.items() if not float(planned) <= float(nothing)}


def _difference(module: nn.Module, layout: Layout, matrices: Sequence[Tensor], shift: Tensor) -> nn.Module:
    """A layer like another one, whose weights and bias are the given ones."""
    layer = copy.deepcopy(module)
    write_matrices(layer, layout, matrices)
    layer.bias = nn.Parameter(shift.to(weight_of(layer)))
    return layer


def _reestimate(model: nn.Module, loader: Iterable[Any] | None) -> None:
    if loader is not None:
        reestimate_batch_norms(model, loader)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        warnings.warn(
            "batch norms keep their statistics of the dense model: pass a loader to re-estimate them, or "
            "reestimate=False",
            CompensationWarning,
            stacklevel=3,
        )


def _refit(
    dense: nn.Module,
    model: nn.Module,
    graph: tp.DependencyGraph,
    removals: Sequence[Removal],
    loader: Iterable[Any],
    ridge: float,
    max_unfolded: int,
    progress: bool,
) -> None:
    names = {port.name for removal in removals if removal.group for port in removal.group.consumers}
    device = device_of(model)
    example = to_device(parse_batch(next(iter(loader)), 0).inputs, device)
    order = execution_order(model, names, example)
    kept = kept_outputs(dense, removals)
    dense.eval()
    with in_evaluation(model), torch.no_grad():
        for name in tqdm(order, desc="refitting", disable=not progress, leave=False):
            module = model.get_submodule(name)
            if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                warnings.warn(
                    f"{name!r} is a {type(module).__name__}, which is not refitted", CompensationWarning, stacklevel=4
                )
                continue
            depth = weight_matrix(module).shape[2]
            if depth > max_unfolded:
                warnings.warn(
                    f"{name!r} unfolds to {depth} rows, more than max_unfolded={max_unfolded}: it keeps its "
                    "least-squares weights",
                    CompensationWarning,
                    stacklevel=4,
                )
                continue
            sums = _regression(dense, model, name, kept.get(name), loader, device)
            _apply(module, following_norm(graph, module), sums, ridge)


def _regression(
    dense: nn.Module, model: nn.Module, name: str, kept: Tensor | None, loader: Iterable[Any], device: torch.device
) -> LeastSquares:
    module = model.get_submodule(name)
    groups, outputs, depth = weight_matrix(module).shape
    sums = LeastSquares.empty(groups, depth, outputs)
    for number, item in enumerate(loader):
        inputs = to_device(parse_batch(item, number).inputs, device)
        target = tap(dense, name, inputs, "out")
        if kept is not None:
            target = target.index_select(-1 if isinstance(module, nn.Linear) else 1, kept.to(device))
        sums.add(unfolded(module, tap(model, name, inputs, "in")), output_matrix(module, target))
    return sums


def _apply(module: nn.Module, norm: nn.Module | None, sums: LeastSquares, ridge: float) -> None:
    """Give a consumer the solution if it errs less on the data than the weights that it has."""
    weights = weight_matrix(module).double().cpu()
    groups, outputs, _ = weights.shape
    bias = torch.zeros(groups, outputs, 1, dtype=torch.float64)
    if has_bias(module):
        bias = cast(Tensor, module.bias).detach().double().cpu().reshape(groups, outputs, 1)
    prior = torch.cat([weights, bias], 2)
    solution = sums.solve(prior, has_bias(module) or norm is not None, ridge)
    if not sums.error(solution) <= sums.error(prior):
        return
    set_weight_matrix(module, solution[:, :, :-1])
    add_shift(module, norm, (solution - prior)[:, :, -1].flatten())


def kept_outputs(dense: nn.Module, removals: Sequence[Removal]) -> dict[str, Tensor]:
    """For each layer that loses outputs, the out-positions that stay, ``[k]`` int64 ascending."""
    gone: dict[str, list[Tensor]] = {}
    for removal in removals:
        for port in removal.group.producers if removal.group is not None else ():
            gone.setdefault(port.name, []).append(port.positions(removal.units))
    kept = {}
    for name, parts in gone.items():
        module = dense.get_submodule(name)
        length = axis_length(module, "out", name)
        kept[name] = complement(length, torch.cat(parts))
    return kept
