"""Answers: what two ONNX files return for the same inputs, compared by their outputs' names and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nns_plugin.adapters.onnxruntime.feeds import Feeds
from nns_plugin.adapters.onnxruntime.file import OnnxFile, TensorSpec
from nns_plugin.adapters.onnxruntime.matching import matched_columns, matched_outputs, output_labels
from nns_plugin.adapters.onnxruntime.session import create_session, run_session
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.agreement import count_agreement, shared_columns
from nns_plugin.evaluation.metrics import Array
from nns_plugin.evaluation.parity import Kind, ParityAccumulator, ParityReport

_KIND: Kind = "dense against pruned"
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Answers:
    """What both files answered to all inputs.

    Attributes:
        parity: How far the candidate's outputs are from the baseline's, for the labels that it has.
        logits: Scores ``[N, labels]`` of both files; ``None`` if they return no such scores.
        columns: For each label of the candidate the baseline's label; ``None`` for "other".
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
    """Run a baseline and a candidate on all inputs, in batches, and compare their outputs.

    Outputs correspond by name, or in order if no name is the same. The baseline's first floating-point output
    ``[N, labels, ...]`` holds the scores, of which the columns of the labels that both have are compared.

    Args:
        files: The baseline and the candidate.
        feeds: Their inputs.
        label_names: Names of their labels, if the files hold none.
        provider: Execution provider of the sessions.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        ExportError: If a file cannot run on the inputs.
        LabelError: If the labels of the two files cannot be matched.
    """
    pairs, incomparable = matched_outputs(files)
    if not pairs:
        return Answers(_nothing(files, feeds, incomparable, rtol, atol), None, (), ())
    sides = [
        _Side(create_session(file.path, provider, threads=torch.get_num_threads()), feed, names)
        for file, feed, names in zip(files, feeds, zip(*[(a.name, b.name) for a, b in pairs], strict=True), strict=True)
    ]
    accumulator = ParityAccumulator([pair[0].name for pair in pairs], rtol, atol)
    faults: dict[str, str] = {}
    scores: _Scores | None = None
    step = _CHUNK * math.lcm(*(feed.fixed or 1 for feed in feeds))
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
        accumulator.add(left, right, first)
    accumulator.names = tuple(name for name in accumulator.names if name not in faults)
    report = accumulator.report(
        _KIND,
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
    """A session that returns some outputs for ranges of its inputs."""

    def __init__(self, session: Any, feed: Feeds, names: Sequence[str]) -> None:
        self.session, self.feed, self.names = session, feed, list(names)
        self.sizes: set[int] = set()

    def run(self, first: int, end: int) -> list[Array]:
        """The outputs for a range of inputs; outputs without one value per input are returned as they are."""
        parts: list[list[Array]] = []
        for values, whole, count in self.feed.batches(first, end):
            self.sizes.add(whole)
            found = [np.atleast_1d(value) for value in run_session(self.session, values, self.feed.path, self.names)]
            parts.append([value[:count] if len(value) == whole else value for value in found])
        return [_joined(name, values) for name, values in zip(self.names, zip(*parts, strict=True), strict=True)]


@dataclass(eq=False)
class _Scores:
    """The label scores of two files, collected batch by batch.

    Attributes:
        place: Index of the pair of outputs that holds them.
        names: Names of the baseline's labels.
        columns: For each label of the candidate the baseline's label; ``None`` for "other".
        parts: Scores ``[n, labels]`` of both, one entry per batch; empty if the scores have positions as well.
        agreeing: Number of answers that agree.
        counted: Number of answers that count.
    """

    place: int
    names: tuple[str, ...]
    columns: tuple[int | None, ...]
    parts: list[tuple[Array, Array]]
    agreeing: int = 0
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
        """The baseline's first output that holds scores, and why it cannot be compared if no labels are known."""
        first = next((spec for spec in files[0].outputs if _may_be_scores(spec)), None)
        for place, (before, after) in enumerate(zip(left, right, strict=True)):
            if pairs[place][0] != first or not (_are_scores(before) and _are_scores(after)):
                continue
            sizes = before.shape[1], after.shape[1]
            is_labelled = label_names[1] is not None or files[1].labels is not None
            if sizes[0] != sizes[1] and not is_labelled:
                name = pairs[place][0].name
                fault = f"output {name!r} has {sizes[0]} scores of the baseline and {sizes[1]} of the candidate"
                return None, {name: f"{fault}, which does not say for which labels: name them"}
            names = output_labels(files[0], label_names[0], sizes[0])
            return cls(place, names, matched_columns(names, files[1], label_names[1], sizes[1]), []), {}
        return None, {}

    def take(self, left: list[Array], right: list[Array]) -> None:
        """Collect the scores of a batch, and restrict both to the labels that they share."""
        before, after = left[self.place], right[self.place]
        if before.ndim == 2 and after.ndim == 2:
            self.parts.append((before, after))
        agreeing, counted = count_agreement(before, after, self.columns)
        self.agreeing, self.counted = self.agreeing + agreeing, self.counted + counted
        ours, theirs = shared_columns(self.columns)
        left[self.place], right[self.place] = before[:, ours], after[:, theirs]

    @property
    def agreement(self) -> float | None:
        """Share of the counted answers that agree."""
        return self.agreeing / self.counted if self.counted else None

    @property
    def logits(self) -> tuple[Array, Array] | None:
        """``[N, labels]`` of both; ``None`` if the scores have positions as well."""
        if not self.parts:
            return None
        before, after = (np.concatenate(values) for values in zip(*self.parts, strict=True))
        return before, after


def _nothing(
    files: Sequence[OnnxFile], feeds: Sequence[Feeds], incomparable: tuple[str, ...], rtol: float, atol: float
) -> ParityReport:
    """The report if no outputs correspond."""
    return ParityAccumulator((), rtol, atol).report(
        _KIND,
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
            f"output {name!r} changes its shape from batch to batch ({', '.join(shapes[:3])}) and cannot be compared; "
            "give inputs for which it does not"
        ) from error


def _may_be_scores(spec: TensorSpec) -> bool:
    return spec.dtype.startswith("float") and (spec.shape is None or len(spec.shape) > 1)


def _are_scores(values: Array) -> bool:
    return values.ndim >= 2 and bool(np.issubdtype(values.dtype, np.floating))
