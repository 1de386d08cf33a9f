"""Compensated removal: a backend removes units, and the kept units take over what those contributed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.compensation.group_mixing import GroupMixing
from nns_plugin.compensation.options import Compensation
from nns_plugin.compensation.plans import ChannelMethod, Plan, apply_plan, plan_removal, worse_than_nothing
from nns_plugin.compensation.refit import Refitting
from nns_plugin.compensation.removals import (
    PrunableModel,
    Removal,
    consumers_of,
    kept_outputs,
    kept_units,
    removed_channels,
)
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.models.activations import execution_order
from nns_plugin.models.batch_norms import recalibrate_batch_norms
from nns_plugin.models.batches import first_inputs
from nns_plugin.models.inputs import run_model
from nns_plugin.models.layers import axis_length, has_bias, is_batch_norm, is_linear_or_convolution, unfolded_weight
from nns_plugin.models.preserve import copied, in_evaluation, preserved
from nns_plugin.statistics.statistics import Statistics

UNKNOWN_OUTPUTS = "it lost outputs, but not known which"


class CompensationWarning(UserWarning):
    """A consumer was compensated in a weaker way than was asked for."""


def compensated_removal(
    prunable: PrunableModel,
    removals: Sequence[Removal],
    statistics: Statistics,
    how: Compensation,
    loader: Iterable[Any] | None = None,
    *,
    survivors: Mapping[str, Survivors] | None = None,
    progress: bool = False,
) -> Statistics:
    """Carry out planned removals, and let the kept units take over.

    Args:
        prunable: The model in the hands of a backend; changed in place.
        removals: The units that go.
        statistics: Statistics of the model as it is.
        how: How the kept units take over.
        loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``. Needed by ``"refit"`` and ``sequential``;
            with one, batch norms are recalibrated, and where a kernel spans several positions the other methods are
            used only if they beat plain removal on this data.
        survivors: For ``"merge"``, by name of the consumer: which kept channel takes over from which. By default the
            one whose vector is nearest to parallel does, unless plain removal errs less on the calibration data.
        progress: Whether to show progress bars.

    Returns:
        The statistics of the pruned model, narrowed.

    Raises:
        PruningError: If the options cannot work. After this or any other error, the model is as it was.
        StaleStatisticsError: If the statistics are of other widths than the model.
    """
    how.check(loader)
    model = prunable.model
    if loader is not None:
        _check_runs(model, loader)
    dense = copied(model).eval() if how.method == "refit" or how.sequential else None
    with prunable.restored_on_failure(), torch.no_grad():
        if dense is not None and loader is not None and how.sequential:
            statistics = _remove_in_sequence(prunable, dense, removals, statistics, loader)
        else:
            if how.method != "none":
                _compensate(prunable, removals, statistics, how, loader, survivors)
            for removal in removals:
                prunable.carry_out(removal)
            statistics = statistics.narrow(kept_units(removals, statistics))
        if how.method == "refit" and dense is not None and loader is not None:
            _refit(prunable, dense, removals, how, loader, progress)
        elif how.recalibrate_batch_norms:
            _recalibrate_batch_norms(model, loader)
    return statistics


def _check_runs(model: nn.Module, loader: Iterable[Any]) -> None:
    """Run the first batch, so that a fault in it shows before anything changes."""
    with preserved(model), torch.no_grad():
        model.eval()
        run_model(model, first_inputs(loader, model))


def _compensate(
    prunable: PrunableModel,
    removals: Sequence[Removal],
    statistics: Statistics,
    how: Compensation,
    loader: Iterable[Any] | None,
    survivors: Mapping[str, Survivors] | None,
) -> None:
    """Write compensated weights into the consumers while they are whole; removed channels get 0."""
    method: ChannelMethod = how.method if how.method in ("merge", "mean") else "least_squares"
    model, plans, norms = prunable.model, {}, {}
    unseen = sorted(name for name in consumers_of(removals) if ("in", name) not in statistics.records)
    if unseen:
        _warn(f"pruned without compensation, the statistics do not cover the inputs of: {', '.join(unseen)}")
    for name, gone in removed_channels(model, removals, statistics).items():
        module = model.get_submodule(name)
        norm = prunable.following_norm(name)
        norms[name] = None if norm is None else model.get_submodule(norm)
        plan = plan_removal(
            module,
            statistics.records["in", name],
            gone,
            method,
            constant=has_bias(module) or norm is not None,
            survivors=None if survivors is None else survivors.get(name),
        )
        if plan is None:
            _warn(f"{name!r} is pruned without compensation: the statistics have no Gram matrix of its input")
        else:
            plans[name] = plan
    # Refitted consumers are compared with plain removal later, and survivors that a caller names are the caller's say.
    compared = _left_out(model, plans, how, loader) if how.method == "refit" and loader is not None else plans
    judged = {name: plan for name, plan in plans.items() if survivors is None and name in compared}
    for name in _not_worth_it(model, judged, statistics, loader):
        del plans[name]
    for name, plan in plans.items():
        apply_plan(model.get_submodule(name), statistics.records["in", name].layout, plan, norms[name])


def _not_worth_it(
    model: nn.Module, plans: Mapping[str, Plan], statistics: Statistics, loader: Iterable[Any] | None
) -> list[str]:
    """Consumers whose plan errs more on the calibration data than plain removal."""
    worse = {name for name, plan in plans.items() if plan.is_worse}
    undecided = {name: plan for name, plan in plans.items() if plan.is_worse is None}
    if loader is not None:
        worse |= worse_than_nothing(model, undecided, statistics, loader)
    elif undecided:
        _warn(
            f"the kernels of {', '.join(undecided)} span several positions, so the statistics cannot tell whether "
            "compensation beats plain removal there; pass a loader to compare both"
        )
    if worse:
        _warn(
            f"pruned without compensation, plain removal errs less on the calibration data: {', '.join(sorted(worse))}"
        )
    return sorted(worse)


def _remove_in_sequence(
    prunable: PrunableModel, dense: nn.Module, removals: Sequence[Removal], statistics: Statistics, loader: Any
) -> Statistics:
    """Remove one group after the other in execution order, each time mixing its consumers' inputs as they are now."""
    model = prunable.model
    example = first_inputs(loader, model)
    producers = {removal.group.name for removal in removals if removal.group is not None}
    order = {name: place for place, name in enumerate(execution_order(model, producers, example))}
    mixing, narrowed = GroupMixing(dense, model, loader), statistics
    done: list[Removal] = []
    for removal in sorted(removals, key=lambda removal: order.get(removal.group.name, -1) if removal.group else -1):
        prunable.carry_out(removal)
        done.append(removal)
        narrowed = narrowed.narrow(kept_units([removal], narrowed))
        kept = kept_outputs(dense, done)
        with in_evaluation(model):
            for name, calls in execution_order(model, consumers_of([removal]), example).items():
                if reason := _no_mixing(model, dense, name, narrowed, calls, kept.get(name)):
                    _warn(f"{name!r} is pruned without compensation: {reason}")
                    continue
                whole, narrow = (known.records["in", name].layout for known in (statistics, narrowed))
                norm = prunable.following_norm(name)
                mixing.mix(name, whole, narrow, None if norm is None else model.get_submodule(norm), kept.get(name))
    return narrowed


