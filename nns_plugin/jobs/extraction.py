"""Extraction of a subnet: calibrate, score, select, remove and compensate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nns_plugin.criteria.contract import needs_of
from nns_plugin.environment import versions
from nns_plugin.errors import CriterionError, LabelError, PruningError
from nns_plugin.jobs.accuracy_search import Judge, smallest_within
from nns_plugin.jobs.choosing import Chooser, build_criterion, by_angle
from nns_plugin.jobs.stages import stage
from nns_plugin.labels import LabelSet
from nns_plugin.models.fingerprint import digest, fingerprint
from nns_plugin.models.inputs import device_of, run_model, to_device
from nns_plugin.models.preserve import preserved
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.extraction import Choice, Extraction, Preparation, Prepared
from nns_plugin.subnets.options import CONFIDENCE, ExtractionOptions
from nns_plugin.subnets.provenance import Provenance, Trial
from nns_plugin.subnets.steps import PLAIN, carry_out, prepare
from nns_plugin.subnets.subnet import Subnet
from nns_plugin.synapses.snapshot import WeightSnapshot

if TYPE_CHECKING:
    from nns_plugin.jobs.latency_search import Timing

Searched = tuple[Extraction, tuple[Trial, ...]]


def extract_subnet(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    options: ExtractionOptions | None = None,
    *,
    validation: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    snapshot: WeightSnapshot | None = None,
    progress: bool = False,
    **settings: Any,
) -> Subnet:
    """Extract the part of a classifier that some labels need.

    Args:
        model: Returns logits ``[N, labels]``; left as it was found.
        example_inputs: A tensor, or a tuple or mapping of tensors, that the model can run on.
        loader: Re-iterable; yields ``(inputs, labels)``.
        options: What to extract, and how.
        validation: Yields ``(inputs, labels)`` for ``max_balanced_accuracy_drop``, a target for latency and
            ``calibrate_head``.
        statistics: Labelled statistics of the model, with ``gram=True`` where the criterion or compensation needs that;
            collected from the loader by default.
        snapshot: The model's weights before training, for the criterion ``"wsf"``.
        progress: Whether to show progress bars.
        **settings: Fields of :class:`nns_plugin.subnets.options.ExtractionOptions` by name, such as ``labels``,
            ``ratio``, ``criterion`` or ``max_balanced_accuracy_drop``; they replace those of ``options``.

    Returns:
        The subnet; the trials of a search are in ``provenance.trials``.

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
    for name, data in (("the loader", loader), ("validation", validation)):
        if isinstance(data, Iterator):
            raise PruningError(f"{name} is an iterator, which yields once; pass something that yields anew")
    options = ExtractionOptions.of(settings, options)
    if validation is None and (options.calibrate_head or options.max_balanced_accuracy_drop is not None):
        raise PruningError("calibrate_head and max_balanced_accuracy_drop need validation data; pass validation")
    numbers = _numbers(model, example_inputs)
    names = options.label_names or (statistics and statistics.labels) or numbers
    if len(names) != len(numbers) or len(set(names)) != len(names):
        raise LabelError(
            f"there are {len(numbers)} outputs and the label names {tuple(names)}; expected one for each, distinct"
        )
    labels = LabelSet.of(names, options.labels)
    sources = Sources(example_inputs, loader, validation, statistics, snapshot)
    extraction, trials = extract(model, sources, options, labels, progress=progress)
    return Subnet.of(extraction, provenance(model, options, extraction, trials))


@dataclass(frozen=True, eq=False)
class Sources:
    """What an extraction learns from.

    Attributes:
        example_inputs: Inputs that the model can run on.
        loader: Re-iterable; yields ``(inputs, labels)`` for calibration.
        validation: Yields ``(inputs, labels)`` for decisions; those of the loader by default.
        statistics: Statistics of the dense model; collected from the loader by default.
        snapshot: The dense model's weights before training, for criteria that need them.
    """

    example_inputs: Any
    loader: Iterable[Any]
    validation: Iterable[Any] | None = None
    statistics: Statistics | None = None
    snapshot: WeightSnapshot | None = None

    @property
    def decisive(self) -> Iterable[Any]:
        """The data for decisions."""
        return self.loader if self.validation is None else self.validation


