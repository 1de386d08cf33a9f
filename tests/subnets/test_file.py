"""Subnet files: what was written comes back, and anything else is one clear error."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nns_plugin import Subnet
from nns_plugin.errors import SubnetError
from nns_plugin.labels import LabelSet
from nns_plugin.subnets.file import FORMAT, _digest
from nns_plugin.subnets.provenance import Provenance, Trial

KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)


def subnet_with(weights: dict[str, Tensor], **changes: Any) -> Subnet:
    known: dict[str, Any] = {
        "kept": {"a": torch.tensor([0, 2, 11]), "b.c": torch.tensor([3])},
        "sizes": {"a": 12, "b.c": 4},
        "scores": {"a": torch.tensor([1.0, 0.1, 1 / 3], dtype=torch.float64)},
        "labels": LabelSet(("ant", "b\u00e9e", 'c"at'), (0, 2), (0, 2, None)),
        "head_layer": "b",
        "weights": weights,
        "inputs": {"tuple": [{"shape": [2, 3], "dtype": "float32"}]},
        "provenance": Provenance(
            parent="0" * 32,
            versions={"torch": "2"},
            criterion="semantic",
            options={"measure": "mean"},
            selection={"zeta": 0.4},
            compensation={"method": "none"},
            head="open",
            ignored_layers=("x.y",),
            trials=(
                Trial(0.5, 10, 0.9, 0.01, True),
                Trial(0.75, 5, 0.8, 0.11, False),
                Trial(0.8, 4, None, None, True, 8, 0.5, 2.1, 2.0, True),
            ),
        ),
    }
    return Subnet(**{**known, **changes})


def weights_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (0,), (3,), (2, 3), (2, 1, 3, 3)]
    return {
        f"block.{place}.{'weight' if place % 2 else 'deep.bias'}": (
            torch.randn(shapes[(place + seed) % 5], generator=generator) * 100
        ).to(KINDS[(place * seed) % len(KINDS)])
        for place in range(9)
    }


@given(seed=st.integers(0, 50))
def test_what_was_written_comes_back(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("file") / "s.safetensors"
    subnet = subnet_with(weights_of(seed))
    again = Subnet.load(subnet.save(path))
    for field in ("sizes", "labels", "head_layer", "inputs", "provenance"):
        assert getattr(again, field) == getattr(subnet, field), field
    for field in ("kept", "scores", "weights"):
        left, right = getattr(again, field), getattr(subnet, field)
        assert list(left) == list(right)
        for name, value in right.items():
            assert left[name].dtype == value.dtype
            assert torch.equal(left[name], value), name


def test_the_file_is_a_safetensors_file_with_a_json_header(tmp_path: Path) -> None:
    path = subnet_with({"w": torch.arange(4.0), "n": torch.tensor(3)}).save(tmp_path / "s.safetensors")
    tensors = load_file(path)
    assert tensors["weights.float32"].tolist() == [0, 1, 2, 3]
    assert tensors["weights.int64"].tolist() == [3]
    assert tensors["kept"].tolist() == [0b10100000, 0b00010001]
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])["__metadata__"]
    assert header["format"] == FORMAT
    assert json.loads(header["nns"])["groups"] == {"a": 12, "b.c": 4}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_hardly_larger_than_its_weights(tmp_path: Path) -> None:
    """The bound of a net with many small tensors: 1.02 times the weights' bytes plus 4 KiB."""
    weights = {}
    for block in range(20):
        weights[f"layer1.{block}.conv.weight"] = torch.randn(8, 8, 3, 3)
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"layer1.{block}.bn.{name}"] = torch.randn(8)
        weights[f"layer1.{block}.bn.num_batches_tracked"] = torch.tensor(1)
    path = subnet_with(weights).save(tmp_path / "s.safetensors")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    assert path.stat().st_size <= 1.02 * size + 4096


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return subnet_with(weights_of(1)).save(tmp_path_factory.mktemp("good") / "s.safetensors").read_bytes()


def refused(content: bytes, folder: Path) -> str:
    path = folder / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(SubnetError) as caught:
        Subnet.load(path)
    message = str(caught.value)
    assert "bad.safetensors" in message
    return message


@given(data=st.data())
def test_any_changed_byte_is_found(data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(1, 255))
    changed = bytearray(good)
    changed[place] ^= value
    refused(bytes(changed), tmp_path_factory.mktemp("changed"))


