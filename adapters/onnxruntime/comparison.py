"""A candidate beside its baseline: parity, accuracy per label, latency, memory, and where the time goes."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport, accuracy_report
from nns_plugin.adapters.onnxruntime.answers import answers_of
from nns_plugin.adapters.onnxruntime.exporting import export
from nns_plugin.adapters.onnxruntime.feeds import Feeds, feeds_of, random_values, values_of
from nns_plugin.adapters.onnxruntime.file import OnnxFile, read_file
from nns_plugin.adapters.onnxruntime.latency import SESSIONS, FeedPair, LatencyComparison, measure_latency
from nns_plugin.adapters.onnxruntime.layers import read_layers
from nns_plugin.adapters.onnxruntime.memory import SessionMemory, session_memory
from nns_plugin.adapters.onnxruntime.parity import check_parity, check_removal
from nns_plugin.adapters.onnxruntime.profile import ProfileComparison, compare_profiles, profile
from nns_plugin.adapters.onnxruntime.session import check_provider, provider_name, runtime_build
from nns_plugin.environment import machine, versions
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.metrics import Array
from nns_plugin.evaluation.parity import ParityReport, check_tolerances

Model: TypeAlias = str | os.PathLike[str] | nn.Module
RANDOM_INPUTS = 64
_CHUNK = 64


class UnmeasuredWarning(UserWarning):
    """Something that no threshold is about could not be measured."""


@dataclass(frozen=True)
class Comparison:
    """What was measured of a candidate and its baseline.

    Attributes:
        baseline: What the baseline's file says of itself.
        candidate: What the candidate's file says of itself.
        labels: Names of the labels that the outputs are compared for; empty where there are none.
        inputs: Number of inputs that outputs were compared on.
        random_inputs: Whether these were drawn at random, for want of data.
        parity: All reports, each with its kind.
        accuracy: If there were labels.
        accuracy_fault: Why there is none in spite of labels.
        latency: One comparison a batch size.
        profiles: Where the time goes, at each of them, or at one if there are none.
        baseline_memory: What a session of the baseline takes, at the largest batch size.
        candidate_memory: What a session of the candidate takes.
        environment: What all that was measured on and with.
    """

    baseline: OnnxFile
    candidate: OnnxFile
    labels: tuple[str, ...]
    inputs: int
    random_inputs: bool
    parity: tuple[ParityReport, ...]
    accuracy: AccuracyReport | None
    accuracy_fault: str | None
    latency: tuple[LatencyComparison, ...]
    profiles: tuple[ProfileComparison, ...]
    baseline_memory: SessionMemory | None
    candidate_memory: SessionMemory | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types; numbers that JSON has not are None."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found


def jsonable(value: Any) -> Any:
    """A value of nested dataclasses' fields with what JSON lacks, such as NaN, as None."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    baseline: Model,
    candidate: Model,
    inputs: Any = None,
    labels: Any = None,
    *,
    baseline_model: nn.Module | None = None,
    candidate_model: nn.Module | None = None,
    masked: nn.Module | None = None,
    label_names: Sequence[str] | None = None,
    candidate_labels: Sequence[str] | None = None,
    provider: str = "cpu",
    threads: int = 1,
    batches: Sequence[int] | None = None,
    samples: int = 300,
    sessions: int = SESSIONS,
    io_binding: bool = False,
    allow_spinning: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    confidence: float = 0.95,
    resamples: int = 1000,
    profile_runs: int = 30,
    memory: bool = True,
    opset: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Measure a candidate beside its baseline.

    Args:
        baseline: An ONNX file, or a torch model, which is exported for it and must answer as its file does.
        candidate: Another; its labels may be some of the baseline's, with an output "other" or without.
        inputs: Tensors or arrays ``[N, ...]``, one, several in order, or by name; random ones by default. Torch models
            need some.
        labels: ``[N]`` indices of the inputs' true labels, among the baseline's outputs.
        baseline_model: The torch model that a baseline's file was exported from: they must agree.
        candidate_model: The same of the candidate.
        masked: A torch model in which the units are masked that the candidate in torch has not: they must agree.
        label_names: Names of the baseline's labels; by default those in its file, or numbers.
        candidate_labels: Names of the candidate's, in order; by default those in its file, or the baseline's if they
            are as many.
        provider: Execution provider of all sessions, such as ``"cpu"`` or ``"cuda"``.
        threads: Threads within an operator.
        batches: Batch sizes at which latency is measured; by default 1, or the only one that a file takes. Empty for no
            latency.
        samples: Timed runs of each file at each batch size.
        sessions: Pairs of sessions that they are taken in.
        io_binding: Whether to bind inputs and outputs to the device for that.
        allow_spinning: Whether idle threads spin.
        rtol: Relative tolerance of outputs.
        atol: Absolute tolerance of outputs.
        confidence: Of the bounds on what accuracy loses: share of the bootstrap resamples.
        resamples: Bootstrap resamples of the inputs for that.
        profile_runs: Runs with ONNX Runtime's profiler.
        memory: Whether to measure what sessions take, each in a process of its own.
        opset: For exports of torch models.
        seed: Of random inputs, the order of runs and the bootstrap.
        progress: Whether to show progress bars.

    Returns:
        What was measured.

    Raises:
        ExportError: If a file cannot be used, or inputs, labels or options do not fit.
        ProviderError: If a session does not get the provider.
        LabelError: If the labels of the two cannot be matched, or have no inputs.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> found = compare(model, model, torch.randn(32, 4), samples=20, sessions=1, memory=False)
        >>> [(report.kind, report.passed) for report in found.parity]
        [('torch against ONNX', True), ('torch against ONNX', True), ('dense against pruned', True)]
    """
    _check_options(batches or (), confidence, resamples, profile_runs, seed)
    check_tolerances(rtol, atol)
    check_provider(provider)
    models = {"baseline": baseline, "candidate": candidate}
    in_torch = [
        model if isinstance(model, nn.Module) else other
        for model, other in ((baseline, baseline_model), (candidate, candidate_model))
    ]
    if masked is not None and in_torch[1] is None:
        raise ExportError("masked is compared with a candidate in torch, found a file; pass candidate_model as well")
    with _as_files(models, inputs, (label_names, candidate_labels), opset) as paths:
        files = [read_file(path) for path in paths]
        given = inputs is not None
        fixed = next((file.fixed_batch for file in files if file.fixed_batch is not None), 1)
        sizes = (fixed,) if batches is None else tuple(dict.fromkeys(batches))
        count = max((RANDOM_INPUTS, *sizes))
        values = values_of(inputs, files[0]) if given else random_values(files[0], count, seed)
        feeds = [feeds_of(file, values) for file in files]
        reports: list[ParityReport] = []
        some: Any = (
            _some(list(values.values()) if inputs is None else inputs, _CHUNK) if in_torch != [None, None] else ()
        )
        for model, path in zip(in_torch, paths, strict=True):
            if model is not None:
                reports.append(check_parity(model, path, some, rtol=rtol, atol=atol, provider=provider))
        if masked is not None and in_torch[1] is not None:
            reports.append(check_removal(masked, in_torch[1], some, rtol=rtol, atol=atol))
        answers = answers_of(files, feeds, (label_names, candidate_labels), provider, rtol=rtol, atol=atol)
        reports.append(answers.parity)
        accuracy, fault = None, None
        if labels is not None:
            accuracy, fault = accuracy_report(answers, labels, confidence, resamples, seed)
        options: dict[str, Any] = {"provider": provider_name(provider), "threads": threads}
        latencies = [
            measure_latency(
                dict(zip(("baseline", "candidate"), paths, strict=True)),
                FeedPair(feeds[0].batch(size), feeds[1].batch(size), size),
                samples=samples,
                sessions=sessions,
                io_binding=io_binding,
                allow_spinning=allow_spinning,
                seed=seed,
                progress=progress,
                **options,
            )
            for size in sizes
        ]
        profiles = _profiles(paths, feeds, sizes or (fixed,), profile_runs, options)
        largest = max(sizes, default=fixed)
        taken = [
            _memory(path, feed.batch(largest), options) if memory else None
            for path, feed in zip(paths, feeds, strict=True)
        ]
    return Comparison(
        baseline=files[0],
        candidate=files[1],
        labels=answers.labels,
        inputs=feeds[0].inputs,
        random_inputs=not given,
        parity=tuple(reports),
        accuracy=accuracy,
        accuracy_fault=fault,
        latency=tuple(latencies),
        profiles=tuple(profiles),
        baseline_memory=taken[0],
        candidate_memory=taken[1],
        environment={"machine": asdict(machine()), "onnxruntime": runtime_build(), "versions": versions()},
    )


def _profiles(
    paths: Sequence[Path], feeds: Sequence[Feeds], sizes: Sequence[int], runs: int, options: Mapping[str, Any]
) -> list[ProfileComparison]:
    """Where the time goes at each batch size, and which provider ran what; widths of layers are told with the first."""
    found: list[ProfileComparison] = []
    for size in sizes:
        baseline, candidate = (
            profile(path, feed.batch(size), batch=size, runs=runs, **options)
            for path, feed in zip(paths, feeds, strict=True)
        )
        found.append(compare_profiles(baseline, candidate, () if found else read_layers(paths[1])))
    return found


def _memory(path: Path, feed: dict[str, Array], options: Mapping[str, Any]) -> SessionMemory | None:
    try:
        return session_memory(path, feed, **options)
    except ExportError as error:
        warnings.warn(str(error), UnmeasuredWarning, stacklevel=3)
        return None


def _check_options(batches: Sequence[int], confidence: float, resamples: int, profile_runs: int, seed: int) -> None:
    if seed < 0:
        raise ExportError(f"seed is {seed}; expected a number from 0 on")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in batches):
        raise ExportError(f"batches is {list(batches)}; expected sizes from 1 on")
    if not 0.5 <= confidence < 1 or resamples < 100 or profile_runs < 1:
        raise ExportError(
            f"confidence is {confidence}, resamples {resamples} and profile_runs {profile_runs}; expected a share from "
            "0.5 to under 1, at least 100 and at least 1"
        )


@contextmanager
def _as_files(
    models: Mapping[str, Model], inputs: Any, names: tuple[Sequence[str] | None, ...], opset: int | None
) -> Iterator[list[Path]]:
    """The models as ONNX files; those that are exported for it are gone on exit."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for (name, model), label_names in zip(models.items(), names, strict=True):
            if isinstance(model, nn.Module):
                if inputs is None:
                    raise ExportError(f"the {name} is a torch model, which needs inputs to be exported; pass some")
                path = Path(folder, f"{name}.onnx")
                export(model, _some(inputs, 2), path, label_names=label_names, opset=opset)
                paths.append(path)
            else:
                paths.append(Path(model))
        yield paths


def _some(inputs: Any, count: int) -> Any:
    """The first inputs, as tensors of their own."""

    def tensor(value: Any) -> Tensor:
        found = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return found[:count] if found.ndim else found

    if isinstance(inputs, Mapping):
        return {name: tensor(value) for name, value in inputs.items()}
    if isinstance(inputs, (Tensor, np.ndarray)):
        return tensor(inputs)
    return tuple(tensor(value) for value in inputs)
