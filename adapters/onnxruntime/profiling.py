"""Where the time of an ONNX file goes, from ONNX Runtime's own profile: operators, kernels and providers."""

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
    """Time of one node.

    Attributes:
        name: Name of the node.
        operator: Its type as it was run, after fusion and other optimisations.
        provider: The execution provider that ran it.
        mean_us: Mean over the timed runs, in microseconds.
        input_shapes: Shapes of its inputs, including weights.
        output_shapes: Shapes of its outputs.
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
        provider: The requested execution provider.
        runs: Number of timed runs.
        batch: Number of inputs in one run.
        nodes: All nodes that ran.
    """

    provider: str
    runs: int
    batch: int
    nodes: tuple[NodeTime, ...]

    @property
    def total_us(self) -> float:
        """Time of all nodes in one run, in microseconds, without the time between nodes."""
        return sum(node.mean_us for node in self.nodes)

    @property
    def fallen_back(self) -> tuple[NodeTime, ...]:
        """The nodes that were run by another provider than the requested one."""
        return tuple(node for node in self.nodes if node.provider != self.provider)

    @property
    def operators(self) -> dict[str, tuple[int, float]]:
        """Number of nodes and their total time in microseconds, by type of operator."""
        found: dict[str, tuple[int, float]] = {}
        for node in self.nodes:
            count, total = found.get(node.operator, (0, 0.0))
            found[node.operator] = count + 1, total + node.mean_us
        return found


@dataclass(frozen=True)
class OperatorChange:
    """Total time of the nodes of one type in two files.

    Attributes:
        operator: Type of the nodes.
        baseline_nodes: Number of these nodes in the baseline.
        candidate_nodes: Number of these nodes in the candidate.
        baseline_us: Their total time in one run of the baseline, in microseconds.
        candidate_us: Their total time in one run of the candidate, in microseconds.
    """

    operator: str
    baseline_nodes: int
    candidate_nodes: int
    baseline_us: float
    candidate_us: float


@dataclass(frozen=True)
class ProfileComparison:
    """Where two files spend their time.

    Attributes:
        baseline: Profile of the baseline.
        candidate: Profile of the candidate.
        operators: Totals by type of operator, the largest differences first.
        notes: Reasons why the candidate is not as fast as it could be, one line each.
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

    Profiling itself takes time, so the sums exceed the latency; compare them only with each other.

    Args:
        path: The file.
        feed: Arrays by name of the input.
        batch: Number of inputs in the feed.
        runs: Number of timed runs, after a few untimed ones.
        provider: Execution provider of the session.
        threads: Intra-op threads.

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
    """The nodes of a profile with means over its last runs, in the order in which they first ran."""
    times: dict[tuple[str, str], list[tuple[float, Mapping[str, Any]]]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith(_KERNEL):
            arguments = event["args"]
            key = str(arguments.get("node_index", "")), str(event["name"])
            times.setdefault(key, []).append((float(event["dur"]), arguments))
    found = []
    for (_, name), measured in times.items():
        last = measured[-runs:]  # a node in a loop runs more than once per run, so its mean is too small
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
    """Whether a node has constant weights; weights packed for its kernel are not listed as inputs."""
    return len(arguments.get("input_type_shape", ())) == 1 or int(arguments.get("parameter_size", 0)) > 0


def _shapes(listed: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape) for tensor in listed for shape in tensor.values())


def compare_profiles(baseline: Profile, candidate: Profile, layers: Sequence[OnnxLayer] = ()) -> ProfileComparison:
    """Compare two profiles: totals by type of operator, and reasons why the candidate is slower than its MACs suggest.

    Args:
        baseline: Profile of the baseline.
        candidate: Profile of the candidate.
        layers: The candidate's layers, for notes about their channels; profiles list channels as padded by kernels.
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
            f"candidate: {len(odd)} of {len(layers)} layers have channels that are not a multiple of {MULTIPLES[0]} "
            f"({smaller} of them not of {MULTIPLES[-1]} either), to which kernels pad them: {shown}{more}"
        )
    notes += _other_kernels(baseline, candidate)
    return notes


def _other_kernels(baseline: Profile, candidate: Profile) -> list[str]:
    """Layers that run another kernel than in the baseline; layers correspond in order if there are equally many."""
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
    """Whether ONNX Runtime chose the kernel with blocked channels."""
    return "_nchwc" in node.name


def _kernel(node: NodeTime) -> str:
    return f"{node.operator}{' in blocks of channels' if _blocked(node) else ''} on {node.provider}"
