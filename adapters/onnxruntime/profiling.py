"""Where the time of an ONNX file goes, by ONNX Runtime's own profile: operators, kernels, and who ran them."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nns_plugin.adapters.onnxruntime.layers import MULTIPLES, OnnxLayer, odd_layers
from nns_plugin.adapters.onnxruntime.session import create_session, provider_name, run_session
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.metrics import Array

_WARMUP = 5
_KERNEL = "_kernel_time"
_LAYERS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclass(frozen=True)
class NodeTime:
    """What one node took.

    Attributes:
        name: Its name.
        operator: Its type, as it was run: what optimisation fused and reordered is in it.
        provider: The execution provider that ran it.
        mean_us: Mean of the timed runs, in microseconds.
        input_shapes: Shapes of what it took, weights included.
        output_shapes: Shapes of what it gave.
        is_layer: Whether it is a convolution or matrix product with weights.
    """

    name: str
    operator: str
    provider: str
    mean_us: float
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    is_layer: bool


@dataclass(frozen=True)
class Profile:
    """The nodes of one file, in the order in which they ran.

    Attributes:
        provider: The execution provider that was asked for.
        runs: Timed runs that the means are of.
        batch: Inputs in one run.
        nodes: All nodes that ran.
    """

    provider: str
    runs: int
    batch: int
    nodes: tuple[NodeTime, ...]

    @property
    def total_us(self) -> float:
        """Of all nodes in one run, in microseconds; what lies between them is not in it."""
        return sum(node.mean_us for node in self.nodes)

    @property
    def fallen_back(self) -> tuple[NodeTime, ...]:
        """The nodes that another provider ran than the one that was asked for."""
        return tuple(node for node in self.nodes if node.provider != self.provider)

    @property
    def operators(self) -> dict[str, tuple[int, float]]:
        """For each type of operator how many nodes there are, and what they took together, in microseconds."""
        found: dict[str, tuple[int, float]] = {}
        for node in self.nodes:
            count, total = found.get(node.operator, (0, 0.0))
            found[node.operator] = count + 1, total + node.mean_us
        return found


@dataclass(frozen=True)
class OperatorChange:
    """What the nodes of one type took in two files.

    Attributes:
        operator: Their type.
        baseline_nodes: How many the baseline has.
        candidate_nodes: How many the candidate has.
        baseline_us: What they took in one run of it, in microseconds.
        candidate_us: What they took in one run of the candidate, in microseconds.
    """

    operator: str
    baseline_nodes: int
    candidate_nodes: int
    baseline_us: float
    candidate_us: float


@dataclass(frozen=True)
class ProfileComparison:
    """Where the time of two files goes.

    Attributes:
        baseline: Of the baseline.
        candidate: Of the candidate.
        operators: Totals for each type of operator, the largest differences first.
        notes: What explains why the candidate is not as fast as it could be, one line each.
    """

    baseline: Profile
    candidate: Profile
    operators: tuple[OperatorChange, ...]
    notes: tuple[str, ...]


def profile(
    path: str | os.PathLike[str],
    feed: Mapping[str, Array],
    *,
    batch: int,
    runs: int = 30,
    provider: str = "CPUExecutionProvider",
    threads: int = 1,
) -> Profile:
    """Run an ONNX file with ONNX Runtime's profiler.

    Profiling itself costs time, so that the sums are more than the latency; compare them with each other.

    Args:
        path: The file.
        feed: Arrays by name of the input.
        batch: Inputs in the feed.
        runs: Timed runs, after a few that are not.
        provider: Execution provider of the session.
        threads: Threads within an operator.

    Raises:
        ExportError: If the file cannot be loaded or run.
        ProviderError: If the session does not get the provider.
    """
    if runs < 1:
        raise ExportError(f"runs is {runs}; expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        session = create_session(path, provider, threads=threads, profile=Path(folder, "profile"))
        try:
            for _ in range(_WARMUP + runs):
                run_session(session, feed, path)
        finally:
            written = session.end_profiling()
        events = json.loads(Path(written).read_text(encoding="utf-8"))
    return Profile(provider_name(provider), runs, batch, _nodes(events, runs))


def _nodes(events: Sequence[Mapping[str, Any]], runs: int) -> tuple[NodeTime, ...]:
    """The nodes of a profile with the means over its last runs, in the order of the first of these."""
    times: dict[tuple[str, str], list[tuple[float, Mapping[str, Any]]]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_KERNEL):
            arguments = event["args"]
            key = str(arguments.get("node_index", "")), str(event["name"])
            times.setdefault(key, []).append((float(event["dur"]), arguments))
    found = []
    for (_, name), measured in times.items():
        last = measured[-runs:]  # a node in a loop runs more than once a run: its mean would be too small
        each = len(measured) / (runs + _WARMUP)
        arguments = last[-1][1]
        found.append(
            NodeTime(
                name=name.removesuffix(_KERNEL),
                operator=str(arguments.get("op_name", "")),
                provider=str(arguments.get("provider", "")),
                mean_us=max(1.0, each) * sum(duration for duration, _ in last) / len(last),
                input_shapes=_shapes(arguments.get("input_type_shape", ())),
                output_shapes=_shapes(arguments.get("output_type_shape", ())),
                is_layer=arguments.get("op_name") in _LAYERS and _has_weights(arguments),
            )
        )
    return tuple(found)


def _has_weights(arguments: Mapping[str, Any]) -> bool:
    """Whether a node has constant weights; those that are packed for its kernel are not told as inputs."""
    return len(arguments.get("input_type_shape", ())) == 1 or int(arguments.get("parameter_size", 0)) > 0


def _shapes(told: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape) for tensor in told for shape in tensor.values())


def compare_profiles(baseline: Profile, candidate: Profile, layers: Sequence[OnnxLayer] = ()) -> ProfileComparison:
    """Totals for each type of operator, and what explains a candidate that is slower than its operations say.

    Args:
        baseline: Of the baseline.
        candidate: Of the candidate.
        layers: The candidate's layers, for notes about their channels: profiles tell those as kernels pad them.
    """
    left, right = baseline.operators, candidate.operators
    changes = [
        OperatorChange(name, *_split(left.get(name), right.get(name))) for name in sorted(left.keys() | right.keys())
    ]
    changes.sort(key=lambda change: -abs(change.baseline_us - change.candidate_us))
    return ProfileComparison(baseline, candidate, tuple(changes), tuple(_notes(baseline, candidate, layers)))


def _split(left: tuple[int, float] | None, right: tuple[int, float] | None) -> tuple[int, int, float, float]:
    (left_count, left_us), (right_count, right_us) = left or (0, 0.0), right or (0, 0.0)
    return left_count, right_count, left_us, right_us


def _notes(baseline: Profile, candidate: Profile, layers: Sequence[OnnxLayer]) -> list[str]:
    notes = []
    for name, of in (("baseline", baseline), ("candidate", candidate)):
        if of.fallen_back:
            by = Counter(f"{node.operator} by {node.provider}" for node in of.fallen_back)
            listed = ", ".join(f"{count} {text}" for text, count in by.most_common())
            notes.append(f"{name}: {len(of.fallen_back)} of {len(of.nodes)} nodes not run by {of.provider}: {listed}")
    odd = odd_layers(layers)
    if odd:
        shown = ", ".join(f"{layer.name} ({layer.inputs} -> {layer.outputs})" for layer in odd[:5])
        more = ", ..." if len(odd) > 5 else ""
        smaller = len(odd_layers(layers, MULTIPLES[-1]))
        notes.append(
            f"candidate: {len(odd)} of {len(layers)} layers have channels that are no multiple of {MULTIPLES[0]} "
            f"({smaller} of them none of {MULTIPLES[-1]}), to which kernels pad them: {shown}{more}"
        )
    notes += _other_kernels(baseline, candidate)
    return notes


def _other_kernels(baseline: Profile, candidate: Profile) -> list[str]:
    """Layers whose kernel is another than the baseline's; layers correspond in order, where there are as many."""
    layers = [[node for node in of.nodes if node.is_layer] for of in (baseline, candidate)]
    if len(layers[0]) != len(layers[1]):
        return []
    changed: dict[tuple[str, str], list[tuple[NodeTime, NodeTime]]] = {}
    for before, after in zip(*layers, strict=True):
        if _kernel(before) != _kernel(after):
            changed.setdefault((_kernel(before), _kernel(after)), []).append((before, after))
    notes = []
    for (old, new), pairs in changed.items():
        took = [sum(pair[side].mean_us for pair in pairs) for side in (0, 1)]
        notes.append(
            f"{len(pairs)} of {len(layers[0])} layers run another kernel: {old} in the baseline ({took[0]:.0f} us), "
            f"{new} in the candidate ({took[1]:.0f} us)"
        )
    return notes


def _blocked(node: NodeTime) -> bool:
    """Whether ONNX Runtime chose the kernel for channels in blocks."""
    return "_nchwc" in node.name


def _kernel(node: NodeTime) -> str:
    return f"{node.operator}{' in blocks of channels' if _blocked(node) else ''} on {node.provider}"
