"""Statistics on disk: one safetensors file with a JSON header, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nns_plugin.errors import GroupError, StatisticsError
from nns_plugin.files import read_safetensors, write_safetensors
from nns_plugin.models.layers import Layout
from nns_plugin.statistics.records import SUMS, Key, Record
from nns_plugin.units import Port, UnitGroup, check_group

FORMAT = "nns-plugin statistics 1"


class Content(NamedTuple):
    """The content of a file: the fields of :class:`nns_plugin.statistics.statistics.Statistics`, in their order."""

    records: Mapping[Key, Record]
    groups: tuple[UnitGroup, ...]
    labels: tuple[str, ...] | None
    threshold: float
    fingerprint: Mapping[str, str]


def write_statistics(path: Path, content: Content) -> None:
    """Write statistics atomically.

    Raises:
        StatisticsError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for number, record in enumerate(content.records.values()):
        tensors |= {f"record.{number}.{name}": value for name, value in record.sums().items()}
        tensors |= {f"record.{number}.channel": record.layout.channel, f"record.{number}.slot": record.layout.slot}
    for number, group in enumerate(content.groups):
        for role, ports in (("producers", group.producers), ("consumers", group.consumers)):
            for place, port in enumerate(ports):
                tensors[f"group.{number}.{role}.{place}.index"] = port.index
                tensors[f"group.{number}.{role}.{place}.unit"] = port.unit
    header = {
        "records": [list(key) for key in content.records],
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "producers": [port.name for port in group.producers],
                "consumers": [port.name for port in group.consumers],
            }
            for group in content.groups
        ],
        "labels": content.labels,
        "threshold": content.threshold,
        "fingerprint": dict(content.fingerprint),
    }
    write_safetensors(path, FORMAT, StatisticsError, {"nns": json.dumps(header)}, tensors)


def read_statistics(path: Path) -> Content:
    """Read statistics and check that they are complete and consistent.

    Raises:
        StatisticsError: If the file is missing, damaged or foreign.
    """
    return read_safetensors(
        path, FORMAT, StatisticsError, lambda metadata, tensors: _decode(json.loads(metadata["nns"]), tensors)
    )


def _decode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Content:
    groups = []
    for number, item in enumerate(header["groups"]):
        ports = {
            role: tuple(
                Port(
                    name,
                    tensors[f"group.{number}.{role}.{place}.index"],
                    tensors[f"group.{number}.{role}.{place}.unit"],
                )
                for place, name in enumerate(item[role])
            )
            for role in ("producers", "consumers")
        }
        group = UnitGroup(str(item["name"]), int(item["size"]), ports["producers"], ports["consumers"])
        check_group(group)
        groups.append(group)
    labels = None if header["labels"] is None else tuple(str(label) for label in header["labels"])
    records: dict[Key, Record] = {}
    for number, (side, name) in enumerate(header["records"]):
        layout = Layout(tensors[f"record.{number}.channel"], tensors[f"record.{number}.slot"])
        if side not in ("in", "out") or not bool(torch.isin(layout.channel, torch.arange(layout.slot.numel())).all()):
            raise GroupError(f"record {number} has side {side!r} or a channel out of range")
        sums = {field: tensors[f"record.{number}.{field}"] for field in SUMS}
        record = Record(layout, **sums, gram=tensors.get(f"record.{number}.gram"))
        empty = Record.empty(layout, sums["inputs"].numel())
        for field, value in sums.items():
            like = getattr(empty, field)
            if value.shape != like.shape or value.dtype != like.dtype or not bool(torch.isfinite(value).all()):
                raise GroupError(f"{field} of {name!r} is {value.dtype}{list(value.shape)} or not finite")
        if sums["inputs"].numel() != (1 if labels is None else len(labels)):
            raise GroupError(f"{name!r} has sums of {sums['inputs'].numel()} labels, not of {labels}")
        records[side, name] = record
    return Content(records, tuple(groups), labels, float(header["threshold"]), dict(header["fingerprint"]))
