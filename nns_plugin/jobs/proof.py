"""The proof of a job: export both models, evaluate and measure them, and write the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from nns_plugin.adapters.onnxruntime import (
    LatencyComparison,
    LatencyOptions,
    check_parity,
    check_removal,
    export,
    label_parity,
    measure_latency,
    runtime_build,
)
from nns_plugin.adapters.torch_pruning.macs import count_macs
from nns_plugin.environment import machine, versions
from nns_plugin.evaluation.evaluation import Outputs, comparable_outputs, drops, evaluate
from nns_plugin.evaluation.intervals import Interval, interval
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.extraction import provenance
from nns_plugin.jobs.job import Job
from nns_plugin.jobs.latency_search import Target, Timing
from nns_plugin.jobs.recipe import Recipe
from nns_plugin.jobs.reports import ModelReport, Report
from nns_plugin.jobs.stages import stage
from nns_plugin.subnets.extraction import Extraction
from nns_plugin.subnets.provenance import Trial
from nns_plugin.subnets.subnet import Subnet

PARITY_INPUTS = 64


def prove(job: Job, extraction: Extraction, trials: tuple[Trial, ...], folder: Path) -> Report:
    """Write the four files of a job: both models, the subnet and the report.

    Args:
        job: The job.
        extraction: The small model.
        trials: The trials of a search.
        folder: Where to write.

    Returns:
        The report, as written.
    """
    recipe, data, settings = job.recipe, job.data, job.recipe.measure
    subnet = Subnet.of(extraction, provenance(job.dense, job.options, extraction, trials, _training(recipe)))
    reports: dict[str, ModelReport] = {}
    raw: dict[str, NDArray[Any]] = {}
    answers: dict[str, Outputs] = {}
    truth: Tensor | None = None
    labels, timing = extraction.labels, timing_of(recipe)
    batch, parity_inputs = job.test_inputs(timing.batch), job.test_inputs(PARITY_INPUTS)
    pair = (
        ("baseline", job.dense, labels.with_all_outputs()),
        ("subnet", extraction.model, labels),
    )
    for name, model, own in tqdm(pair, desc="exporting and evaluating", disable=not job.progress, leave=False):
        path = folder / f"{name}.onnx"
        export(model, data.example_inputs, path, label_names=own.output_names, opset=recipe.export.opset)
        with stage("data.test"):
            logits, truth = predict(model, data.test, job.progress, truth)
        raw[name] = logits.numpy()
        answers[name] = comparable_outputs(logits, own.outputs, labels.indices, labels.outputs)
        evaluation = evaluate(
            answers[name][0],
            truth,
            answers[name][1],
            labels.indices,
            labels.names,
            settings.resamples,
            recipe.seed,
        )
        reports[name] = ModelReport.of(
            evaluation=evaluation,
            counts=count_macs(model, data.example_inputs),
            path=path,
            outputs=own.output_names,
            parity=check_parity(
                model,
                path,
                parity_inputs,
                rtol=settings.rtol,
                atol=settings.atol,
                provider=settings.provider,
            ),
        )
    latency = measure_latency(
        {name: folder / f"{name}.onnx" for name in reports},
        batch,
        timing.latency,
        progress=job.progress,
    )
    assert truth is not None
    drop, drop_limits = _drop(job, reports, answers, truth)
    masked = subnet.masked_unchecked(job.dense, data.example_inputs)  # what a check would compare is reported
    report = Report(
        recipe=recipe.model_dump(mode="json"),
        labels=labels.kept_names,
        units={group.name: group.size for group in extraction.groups},
        kept_units={name: tuple(units.tolist()) for name, units in extraction.kept.items()},
        trials=trials,
        target_met=_target_met(job, latency),
        balanced_accuracy_drop=drop,
        balanced_accuracy_drop_interval=drop_limits,
        baseline=reports["baseline"],
        subnet=reports["subnet"],
        removal=check_removal(masked, extraction.model, parity_inputs, rtol=settings.rtol, atol=settings.atol),
        pruning=label_parity(
            raw["baseline"],
            raw["subnet"],
            labels.outputs,
            ("dense model", "subnet"),
            rtol=settings.rtol,
            atol=settings.atol,
        ),
        latency=latency,
        environment={"machine": asdict(machine()), "onnxruntime": runtime_build()},
        versions=versions(),
    )
    subnet.save(folder / "subnet.safetensors")
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def timing_of(recipe: Recipe) -> Timing:
    """How a recipe measures latency."""
    measure = recipe.measure
    latency = LatencyOptions(
        samples=measure.samples, threads=measure.threads, provider=measure.provider, seed=recipe.seed
    )
    return Timing(measure.batch, recipe.export.opset, latency)


def _target_met(job: Job, latency: LatencyComparison) -> bool | None:
    """Whether the finished subnet, measured again, meets the target for latency; ``None`` without a target."""
    if not job.options.has_target:
        return None
    return Target(job.options.target_latency_ms, job.options.target_speedup).is_met(latency)


def _training(recipe: Recipe) -> dict[str, Any]:
    """How a recipe trains the weights of a subnet after extraction."""
    found: dict[str, Any] = {"fine_tune": recipe.fine_tune.epochs} if recipe.fine_tune.epochs else {}
    for name in ("iterative", "synapses"):
        section = getattr(recipe, name)
        if section is not None:
            found[name] = section.model_dump()
    return found


def _drop(
    job: Job, reports: Mapping[str, ModelReport], answers: Mapping[str, Outputs], truth: Tensor
) -> tuple[float | None, Interval | None]:
    """The drop of the mean balanced accuracy, and its interval."""
    before, after = (reports[name].evaluation.mean_balanced_accuracy for name in ("baseline", "subnet"))
    if before is None or after is None:
        return None, None
    resamples, labels = job.recipe.measure.resamples, job.labels
    if not resamples:
        return before - after, None
    lost = drops(
        answers["baseline"], answers["subnet"], truth, labels.indices, labels.names, resamples, job.recipe.seed
    )
    return before - after, interval(lost.mean_balanced_accuracy)
