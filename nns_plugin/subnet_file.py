"""Subnets on disk: one safetensors file with the kept weights and a JSON header, never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nns_plugin.errors import StatisticsError, SubnetError
from nns_plugin.statistics_file import write_safetensors
from nns_plugin.subnet import Provenance, Subnet, Trial

FORMAT = "nns-plugin subnet 1"

# Weights of one type lie in one tensor, end to end: the many small ones of norms would need more room for the entries
# of a safetensors header than for themselves.
TYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


def save(subnet: Subnet, path: Path) -> Path:
    """Write a subnet; the file appears whole or not at all."""
    weights = {name: value.detach().cpu() for name, value in subnet.weights.items()}
    kinds = {name: str(value.dtype).removeprefix("torch.") for name, value in weights.items()}
    for name, kind in kinds.items():
        if kind not in TYPES:
            raise SubnetError(f"{name!r} is of type {kind}, which a subnet file cannot hold: {', '.join(TYPES)}")
    most = max(kinds.values(), key=list(kinds.values()).count, default="float32")
    tensors = {
        f"weights.{kind}": torch.cat([weights[name].flatten() for name in weights if kinds[name] == kind])
        for kind in dict.fromkeys(kinds.values())
    }
    masks = [_mask(subnet.kept[name], size) for name, size in subnet.sizes.items()]
    tensors["kept"] = _packed(torch.cat([*masks, torch.zeros(0, dtype=torch.bool)]))
    scored = [name for name in subnet.sizes if name in subnet.scores]
    if scored:
        tensors["scores"] = torch.cat([subnet.scores[name].double() for name in scored])
    layout: dict[str, Any] = {}
    for name, value in weights.items():
        shape = list(value.shape)
        _put(layout, name, shape if kinds[name] == most else [kinds[name], *shape])
    header = {
        "groups": dict(subnet.sizes),
        "scored": "all" if scored == list(subnet.sizes) else scored,
        "label_names": subnet.label_names,
        "labels": subnet.labels,
        "outputs": subnet.outputs,
        "head_layer": subnet.head_layer,
        "inputs": subnet.inputs,
        "provenance": dataclasses.asdict(subnet.provenance)
        | {"trials": [list(dataclasses.astuple(trial)) for trial in subnet.provenance.trials]},
        "type": most,
        "layout": layout,
    }
    text = json.dumps(header, separators=(",", ":"))
    metadata = {"format": FORMAT, "digest": _digest(text, tensors), "nns": text}
    try:
        write_safetensors(tensors, metadata, path)
    except StatisticsError as error:
        raise SubnetError(str(error)) from error
    return path


def load(path: Path) -> Subnet:
    """Read a subnet and check that it is whole and as it was written."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SubnetError(
                    f"{str(path)!r} is no subnet file: its format is {metadata.get('format')!r}, expected {FORMAT!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if _digest(metadata["nns"], tensors) != metadata["digest"]:
            raise SubnetError(f"{str(path)!r} is damaged: its content has changed since it was written; copy it again")
        return _decode(json.loads(metadata["nns"]), tensors)
    except FileNotFoundError as error:
        raise SubnetError(f"there is no file {str(path)!r}") from error
    except (SafetensorError, OSError) as error:
        raise SubnetError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError) as error:
        if isinstance(error, SubnetError):
            raise
        raise SubnetError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from error


def _decode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Subnet:
    """A subnet of a header and tensors; nothing is made that is larger than the file."""
    sizes = {str(name): _count(size) for name, size in header["groups"].items()}
    total, packed = sum(sizes.values()), tensors["kept"]
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != -(-total // 8):
        raise ValueError(f"'kept' is {packed.dtype}{list(packed.shape)}, which does not hold {total} units")
    masks = dict(zip(sizes, _unpacked(packed, total).split(list(sizes.values())), strict=True))
    kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
    if any(units.numel() == 0 for units in kept.values()):
        raise ValueError("a group has no kept unit")
    scored = list(sizes) if header["scored"] == "all" else list(header["scored"])
    counts = [kept[name].numel() for name in scored]
    scores = dict(zip(scored, tensors["scores"].split(counts), strict=True)) if scored else {}
    names = tuple(str(name) for name in header["label_names"])
    outputs = tuple(None if label is None else _label(label, names) for label in header["outputs"])
    provenance = dict(header["provenance"])
    trials = tuple(Trial(float(a), _count(b), float(c), bool(d)) for a, b, c, d in provenance.pop("trials"))
    provenance["ignored_layers"] = tuple(str(name) for name in provenance["ignored_layers"])
    if header["head_layer"] is not None and not isinstance(header["head_layer"], str):
        raise TypeError(f"head_layer is {header['head_layer']!r}")
    return Subnet(
        kept=kept,
        sizes=sizes,
        scores=scores,
        label_names=names,
        labels=tuple(_label(label, names) for label in header["labels"]),
        outputs=outputs,
        head_layer=header["head_layer"],
        weights=_weights(header["layout"], header["type"], tensors),
        inputs=header["inputs"],
        provenance=Provenance(**provenance, trials=trials),
    )


def _weights(layout: dict[str, Any], most: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights, used = {}, dict.fromkeys(tensors, 0)
    for name, entry in _leaves(layout):
        kind, shape = (entry[0], entry[1:]) if entry and isinstance(entry[0], str) else (most, entry)
        lengths = [_count(length) for length in shape]
        source = tensors[f"weights.{kind}"]
        start, count = used[f"weights.{kind}"], math.prod(lengths)
        if source.dtype != TYPES[kind] or start + count > source.numel():
            raise ValueError(f"{name!r} is said to be {kind}{lengths}, more than the file holds")
        weights[name] = source[start : start + count].reshape(lengths).clone()
        used[f"weights.{kind}"] = start + count
    for name, count in used.items():
        if name.startswith("weights.") and count != tensors[name].numel():
            raise ValueError(f"{name!r} has {tensors[name].numel()} numbers, but {count} belong to weights")
    return weights


def _put(tree: dict[str, Any], name: str, shape: list[Any]) -> None:
    *path, last = name.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = shape


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value)


def _mask(units: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[units] = True
    return mask


_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def _packed(mask: Tensor) -> Tensor:
    """Eight units a byte, the first in the highest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8))
    return (padded.reshape(-1, 8) * _BITS).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, total: int) -> Tensor:
    return (packed[:, None] & _BITS).bool().flatten()[:total]


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _label(value: Any, names: tuple[str, ...]) -> int:
    if _count(value) >= len(names):
        raise ValueError(f"label {value} has no name")
    return int(value)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"{name}:{value.dtype}{list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