def _no_mixing(
    model: nn.Module, dense: nn.Module, name: str, statistics: Statistics, calls: int, kept: Tensor | None
) -> str:
    """Why a consumer's input cannot be mixed; empty if it can."""
    if ("in", name) not in statistics.records:
        return "the statistics do not cover its input"
    if calls > 1:
        return f"it runs {calls} times in a forward"
    return "" if _same_outputs(model, dense, name, kept) else UNKNOWN_OUTPUTS


def _refit(
    prunable: PrunableModel,
    dense: nn.Module,
    removals: Sequence[Removal],
    how: Compensation,
    loader: Iterable[Any],
    progress: bool,
) -> None:
    """Refit all consumers of the groups that lost units, in execution order."""
    model = prunable.model
    names = consumers_of(removals)
    kept = kept_outputs(dense, removals)
    left_out = _left_out(model, names, how, loader)
    for name in names - left_out.keys():
        if not _same_outputs(model, dense, name, kept.get(name)):
            left_out[name] = UNKNOWN_OUTPUTS
    for name, reason in sorted(left_out.items()):
        _warn(f"{name!r} is not refitted and keeps its least-squares weights: {reason}")
    unread = any(removal.group is None or not removal.group.consumers for removal in removals)
    if how.recalibrate_batch_norms and (left_out or unread):
        # A refitted layer repeats the dense model's outputs, and its norm gets their statistics; others do not.
        recalibrate_batch_norms(model, loader)
    example = first_inputs(loader, model)
    refitting = Refitting(dense, model, loader, how.ridge)
    order = list(execution_order(model, names - left_out.keys(), example))
    with in_evaluation(model):
        for name in tqdm(order, desc="refitting", disable=not progress, leave=False):
            refitting.refit(name, prunable.following_norm(name), kept.get(name))


def _same_outputs(model: nn.Module, dense: nn.Module, name: str, kept: Tensor | None) -> bool:
    """Whether a layer has as many outputs as it is known to keep."""
    now, before = (axis_length(part.get_submodule(name), "out", name) for part in (model, dense))
    return now == (before if kept is None else kept.numel())


def _left_out(model: nn.Module, names: Iterable[str], how: Compensation, loader: Iterable[Any]) -> dict[str, str]:
    """Consumers that cannot be refitted, and why."""
    calls = execution_order(model, names, first_inputs(loader, model))
    reasons = {}
    for name in names:
        module = model.get_submodule(name)
        if not is_linear_or_convolution(module):
            reasons[name] = f"it is a {type(module).__name__}"
        elif calls.get(name, 0) != 1:
            reasons[name] = f"it runs {calls.get(name, 0)} times in a forward"
        elif (depth := unfolded_weight(module).shape[2]) > how.max_unfolded:
            reasons[name] = f"its input unfolds to {depth} rows, more than max_unfolded={how.max_unfolded}"
    return reasons


def _recalibrate_batch_norms(model: nn.Module, loader: Iterable[Any] | None) -> None:
    if loader is not None:
        recalibrate_batch_norms(model, loader)
    elif any(is_batch_norm(module) for module in model.modules()):
        _warn(
            "batch norms keep the dense model's statistics: pass a loader to recalibrate them, or "
            "recalibrate_batch_norms=False to accept that"
        )


def _warn(message: str) -> None:
    warnings.warn(message, CompensationWarning, stacklevel=5)
