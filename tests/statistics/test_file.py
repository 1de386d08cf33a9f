"""Statistics on disk: round trips, damaged files, and files that cannot be written."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from observations import (
    DATA,
    GROUPS,
    MODEL,
    Observed,
    assert_same,
    collect,
    consumer,
    quarters,
)
from safetensors.torch import save_file
from torch import nn

from nns_plugin import Statistics, calibrate
from nns_plugin.errors import StatisticsError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    collect(list(range(12)), []).save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_a_file_gives_back_the_same_statistics(saved: Path) -> None:
    loaded, whole = Statistics.load(saved, MODEL), collect(list(range(12)), [])
    assert_same(loaded, whole)
    for mine, theirs in zip(loaded.groups, whole.groups, strict=True):
        assert (mine.name, mine.size, zoo.by_hand(mine)) == (theirs.name, theirs.size, zoo.by_hand(theirs))
    assert_same(Statistics.load(str(saved)), whole)
    assert_same(loaded.merge(whole), whole.merge(whole))


def test_unlabelled_and_narrowed_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = calibrate(MODEL, [DATA[0]], GROUPS).narrow({"producer": torch.tensor([0, 2])})
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.labels is None
    assert_same(loaded, statistics)
    with pytest.raises(StatisticsError, match="holds narrowed statistics"):
        Statistics.load(tmp_path / "s.safetensors", MODEL)


def test_nothing_but_the_file_is_left_and_others_may_read_it(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["s.safetensors"]
    other = saved.with_name("plain")
    other.write_bytes(b"")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(other.stat().st_mode), "the same as of any new file"


def test_a_file_can_be_replaced(saved: Path) -> None:
    collect([0], []).save(saved)
    assert int(Statistics.load(saved).records["in", "layer"].inputs.sum()) == 1


def test_a_file_of_another_model_names_what_differs(saved: Path) -> None:
    other = Observed(nn.Conv2d(3, 2, 2, padding=1))
    with pytest.raises(
        StatisticsError,
        match=r"s\.safetensors' belong to another state of the model: .*'layer.weight' has other values",
    ):
        Statistics.load(saved, other)
    with pytest.raises(StatisticsError, match="'layer.weight' is 5x3x2x2 instead of 2x3x2x2"):
        Statistics.load(saved, Observed(nn.Conv2d(3, 5, 2, padding=1)))
    with pytest.raises(StatisticsError, match="'layer.bias' is missing, .* and 1 more"):
        Statistics.load(saved, Observed(nn.Conv2d(3, 2, 2, padding=1, bias=False)))
    calibrate(Observed(nn.Linear(3, 2, bias=False)), [quarters(2, 3)], consumer(zoo.one_each(3))).save(saved)
    with pytest.raises(StatisticsError, match="'layer.bias' is new, "):
        Statistics.load(saved, Observed(nn.Linear(3, 2)))


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="there is no file .*nowhere"):
        Statistics.load(tmp_path / "nowhere")
    with pytest.raises(StatisticsError, match="damaged or not a safetensors file"):
        Statistics.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        StatisticsError,
        match="weights.safetensors' is a file of another kind: its format is None, expected 'nns-plugin statistics 1'",
    ):
        Statistics.load(tmp_path / "weights.safetensors")
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    with pytest.raises(StatisticsError, match="pickle.pt' is damaged or not a safetensors file"):
        Statistics.load(tmp_path / "pickle.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "old", metadata={"format": "nns-plugin statistics 0"})
    with pytest.raises(StatisticsError, match="its format is 'nns-plugin statistics 0', expected"):
        Statistics.load(tmp_path / "old")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file: its own part and ours."""
    header, data = parts(path)
    ours = json.loads(header["__metadata__"]["nns"])
    change(header, ours)
    if "nns" in header["__metadata__"]:
        header["__metadata__"]["nns"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


DAMAGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "no header of ours": lambda header, ours: header["__metadata__"].pop("nns"),
    "no groups": lambda header, ours: ours.pop("groups"),
    "a renamed sum": lambda header, ours: header.update({"record.0.sum": header.pop("record.0.total")}),
    "too many records": lambda header, ours: ours["records"].append(["in", "other"]),
    "a record without a side": lambda header, ours: ours["records"][0].pop(),
    "labels that do not fit": lambda header, ours: ours.update(labels=["a", "b"]),
    "labels of unlabelled sums": lambda header, ours: ours.update(labels=None),
    "a size that does not fit": lambda header, ours: ours["groups"][0].update(size=2),
    "a size that is none": lambda header, ours: ours["groups"][0].update(size="many"),
    "groups that are none": lambda header, ours: ours.update(groups=7),
    "a threshold that is none": lambda header, ours: ours.update(threshold="low"),
    "no fingerprint": lambda header, ours: ours.update(fingerprint=None),
    "another shape": lambda header, ours: header["record.0.total"].update(shape=[1, 9]),
    "another type": lambda header, ours: header["record.0.total"].update(dtype="I64"),
    "a side that is none": lambda header, ours: ours["records"][0].__setitem__(0, "up"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_refused(saved: Path, damage: str) -> None:
    rewrite(saved, DAMAGES[damage])
    with pytest.raises(StatisticsError, match=r"s\.safetensors' is damaged"):
        Statistics.load(saved)


def test_channels_out_of_range_are_refused(saved: Path) -> None:
    header, data = parts(saved)
    start, stop = header["record.0.channel"]["data_offsets"]
    damaged = data[:start] + struct.pack("<q", 99) + data[start + 8 : stop] + data[stop:]
    text = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text + damaged)
    with pytest.raises(StatisticsError, match="is damaged"):
        Statistics.load(saved)


def test_truncated_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [*range(0, 40), *range(40, len(content), 97), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(StatisticsError):
            Statistics.load(saved)


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_garbage_is_refused(content: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"nns-garbage-{os.getpid()}"
    path.write_bytes(content)
    try:
        with pytest.raises(StatisticsError):
            Statistics.load(path)
    finally:
        path.unlink()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = collect([0, 1], [])
    with pytest.raises(StatisticsError, match="cannot write .*no/s.safetensors"):
        statistics.save(tmp_path / "no" / "s.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StatisticsError, match="cannot write .*folder"):
        statistics.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    statistics.save(tmp_path / "s.safetensors")
    good = (tmp_path / "s.safetensors").read_bytes()
    monkeypatch.setattr("nns_plugin.files.save_file", full)
    with pytest.raises(StatisticsError, match="cannot write .*s.safetensors.*No space left"):
        statistics.save(tmp_path / "s.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "s.safetensors"]
    assert (tmp_path / "s.safetensors").read_bytes() == good, "the old file is whole"
