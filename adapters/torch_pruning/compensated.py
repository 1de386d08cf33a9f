"""Compensated removal: a host decides what goes, and the survivors take over what it contributed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.adapters.torch_pruning.removals import (
    Removal,
    consumers_of,
    kept_outputs,
    kept_units,
    planned_removals,
    removed_channels,
    restored_on_failure,
)
from nns_plugin.compensation.group_mixing import GroupMixing
from nns_plugin.compensation.options import Compensation, Method, Recalibrate
from nns_plugin.compensation.plans import ChannelMethod, Plan, apply_plan, plan_removal, worse_than_nothing
from nns_plugin.compensation.refit import Refitting
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.errors import StaleStatisticsError
from nns_plugin.models.activations import execution_order
from nns_plugin.models.batch_norms import recalibrate_batch_norms
from nns_plugin.models.fingerprint import difference, fingerprint
from nns_plugin.models.inputs import device_of, first_inputs, run_model, to_device
from nns_plugin.models.layers import Convolution, axis_length, has_bias, weight_matrix
from nns_plugin.models.preserve import copied, in_evaluation, preserved
from nns_plugin.statistics.statistics import Statistics


class CompensationWarning(UserWarning):
    """A consumer was compensated in a weaker way than was asked for."""


def compensated_step(
    pruner: tp.pruner.BasePruner,
    statistics: Statistics,
    method: Method = "refit",
    loader: Iterable[Any] | None = None,
    *,
    recalibrate: Recalibrate = "once",
    recalibrate_batch_norms: bool = True,
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
            ``recalibrate="each_group"``; with one, batch norms are recalibrated, and where a kernel spans several
            positions ``"least_squares"`` is only used if it is better than nothing on this data.
        recalibrate: ``"each_group"`` observes the model anew before each group, so that later consumers see what
            their inputs have become.
        recalibrate_batch_norms: Whether to recalibrate batch norms after removal. ``"refit"`` gives norms behind the
            layers that it refits the dense model's statistics in either case, and recalibrates the others only where
            it has to leave a consumer out.
        ridge: Of ``"refit"``: pull towards the weights before it, relative to the inputs' energy.
        max_unfolded: Of ``"refit"``: a consumer whose input unfolds to more rows keeps its least-squares weights.
        progress: Whether to show progress bars.

    Returns:
        The statistics of the pruned model, narrowed; exact but for what removal itself changed.

    Raises:
        PruningError: If the method is unknown or the loader is missing. After this or any other error, the model and
            the pruner are as they were.
        StaleStatisticsError: If the statistics do not belong to the model.
    """
    how = Compensation(method, recalibrate, recalibrate_batch_norms, ridge, max_unfolded)
    how.check(loader)
    known = _followed(pruner, statistics)
    steps_before = pruner.current_step
    try:
        with torch.no_grad():
            removals = planned_removals(pruner)
        known = compensated_removal(pruner.DG, removals, known, how, loader, progress=progress)
    except BaseException:
        pruner.current_step = steps_before
        raise
    _FOLLOWED[pruner] = (statistics, known, fingerprint(pruner.model))
    follow = getattr(pruner.importance, "follow", None)
    if follow is not None:
        follow(pruner.DG, known)
    return known


# For each pruner the statistics that it was given, what has become of them, and of which model.
_FOLLOWED: weakref.WeakKeyDictionary[Any, tuple[Statistics, Statistics, Mapping[str, str]]]
_FOLLOWED = weakref.WeakKeyDictionary()


def _followed(pruner: tp.pruner.BasePruner, statistics: Statistics) -> Statistics:
    given, known, mark = _FOLLOWED.get(pruner, (None, statistics, statistics.fingerprint))
    if given is not statistics:
        known, mark = statistics, statistics.fingerprint
    _check_mark(mark, pruner.model)
    return known


def check_current(statistics: Statistics, model: nn.Module) -> None:
    """Refuse statistics of another state of the model.

    Raises:
        StaleStatisticsError: If they say what they belong to, and it is not this model as it is.
    """
    _check_mark(statistics.fingerprint, model)


def _check_mark(mark: Mapping[str, str], model: nn.Module) -> None:
    differs = difference(mark, fingerprint(model)) if mark else ""
    if differs:
        raise StaleStatisticsError(f"the statistics belong to another state of the model: {differs}; calibrate again")


