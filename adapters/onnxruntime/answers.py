"""What two ONNX files answer to the same inputs, matched by their outputs' names and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nns_plugin.adapters.onnxruntime.feeds import Feeds
from nns_plugin.adapters.onnxruntime.file import OnnxFile, TensorSpec
from nns_plugin.adapters.onnxruntime.session import create_session, run_session
from nns_plugin.errors import ExportError, LabelError
from nns_plugin.evaluation.agreement import count_agreement, shared_columns
from nns_plugin.evaluation.metrics import Array
from nns_plugin.evaluation.parity import Kind, ParityAccumulator, ParityReport
from nns_plugin.labels import OTHER

KIND: Kind = "dense against pruned"
CHUNK = 64


@dataclass(frozen=True, eq=False)
class Answers:
    """What both files answered to all inputs.

    Attributes:
        parity: How far the candidate's outputs are from the baseline's, for the labels that it has.
        logits: Scores ``[N, labels]`` of both; ``None`` if there are no such.
        columns: For each label of the candidate that of the baseline; ``None`` for "other".
        names: Names of the baseline's labels; empty if there are no scores.
        one_file: Whether both are one and the same file.
    """

    parity: ParityReport
    logits: tuple[Array, Array] | None
    columns: tuple[int | None, ...]
    names: tuple[str, ...]
    one_file: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that are compared."""
        return tuple(self.names[column] for column in self.columns if column is not None)


def answers_of(
    files: Sequence[OnnxFile],
    feeds: Sequence[Feeds],
    label_names: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None),
    provider: str = "cpu",
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
) -> Answers:
    """Run a baseline and a candidate on all inputs, in batches, and compare what they give.

    Outputs correspond by name, or in order where no name is the same. The baseline's first floating-point output
    ``[N, labels, ...]`` is the scores, of which the columns of the labels that both have are compared.

    Args:
        files: The baseline and the candidate.
        feeds: Their inputs.
        label_names: Names of their labels, where the files tell none.
        provider: Execution provider of the sessions.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        ExportError: If a file cannot run on the inputs.
        LabelError: If the labels of the two cannot be matched.
    """
    pairs, incomparable = _matched(files)
    if not pairs:
        return Answers(_nothing(files, feeds, incomparable, rtol, atol), None, (), ())
    sides = [
        _Side(create_session(file.path, provider, threads=torch.get_num_threads()), feed, names)
        for file, feed, names in zip(files, feeds, zip(*[(a.name, b.name) for a, b in pairs], strict=True), strict=True)
    ]
    comparing = ParityAccumulator([pair[0].name for pair in pairs], rtol, atol)
    faults: dict[str, str] = {}
    scores: _Scores | None = None
    step = CHUNK * math.lcm(*(feed.fixed or 1 for feed in feeds))
    for first in range(0, feeds[0].inputs, step):
        left, right = (side.run(first, min(first + step, feeds[0].inputs)) for side in sides)
        if not first:
            scores, faults = _Scores.found(pairs, left, right, files, label_names)
        if scores is not None:
            scores.take(left, right)
        for place, (spec, _) in enumerate(pairs):
            if spec.name not in faults and left[place].shape != right[place].shape:
                shapes = [list(values[place].shape) for values in (left, right)]
                faults[spec.name] = (
                    f"output {spec.name!r} is {shapes[0]} of the baseline, {shapes[1]} of the candidate in a batch"
                )
            if spec.name in faults:
                left[place] = right[place] = np.zeros(0)
        comparing.add(left, right, first)
    comparing.names = tuple(name for name in comparing.names if name not in faults)
    report = comparing.report(
        KIND,
        (f"baseline {files[0].path}", f"candidate {files[1].path}"),
        inputs=feeds[0].inputs,
        batch_sizes=tuple(sorted({size for side in sides for size in side.sizes})),
        top1=None if scores is None else scores.agreement,
        provider=sides[0].session.get_providers()[0],
        incomparable=(*incomparable, *faults.values()),
    )
    if scores is None:
        return Answers(report, None, (), ())
    one_file = sorted(files[0].sha256.values()) == sorted(files[1].sha256.values())
    return Answers(report, scores.logits, scores.columns, scores.names, one_file)


class _Side:
    """A session that gives some outputs for ranges of its inputs."""

    def __init__(self, session: Any, feed: Feeds, names: Sequence[str]) -> None:
        self.session, self.feed, self.names = session, feed, list(names)
        self.sizes: set[int] = set()

    def run(self, first: int, end: int) -> list[Array]:
        """The outputs of inputs; those that have no value for each input are as they are."""
        parts: list[list[Array]] = []
        for values, whole, count in self.feed.batches(first, end):
            self.sizes.add(whole)
            found = [np.atleast_1d(value) for value in run_session(self.session, values, self.feed.path, self.names)]
            parts.append([value[:count] if len(value) == whole else value for value in found])
        return [_joined(name, values) for name, values in zip(self.names, zip(*parts, strict=True), strict=True)]


