"""Profiles of ONNX files: operators, channels, kernels and providers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import W, X, linear, tensor, write  # noqa: E402

from nns_plugin.adapters.onnxruntime import profiling  # noqa: E402
from nns_plugin.adapters.onnxruntime.feeds import feeds_of, random_values  # noqa: E402
from nns_plugin.adapters.onnxruntime.file import read_file  # noqa: E402
from nns_plugin.adapters.onnxruntime.layers import OnnxLayer, odd_layers, read_layers  # noqa: E402
from nns_plugin.adapters.onnxruntime.profiling import (  # noqa: E402
    NodeTime,
    OperatorChange,
    Profile,
    compare_profiles,
    profile,
)
from nns_plugin.errors import ExportError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def convnet(path: Path, channels: int = 16) -> Path:
    """Two convolutions, their mean over positions, and a layer with five outputs."""
    rng = np.random.default_rng(0)
    shapes = {"a": (channels, 3, 3, 3), "b": (channels, channels, 3, 3), "c": (channels, 5)}
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "a"], ["1"], pads=[1, 1, 1, 1], name="first"),
        node("Relu", ["1"], ["2"], name="rectified"),
        node("Conv", ["2", "b"], ["3"], pads=[1, 1, 1, 1], name="second"),
        node("GlobalAveragePool", ["3"], ["4"], name="pool"),
        node("Flatten", ["4"], ["5"], name="flat"),
        node("MatMul", ["5", "c"], ["y"], name="last"),
    ]
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return write(path, [tensor("x", "n", 3, 8, 8)], [tensor("y", "n", 5)], nodes, constants)


def profiled(path: Path, batch: int = 2, **options: Any) -> Profile:
    feeds = feeds_of(read_file(path), random_values(read_file(path), batch))
    return profile(path, feeds.batch(batch), batch=batch, **options)


def node(operator: str = "Conv", us: float = 1.0, name: str = "n", by: str = CPU) -> NodeTime:
    return NodeTime(name, operator, by, us, (), (), operator in ("Conv", "Gemm", "MatMul"))


def layer(operator: str = "Conv", channels: tuple[int, int] = (16, 16), name: str = "n") -> OnnxLayer:
    return OnnxLayer(name, operator, "x", {}, *channels, (3, 3) if operator == "Conv" else (), 1)


def of(*nodes: NodeTime, provider: str = CPU) -> Profile:
    return Profile(provider, 10, 1, nodes)


# Of a real session ----------------------------------------------------------------------------------------------


def test_the_operators_of_a_convnet_are_counted(tmp_path: Path) -> None:
    found = profiled(convnet(tmp_path / "model.onnx"), runs=3)
    assert (found.provider, found.runs, found.batch) == (CPU, 3, 2)
    (last,) = (node for node in found.nodes if node.operator in ("MatMul", "Gemm", "FusedMatMul"))
    assert sum(node.is_layer for node in found.nodes) == 3
    assert last.output_shapes == ((2, 5),)
    assert last is found.nodes[-1]
    counts = {operator: count for operator, (count, _) in found.operators.items()}
    assert sum(counts.values()) == len(found.nodes) >= 4
    assert sum(counts.get(name, 0) for name in ("Conv", "FusedConv")) == 2
    assert not found.fallen_back
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"], "the profile's own file is gone"


def test_totals_are_sums_of_the_nodes(tmp_path: Path) -> None:
    found = profiled(convnet(tmp_path / "model.onnx"), runs=2)
    assert found.total_us == pytest.approx(sum(node.mean_us for node in found.nodes))
    assert found.total_us == pytest.approx(sum(total for _, total in found.operators.values()))
    assert all(node.mean_us >= 0 for node in found.nodes)


def test_products_with_weights_are_layers_and_products_of_activations_are_not(tmp_path: Path) -> None:
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"], name="weights"),
        onnx.helper.make_node("Gemm", ["x", "w"], ["b"], name="no_bias"),
        onnx.helper.make_node("Gemm", ["x", "w", "v"], ["c"], name="bias"),
        onnx.helper.make_node("MatMul", ["a", "z"], ["y"], name="activations"),
    ]
    outputs = [tensor("b", "n", 20), tensor("c", "n", 20), tensor("y", "n", 7)]
    constants = {"w": np.ones((9, 20), np.float32), "v": np.ones(20, np.float32)}
    path = write(tmp_path / "model.onnx", [tensor("x", "n", 9), tensor("z", 20, 7)], outputs, nodes, constants)
    found = {node.name: node.is_layer for node in profiled(path, runs=1).nodes}
    assert found == {"weights": True, "no_bias": True, "bias": True, "activations": False}
    assert [(each.name, each.inputs, each.outputs) for each in read_layers(path)] == [
        ("weights", 9, 20), ("no_bias", 9, 20), ("bias", 9, 20)
    ]  # fmt: skip


def test_layers_are_read_with_their_widths_also_where_a_kernel_pads_them(tmp_path: Path) -> None:
    found = read_layers(convnet(tmp_path / "model.onnx", channels=20))
    assert [(each.name, each.operator, each.inputs, each.outputs, each.kernel) for each in found] == [
        ("first", "Conv", 3, 20, (3, 3)), ("second", "Conv", 20, 20, (3, 3)), ("last", "MatMul", 20, 5, ())
    ]  # fmt: skip
    assert odd_layers(found) == found
    assert odd_layers(read_layers(convnet(tmp_path / "even.onnx"))) == ()


def test_transposed_weights_constants_and_groups_are_read(tmp_path: Path) -> None:
    make = onnx.helper.make_node
    constant = onnx.numpy_helper.from_array(np.ones((6, 7), np.float32), "")
    nodes = [
        make("Conv", ["x", "k"], ["a"], group=3, name="grouped"),
        make("Flatten", ["a"], ["b"]),
        make("Gemm", ["b", "t"], ["c"], transB=1, name="turned"),
        make("Constant", [], ["m"], value=constant),
        make("MatMul", ["c", "m"], ["y"], name="constant"),
    ]
    constants = {"k": np.ones((12, 2, 1, 1), np.float32), "t": np.ones((6, 12), np.float32)}
    path = write(tmp_path / "model.onnx", [tensor("x", "n", 6, 1, 1)], [tensor("y", "n", 7)], nodes, constants)
    assert [(each.name, each.inputs, each.outputs, each.groups) for each in read_layers(path)] == [
        ("grouped", 6, 12, 3), ("turned", 12, 6, 1), ("constant", 6, 7, 1)
    ]  # fmt: skip


def test_means_are_those_of_the_timed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node in a loop runs more than once a run, nodes may share a name, and warm-up does not count."""
    runs: list[Any] = []

    def event(name: str, place: int, duration: float) -> dict[str, Any]:
        arguments = {"node_index": str(place), "op_name": "Add", "provider": CPU}
        return {"cat": "Node", "name": name, "dur": duration, "args": arguments}

    def written() -> str:
        events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_run", "dur": 9}]
        for left in reversed(range(len(runs))):  # timed runs left: the last four are timed
            slow = 0 if left < 4 else 100
            events += [event("once_kernel_time", 0, 4 - left + slow), event("once_fence_before", 0, 50)]
            events += [event("inner_kernel_time", 1, 2 + slow) for _ in range(3)]
            events += [event("once_kernel_time", 2, 7 + slow)]  # another node of the same name
        file = tmp_path / "profile.json"
        file.write_text(json.dumps(events), encoding="utf-8")
        return str(file)

    session = SimpleNamespace(run=lambda _, feed: runs.append(feed) or [], end_profiling=written)
    monkeypatch.setattr(profiling, "create_session", lambda *_, **__: session)
    found = profile("model.onnx", {"x": X}, batch=90, runs=4)
    assert len(runs) > 4
    assert [(each.name, each.mean_us) for each in found.nodes] == [("once", 2.5), ("inner", 6), ("once", 7)]
    assert {(each.operator, each.provider) for each in found.nodes} == {("Add", CPU)}