def compensated_removal(
    graph: tp.DependencyGraph,
    removals: Sequence[Removal],
    statistics: Statistics,
    how: Compensation,
    loader: Iterable[Any] | None = None,
    *,
    survivors: Mapping[str, Survivors] | None = None,
    progress: bool = False,
) -> Statistics:
    """Carry out planned removals and let the kept units take over.

    Args:
        graph: Dependency graph of the model, which is changed in place.
        removals: What goes.
        statistics: Of the model as it is.
        how: How the survivors take over.
        loader: As for :func:`compensated_step`.
        survivors: For ``"merge"``, by name of the consumer: who takes over from whom. By default the kept channel
            whose vector is nearest to parallel does, unless plain removal errs less on the calibration data.
        progress: Whether to show progress bars.

    Returns:
        The statistics of the pruned model, narrowed.
    """
    how.check(loader)
    model = graph.model
    if loader is not None:
        _check_runs(model, loader)
    dense = copied(model).eval() if how.method == "refit" or how.recalibrate == "each_group" else None
    with restored_on_failure(graph), torch.no_grad():
        if dense is not None and loader is not None and how.recalibrate == "each_group":
            statistics = _group_by_group(graph, dense, removals, statistics, loader)
        else:
            if how.method != "none":
                _compensate(graph, removals, statistics, how, loader, survivors)
            for removal in removals:
                removal.carry_out(graph)
            statistics = statistics.narrow(kept_units(removals, statistics))
        if how.method == "refit" and dense is not None and loader is not None:
            _refit(graph, dense, removals, how, loader, progress)
        elif how.recalibrate_batch_norms:
            _recalibrate_batch_norms(model, loader)
    return statistics


def _check_runs(model: nn.Module, loader: Iterable[Any]) -> None:
    """Run the first batch, so that what is wrong with it shows before anything changes."""
    with preserved(model), torch.no_grad():
        model.eval()
        run_model(model, to_device(first_inputs(loader), device_of(model)))


def _compensate(
    graph: tp.DependencyGraph,
    removals: Sequence[Removal],
    statistics: Statistics,
    how: Compensation,
    loader: Iterable[Any] | None,
    survivors: Mapping[str, Survivors] | None,
) -> None:
    """Write compensated weights into the still whole consumers; columns that go are left at 0."""
    method: ChannelMethod = how.method if how.method in ("merge", "mean") else "least_squares"
    model, plans, norms = graph.model, {}, {}
    unseen = sorted(name for name in consumers_of(removals) if ("in", name) not in statistics.records)
    if unseen:
        _warn(f"not compensated, the statistics do not cover what they read: {', '.join(unseen)}")
    for name, gone in removed_channels(graph, removals, statistics).items():
        module = model.get_submodule(name)
        norms[name] = following_norm(graph, module)
        plan = plan_removal(
            module,
            statistics.records["in", name],
            gone,
            method,
            constant=has_bias(module) or norms[name] is not None,
            survivors=None if survivors is None else survivors.get(name),
        )
        if plan is None:
            _warn(f"{name!r} is not compensated: its input has no Gram matrix")
        else:
            plans[name] = plan
    # What is refitted is compared then, and what a caller says who takes over from whom is not ours to judge.
    left_out = _left_out(model, plans, how, loader) if how.method == "refit" and loader is not None else plans
    judged = {name: plan for name, plan in plans.items() if survivors is None and name in left_out}
    for name in _not_worth_it(model, judged, statistics, loader):
        del plans[name]
    for name, plan in plans.items():
        apply_plan(model.get_submodule(name), statistics.records["in", name].layout, plan, norms[name])


def _not_worth_it(
    model: nn.Module, plans: Mapping[str, Plan], statistics: Statistics, loader: Iterable[Any] | None
) -> list[str]:
    """Consumers whose plan errs more on the calibration data than plain removal, which they get instead."""
    worse = {name for name, plan in plans.items() if plan.is_worse}
    open_plans = {name: plan for name, plan in plans.items() if plan.is_worse is None}
    if loader is not None:
        worse |= worse_than_nothing(model, open_plans, statistics, loader)
    elif open_plans:
        _warn(
            f"kernels of several positions ({', '.join(open_plans)}) are compensated without a look whether plain "
            "removal errs less: pass a loader"
        )
    if worse:
        _warn(f"plain removal errs less on the calibration data at {', '.join(sorted(worse))}: it is left at that")
    return sorted(worse)


