"""Compare a candidate with its baseline: parity, accuracy per label, latency, memory, and where the time goes."""

from __future__ import annotations

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

from nns_plugin.adapters.onnxruntime.accuracy import accuracy_report
from nns_plugin.adapters.onnxruntime.answers import answers_of
from nns_plugin.adapters.onnxruntime.comparison import CompareOptions, Comparison
from nns_plugin.adapters.onnxruntime.exporting import export
from nns_plugin.adapters.onnxruntime.feeds import Feeds, feeds_of, random_values, values_of
from nns_plugin.adapters.onnxruntime.file import OnnxFile, read_file
from nns_plugin.adapters.onnxruntime.latency import FeedPair, measure_latency
from nns_plugin.adapters.onnxruntime.layers import read_layers
from nns_plugin.adapters.onnxruntime.memory import SessionMemory, session_memory
from nns_plugin.adapters.onnxruntime.parity import check_parity, check_removal
from nns_plugin.adapters.onnxruntime.profiling import ProfileComparison, compare_profiles, profile
from nns_plugin.adapters.onnxruntime.session import check_provider, provider_name, runtime_build
from nns_plugin.environment import machine, versions
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.metrics import Array
from nns_plugin.evaluation.parity import ParityReport

Model: TypeAlias = str | os.PathLike[str] | OnnxFile | nn.Module
RANDOM_INPUTS = 64
_PARITY_INPUTS = 64  # inputs on which torch models are compared


class UnmeasuredWarning(UserWarning):
    """Something that no threshold depends on could not be measured."""


@dataclass(frozen=True)
class TorchModels:
    """Torch models that ONNX files, or the removal of units, must agree with.

    Attributes:
        baseline: The model from which the baseline's file was exported.
        candidate: The model from which the candidate's file was exported.
        masked: A model in which the units that the candidate lacks are masked.
    """

    baseline: nn.Module | None = None
    candidate: nn.Module | None = None
    masked: nn.Module | None = None


def compare(
    baseline: Model,
    candidate: Model,
    inputs: Any = None,
    labels: Any = None,
    options: CompareOptions | None = None,
    *,
    torch_models: TorchModels | None = None,
    label_names: Sequence[str] | None = None,
    candidate_labels: Sequence[str] | None = None,
) -> Comparison:
    """Compare a candidate with its baseline.

    Args:
        baseline: An ONNX file, or what :func:`read_file` returned for it; or a torch model, which is exported for the
            comparison and must agree with its file.
        candidate: Another; its labels may be a subset of the baseline's, with or without an output "other".
        inputs: Tensors or arrays ``[N, ...]``: one, several in order, or by name; random ones by default. Torch models
            need some.
        labels: ``[N]`` indices of the inputs' true labels, among the baseline's outputs.
        options: How to compare; the defaults of :class:`CompareOptions` if ``None``.
        torch_models: Torch models that the files must agree with.
        label_names: Names of the baseline's labels; by default those in its file, or numbers.
        candidate_labels: Names of the candidate's labels, in order; by default those in its file, or the baseline's if
            there are equally many.

    Raises:
        ExportError: If a file cannot be used, or inputs or labels do not fit.
        ProviderError: If a session does not get the provider.
        LabelError: If the labels of the two cannot be matched, or have no inputs.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> options = CompareOptions(samples=20, sessions=1, memory=False)
        >>> found = compare(model, model, torch.randn(32, 4), options=options)
        >>> [(report.kind, report.passed) for report in found.parity]
        [('torch against ONNX', True), ('torch against ONNX', True), ('dense against pruned', True)]
    """
    options, given = options or CompareOptions(), torch_models or TorchModels()
    check_provider(options.provider)
    models = {"baseline": baseline, "candidate": candidate}
    references = TorchModels(
        baseline=baseline if isinstance(baseline, nn.Module) else given.baseline,
        candidate=candidate if isinstance(candidate, nn.Module) else given.candidate,
        masked=given.masked,
    )
    if references.masked is not None and references.candidate is None:
        raise ExportError("masked is compared with a candidate in torch, found only its file; pass its torch model too")
    with _as_files(models, inputs, (label_names, candidate_labels), options.opset) as files:
        paths = [Path(file.path) for file in files]
        fixed = next((file.fixed_batch for file in files if file.fixed_batch is not None), 1)
        sizes = (fixed,) if options.batches is None else tuple(dict.fromkeys(options.batches))
        count = max((RANDOM_INPUTS, *sizes))
        values = random_values(files[0], count, options.seed) if inputs is None else values_of(inputs, files[0])
        feeds = [feeds_of(file, values) for file in files]
        reports = _torch_parity(references, paths, list(values.values()) if inputs is None else inputs, options)
        answers = answers_of(
            files, feeds, (label_names, candidate_labels), options.provider, rtol=options.rtol, atol=options.atol
        )
        accuracy, fault = None, None
        if labels is not None:
            accuracy, fault = accuracy_report(answers, labels, options.confidence, options.resamples, options.seed)
        latencies = [
            measure_latency(
                dict(zip(models, paths, strict=True)),
                FeedPair(feeds[0].batch(size), feeds[1].batch(size), size),
                options.latency,
                progress=options.progress,
            )
            for size in sizes
        ]
        profiles = _profiles(paths, feeds, sizes or (fixed,), options)
        largest = max(sizes, default=fixed)
        baseline_memory, candidate_memory = (
            _memory(path, feed.batch(largest), options) if options.memory else None
            for path, feed in zip(paths, feeds, strict=True)
        )
    return Comparison(
        baseline=files[0],
        candidate=files[1],
        labels=answers.labels,
        inputs=feeds[0].inputs,
        random_inputs=inputs is None,
        parity=(*reports, answers.parity),
        accuracy=accuracy,
        accuracy_fault=fault,
        latency=tuple(latencies),
        profiles=tuple(profiles),
        baseline_memory=baseline_memory,
        candidate_memory=candidate_memory,
        environment={"machine": asdict(machine()), "onnxruntime": runtime_build(), "versions": versions()},
    )