def test_nodes_run_by_another_provider_have_fallen_back(tmp_path: Path) -> None:
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this build has no provider that runs nothing")
    path = linear(tmp_path / "model.onnx", W)
    found = profiled(path, runs=1, provider="azure")
    assert found.provider == "AzureExecutionProvider"
    assert found.fallen_back == found.nodes != ()
    assert {node.provider for node in found.nodes} == {CPU}
    (note,) = compare_profiles(of(node()), found).notes[:1]
    assert note == "candidate: 1 of 1 nodes not run by AzureExecutionProvider: 1 MatMul by CPUExecutionProvider"


def test_what_cannot_be_profiled(tmp_path: Path) -> None:
    path = linear(tmp_path / "model.onnx", W)
    with pytest.raises(ExportError, match="runs is 0; expected at least 1"):
        profile(path, {"x": X}, batch=90, runs=0)
    with pytest.raises(ExportError, match="cannot run on"):
        profile(path, {"x": X[:, :2]}, batch=90)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


# Channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "multiple", "odd"),
    [
        (layer(channels=(16, 24)), 8, False),
        (layer(channels=(16, 24)), 16, True),
        (layer(channels=(32, 48)), 16, False),
        (layer(channels=(16, 20)), 8, True),
        (layer(channels=(20, 16)), 8, True),
        (layer(channels=(3, 16)), 8, False),  # an image's
        (layer(channels=(5, 16)), 8, True),
        (layer("Gemm", channels=(16, 10)), 8, False),  # outputs may be labels
        (layer("MatMul", channels=(10, 16)), 8, True),
    ],
)
def test_odd_layers_have_channels_that_are_no_multiple(given: OnnxLayer, multiple: int, odd: bool) -> None:
    assert odd_layers([given], multiple) == ((given,) if odd else ())
    assert odd_layers([given]) == odd_layers([given], 16)


