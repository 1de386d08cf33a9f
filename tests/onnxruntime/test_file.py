"""ONNX files: what one says of itself, and one clear line about each that cannot be used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from nns_plugin.adapters import onnxruntime as adapter  # noqa: E402
from nns_plugin.adapters.onnxruntime.file import OnnxFile, TensorSpec, read_file  # noqa: E402
from nns_plugin.errors import ExportError  # noqa: E402
from nns_plugin.synapses.input_selection import InputSelection  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

FLOAT = onnx.TensorProto.FLOAT


def put(name: str, *shape: int | str | None, kind: int = FLOAT) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def save(
    path: Path,
    inputs: list[Any],
    outputs: list[Any],
    nodes: list[Any],
    *,
    constants: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    **options: Any,
) -> Path:
    """Write a hand-made ONNX model."""
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, initializer=weights)
    opsets = [onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=ir_version, producer_name="by hand", producer_version="2"
    )
    onnx.helper.set_model_props(model, metadata or {})
    onnx.save(model, path, **options)
    return path


def relu(path: Path, **options: Any) -> Path:
    return save(path, [put("x", "n", 2)], [put("y", "n", 2)], [onnx.helper.make_node("Relu", ["x"], ["y"])], **options)


def product(path: Path, **options: Any) -> Path:
    """A matrix product whose weights, 4 KiB, are also listed as an input, as old exporters do."""
    return save(
        path,
        [put("x", "n", 32), put("w", 32, 32)],
        [put("y", "n", 32)],
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        constants={"w": np.eye(32, dtype=np.float32)},
        **options,
    )


def refusal(path: Path, error: type[Exception] = ExportError) -> str:
    """The error of reading a file, which must be a single line that names it."""
    with pytest.raises(error) as failure:
        read_file(path)
    message = str(failure.value)
    assert repr(str(path)) in message
    assert len(message.splitlines()) == 1
    return message


def external(path: Path) -> Path:
    return product(path, save_as_external_data=True, location="weights.bin", size_threshold=0)


# What it says of itself -----------------------------------------------------------------------------------------


def test_the_facts_of_a_file(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx", opset=15, metadata={"origin": "tests", "note": "ü"})
    found = read_file(path)
    assert found == OnnxFile(
        path=str(path),
        sha256={"model.onnx": hashlib.sha256(path.read_bytes()).hexdigest()},
        file_bytes=len(path.read_bytes()),
        opset=15,
        producer="by hand 2",
        inputs=(TensorSpec("x", "float32", ("n", 32)),),
        outputs=(TensorSpec("y", "float32", ("n", 32)),),
        labels=None,
        metadata={"origin": "tests", "note": "ü"},
    )
    assert found.selection is None
    assert read_file(str(path)) == found


def test_every_kind_of_input_is_described(tmp_path: Path) -> None:
    types = onnx.TensorProto
    inputs = [
        put("images", "batch", 3, None, 8, kind=types.FLOAT16),
        put("tokens", None, "length", kind=types.INT64),
        put("flag", kind=types.BOOL),
        onnx.helper.make_tensor_value_info("anything", types.DOUBLE, None),
        onnx.helper.make_tensor_sequence_value_info("several", FLOAT, None),
    ]
    nodes = [onnx.helper.make_node("Identity", ["flag"], ["same"])]
    found = read_file(save(tmp_path / "model.onnx", inputs, [put("same", kind=types.BOOL)], nodes))
    assert [(spec.dtype, spec.shape) for spec in found.inputs[:4]] == [
        ("float16", ("batch", 3, None, 8)),
        ("int64", (None, "length")),
        ("bool", ()),
        ("float64", None),
    ]
    assert (found.inputs[4].dtype, found.inputs[4].shape) == ("sequence_type", None)
    assert [str(spec) for spec in found.inputs[:4]] == [
        "images float16[batch, 3, ?, 8]",
        "tokens int64[?, length]",
        "flag bool[]",
        "anything float64[...]",
    ]


def test_the_checksum_follows_the_content(tmp_path: Path) -> None:
    one, two = relu(tmp_path / "one.onnx"), relu(tmp_path / "two.onnx")
    assert read_file(one).sha256["one.onnx"] == read_file(two).sha256["two.onnx"]
    relu(two, metadata={"a": "b"})
    assert read_file(one).sha256["one.onnx"] != read_file(two).sha256["two.onnx"]


def test_external_weights_are_counted_and_hashed(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx")
    weights = tmp_path / "weights.bin"
    assert weights.stat().st_size == 4096
    found = read_file(path)
    assert found.sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, weights)}
    assert found.file_bytes == path.stat().st_size + 4096
    assert [spec.name for spec in found.inputs] == ["x"]


def test_external_files_of_one_name_are_both_listed(tmp_path: Path) -> None:
    constants = {"v": np.ones(2, np.float32), "w": np.full(2, 2, np.float32)}
    nodes = [onnx.helper.make_node("Add", ["x", "v"], ["z"]), onnx.helper.make_node("Mul", ["z", "w"], ["y"])]
    path = save(tmp_path / "model.onnx", [put("x", "n", 2)], [put("y", "n", 2)], nodes, constants=constants)
    model = onnx.load(path)
    for tensor, folder in zip(model.graph.initializer, ("a", "b"), strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data").write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, f"{folder}/data", 0, 8)
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    assert len(read_file(path).sha256) == 3
    (tmp_path / "b" / "data").unlink()
    assert "'b/data'" in refusal(path)


def test_weights_of_graphs_within_nodes_are_looked_for(tmp_path: Path) -> None:
    inner = onnx.helper.make_tensor("value", FLOAT, [1], [1.0])
    inner.ClearField("float_data")
    inner.raw_data = np.ones(1, np.float32).tobytes()
    onnx.external_data_helper.set_external_data(inner, "inner.bin", 0, 4)
    inner.ClearField("raw_data")
    branches = {
        name: onnx.helper.make_graph(
            [onnx.helper.make_node("Constant", [], [name], value=inner)], name, [], [put(name, 1)]
        )
        for name in ("then_branch", "else_branch")
    }
    nodes = [onnx.helper.make_node("If", ["flag"], ["y"], **branches)]
    path = save(tmp_path / "model.onnx", [put("flag", kind=onnx.TensorProto.BOOL)], [put("y", 1)], nodes)
    assert "'inner.bin'" in refusal(path)


def test_labels_and_the_selection_come_back_from_an_export(tmp_path: Path) -> None:
    selection = InputSelection(torch.tensor([2, 5, 7]), total=9, axis=-1, flat=False)
    path = tmp_path / "model.onnx"
    adapter.export(nn.Linear(3, 2), torch.randn(2, 3), path, label_names=["één", ""], features=selection)
    found = read_file(path)
    assert found.labels == ("één", "")
    assert found.selection is not None
    assert found.selection.indices.tolist() == [2, 5, 7]
    assert (found.selection.total, found.selection.axis, found.selection.flat) == (9, -1, False)
    assert found.inputs[0].shape == ("batch", 3)
    assert found.producer.startswith("pytorch")


def test_indices_alone_are_no_selection(tmp_path: Path) -> None:
    found = read_file(relu(tmp_path / "model.onnx", metadata={adapter.FEATURES_KEY: "[1, 2]"}))
    assert found.selection is None


# Files that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["{", '{"a": 1}', "[1, 2]", '"cat"'])
def test_labels_that_are_no_list_of_names(labels: str, tmp_path: Path) -> None:
    message = refusal(relu(tmp_path / "model.onnx", metadata={adapter.LABELS_KEY: labels}))
    assert adapter.LABELS_KEY in message


@pytest.mark.parametrize("indices", ["[0, 1]", "zero", '["a"]', "[[0], [1, 2]]"])
@pytest.mark.parametrize("indexed", ["{}", "[]", "no", '{"total": "x", "axis": 1, "flat": false}'])
def test_a_selection_that_cannot_be_read(indices: str, indexed: str, tmp_path: Path) -> None:
    metadata = {adapter.FEATURES_KEY: indices, adapter.SELECTION_KEY: indexed}
    found = read_file(relu(tmp_path / "model.onnx", metadata=metadata))
    with pytest.raises(ExportError, match="export it again") as failure:
        _ = found.selection
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize("indices", ["[0, 9]", "[-1, 0]", "[0.5, 1]", "[[0, 1]]", "[]"])
def test_a_selection_of_what_is_not_there(indices: str, tmp_path: Path) -> None:
    indexed = json.dumps({"total": 4, "axis": 1, "flat": False})
    found = read_file(
        relu(tmp_path / "model.onnx", metadata={adapter.FEATURES_KEY: indices, adapter.SELECTION_KEY: indexed})
    )
    with pytest.raises(ExportError, match="export it again"):
        _ = found.selection


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(path)
    assert "truncated or damaged" in message
    assert f"({path.stat().st_size:,} bytes)" in message


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04" + bytes(40), b"\x89PNG\r\n\x1a\n", b"\xff" * 9, bytes(50)])
def test_what_is_no_onnx_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "is not an ONNX file" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"\x08\x08", onnx.ModelProto(ir_version=8).SerializeToString()])
def test_a_file_without_a_graph_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "holds no graph" in refusal(path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "model.onnx")
    assert "there is no file" in refusal(tmp_path)


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    message = refusal(path)
    assert "'weights.bin'" in message
    assert "copy both" in message


def test_external_weights_that_are_cut_short_do_not_become_a_session(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(ExportError, match="cannot load") as failure:
        adapter.create_session(path)
    assert len(str(failure.value).splitlines()) == 1


def test_an_opset_from_the_future_is_reported_in_numbers(tmp_path: Path) -> None:
    path = relu(tmp_path / "model.onnx", opset=99)
    assert read_file(path).opset == 99
    with pytest.raises(ExportError) as failure:
        adapter.create_session(path)
    message = str(failure.value)
    assert repr(str(path)) in message
    assert "it asks for opset 99 of ai.onnx, and this ONNX Runtime knows those up to " in message
    assert "onnxruntime_src" not in message
    assert len(message.splitlines()) == 1


def test_a_format_from_the_future_is_reported_in_numbers(tmp_path: Path) -> None:
    path = relu(tmp_path / "model.onnx", ir_version=99)
    assert read_file(path).inputs[0].name == "x"
    with pytest.raises(ExportError, match="IR version: 99, max supported IR version") as failure:
        adapter.create_session(path)
    assert "onnxruntime_src" not in str(failure.value)
    assert len(str(failure.value).splitlines()) == 1