def _group_by_group(
    graph: tp.DependencyGraph, dense: nn.Module, removals: Sequence[Removal], statistics: Statistics, loader: Any
) -> Statistics:
    """Remove one group after the other, in the order in which they run, and mix its consumers' real inputs anew."""
    model = graph.model
    example = to_device(first_inputs(loader), device_of(model))
    producers = {removal.group.name for removal in removals if removal.group is not None}
    order = {name: place for place, name in enumerate(execution_order(model, producers, example))}
    mixing, narrowed = GroupMixing(dense, model, loader), statistics
    done: list[Removal] = []
    for removal in sorted(removals, key=lambda removal: order.get(removal.group.name, -1) if removal.group else -1):
        removal.carry_out(graph)
        done.append(removal)
        narrowed = narrowed.narrow(kept_units([removal], narrowed))
        kept = kept_outputs(dense, done)
        with in_evaluation(model):
            for name, calls in execution_order(model, consumers_of([removal]), example).items():
                if ("in", name) not in narrowed.records or calls > 1:
                    _warn(f"{name!r} is left at plain removal: it was not observed, or runs {calls} times in a forward")
                    continue
                whole, narrow = (known.records["in", name].layout for known in (statistics, narrowed))
                norm = following_norm(graph, model.get_submodule(name))
                if not _same_outputs(model, dense, name, kept.get(name)):
                    _warn(f"{name!r} is left at plain removal: which of its outputs went could not be followed")
                    continue
                mixing.mix(name, whole, narrow, norm, kept.get(name))
    return narrowed


def _refit(
    graph: tp.DependencyGraph,
    dense: nn.Module,
    removals: Sequence[Removal],
    how: Compensation,
    loader: Iterable[Any],
    progress: bool,
) -> None:
    """Refit all consumers of what was removed, in the order in which they run."""
    model = graph.model
    names = consumers_of(removals)
    kept = kept_outputs(dense, removals)
    left_out = _left_out(model, names, how, loader)
    for name in names - left_out.keys():
        if not _same_outputs(model, dense, name, kept.get(name)):
            left_out[name] = "which of its outputs went could not be followed"
    for name, reason in sorted(left_out.items()):
        _warn(f"{name!r} is not refitted, it keeps the weights that least squares gave it: {reason}")
    unread = any(removal.group is None or not removal.group.consumers for removal in removals)
    if how.recalibrate_batch_norms and (left_out or unread):
        # What is refitted repeats the dense model's outputs, and its norm gets their statistics; the rest does not.
        recalibrate_batch_norms(model, loader)
    example = to_device(first_inputs(loader), device_of(model))
    modules = {module: name for name, module in model.named_modules()}
    refitting = Refitting(dense, model, loader, how.ridge)
    order = list(execution_order(model, names - left_out.keys(), example))
    with in_evaluation(model):
        for name in tqdm(order, desc="refitting", disable=not progress, leave=False):
            norm = following_norm(graph, model.get_submodule(name))
            refitting.refit(name, None if norm is None else modules[norm], kept.get(name))


def _same_outputs(model: nn.Module, dense: nn.Module, name: str, kept: Tensor | None) -> bool:
    """Whether a layer has as many outputs as are said to be kept."""
    now, before = (axis_length(part.get_submodule(name), "out", name) for part in (model, dense))
    return now == (before if kept is None else kept.numel())


def _left_out(model: nn.Module, names: Iterable[str], how: Compensation, loader: Iterable[Any]) -> dict[str, str]:
    """Consumers that cannot be refitted, and why."""
    calls = execution_order(model, names, to_device(first_inputs(loader), device_of(model)))
    reasons = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, (nn.Linear, Convolution)):
            reasons[name] = f"it is a {type(module).__name__}"
        elif calls.get(name, 0) != 1:
            reasons[name] = f"it runs {calls.get(name, 0)} times in a forward"
        elif (depth := weight_matrix(module).shape[2]) > how.max_unfolded:
            reasons[name] = f"its input unfolds to {depth} rows, more than max_unfolded={how.max_unfolded}"
    return reasons


def _recalibrate_batch_norms(model: nn.Module, loader: Iterable[Any] | None) -> None:
    if loader is not None:
        recalibrate_batch_norms(model, loader)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        _warn(
            "batch norms keep their statistics of the dense model: pass a loader to recalibrate them, or "
            "recalibrate_batch_norms=False"
        )


def _warn(message: str) -> None:
    warnings.warn(message, CompensationWarning, stacklevel=5)


def following_norm(graph: tp.DependencyGraph, module: nn.Module) -> nn.Module | None:
    """The batch norm that alone reads a layer's output, reads nothing else, and can take up a shift in its mean."""
    outputs = graph.module2node[module].outputs if module in graph.module2node else []
    if len(outputs) != 1 or not isinstance(outputs[0].module, nn.modules.batchnorm._BatchNorm):
        return None
    norm = outputs[0].module
    return norm if norm.running_mean is not None and len(outputs[0].inputs) == 1 else None