# Beside each other ----------------------------------------------------------------------------------------------


def test_operators_that_differ_most_come_first() -> None:
    baseline = of(node("Conv", 10), node("Conv", 20), node("Gemm", 5), node("Relu", 1), node("Add", 8))
    candidate = of(node("Conv", 25), node("Gemm", 1), node("Relu", 1), node("Reorder", 7), node("Add", 2))
    found = compare_profiles(baseline, candidate)
    assert found.operators == (
        OperatorChange("Reorder", 0, 1, 0, 7),
        OperatorChange("Add", 1, 1, 8, 2),
        OperatorChange("Conv", 2, 1, 30, 25),
        OperatorChange("Gemm", 1, 1, 5, 1),
        OperatorChange("Relu", 1, 1, 1, 1),
    )
    assert (found.baseline, found.candidate) == (baseline, candidate)
    for order in itertools.permutations(baseline.nodes):
        assert compare_profiles(of(*order), candidate).operators == found.operators


def test_nothing_is_noted_where_nothing_is_odd() -> None:
    assert compare_profiles(of(node(us=20), node("Gemm")), of(node(us=10), node("Gemm"))).notes == ()


def test_odd_channels_of_the_candidate_are_noted() -> None:
    layers = [layer(channels=(16, 24), name="one"), layer(), layer("Gemm", channels=(20, 10), name="two")]
    (note,) = compare_profiles(of(node()), of(node()), layers).notes
    assert note == (
        "candidate: 2 of 3 layers have channels that are not a multiple of 16 (1 of them not of 8 either), to which "
        "kernels pad them: one (16 -> 24), two (20 -> 10)"
    )
    many = [layer(channels=(16, 20), name=f"n{i}") for i in range(7)]
    (note,) = compare_profiles(of(node()), of(node()), many).notes
    assert note.endswith("n3 (16 -> 20), n4 (16 -> 20), ...")


def test_other_kernels_are_noted() -> None:
    blocked = [node(us=10, name=f"n{i}_nchwc") for i in range(3)]
    plain = [node(us=30, name="n0"), *blocked[1:]]
    found = compare_profiles(of(*blocked, node("Relu")), of(*plain, node("Add")))
    assert found.notes == (
        f"1 of 3 layers run another kernel: Conv in blocks of channels on {CPU} in the baseline (10 us), Conv on {CPU} "
        "in the candidate (30 us)",
    )
    assert compare_profiles(of(*blocked), of(*blocked)).notes == ()
    assert compare_profiles(of(*blocked), of(*plain[:2])).notes == (), "layers that are not as many do not correspond"


def test_nodes_that_fell_back_are_noted_by_operator() -> None:
    fallen = of(node(by=CUDA), node("Add"), node("Add"), node("Relu"), provider=CUDA)
    whole = of(node(by=CUDA), provider=CUDA)
    assert compare_profiles(fallen, whole).notes == (
        f"baseline: 3 of 4 nodes not run by {CUDA}: 2 Add by {CPU}, 1 Relu by {CPU}",
    )
    assert compare_profiles(whole, fallen).notes[0].startswith("candidate: 3 of 4 nodes not run by")
