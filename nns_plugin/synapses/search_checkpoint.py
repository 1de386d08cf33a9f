"""The checkpoint of a search for a minimal network: its last accepted network and its progress, in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nns_plugin.errors import CheckpointError
from nns_plugin.files import read_safetensors, write_safetensors
from nns_plugin.synapses.search import Progress, Search, Step

FORMAT = "nns-plugin minimal network 1"
OPTIONS = ("schedule", "one_by_one", "global_pruning", "by_unit", "max_drop", "min_synapses", "seed")
"""The options that two runs of one search must share."""


def save_search(search: Search, path: Path, origin: Mapping[str, Any]) -> None:
    """Write the last accepted network and the progress of a search atomically.

    Args:
        search: The search.
        path: The file.
        origin: What the search started from, as JSON types.
    """
    header = {**origin, "options": _options(search), "progress": asdict(search.progress)}
    write_safetensors(path, FORMAT, CheckpointError, {"nns": json.dumps(header)}, search.model.state_dict())


def resume_search(search: Search, path: Path, origin: Mapping[str, Any]) -> None:
    """Restore a search from a file of :func:`save_search`.

    Raises:
        CheckpointError: If the file is damaged or belongs to another search.
    """
    expected = json.loads(json.dumps({**origin, "options": _options(search)}))
    header, state = read_safetensors(path, FORMAT, CheckpointError, _decoded)
    for name, value in expected.items():
        if header.get(name) != value:
            raise CheckpointError(
                f"{str(path)!r} belongs to another search: its {name} is {header.get(name)}, expected {value}; resume "
                "with the same model, snapshot, scores and options, or choose another file"
            )
    shapes = {name: (value.shape, value.dtype) for name, value in state.items()}
    if shapes != {name: (value.shape, value.dtype) for name, value in search.model.state_dict().items()}:
        raise CheckpointError(f"{str(path)!r} belongs to another model: its weights have other shapes")
    if not header["progress"].rung <= len(search.options.schedule):
        raise CheckpointError(f"{str(path)!r} is damaged: it is past the end of its schedule")
    search.model.load_state_dict(state)
    search.progress = header["progress"]


def _options(search: Search) -> dict[str, Any]:
    options = {name: getattr(search.options, name) for name in OPTIONS}
    return {**options, "schedule": list(search.options.schedule)}


def _decoded(metadata: Mapping[str, str], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(metadata["nns"])
    progress = Progress(**header["progress"])
    progress.steps = [Step(**step) for step in header["progress"]["steps"]]
    counts = [progress.rung, *progress.tried, *(part for step in progress.steps for part in (step.removed, step.left))]
    values = [progress.reference, *(step.value for step in progress.steps)]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count is not a whole number of at least 0")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError("a value is not finite")
    if any(bool(((mask != 0) & (mask != 1)).any()) for name, mask in state.items() if name.endswith("_mask")):
        raise ValueError("a mask holds values other than 0 and 1")
    return {**header, "progress": progress}, state
