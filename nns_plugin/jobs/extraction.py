"""Extraction: calibrate, score, select and remove, so that what is left knows some labels."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend
from nns_plugin.backends import Backend
from nns_plugin.compensation.options import Compensation, Method
from nns_plugin.compensation.survivors import Survivors, survivors_of
from nns_plugin.criteria import build, find, needs_of, options_of, score_groups
from nns_plugin.errors import CriterionError, LabelError, NNSError, PruningError, RecipeError, SelectionError
from nns_plugin.jobs.accuracy_search import Judge, smallest_within
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.loading import check_extraction
from nns_plugin.jobs.recipe import CONFIDENCE, ExtractionSection, MeasureSection, Recipe
from nns_plugin.labels import resolve_label
from nns_plugin.models.fingerprint import digest, fingerprint
from nns_plugin.models.inputs import device_of, run_model, to_device
from nns_plugin.models.preserve import preserved
from nns_plugin.selection import AngleRule, keep_by_ratio, keep_by_threshold
from nns_plugin.statistics.macs import layer_macs, unit_macs
from nns_plugin.statistics.sensitivity import output_sensitivity
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.provenance import Provenance, Trial, current_versions
from nns_plugin.subnets.steps import Extraction, Head, carry_out, prepare
from nns_plugin.subnets.subnet import Subnet
from nns_plugin.synapses.snapshot import WeightSnapshot

EVIDENCE = ("statistics", "model", "snapshot")


def extract_subnet(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    *,
    labels: Sequence[int | str] | None = None,
    ratio: float | None = None,
    zeta: float | None = None,
    max_balanced_accuracy_drop: float | None = None,
    confidence: float | None = None,
    criterion: str | None = None,
    options: Mapping[str, Any] | None = None,
    compensation: Method | None = None,
    head: Head | None = None,
    calibrate_head: bool = False,
    global_pruning: bool = False,
    round_to: int = 1,
    ignored_layers: Sequence[str] = (),
    validation: Iterable[Any] | None = None,
    label_names: Sequence[str] | None = None,
    statistics: Statistics | None = None,
    snapshot: WeightSnapshot | None = None,
    progress: bool = False,
) -> Subnet:
    """Cut out of a classifier what some labels need.

    Args:
        model: Gives logits ``[N, labels]``; left as it was found.
        example_inputs: A tensor, or a tuple or mapping of tensors, that it can run on.
        loader: Yields ``(inputs, labels)``; anew each time.
        labels: Labels to keep, by index or name; all by default.
        ratio: Share of units to remove, in [0, 1); 0.5 if nothing else decides.
        zeta: Keep units that score at least this.
        max_balanced_accuracy_drop: Search the smallest subnet whose mean balanced accuracy over the labels is at most
            this far (0.02: two points) under the dense model's as it answers, to judge by the validation data.
            ``provenance.trials`` of the result says what was tried.
        confidence: How sure of that to be in each trial, 0.95 by default: the share of the bootstrap resamples of the
            validation data in which it must hold. More data, and confidence down to 0.5, allow smaller subnets.
        criterion: Name of the criterion; by default ``"semantic"`` with labels, else ``"distinctiveness"``.
        options: Its options.
        compensation: How kept units take over; by default ``"refit"`` with ``"distinctiveness"``, else ``"none"``.
        head: ``"open"`` (the default with labels) has an output for everything else, ``"closed"`` has none, ``"keep"``
            leaves the head as it is.
        calibrate_head: Whether to move the output for everything else so that balanced accuracy is best on the
            validation data, which the dense model's outputs are not: part of a budget may be paid with that.
        global_pruning: Whether to rank the units of all groups together.
        round_to: Keep a multiple of this many units in each group.
        ignored_layers: Names of layers whose outputs must stay whole.
        validation: Yields ``(inputs, labels)`` that ``max_balanced_accuracy_drop`` and ``calibrate_head`` go by.
        label_names: Name of each label; their numbers by default.
        statistics: Of the model, labelled, and with ``gram=True`` where the criterion or compensation needs that;
            collected from the loader by default.
        snapshot: The model's weights before training, for the criterion ``"wsf"``.
        progress: Whether to show progress bars.

    Returns:
        The subnet.

    Raises:
        NNSError: If an option is wrong, or the model or the data cannot be used.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> loader = [(torch.randn(60, 4), torch.arange(60) % 3)]
        >>> subnet = extract_subnet(model, torch.randn(2, 4), loader, labels=[0, 2], ratio=0.5)
        >>> subnet.output_names, subnet.weights["0.weight"].shape
        (('0', '2', 'other'), torch.Size([8, 4]))
    """
    for name, value in (("labels", labels), ("ignored_layers", ignored_layers)):
        if isinstance(value, str) or not isinstance(value, (Iterable, type(None))):
            raise RecipeError(f"{name} is {value!r}; it must be a list")
    if isinstance(validation, Iterator):
        raise PruningError("validation is an iterator, which yields once; pass something that yields anew")
    cut_section = check_extraction(
        labels=None if labels is None else [_plain(label) for label in labels],
        criterion={"name": criterion, "options": dict(options or {})},
        compensation={"method": compensation},
        ratio=ratio,
        zeta=zeta,
        max_balanced_accuracy_drop=max_balanced_accuracy_drop,
        confidence=confidence,
        global_pruning=global_pruning,
        round_to=round_to,
        ignored_layers=list(ignored_layers),
        head=head,
        calibrate_head=calibrate_head,
    )
    if validation is None and (calibrate_head or max_balanced_accuracy_drop is not None):
        raise PruningError("calibrate_head and max_balanced_accuracy_drop need validation data; pass validation")
    numbers = _numbers(model, example_inputs)
    names = tuple(str(name) for name in label_names or (statistics and statistics.labels) or numbers)
    if len(names) != len(numbers) or len(set(names)) != len(names):
        raise LabelError(
            f"there are {len(numbers)} outputs and the label names {names}; expected one for each, distinct"
        )
    extraction, trials = extract(
        model,
        example_inputs,
        loader,
        names,
        cut_section,
        validation=validation,
        statistics=statistics,
        snapshot=snapshot,
        progress=progress,
    )
    return Subnet.of(extraction, names, provenance(model, cut_section, extraction, trials))


def extract(
    dense: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    names: Sequence[str],
    section: ExtractionSection,
    *,
    validation: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    snapshot: WeightSnapshot | None = None,
    progress: bool = False,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """Cut a copy of a model as a section says.

    It is calibrated, its units are scored, selected and removed, the kept ones take over, batch norms are recalibrated
    and the head is shrunk; with Gram matrices that comes first.

    Returns:
        The finished cut, and what a search within a budget tried.

    Raises:
        PruningError: If nothing in the model can be pruned.
    """
    chosen = chosen_labels(section, names)
    kind = criterion_class(section)
    if "snapshot" in needs_of(kind).requires and snapshot is None:
        raise CriterionError(
            f"criterion {section.effective_criterion.name!r} needs the weights before training: pass a snapshot; in a "
            "recipe, let the job train, or give model.initial"
        )
    how = section.effective_compensation
    with stage("data.calibration"):
        prepared = prepare(
            dense,
            example_inputs,
            loader,
            names,
            labels=chosen,
            head=section.effective_head,
            gram=how.method != "none" or needs_of(kind).gram,
            backend=TorchPruningBackend,
            ignored_layers=section.ignored_layers,
            statistics=statistics,
            progress=progress,
        )
        evidence = _evidence(section, prepared, loader, progress)
    if snapshot is not None:  # of the model before its head was shrunk
        evidence |= {"snapshot": snapshot, "model": dense}
    criterion = _criterion(section, evidence, chosen)
    scores = None if section.angle is not None else score_groups(criterion, prepared.groups)
    backend = backend_of(section)

    def finished(kept: Mapping[str, Tensor], survivors: Mapping[str, Survivors] | None = None) -> Extraction:
        with stage("cutting"):
            return carry_out(
                prepared,
                kept,
                how,
                loader,
                backend=backend,
                scores=scores,
                survivors=survivors,
                validation=validation if section.calibrate_head else None,
                progress=progress,
            )

    if scores is None:
        kept, survivors = _by_angle(section, criterion, prepared)
        return finished(kept, survivors), ()
    if section.config_list is not None:
        by_list = _by_masks(prepared, scores, section.config_list)
        if all(by_list[group.name].numel() == group.size for group in prepared.groups if group.name in by_list):
            raise SelectionError("the config list masks no unit whole, so that nothing goes; ask for more of it")
        return finished(by_list), ()
    if section.zeta is not None and section.framework == "nni":
        return finished(_by_masks(prepared, scores, [{"sparse_threshold": section.zeta}])), ()
    if section.zeta is not None:
        return finished(keep_by_threshold(scores, section.zeta, round_to=section.round_to)), ()

    def by_ratio(ratio: float, round_to: int = section.round_to) -> dict[str, Tensor]:
        if section.framework == "nni":
            return _by_masks(prepared, scores, [{"sparse_ratio": ratio}])
        return keep_by_ratio(scores, ratio, round_to=round_to, global_pruning=section.global_pruning)

    if section.has_target:
        data = loader if validation is None else validation
        return _by_latency(dense, prepared, section, by_ratio, finished, names, data, progress)
    max_drop, confidence = section.max_balanced_accuracy_drop, section.effective_confidence
    if max_drop is None or confidence is None:
        return finished(by_ratio(0.5 if section.ratio is None else section.ratio)), ()
    data = loader if validation is None else validation
    with stage("data.validation"):
        return smallest_within(
            dense,
            by_ratio,
            finished,
            names,
            data,
            max_drop,
            confidence,
            section.calibrate_head,
            progress,
        )


def extract_from(
    dense: nn.Module,
    data: Datasets,
    section: ExtractionSection,
    *,
    statistics: Statistics | None = None,
    snapshot: WeightSnapshot | None = None,
    progress: bool = False,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """The same, with the data of a job; a recipe's section ``measure`` says how a target for latency is measured."""
    return extract(
        dense,
        data.example_inputs,
        data.calibration,
        data.label_names,
        section,
        validation=data.decisive,
        statistics=statistics,
        snapshot=snapshot,
        progress=progress,
    )


