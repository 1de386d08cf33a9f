"""Cutting: shrink the head to some labels, remove units, let the kept ones take over, fit the output "other"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nns_plugin.backends import Backend
from nns_plugin.compensation.options import Compensation
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.errors import LabelError, PruningError, StaleStatisticsError
from nns_plugin.labels import OTHER
from nns_plugin.models.activations import capture_input, collect_inputs
from nns_plugin.models.fingerprint import fingerprint
from nns_plugin.models.inputs import device_of, run_model, to_device
from nns_plugin.models.preserve import copied, preserved
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.head import balancing_shift, close_head, fit_other, linear_head, open_head, shift_output
from nns_plugin.units import UnitGroup

Head = Literal["keep", "closed", "open"]


@dataclass(frozen=True, eq=False)
class Extraction:
    """A model that is being cut down to a label set.

    Attributes:
        model: A copy of the dense model, with as much done to it as has been done so far.
        example_inputs: Inputs that it can run on.
        groups: Its unit groups before any removal.
        statistics: Of the model before any removal.
        labels: Indices of the labels to keep, ascending.
        outputs: The label of each output; ``None`` for "other".
        head: The layer that was shrunk; ``None`` if none was.
        opens: Whether the output "other" belongs to it.
        kept: For each pruned group's name the kept units, ``[k]`` int64 ascending.
        scores: For each pruned group's name the criterion's scores of all units, ``[U]`` float64, where it has any.
    """

    model: nn.Module
    example_inputs: Any
    groups: tuple[UnitGroup, ...]
    statistics: Statistics
    labels: tuple[int, ...]
    outputs: tuple[int | None, ...]
    head: str | None
    opens: bool
    kept: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]


def prepare(
    dense: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any] | None,
    names: Sequence[str],
    *,
    labels: Sequence[int] | None,
    head: Head,
    gram: bool,
    backend: Backend,
    ignored_layers: Sequence[str] = (),
    statistics: Statistics | None = None,
    progress: bool = False,
) -> Extraction:
    """Copy a model, shrink its head and calibrate it, so that units can be chosen.

    With Gram matrices the head is shrunk to all that it is going to answer, so that a unit counts for what the kept
    labels do with it, and survivors take over that.

    Args:
        dense: The model; left as it was found.
        example_inputs: Inputs that it can run on.
        loader: Yields ``(inputs, labels)``; anew each time. Not needed where statistics are given and the head does
            not open.
        names: Name of each label.
        labels: Indices of the labels to keep; ``None`` for all.
        head: What the outputs become.
        gram: Whether Gram matrices are needed.
        backend: Traces and cuts.
        ignored_layers: Names of layers whose outputs must stay whole.
        statistics: Of the dense model; collected from the loader by default.
        progress: Whether to show progress bars.

    Raises:
        PruningError: If nothing can be pruned, the head cannot be shrunk or ``head`` is unknown.
        StaleStatisticsError: If the statistics are of another model, or lack Gram matrices.
    """
    if head not in get_args(Head):
        raise PruningError(f"head is {head!r}; it must be one of {', '.join(get_args(Head))}")
    model = copied(dense)
    traced = backend(model, example_inputs)
    whole = tuple(range(len(names)))
    chosen = whole if labels is None else tuple(sorted(labels))
    shrinks = head != "keep" and chosen != whole  # of all labels there is nothing to cut, and no other
    if shrinks and len(traced.heads) != 1:
        raise PruningError(
            f"the model's outputs are written by {len(traced.heads)} layers ({', '.join(traced.heads) or 'none'}); "
            "shrinking the head needs exactly one: use head 'keep'"
        )
    groups = traced.groups(ignored_layers)
    if not groups:
        raise PruningError(
            "nothing in this model can be pruned: no group of units is left beside the output, ignored layers "
            f"({', '.join(ignored_layers) or 'none'}) and groups that warnings name"
        )
    name = traced.heads[0] if shrinks else None
    if head == "open" and shrinks and OTHER in (names[label] for label in chosen):
        raise LabelError(
            f"a kept label is called {OTHER!r}, as the output for everything else: rename it, or close the head"
        )
    if statistics is not None:
        _check(statistics, dense, groups, gram)
    outputs: tuple[int | None, ...] = chosen if shrinks else whole
    if name is not None:
        _check_head(model, name, example_inputs)
        close_head(linear_head(model, name), chosen)
        if gram and head == "open":
            _open(model, name, chosen, loader, progress)
            outputs = (*chosen, None)
    if statistics is None:
        if loader is None:
            raise PruningError("there are neither statistics nor a loader to collect them from; pass one of them")
        statistics = calibrate(model, loader, groups, labels=names, gram=gram, progress=progress)
    else:  # a head is a consumer: what it reads is the same
        statistics = replace(statistics, fingerprint=fingerprint(model))
    return Extraction(
        model, example_inputs, groups, statistics, chosen, outputs, name, head == "open" and shrinks, {}, {}
    )


def carry_out(
    extraction: Extraction,
    kept: Mapping[str, Tensor],
    how: Compensation,
    loader: Iterable[Any] | None,
    *,
    backend: Backend,
    scores: Mapping[str, Tensor] | None = None,
    survivors: Mapping[str, Survivors] | None = None,
    validation: Iterable[Any] | None = None,
    progress: bool = False,
) -> Extraction:
    """Remove all but the kept units from a copy of a prepared model, and finish it.

    Args:
        extraction: From :func:`prepare`; stays as it is, so that it can be carried out in several ways.
        kept: For each pruned group's name the kept units, ``[k]`` int64 ascending.
        how: How the kept units take over.
        loader: Yields ``(inputs, labels)``.
        backend: Traces and cuts.
        scores: What the units were chosen by.
        survivors: Who takes over from whom, after a selection by angles.
        validation: Yields ``(inputs, labels)`` that the output "other" is calibrated on, for the best mean balanced
            accuracy; it is left as it was fitted by default.
        progress: Whether to show progress bars.
    """
    model = copied(extraction.model)
    traced = backend(model, extraction.example_inputs)
    traced.keep_and_compensate(extraction.groups, kept, extraction.statistics, how, loader, survivors, progress)
    done = replace(extraction, model=model, kept=dict(kept), scores={} if scores is None else dict(scores))
    return finish_head(done, loader, validation, progress)


def finish_head(
    extraction: Extraction,
    loader: Iterable[Any] | None,
    validation: Iterable[Any] | None = None,
    progress: bool = False,
) -> Extraction:
    """Fit the output "other", in place, to what the features are now, and calibrate it if there is validation data."""
    if not extraction.opens or extraction.head is None:
        return extraction
    _open(extraction.model, extraction.head, extraction.labels, loader, progress)
    extraction = replace(extraction, outputs=(*extraction.labels, None))
    if validation is not None:
        calibrate_head(extraction, validation, progress)
    return extraction


def calibrate_head(extraction: Extraction, validation: Iterable[Any], progress: bool = False) -> None:
    """Move the output "other" to the best mean balanced accuracy on validation data, in place.

    Args:
        extraction: A cut with that output; nothing happens to others.
        validation: Yields ``(inputs, labels)``, anew each time.
        progress: Whether to show progress bars.
    """
    if not extraction.opens or extraction.head is None:
        return
    features, truth = _features(extraction.model, extraction.head, validation, progress)
    head = linear_head(extraction.model, extraction.head)
    with torch.no_grad():
        logits = head(features.to(head.weight)).cpu()
    shift_output(head, extraction.outputs.index(None), balancing_shift(logits, extraction.outputs, truth))


def _open(model: nn.Module, name: str, labels: Sequence[int], loader: Iterable[Any] | None, progress: bool) -> None:
    """Fit the output "other" to the features as they are, in place; anew if it is there already."""
    if loader is None:
        raise PruningError("head 'open' is fitted on labelled inputs, and there is no loader; pass one")
    features, truth = _features(model, name, loader, progress)
    head = linear_head(model, name)
    close_head(head, range(len(labels)))
    with torch.no_grad():
        kept_logits = head(features.to(head.weight)).cpu()
    open_head(head, *fit_other(features, kept_logits, ~torch.isin(truth, torch.tensor(labels))))


def _check_head(model: nn.Module, name: str, example_inputs: Any) -> None:
    """Make sure that the outputs are what the head's rows give: as they are, or behind a softmax or sigmoid."""
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
        f"the model's outputs are not what its head {name!r} gives, as it is or behind a softmax: which label each row "
        "is of cannot be told; use head 'keep'"
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