def _torch_parity(
    references: TorchModels, paths: Sequence[Path], inputs: Any, options: CompareOptions
) -> list[ParityReport]:
    """Reports on the files against their torch models, and on the candidate against the masked model."""
    if references.baseline is None and references.candidate is None:
        return []
    some = _first_tensors(inputs, _PARITY_INPUTS)
    tolerances = {"rtol": options.rtol, "atol": options.atol}
    reports = [
        check_parity(model, path, some, provider=options.provider, **tolerances)
        for model, path in zip((references.baseline, references.candidate), paths, strict=True)
        if model is not None
    ]
    if references.masked is not None and references.candidate is not None:
        reports.append(check_removal(references.masked, references.candidate, some, **tolerances))
    return reports


def _profiles(
    paths: Sequence[Path], feeds: Sequence[Feeds], sizes: Sequence[int], options: CompareOptions
) -> list[ProfileComparison]:
    """Where the time goes at each batch size, and which provider ran what; layer widths are noted only once."""
    found: list[ProfileComparison] = []
    for size in sizes:
        baseline, candidate = (
            profile(
                path,
                feed.batch(size),
                batch=size,
                runs=options.profile_runs,
                provider=options.provider,
                threads=options.threads,
            )
            for path, feed in zip(paths, feeds, strict=True)
        )
        found.append(compare_profiles(baseline, candidate, () if found else read_layers(paths[1])))
    return found


def _memory(path: Path, feed: dict[str, Array], options: CompareOptions) -> SessionMemory | None:
    try:
        return session_memory(path, feed, provider=provider_name(options.provider), threads=options.threads)
    except ExportError as error:
        warnings.warn(str(error), UnmeasuredWarning, stacklevel=3)
        return None


@contextmanager
def _as_files(
    models: Mapping[str, Model], inputs: Any, names: tuple[Sequence[str] | None, ...], opset: int | None
) -> Iterator[list[OnnxFile]]:
    """The models as ONNX files; those exported here are deleted on exit."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for (name, model), label_names in zip(models.items(), names, strict=True):
            if isinstance(model, nn.Module):
                if inputs is None:
                    raise ExportError(f"the {name} is a torch model, which needs inputs to be exported; pass some")
                path = Path(folder, f"{name}.onnx")
                export(model, _first_tensors(inputs, 2), path, label_names=label_names, opset=opset)
                files.append(read_file(path))
            else:
                files.append(model if isinstance(model, OnnxFile) else read_file(model))
        yield files


def _first_tensors(inputs: Any, count: int) -> Any:
    """The first inputs, as tensors."""

    def tensor(value: Any) -> Tensor:
        found = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return found[:count] if found.ndim else found

    if isinstance(inputs, Mapping):
        return {name: tensor(value) for name, value in inputs.items()}
    if isinstance(inputs, (Tensor, np.ndarray)):
        return tensor(inputs)
    return tuple(tensor(value) for value in inputs)