def _by_latency(
    dense: nn.Module,
    prepared: Extraction,
    section: ExtractionSection,
    keep: Callable[[float, int], Mapping[str, Tensor]],
    finish: Callable[[Mapping[str, Tensor]], Extraction],
    names: Sequence[str],
    validation: Iterable[Any],
    progress: bool,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """Search the cut that meets a target for latency."""
    from nns_plugin.jobs.latency_search import Stopwatch, Target, fast_enough  # needs the extra onnx

    backend = backend_of(section)

    def sketch(kept: Mapping[str, Tensor]) -> nn.Module:
        closed = dataclasses.replace(prepared, opens=False)
        return carry_out(closed, kept, Compensation("none", recalibrate_batch_norms=False), None, backend=backend).model

    with stage("data.validation"):
        judge = Judge(
            dense,
            names,
            validation,
            section.max_balanced_accuracy_drop,
            section.effective_confidence or CONFIDENCE,
            section.calibrate_head,
        )
    how: dict[str, Any] = {"settings": MeasureSection()}
    if isinstance(section, Recipe):
        how = {"settings": section.measure, "opset": section.export.opset, "seed": section.seed}
    with stage("searching"), Stopwatch(dense, prepared.example_inputs, **how) as stopwatch:
        return fast_enough(
            stopwatch,
            keep,
            sketch,
            finish,
            judge,
            Target(section.target_latency_ms, section.target_speedup),
            section.effective_roundings,
            section.max_balanced_accuracy_drop,
            progress,
        )


def provenance(
    parent: nn.Module,
    section: ExtractionSection,
    extraction: Extraction,
    trials: tuple[Trial, ...] = (),
    training: Mapping[str, Any] | None = None,
) -> Provenance:
    """Where a subnet that is cut out of a parent as a section says comes from."""
    criterion = section.effective_criterion
    return Provenance(
        parent=digest(fingerprint(parent)),
        versions=current_versions(),
        criterion=str(criterion.name),
        options=dict(criterion.options),
        selection=section.selection,
        compensation=dataclasses.asdict(section.effective_compensation),
        head=section.effective_head,
        ignored_layers=tuple(section.ignored_layers),
        calibrated=section.calibrate_head and extraction.opens,
        training=dict(training or {}),
        trials=trials,
    )


def criterion_class(section: ExtractionSection) -> type[Any]:
    """The criterion that a recipe names, after a look at its options.

    Raises:
        CriterionError: If it needs something that a recipe cannot provide.
        RecipeError: If an option does not exist or contradicts the section.
    """
    name, options = section.effective_criterion.name, section.effective_criterion.options
    criterion = find(str(name))
    missing = [need for need in needs_of(criterion).requires if need not in EVIDENCE]
    if missing:
        raise CriterionError(
            f"criterion {name!r} needs {', '.join(missing)}, which a recipe cannot provide; use its importance class "
            "in nns_plugin.adapters.torch_pruning"
        )
    allowed = options_of(criterion)
    for option in options:
        if option not in allowed:
            raise RecipeError(f"criterion.options: found {option!r}; {name!r} has the options {', '.join(allowed)}")
    return criterion


def _criterion(section: ExtractionSection, evidence: Mapping[str, Any], chosen: Sequence[int] | None) -> Any:
    try:
        return build(criterion_class(section), evidence, section.effective_criterion.options, chosen)
    except (CriterionError, TypeError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise RecipeError(f"criterion.options: {' '.join(str(error).split())}") from error


def _evidence(
    section: ExtractionSection, extraction: Extraction, loader: Iterable[Any], progress: bool
) -> dict[str, Any]:
    """What a criterion may be built from; the costly parts only where they change something."""
    model, groups = extraction.model, extraction.statistics.groups
    evidence: dict[str, Any] = {"statistics": extraction.statistics, "model": model}
    wanted = needs_of(criterion_class(section)).optional
    if "sensitivity" in wanted and (section.global_pruning or section.labels is not None):
        evidence["sensitivity"] = output_sensitivity(model, loader, groups, progress=progress)
    if "cost" in wanted and section.global_pruning:
        evidence["cost"] = unit_macs(model, groups, layer_macs(model, extraction.example_inputs))
    return evidence


def _by_angle(
    section: ExtractionSection, criterion: Any, extraction: Extraction
) -> tuple[dict[str, Tensor], dict[str, Survivors]]:
    """The kept units of each group, and who takes over from whom."""
    angle = section.angle
    if angle is None:
        raise RecipeError("angle: found nothing; it is required")
    selections = criterion.select(extraction.groups, AngleRule(angle.similar, angle.complementary, angle.complement))
    survivors = survivors_of(extraction.statistics, extraction.groups, selections, angle.merge, criterion.center)
    return {name: selection.kept for name, selection in selections.items()}, survivors


def backend_of(section: ExtractionSection) -> Backend:
    """What removes the units.

    Raises:
        MissingExtraError: If NNI is asked for and not installed.
    """
    if section.framework == "torch_pruning":
        return TorchPruningBackend
    from nns_plugin.adapters.nni import NNIBackend

    return NNIBackend


def _by_masks(
    extraction: Extraction, scores: Mapping[str, Tensor], config_list: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The kept units of each group by NNI's masks; configs that name no layers are about all that write units."""
    from nns_plugin.adapters.nni import kept_by_masks

    producers = [port.name for group in extraction.groups if group.name in scores for port in group.producers]
    named = [
        {"op_names": list(dict.fromkeys(producers)), **config}
        if not {"op_names", "op_types", "op_names_re"} & config.keys()
        else config
        for config in config_list
    ]
    return kept_by_masks(extraction.model, extraction.example_inputs, extraction.groups, scores, named)


def _plain(label: Any) -> Any:
    """A label as Python's own type: NumPy and torch have integers of theirs."""
    if isinstance(label, (str, bool)):
        return label
    try:
        return operator.index(label)
    except TypeError:
        return label


def _numbers(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """Numbers for names, as many as the model has outputs."""
    with preserved(model), torch.no_grad(), stage("example_inputs"):
        model.eval()
        found = run_model(model, to_device(example_inputs, device_of(model)))
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise PruningError("the model must give logits of shape [N, labels] for the example inputs")
    return tuple(str(place) for place in range(found.shape[1]))


def chosen_labels(section: ExtractionSection, names: Sequence[str]) -> list[int] | None:
    """Indices of the labels to keep, ascending; ``None`` for all.

    Raises:
        LabelError: If one is unknown or ambiguous.
    """
    if section.labels is None:
        return None
    for label in section.labels:
        if isinstance(label, int) and str(label) in names and names.index(str(label)) != label:
            raise LabelError(
                f"label {label} is ambiguous: it is an index, and the name of label number {names.index(str(label))}; "
                f'write "{label}" for the name'
            )
    return sorted({resolve_label(label, names) for label in section.labels})


@contextmanager
def stage(field: str) -> Iterator[None]:
    """Name the field of the recipe whose code or data failed.

    Raises:
        RecipeError: For whatever the user's code or data raises that is no error of ours.
    """
    try:
        yield
    except NNSError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"{field}: {type(error).__name__}: {text[:300]}") from error