def extract(
    dense: nn.Module,
    sources: Sources,
    options: ExtractionOptions,
    labels: LabelSet,
    timing: Timing | None = None,
    progress: bool = False,
) -> Searched:
    """Extract a small model from a copy of the dense one.

    The copy is calibrated, its units are scored, selected and removed, the kept ones take over, batch norms are
    recalibrated and the head is shrunk; with Gram matrices that comes first.

    Args:
        dense: The dense model; left as it was found.
        sources: What to learn from.
        options: What to extract, and how.
        labels: The labels to keep.
        timing: How to measure latency for a target.
        progress: Whether to show progress bars.

    Returns:
        The extraction, and the trials of a search.

    Raises:
        PruningError: If nothing in the model can be pruned.
    """
    if "snapshot" in needs_of(options.criterion_class).requires and sources.snapshot is None:
        raise CriterionError(
            f"criterion {options.effective_criterion!r} needs the weights before training: pass a snapshot; in a "
            "recipe, let the job train, or give model.initial"
        )
    # The snapshot is compared with the model before its head was shrunk.
    known = {} if sources.snapshot is None else {"snapshot": sources.snapshot, "model": dense}
    how = Preparation(options.effective_head, options.needs_gram, options.ignored_layers, options.framework)
    with stage("data.calibration"):
        prepared = prepare(
            dense,
            sources.example_inputs,
            sources.loader,
            labels,
            how,
            statistics=sources.statistics,
            progress=progress,
        )
        criterion = build_criterion(options, prepared, sources.loader, known, progress)

    def finish(choice: Choice, prepared: Prepared = prepared) -> Extraction:
        validation = sources.validation if options.calibrate_head else None
        with stage("extraction"):
            return carry_out(
                prepared,
                choice,
                options.effective_compensation,
                sources.loader,
                validation=validation,
                progress=progress,
            )

    if options.angle is not None:
        return finish(by_angle(options, prepared, criterion)), ()
    chooser = Chooser.of(options, prepared, criterion)
    if not options.has_target and options.max_balanced_accuracy_drop is None:
        return finish(chooser.fixed()), ()
    with stage("data.validation"):
        judge = Judge(
            dense,
            sources.decisive,
            options.max_balanced_accuracy_drop,
            options.effective_confidence or CONFIDENCE,
            options.calibrate_head,
        )
        if not options.has_target:
            return smallest_within(
                judge, chooser.by_ratio, lambda choice: finish(choice, prepared.fork()), progress=progress
            )
    return _by_latency(dense, chooser, finish, judge, timing, progress)


def _by_latency(
    dense: nn.Module,
    chooser: Chooser,
    finish: Callable[[Choice, Prepared], Extraction],
    judge: Judge,
    timing: Timing | None,
    progress: bool,
) -> Searched:
    """Search the extraction that meets a target for latency."""
    from nns_plugin.jobs.latency_search import Candidates, Stopwatch, Target, Timing, fast_enough  # needs extra onnx

    options, prepared = chooser.options, chooser.prepared

    def sketch(choice: Choice) -> nn.Module:
        closed = dataclasses.replace(prepared.fork(), opens=False)
        return carry_out(closed, choice, PLAIN, None).model

    candidates = Candidates(chooser.by_ratio, sketch, lambda choice: finish(choice, prepared.fork()))
    target = Target(options.target_latency_ms, options.target_speedup)
    with stage("searching"), Stopwatch(dense, prepared.example_inputs, timing or Timing()) as stopwatch:
        return fast_enough(
            stopwatch,
            candidates,
            judge,
            target,
            options.effective_roundings,
            options.max_balanced_accuracy_drop,
            progress,
        )


def provenance(
    parent: nn.Module,
    options: ExtractionOptions,
    extraction: Extraction,
    trials: tuple[Trial, ...] = (),
    training: Mapping[str, Any] | None = None,
) -> Provenance:
    """The provenance of a subnet that was extracted from a parent."""
    return Provenance(
        parent=digest(fingerprint(parent)),
        versions=versions(),
        criterion=options.effective_criterion,
        options=options.effective_criterion_options,
        selection=options.selection,
        compensation=dataclasses.asdict(options.effective_compensation),
        head=options.effective_head,
        ignored_layers=options.ignored_layers,
        calibrated=options.calibrate_head and extraction.opens,
        training=dict(training or {}),
        trials=trials,
    )


def _numbers(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """Numbers for names, as many as the model has outputs."""
    with preserved(model), torch.no_grad(), stage("example_inputs"):
        model.eval()
        found = run_model(model, to_device(example_inputs, device_of(model)))
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise PruningError("the model must return logits of shape [N, labels] for the example inputs")
    return tuple(str(place) for place in range(found.shape[1]))
