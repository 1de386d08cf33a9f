"""Subnets on disk: one safetensors file with the kept weights and a JSON header, never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from nns_plugin.compensation.options import Compensation
from nns_plugin.errors import SubnetError
from nns_plugin.files import read_safetensors, write_safetensors
from nns_plugin.labels import LabelSet
from nns_plugin.models.inputs import INPUT_TYPES, check_kinds
from nns_plugin.subnets.content import SubnetContent
from nns_plugin.subnets.options import Head
from nns_plugin.subnets.provenance import Provenance, Trial

FORMAT = "nns-plugin subnet 2"

# Weights of one type lie in one tensor, end to end: the many small ones of norms would need more room for the entries
# of a safetensors header than for themselves.
TYPES = INPUT_TYPES


def save(subnet: SubnetContent, path: Path) -> Path:
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
        "label_names": subnet.labels.names,
        "labels": subnet.labels.indices,
        "outputs": subnet.labels.outputs,
        "head_layer": subnet.head_layer,
        "inputs": subnet.inputs,
        "provenance": dataclasses.asdict(subnet.provenance)
        | {"trials": [list(dataclasses.astuple(trial)) for trial in subnet.provenance.trials]},
        "type": most,
        "layout": layout,
    }
    try:
        text = json.dumps(header, separators=(",", ":"))
    except TypeError as error:
        raise SubnetError(
            f"{str(path)!r} cannot hold the subnet's provenance: {error}; give options of the criterion as plain "
            "numbers and texts"
        ) from error
    write_safetensors(path, FORMAT, SubnetError, {"digest": _digest(text, tensors), "nns": text}, tensors)
    return path


def load(path: Path) -> SubnetContent:
    """Read a subnet and check that it is whole and as it was written."""

    def decoded(metadata: dict[str, str], tensors: dict[str, Tensor]) -> SubnetContent:
        if _digest(metadata["nns"], tensors) != metadata["digest"]:
            raise SubnetError(f"{str(path)!r} is damaged: its content has changed since it was written; copy it again")
        return _decode(json.loads(metadata["nns"]), tensors)

    return read_safetensors(path, FORMAT, SubnetError, decoded)


def _decode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> SubnetContent:
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
    scores = dict(zip(scored, _scores(tensors, sum(counts)).split(counts), strict=True)) if scored else {}
    names = tuple(_text(name) for name in header["label_names"])
    labels = tuple(_label(label, names) for label in header["labels"])
    outputs = tuple(None if label is None else _label(label, names) for label in header["outputs"])
    head_layer = header["head_layer"]
    if not labels or list(labels) != sorted(set(labels)):
        raise ValueError(f"the labels are {labels}; expected some, ascending")
    shrunk = (labels, (*labels, None))
    if not (outputs in shrunk if head_layer is not None else outputs == tuple(range(len(names)))):
        raise ValueError(f"the outputs are {outputs} for the labels {labels} and the head {head_layer!r}")
    check_kinds(header["inputs"])
    return SubnetContent(
        kept=kept,
        sizes=sizes,
        scores=scores,
        labels=LabelSet(names, labels, outputs),
        head_layer=None if head_layer is None else _text(head_layer),
        weights=_weights(header["layout"], header["type"], tensors),
        inputs=header["inputs"],
        provenance=_provenance(header["provenance"]),
    )


def _provenance(found: dict[str, Any]) -> Provenance:
    trials = tuple(_trial(*row) for row in found["trials"])
    known = Provenance(
        **{
            **found,
            "trials": trials,
            "ignored_layers": tuple(_text(name) for name in found["ignored_layers"]),
            "versions": {_text(name): _text(value) for name, value in found["versions"].items()},
            "options": dict(found["options"]),
            "selection": dict(found["selection"]),
            "training": dict(found["training"]),
        }
    )
    for value in (known.parent, known.criterion):
        _text(value)
    if known.head not in get_args(Head) or not isinstance(known.calibrated, bool):
        raise ValueError(f"the head is {known.head!r}, calibrated {known.calibrated!r}")
    for name in ("zeta", "ratio"):
        if name in known.selection:
            _number(known.selection[name])
    if known.compensation:
        how = Compensation(**known.compensation)
        how.check(())
        _number(how.ridge)
    return known


def _scores(tensors: Mapping[str, Tensor], count: int) -> Tensor:
    scores = tensors["scores"]
    if scores.dtype != torch.float64 or scores.shape != (count,) or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"the scores are {scores.dtype}{list(scores.shape)} or not finite; expected {count} numbers")
    return scores


def _weights(layout: dict[str, Any], most: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights, used = {}, dict.fromkeys(tensors, 0)
    for name, entry in _leaves(layout):
        kind, shape = (entry[0], entry[1:]) if entry and isinstance(entry[0], str) else (most, entry)
        lengths = [_count(length) for length in shape]
        source = tensors[f"weights.{kind}"]
        if name in weights:
            raise ValueError(f"{name!r} is there twice")
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


def _trial(
    ratio: Any, parameters: Any, accuracy: Any, bound: Any, within: Any, round_to: Any = 1, *latency: Any
) -> Trial:
    """A row of the trials; in an accuracy search it may lack the fields about latency, which come last."""
    milliseconds, speedup, low, fast = latency or (None, None, None, None)
    return Trial(
        _number(ratio),
        _count(parameters),
        _number_or_none(accuracy),
        _number_or_none(bound),
        bool(within),
        _count(round_to),
        _number_or_none(milliseconds),
        _number_or_none(speedup),
        _number_or_none(low),
        None if fast is None else bool(fast),
    )


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


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