@given(data=st.data())
def test_any_cut_or_addition_is_found(
    data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = data.draw(st.integers(0, len(good) - 1))
    more = data.draw(st.binary(min_size=1, max_size=40))
    folder = tmp_path_factory.mktemp("short")
    refused(good[:place], folder)
    refused(good[:place] + more + good[place:], folder)


@given(content=st.binary(max_size=400))
def test_foreign_bytes_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    refused(content, tmp_path_factory.mktemp("foreign"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(data=st.data())
def test_a_header_that_lies_is_refused(
    data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With a digest that fits: whatever stands in a field, there is an error, or a subnet of what the file holds."""
    folder = tmp_path_factory.mktemp("lie")
    (folder / "good.safetensors").write_bytes(good)
    tensors = load_file(folder / "good.safetensors")
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["nns"])
    place = header if data.draw(st.booleans()) else header["provenance"]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    path = forged(header, tensors, folder)
    try:
        subnet = Subnet.load(path)
    except SubnetError:
        return
    held = sum(value.numel() for name, value in tensors.items() if name.startswith("weights."))
    assert sum(value.numel() for value in subnet.weights.values()) == held


def forged(header: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Path:
    text = json.dumps(header)
    path = folder / "forged.safetensors"
    save_file(tensors, path, metadata={"format": FORMAT, "digest": _digest(text, tensors), "nns": text})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": {"huge": [10**12, 10**12]}}, "more than the file holds"),
        ({"layout": {"huge": [-1]}}, "-1 is no count"),
        ({"layout": {"kind": ["complex64", 1]}}, "weights.complex64"),
        ({"layout": {}}, "but 0 belong to weights"),
        ({"groups": {"a": 10**15}}, "does not hold"),
        ({"groups": {"a": 8, "empty": 1, "c": 7}}, "a group has no kept unit"),
        ({"labels": [3]}, "label 3 has no name"),
        ({"outputs": [True]}, "True is no count"),
        ({"labels": [0, 0]}, "expected some, ascending"),
        ({"outputs": [1, 0, None]}, "the outputs are"),
        ({"head_layer": 3}, "3 is no text"),
        ({"head_layer": None}, "the outputs are"),
        ({"inputs": {}}, "does not describe inputs"),
        ({"inputs": 3}, "does not describe inputs"),
        ({"inputs": {"shape": [4 * 10**8, 10], "dtype": "float32"}}, "more than 67108864"),
        ({"inputs": {"mapping": {"x": {"shape": [-1], "dtype": "float32"}}}}, "is not a shape"),
        ({"inputs": {"tuple": [{"shape": [1], "dtype": "load"}]}}, "does not describe inputs"),
        ({"scored": ["a", "b.c"]}, "the scores are"),
        ({"provenance": {}}, "trials"),
        ({"layout": {"block": {"0": {"deep.bias": []}, "0.deep": {"bias": []}}}}, "is there twice|more than"),
    ],
)
def test_lies_are_named(change: dict[str, Any], message: str, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(good)
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["nns"])
    with pytest.raises(SubnetError, match=message):
        Subnet.load(forged({**header, **change}, load_file(tmp_path / "good.safetensors"), tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": [[10**400, 1, 1.0, 0.0, True]]}, "OverflowError"),
        ({"trials": [[0.5, -1, 1.0, 0.0, True]]}, "-1 is no count"),
        ({"compensation": {"foo": 1}}, "foo"),
        ({"compensation": {"method": "magic"}}, "method is 'magic'"),
        ({"selection": {"zeta": "x"}}, "'x' is no number"),
        ({"selection": [1]}, "damaged"),
        ({"head": "weird"}, "the head is 'weird'"),
        ({"calibrated": 3}, "calibrated 3"),
        ({"parent": 3}, "3 is no text"),
        ({"versions": {"torch": 2}}, "2 is no text"),
        ({"more": 1}, "more"),
    ],
)
def test_lies_about_the_provenance_are_named(change: dict[str, Any], message: str, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(good)
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["nns"])
    header["provenance"] |= change
    with pytest.raises(SubnetError, match=message):
        Subnet.load(forged(header, load_file(tmp_path / "good.safetensors"), tmp_path))


def test_scores_must_be_numbers(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(good)
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["nns"])
    tensors = load_file(tmp_path / "good.safetensors")
    for wrong in (tensors["scores"] * torch.nan, tensors["scores"].float(), tensors["scores"][:, None]):
        with pytest.raises(SubnetError, match="the scores are"):
            Subnet.load(forged(header, {**tensors, "scores": wrong}, tmp_path))


def test_a_subnet_without_pruned_groups(tmp_path: Path) -> None:
    subnet = subnet_with({"w": torch.ones(2)}, kept={}, sizes={}, scores={})
    again = Subnet.load(subnet.save(tmp_path / "s.safetensors"))
    assert again.kept == {}
    assert torch.equal(again.weights["w"], torch.ones(2))


def test_a_provenance_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    subnet = subnet_with({"w": torch.ones(2)})
    subnet = replace(subnet, provenance=replace(subnet.provenance, options={"ridge": torch.tensor(0.1)}))
    with pytest.raises(SubnetError, match="Tensor is not JSON serializable; give options of the criterion as plain"):
        subnet.save(tmp_path / "subnet.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SubnetError, match="there is no file"):
        Subnet.load(tmp_path / "none.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(SubnetError, match="its format is None, expected 'nns-plugin subnet 2'"):
        Subnet.load(tmp_path / "w.safetensors")
    with pytest.raises(SubnetError, match="choose a folder that exists"):
        subnet_with({}).save(tmp_path / "none" / "s.safetensors")
    with pytest.raises(SubnetError, match="of type complex64, which a subnet file cannot hold"):
        subnet_with({"w": torch.ones(1, dtype=torch.complex64)}).save(tmp_path / "c.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w.safetensors"]
