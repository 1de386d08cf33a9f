"""Steps of an extraction: shrink the head to some labels, remove units, compensate, and fit the output "other"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.backends import find_backend
from nns_plugin.compensation.options import Compensation
from nns_plugin.errors import LabelError, PruningError, StaleStatisticsError
from nns_plugin.labels import OTHER, LabelSet
from nns_plugin.models.activations import capture_input, collect_inputs
from nns_plugin.models.fingerprint import fingerprint
from nns_plugin.models.inputs import device_of, run_model, to_device
from nns_plugin.models.preserve import copied, preserved
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.extraction import Choice, Extraction, Preparation, Prepared
from nns_plugin.subnets.head import balancing_shift, close_head, fit_other, linear_head, open_head, shift_output
from nns_plugin.units import UnitGroup

PLAIN = Compensation("none", recalibrate_batch_norms=False)


def prepare(
    dense: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any] | None,
    labels: LabelSet,
    how: Preparation,
    *,
    statistics: Statistics | None = None,
    progress: bool = False,
) -> Prepared:
    """Copy a model, shrink its head and calibrate it, so that units can be chosen.

    With Gram matrices the head is shrunk to all outputs of the subnet first, so that a unit counts for what the kept
    labels do with it, and survivors take over that.

    Args:
        dense: The model; left as it was found.
        example_inputs: Inputs that it can run on.
        loader: Re-iterable; yields ``(inputs, labels)``. Not needed where statistics are given and the head does
            not open.
        labels: The labels to keep.
        how: How to prepare the copy.
        statistics: Statistics of the dense model; collected from the loader by default.
        progress: Whether to show progress bars.

    Raises:
        PruningError: If nothing can be pruned, or the head cannot be shrunk.
        StaleStatisticsError: If the statistics are of another model, or lack Gram matrices.
    """
    backend = find_backend(how.backend)
    model = copied(dense)
    traced = backend(model, example_inputs)
    shrinks = how.head != "keep" and not labels.keeps_all  # of all labels there is nothing to remove, and no other
    opens = how.head == "open" and shrinks
    heads = traced.heads
    if shrinks and len(heads) != 1:
        raise PruningError(
            f"the model's outputs are written by {len(heads)} layers ({', '.join(heads) or 'none'}); shrinking the "
            "head needs exactly one: use head 'keep'"
        )
    groups = traced.groups(how.ignored_layers)
    if not groups:
        raise PruningError(
            "nothing in this model can be pruned: no group of units is left beside the output, ignored layers "
            f"({', '.join(how.ignored_layers) or 'none'}) and groups that warnings name"
        )
    if opens and OTHER in labels.kept_names:
        raise LabelError(
            f"a kept label is called {OTHER!r}, like the output for every other label: rename it, or close the head"
        )
    if statistics is not None:
        _check(statistics, dense, groups, how.gram)
    labels = labels.with_all_outputs()
    if shrinks:
        labels = labels.closed()
        _check_head(model, heads[0], example_inputs)
        close_head(linear_head(model, heads[0]), labels.indices)
        if how.gram and opens:
            _open(model, heads[0], labels, loader, progress)
            labels = labels.opened()
    if statistics is None:
        if loader is None:
            raise PruningError("there are neither statistics nor a loader to collect them from; pass one of them")
        statistics = calibrate(model, loader, groups, labels=labels.names, gram=how.gram, progress=progress)
    else:  # a head is a consumer: what it reads is the same
        statistics = replace(statistics, fingerprint=fingerprint(model))
    return Prepared(traced, backend, example_inputs, groups, statistics, labels, heads[0] if shrinks else None, opens)


def carry_out(
    prepared: Prepared,
    choice: Choice,
    how: Compensation,
    loader: Iterable[Any] | None,
    *,
    validation: Iterable[Any] | None = None,
    progress: bool = False,
) -> Extraction:
    """Remove all but the chosen units from a prepared model, in place, and finish it.

    Args:
        prepared: From :func:`prepare`; it is consumed. Pass a :meth:`Prepared.fork` to use it again.
        choice: Which units stay.
        how: How the kept units take over.
        loader: Yields ``(inputs, labels)``.
        validation: Yields ``(inputs, labels)`` on which the output "other" is calibrated for the best mean balanced
            accuracy; it stays as fitted by default.
        progress: Whether to show progress bars.
    """
    heads = prepared.traced.heads
    prepared.traced.keep_and_compensate(
        prepared.groups, choice.kept, prepared.statistics, how, loader, choice.survivors, progress
    )
    done = Extraction(
        prepared.model,
        prepared.example_inputs,
        prepared.groups,
        heads,
        prepared.labels,
        prepared.head,
        prepared.opens,
        dict(choice.kept),
        dict(choice.scores),
    )
    return finish_head(done, loader, validation, progress)


def finish_head(
    extraction: Extraction,
    loader: Iterable[Any] | None,
    validation: Iterable[Any] | None = None,
    progress: bool = False,
) -> Extraction:
    """Fit the output "other" to the present features, in place, and calibrate it if there is validation data."""
    if not extraction.opens or extraction.head is None:
        return extraction
    _open(extraction.model, extraction.head, extraction.labels, loader, progress)
    extraction = replace(extraction, labels=extraction.labels.opened())
    if validation is not None:
        calibrate_head(extraction, validation, progress)
    return extraction


def calibrate_head(extraction: Extraction, validation: Iterable[Any], progress: bool = False) -> None:
    """Shift the output "other" for the best mean balanced accuracy on validation data, in place.

    Args:
        extraction: An extraction; one without that output stays as it is.
        validation: Re-iterable; yields ``(inputs, labels)``.
        progress: Whether to show progress bars.
    """
    if not extraction.opens or extraction.head is None:
        return
    features, truth = _features(extraction.model, extraction.head, validation, progress)
    head = linear_head(extraction.model, extraction.head)
    with torch.no_grad():
        logits = head(features.to(head.weight)).cpu()
    outputs = extraction.labels.outputs
    shift_output(head, outputs.index(None), balancing_shift(logits, outputs, truth))


def _open(model: nn.Module, name: str, labels: LabelSet, loader: Iterable[Any] | None, progress: bool) -> None:
    """Fit the output "other" to the present features, in place; refit it if it is there already."""
    if loader is None:
        raise PruningError("head 'open' is fitted on labelled inputs; pass a loader")
    features, truth = _features(model, name, loader, progress)
    head = linear_head(model, name)
    close_head(head, range(len(labels.indices)))
    with torch.no_grad():
        kept_logits = head(features.to(head.weight)).cpu()
    open_head(head, *fit_other(features, kept_logits, ~torch.isin(truth, torch.tensor(labels.indices))))


def _check_head(model: nn.Module, name: str, example_inputs: Any) -> None:
    """Check that the model's outputs are the head's, as they are or behind a softmax or sigmoid."""
    head = linear_head(model, name)
    with preserved(model), torch.no_grad():
        model.eval()
        inputs = to_device(example_inputs, device_of(model))
        found = run_model(model, inputs)
        logits = head(capture_input(model, name, inputs))
    if isinstance(found, Tensor) and found.shape == logits.shape and found.dim() == 2:
        for ending in (logits, logits.softmax(1), logits.log_softmax(1), logits.sigmoid()):
            if torch.allclose(found, ending, rtol=1e-3, atol=1e-5):
                return
    raise PruningError(
        f"the model's outputs are not those of its head {name!r}, as they are or behind a softmax, so the label of "
        "each row is unknown; use head 'keep'"
    )


def _features(model: nn.Module, name: str, loader: Iterable[Any], progress: bool) -> tuple[Tensor, Tensor]:
    features, labels = collect_inputs(model, name, loader, progress)
    if labels is None:
        raise LabelError("head 'open' needs labelled calibration data; it yields inputs alone")
    return features, labels


def _check(statistics: Statistics, dense: nn.Module, groups: Sequence[UnitGroup], gram: bool) -> None:
    statistics.check_current(dense)
    for group in groups:
        for port in group.consumers:
            record = statistics.records.get(("in", port.name))
            if record is None or (gram and record.gram is None):
                what = "do not cover" if record is None else "have no Gram matrix of"
                raise StaleStatisticsError(
                    f"the statistics {what} what {port.name!r} reads; calibrate on the model's unit groups"
                    f"{', with gram=True' if gram else ''}"
                )
