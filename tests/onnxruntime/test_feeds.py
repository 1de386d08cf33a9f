"""Inputs of ONNX files: given, read or drawn; checked, and cut into batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from nns_plugin.adapters.onnxruntime.feeds import feeds_of, random_values, read_values, values_of  # noqa: E402
from nns_plugin.adapters.onnxruntime.file import FEATURES_KEY, SELECTION_KEY, OnnxFile, TensorSpec  # noqa: E402
from nns_plugin.errors import ExportError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

Shape = tuple[int | str | None, ...] | None


def file_with(*inputs: tuple[str, Shape] | tuple[str, Shape, str], **metadata: str) -> OnnxFile:
    """What a file would say that takes such inputs: name, shape and, if it is not float32, element type."""
    specs = tuple(TensorSpec(name, dtype[0] if dtype else "float32", shape) for name, shape, *dtype in inputs)
    return OnnxFile("m.onnx", {}, 0, 17, "", specs, (TensorSpec("y", "float32", None),), None, metadata)


def narrowed(indices: list[int], total: int, axis: int, flat: bool, shape: Shape) -> OnnxFile:
    indexed = json.dumps({"axis": axis, "flat": flat, "total": total})
    return file_with(("x", shape), **{FEATURES_KEY: json.dumps(indices), SELECTION_KEY: indexed})


def floats(*shape: int) -> Any:
    return np.arange(float(np.prod(shape)), dtype=np.float32).reshape(shape)


def refusal(failure: pytest.ExceptionInfo[ExportError]) -> str:
    message = str(failure.value)
    assert len(message.splitlines()) == 1
    return message


X = ("x", ("n", 2))
TWO = file_with(X, ("z", ("n", 3)))


# Given ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": floats(4, 2), "z": floats(4, 3)},
        [floats(4, 2), torch.from_numpy(floats(4, 3))],
        (torch.from_numpy(floats(4, 2)).requires_grad_(), floats(4, 3)),
    ],
)
def test_inputs_are_given_by_name_or_in_order(inputs: Any) -> None:
    found = values_of(inputs, TWO)
    assert list(found) == ["x", "z"]
    np.testing.assert_array_equal(found["x"], floats(4, 2))
    np.testing.assert_array_equal(found["z"], floats(4, 3))
    assert all(type(array) is np.ndarray for array in found.values())


@pytest.mark.parametrize("inputs", [floats(4, 2), torch.from_numpy(floats(4, 2)), [floats(4, 2)], {"x": floats(4, 2)}])
def test_one_input_needs_no_name(inputs: Any) -> None:
    found = values_of(inputs, file_with(X))
    np.testing.assert_array_equal(found["x"], floats(4, 2))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (7, "are a int; expected tensors or arrays"),
        ("x.npz", r"has the inputs \['x', 'z'\], found 5"),
        (floats(4, 2), r"has the inputs \['x', 'z'\], found 1"),
        ([floats(4, 2), [1.0]], "input 'z' is a list"),
        ({"x": 1.0, "z": floats(4, 3)}, "input 'x' is a float"),
        ([floats(4, 2), torch.zeros(4, 3, dtype=torch.bfloat16)], "input 'z' is torch.bfloat16, which NumPy lacks"),
    ],
)
def test_what_are_no_inputs(inputs: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message) as failure:
        values_of(inputs, TWO)
    refusal(failure)


# Read -----------------------------------------------------------------------------------------------------------


def test_inputs_and_labels_come_from_an_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", z=floats(4, 3), x=floats(4, 2), labels=np.array([3, 1, 2, 0], np.uint8))
    values, labels = read_values(tmp_path / "data.npz", TWO)
    assert sorted(values) == ["x", "z"]
    np.testing.assert_array_equal(values["z"], floats(4, 3))
    assert labels is not None
    assert labels.tolist() == [3, 1, 2, 0]


def test_a_single_array_may_have_any_name(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", images=floats(4, 2))
    values, labels = read_values(tmp_path / "data.npz", file_with(X))
    np.testing.assert_array_equal(values["x"], floats(4, 2))
    assert labels is None


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", labels=floats(4, 2))
    values, labels = read_values(tmp_path / "data.npz", file_with(("labels", ("n", 2))))
    np.testing.assert_array_equal(values["labels"], floats(4, 2))
    assert labels is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": floats(4, 2)}, r"holds \['x'\]; 'm.onnx' has the inputs \['x', 'z'\]"),
        ({"x": floats(4, 2), "z": floats(4, 3), "w": floats(1)}, r"holds \['w', 'x', 'z'\]"),
        ({"x": floats(4, 2), "z": floats(4, 3), "labels": floats(4)}, r"labels float32\[4\]; expected integers \[N\]"),
        ({"x": floats(4, 2), "z": floats(4, 3), "labels": np.eye(4, dtype=int)}, r"labels int64\[4, 4\]"),
        ({"x": np.array([None]), "z": floats(4, 3)}, "cannot be read as an .npz archive: ValueError"),
    ],
)
def test_archives_with_other_entries(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **entries)
    with pytest.raises(ExportError, match=message) as failure:
        read_values(tmp_path / "data.npz", TWO)
    assert "data.npz" in refusal(failure)


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=floats(400, 2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    for name in ("cut.npz", "text.npz", "empty.npz", "none.npz"):
        with pytest.raises(ExportError, match=f"{name}' cannot be read as an .npz archive: ") as failure:
            read_values(tmp_path / name, file_with(X))
        refusal(failure)


def test_an_array_alone_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", floats(4, 2))
    with pytest.raises(ExportError, match="holds one array; expected an .npz archive"):
        read_values(tmp_path / "one.npy", file_with(X))


# Drawn ----------------------------------------------------------------------------------------------------------


def test_random_inputs_have_the_shapes_and_types_that_a_file_takes() -> None:
    file = file_with(
        ("x", ("n", 2, 3)), ("h", (None, 4), "float16"), ("i", ("n", 500), "int64"), ("b", ("n", 500), "bool"),
        ("u", ("n", 1), "uint8"), ("k", (7,)), ("s", ()),
    )  # fmt: skip
    found = random_values(file, 5, seed=3)
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "x": ((5, 2, 3), "float32"),
        "h": ((5, 4), "float16"),
        "i": ((5, 500), "int64"),
        "b": ((5, 500), "bool"),
        "u": ((5, 1), "uint8"),
        "k": ((7,), "float32"),
        "s": ((), "float32"),
    }
    assert set(found["i"].ravel().tolist()) == {0, 1}
    assert 0.4 < found["b"].mean() < 0.6
    again, other = random_values(file, 5, seed=3), random_values(file, 5, seed=4)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    assert not np.array_equal(found["x"], other["x"])


def test_random_numbers_are_normal() -> None:
    (array,) = random_values(file_with(("x", ("n", 100))), 100).values()
    assert abs(array.mean()) < 0.05
    assert abs(array.std() - 1) < 0.05


def test_random_inputs_of_a_file_with_a_fixed_batch_are_whole_batches() -> None:
    file = file_with(("x", (4, 2)), ("z", (4, 3)))
    found = random_values(file, 12)
    feeds = feeds_of(file, found)
    assert len(found["x"]) == len(found["z"]) == feeds.inputs
    assert feeds.inputs % 4 == 0


@pytest.mark.parametrize(
    "spec",
    [("x", ("n", "length")), ("x", ("n", None, 3)), ("x", None), ("x", ("n", 2), "object"), ("x", ("n",), "undefined")],
)
def test_what_cannot_be_drawn(spec: Any) -> None:
    with pytest.raises(ExportError, match="give data") as failure:
        random_values(file_with(spec), 4)
    assert "'m.onnx' takes x " in refusal(failure)


# Checked and cut ------------------------------------------------------------------------------------------------


def test_free_batches_are_cut_with_a_short_last_one() -> None:
    feeds = feeds_of(TWO, {"z": floats(5, 3), "x": floats(5, 2)})
    assert (feeds.inputs, feeds.fixed, dict(feeds.constant), feeds.path) == (5, None, {}, "m.onnx")
    extraction = [batch for first in (0, 2, 4) for batch in feeds.batches(first, min(first + 2, 5))]
    assert [(whole, count) for _, whole, count in extraction] == [(2, 2), (2, 2), (1, 1)]
    assert [len(values["x"]) for values, _, _ in extraction] == [2, 2, 1]
    for name, columns in (("x", 2), ("z", 3)):
        np.testing.assert_array_equal(np.concatenate([values[name] for values, _, _ in extraction]), floats(5, columns))


def test_a_fixed_batch_is_padded_and_its_real_inputs_are_counted() -> None:
    feeds = feeds_of(file_with(("x", (4, 1))), {"x": floats(6, 1)})
    assert (feeds.inputs, feeds.fixed) == (6, 4)
    extraction = [(values["x"].ravel().tolist(), whole, count) for values, whole, count in feeds.batches(0, 6)]
    assert extraction == [([0, 1, 2, 3], 4, 4), ([4, 5, 0, 1], 4, 2)]
    few = feeds_of(file_with(("x", (4, 1))), {"x": floats(1, 1)})
    assert [(values["x"].ravel().tolist(), count) for values, _, count in few.batches(0, 1)] == [([0, 0, 0, 0], 1)]


def test_a_batch_repeats_too_few_inputs() -> None:
    feeds = feeds_of(file_with(("x", ("n", 1))), {"x": floats(3, 1)})
    assert feeds.batch(2)["x"].ravel().tolist() == [0, 1]
    assert feeds.batch(7)["x"].ravel().tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_file_with_a_fixed_batch_takes_no_other() -> None:
    feeds = feeds_of(file_with(("x", (4, 1))), {"x": floats(3, 1)})
    assert feeds.batch(4)["x"].ravel().tolist() == [0, 1, 2, 0]
    with pytest.raises(ExportError, match="'m.onnx' takes batches of 4 only, found 1"):
        feeds.batch(1)


def test_inputs_without_a_batch_are_the_same_in_every_run() -> None:
    file = file_with(X, ("k", (3,)), ("s", ()))
    feeds = feeds_of(file, {"x": floats(5, 2), "k": floats(3), "s": np.array(2.0)})
    assert (feeds.inputs, feeds.fixed, sorted(feeds.constant)) == (5, None, ["k", "s"])
    for values, whole, count in [*feeds.batches(0, 2), *feeds.batches(2, 5)]:
        assert len(values["x"]) == count == whole
        assert values["k"].tolist() == [0, 1, 2]
        assert (values["s"].shape, float(values["s"]), values["s"].dtype) == ((), 2.0, np.float32)


def test_where_fixed_first_sizes_differ_that_of_the_first_input_is_the_batch() -> None:
    file = file_with(("x", (4, 2)), ("z", (3, 2)), ("w", (4,)))
    feeds = feeds_of(file, {"x": floats(9, 2), "z": floats(3, 2), "w": floats(9)})
    assert (feeds.inputs, feeds.fixed, list(feeds.batched), list(feeds.constant)) == (9, 4, ["x", "w"], ["z"])
    assert {name: array.shape for name, array in random_values(file, 8).items()} == {
        "x": (8, 2), "z": (3, 2), "w": (8,)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [
        ("float16", "float64"), ("float32", "float64"), ("float32", "int64"), ("float32", "bool"), ("int64", "int32"),
        ("int64", "uint8"), ("float32", "float16"), ("int32", "int64"),
    ],
)  # fmt: skip
def test_numbers_of_the_same_kind_are_converted(dtype: str, taken: str) -> None:
    given = np.array([[0, 1], [1, 1]]).astype(taken)
    found = feeds_of(file_with(("x", ("n", 2), dtype)), {"x": given}).batched["x"]
    assert found.dtype == dtype
    assert found.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [("int64", "float32"), ("uint8", "int64"), ("bool", "uint8"), ("float32", "complex64"), ("float32", "U1")],
)
def test_numbers_of_another_kind_are_refused(dtype: str, taken: str) -> None:
    with pytest.raises(ExportError, match=rf"takes x {dtype}\[n, 2\], found .*\[3, 2\]; convert it first") as failure:
        feeds_of(file_with(("x", ("n", 2), dtype)), {"x": np.zeros((3, 2), taken)})
    refusal(failure)


@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**40), ("float16", 1e6)])
def test_numbers_that_do_not_fit_are_refused(dtype: str, value: float) -> None:
    with pytest.raises(ExportError):
        feeds_of(file_with(("x", ("n", 1), dtype)), {"x": np.array([[value]])})


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 1), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"takes x float32\[n, 2\], found float32.*; pass such inputs"):
        feeds_of(file_with(X), {"x": np.zeros(shape, np.float32)})


def test_free_sizes_take_any() -> None:
    file = file_with(("x", ("n", "length", None, 2)))
    assert feeds_of(file, {"x": floats(3, 5, 7, 2)}).inputs == 3
    assert feeds_of(file_with(("x", None)), {"x": floats(3, 5)}).inputs == 3


def test_a_number_where_nothing_is_said_of_the_shape_is_no_batch() -> None:
    with pytest.raises(ExportError):
        feeds_of(file_with(("x", None)), {"x": np.array(1, np.float32)})


@pytest.mark.parametrize("counts", [(4, 3), (0, 0)])
def test_as_many_examples_of_each_are_needed(counts: tuple[int, int]) -> None:
    with pytest.raises(ExportError, match="expected equally many of each, at least one"):
        feeds_of(TWO, {"x": floats(counts[0], 2), "z": floats(counts[1], 3)})


def test_names_of_another_file_are_taken_in_order() -> None:
    feeds = feeds_of(TWO, {"images": floats(4, 2), "angles": floats(4, 3)})
    np.testing.assert_array_equal(feeds.batched["x"], floats(4, 2))
    np.testing.assert_array_equal(feeds.batched["z"], floats(4, 3))
    with pytest.raises(ExportError, match=r"has the inputs \['x', 'z'\], found \['x'\]"):
        feeds_of(TWO, {"x": floats(4, 2)})


def test_a_misspelt_name_does_not_exchange_two_inputs() -> None:
    file = file_with(X, ("z", ("n", 2)))
    with pytest.raises(ExportError, match="has the inputs"):
        feeds_of(file, {"z": floats(4, 2), "xx": floats(4, 2)})


# A narrowed model's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "wide", "expected"),
    [
        (narrowed([0, 3], 4, 1, False, ("n", 2)), floats(5, 4), floats(5, 4)[:, [0, 3]]),
        (narrowed([0, 3], 4, -1, False, ("n", 3, 2)), floats(5, 3, 4), floats(5, 3, 4)[..., [0, 3]]),
        (narrowed([2], 3, 1, False, ("n", 1, 4, 4)), floats(5, 3, 4, 4), floats(5, 3, 4, 4)[:, [2]]),
        (narrowed([1, 5, 6], 8, 1, True, ("n", 3)), floats(5, 2, 4), floats(5, 8)[:, [1, 5, 6]]),
        (narrowed([1, 5, 6], 8, 1, True, ("n", 3)), floats(5, 8)[::-1], floats(5, 8)[::-1][:, [1, 5, 6]]),
    ],
)
def test_wide_inputs_are_picked_out(file: OnnxFile, wide: Any, expected: Any) -> None:
    np.testing.assert_array_equal(feeds_of(file, {"x": wide}).batched["x"], expected)
    np.testing.assert_array_equal(feeds_of(file, {"x": expected}).batched["x"], expected)


def test_read_only_wide_inputs_are_picked_out() -> None:
    wide = floats(5, 4)
    wide.flags.writeable = False
    feeds = feeds_of(narrowed([0, 3], 4, 1, False, ("n", 2)), {"x": wide})
    np.testing.assert_array_equal(feeds.batched["x"], wide[:, [0, 3]])


@pytest.mark.parametrize("given", [floats(5, 3), floats(4), np.zeros((5, 4), "U1"), np.zeros((5, 4), np.complex64)])
def test_inputs_that_are_neither_wide_nor_narrow(given: Any) -> None:
    with pytest.raises(ExportError, match=r"takes x float32\[n, 2\], found"):
        feeds_of(narrowed([0, 3], 4, 1, False, ("n", 2)), {"x": given})