@dataclass(eq=False)
class _Scores:
    """The scores of labels that two files give, collected batch by batch.

    Attributes:
        place: Which pair of outputs they are.
        names: Names of the baseline's labels.
        columns: For each label of the candidate that of the baseline; None for "other".
        parts: Scores ``[n, labels]`` of both, a batch each; none of what has positions as well.
        alike: Answers that are the same.
        counted: Answers that count.
    """

    place: int
    names: tuple[str, ...]
    columns: tuple[int | None, ...]
    parts: list[tuple[Array, Array]]
    alike: int = 0
    counted: int = 0

    @classmethod
    def found(
        cls,
        pairs: Sequence[tuple[TensorSpec, TensorSpec]],
        left: Sequence[Array],
        right: Sequence[Array],
        files: Sequence[OnnxFile],
        label_names: tuple[Sequence[str] | None, Sequence[str] | None],
    ) -> tuple[_Scores | None, dict[str, str]]:
        """The baseline's first output that is scores, and why it cannot be compared where no labels are told."""
        first = next((spec for spec in files[0].outputs if _may_be_scores(spec)), None)
        for place, (before, after) in enumerate(zip(left, right, strict=True)):
            if pairs[place][0] != first or not (_are_scores(before) and _are_scores(after)):
                continue
            sizes, told = (before.shape[1], after.shape[1]), label_names[1] is not None or files[1].labels is not None
            if sizes[0] != sizes[1] and not told:
                name = pairs[place][0].name
                fault = f"output {name!r} has {sizes[0]} scores of the baseline and {sizes[1]} of the candidate"
                return None, {name: f"{fault}, which says not for which labels: name them"}
            names = _label_names(files[0], label_names[0], sizes[0])
            return cls(place, names, _columns(names, files[1], label_names[1], sizes[1]), []), {}
        return None, {}

    def take(self, left: list[Array], right: list[Array]) -> None:
        """Collect the scores of a batch, and cut both to the labels that they share."""
        before, after = left[self.place], right[self.place]
        if before.ndim == 2 and after.ndim == 2:
            self.parts.append((before, after))
        alike, counted = count_agreement(before, after, self.columns)
        self.alike, self.counted = self.alike + alike, self.counted + counted
        ours, theirs = shared_columns(self.columns)
        left[self.place], right[self.place] = before[:, ours], after[:, theirs]

    @property
    def agreement(self) -> float | None:
        """Share of the answers that count which are the same."""
        return self.alike / self.counted if self.counted else None

    @property
    def logits(self) -> tuple[Array, Array] | None:
        """``[N, labels]`` of both, if they are such."""
        if not self.parts:
            return None
        before, after = (np.concatenate(values) for values in zip(*self.parts, strict=True))
        return before, after


def _nothing(
    files: Sequence[OnnxFile], feeds: Sequence[Feeds], incomparable: tuple[str, ...], rtol: float, atol: float
) -> ParityReport:
    """The report where no outputs correspond."""
    return ParityAccumulator((), rtol, atol).report(
        KIND,
        (f"baseline {files[0].path}", f"candidate {files[1].path}"),
        inputs=feeds[0].inputs,
        batch_sizes=(),
        top1=None,
        incomparable=incomparable,
    )


def _joined(name: str, values: Sequence[Array]) -> Array:
    try:
        return np.concatenate(values)
    except ValueError as error:
        shapes = sorted({str(list(value.shape)) for value in values})
        raise ExportError(
            f"output {name!r} changes its shape from batch to batch ({', '.join(shapes[:3])}), so that it cannot be "
            "compared; give inputs for which it does not"
        ) from error


def _matched(files: Sequence[OnnxFile]) -> tuple[list[tuple[TensorSpec, TensorSpec]], tuple[str, ...]]:
    """Outputs of both that correspond, and which of the baseline's have none."""
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


def _may_be_scores(spec: TensorSpec) -> bool:
    return spec.dtype.startswith("float") and (spec.shape is None or len(spec.shape) > 1)


def _are_scores(values: Array) -> bool:
    return values.ndim >= 2 and bool(np.issubdtype(values.dtype, np.floating))


def _label_names(file: OnnxFile, given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of a file's labels: told by it, given, or numbers."""
    if given is not None and file.labels is not None and tuple(given) != file.labels:
        raise LabelError(
            f"{file.path!r} says that its labels are {list(file.labels)[:20]}, but {list(given)[:20]} were given; drop "
            "these"
        )
    names = tuple(given) if given is not None else file.labels
    names = tuple(str(place) for place in range(count)) if names is None else names
    if len(names) != count or len(set(names)) != count:
        raise LabelError(
            f"{file.path!r} gives {count} scores, but there are {len(names)} names of labels, {len(set(names))} "
            "different ones; give one for each"
        )
    return names


def _columns(
    names: tuple[str, ...], candidate: OnnxFile, given: Sequence[str] | None, count: int
) -> tuple[int | None, ...]:
    """For each score of the candidate the baseline's label that it is for."""
    if given is None and candidate.labels is None:
        if count == len(names):
            return tuple(range(count))
        raise LabelError(
            f"{candidate.path!r} gives {count} scores, the baseline {len(names)}, and says not for which labels; name "
            "the candidate's labels"
        )
    theirs = _label_names(candidate, given, count)
    unknown = [name for name in theirs if name not in names and name != OTHER]
    if unknown or all(name not in names for name in theirs):
        raise LabelError(
            f"{candidate.path!r} has the labels {list(theirs)}, the baseline {list(names)[:20]}; expected some of "
            f"these, and {OTHER!r} for the rest"
        )
    return tuple(names.index(name) if name in names else None for name in theirs)
