"""Matching two ONNX files: which outputs correspond, and which labels their scores are for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nns_plugin.adapters.onnxruntime.file import OnnxFile, TensorSpec
from nns_plugin.errors import LabelError
from nns_plugin.labels import OTHER


def matched_outputs(files: Sequence[OnnxFile]) -> tuple[list[tuple[TensorSpec, TensorSpec]], tuple[str, ...]]:
    """Pairs of outputs that correspond, by name or by order, and why others of the baseline have no partner."""
    theirs = {spec.name: spec for spec in files[1].outputs}
    if not any(spec.name in theirs for spec in files[0].outputs) and len(files[0].outputs) == len(theirs):
        theirs = dict(zip((spec.name for spec in files[0].outputs), files[1].outputs, strict=True))
    pairs, missing = [], []
    for spec in files[0].outputs:
        other = theirs.get(spec.name)
        if other is None:
            missing.append(f"output {spec.name!r} is missing from the candidate, which has {_listed(files[1])}")
        elif not all(_is_numeric(each) for each in (spec, other)):
            missing.append(f"output {spec.name!r} holds no numbers: {spec} and {other}")
        else:
            pairs.append((spec, other))
    return pairs, tuple(missing)


def _listed(file: OnnxFile) -> str:
    return ", ".join(repr(spec.name) for spec in file.outputs) or "none"


def _is_numeric(spec: TensorSpec) -> bool:
    try:
        return bool(np.issubdtype(np.dtype(spec.dtype), np.number)) or spec.dtype == "bool"
    except TypeError:
        return False


def output_labels(file: OnnxFile, given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of a file's labels: those it holds, those given, or numbers."""
    if given is not None and file.labels is not None and tuple(given) != file.labels:
        raise LabelError(
            f"{file.path!r} holds the label names {list(file.labels)[:20]}, but {list(given)[:20]} were given; drop "
            "the latter"
        )
    names = tuple(given) if given is not None else file.labels
    names = tuple(str(place) for place in range(count)) if names is None else names
    if len(names) != count or len(set(names)) != count:
        raise LabelError(
            f"{file.path!r} returns {count} scores, but there are {len(names)} label names, {len(set(names))} of them "
            "distinct; give one for each score"
        )
    return names


def matched_columns(
    names: tuple[str, ...], candidate: OnnxFile, given: Sequence[str] | None, count: int
) -> tuple[int | None, ...]:
    """For each score of the candidate the baseline's label; ``None`` for "other"."""
    if given is None and candidate.labels is None:
        if count == len(names):
            return tuple(range(count))
        raise LabelError(
            f"{candidate.path!r} returns {count} scores, the baseline {len(names)}, and it does not say for which "
            "labels; name the candidate's labels"
        )
    theirs = output_labels(candidate, given, count)
    unknown = [name for name in theirs if name not in names and name != OTHER]
    if unknown or all(name not in names for name in theirs):
        raise LabelError(
            f"{candidate.path!r} has the labels {list(theirs)}, the baseline {list(names)[:20]}; expected some of "
            f"these, and {OTHER!r} for the rest"
        )
    return tuple(names.index(name) if name in names else None for name in theirs)
