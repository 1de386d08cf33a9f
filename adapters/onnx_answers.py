"""What two ONNX files answer to the same inputs, matched by their outputs' names and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nns_plugin.adapters.onnx_feeds import Array, Feeds
from nns_plugin.adapters.onnx_file import OnnxFile, TensorSpec
from nns_plugin.adapters.onnx_session import create_session, run_session
from nns_plugin.adapters.output_errors import Comparing, Kind, ParityReport, same_answers, top1_agreement
from nns_plugin.errors import ExportError, LabelError

KIND: Kind = "dense against pruned"
OTHER = "other"
CHUNK = 64


@dataclass(frozen=True, eq=False)
class Answers:
    """What both files answered to all inputs.

    Attributes:
        parity: How far the candidate's outputs are from the baseline's, for the labels that it has.
        logits: First outputs of both ``[N, labels, ...]``; ``None`` if they are no scores of labels.
        columns: For each label of the candidate that of the baseline; ``None`` for "other".
        names: Names of the baseline's labels; empty if the first outputs are no scores of labels.
    """

    parity: ParityReport
    logits: tuple[Array, Array] | None
    columns: tuple[int | None, ...]
    names: tuple[str, ...]

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

    Outputs correspond by name, or in order where no name is the same. Of first outputs ``[N, labels, ...]`` the columns
    of the labels that both have are compared.

    Args:
        files: The baseline and the candidate.
        feeds: Their inputs.
        label_names: Names of their labels, in place of those that the files tell.
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
    parts: tuple[list[list[Array]], list[list[Array]]] = ([], [])
    provider_found = ""
    for side, (file, feed) in enumerate(zip(files, feeds, strict=True)):
        session = create_session(file.path, provider, threads=torch.get_num_threads())
        provider_found = session.get_providers()[0]
        names = [pair[side].name for pair in pairs]
        for values, count in feed.batches(feed.fixed or CHUNK):
            whole = next((len(values[name]) for name in feed.batched), count)
            found = [np.atleast_1d(value) for value in run_session(session, values, file.path, names)]
            parts[side].append([value[:count] if len(value) == whole else value for value in found])
    joined = [[_joined(pair[0], values) for pair, *values in zip(pairs, *side, strict=True)] for side in parts]
    first = [side[0] for side in joined]
    scores = pairs[0][0] == files[0].outputs[0] and all(_are_scores(values, feeds[0].inputs) for values in first)
    columns: tuple[int | None, ...] = ()
    named: tuple[str, ...] = ()
    if scores:
        named = _label_names(files[0], label_names[0], first[0].shape[1])
        columns = _columns(named, files[1], label_names[1], first[1].shape[1])
    compared, faults = _comparable(pairs, joined, columns)
    comparing = Comparing([name for name, _, _ in compared], rtol, atol)
    comparing.add([left for _, left, _ in compared], [right for _, _, right in compared])
    names_of_files = (f"baseline {files[0].path}", f"candidate {files[1].path}")
    report = comparing.report(
        KIND,
        names_of_files,
        inputs=feeds[0].inputs,
        batch_sizes=tuple(sorted({min(feed.fixed or CHUNK, feed.inputs) for feed in feeds})),
        top1=agreement(first[0], first[1], columns) if scores else None,
        provider=provider_found,
        incomparable=(*incomparable, *faults),
    )
    return Answers(report, (first[0], first[1]) if scores else None, columns, named)


def _nothing(
    files: Sequence[OnnxFile], feeds: Sequence[Feeds], incomparable: tuple[str, ...], rtol: float, atol: float
) -> ParityReport:
    """The report where no outputs correspond."""
    return Comparing((), rtol, atol).report(
        KIND,
        (f"baseline {files[0].path}", f"candidate {files[1].path}"),
        inputs=feeds[0].inputs,
        batch_sizes=(),
        top1=None,
        incomparable=incomparable,
    )


def _joined(spec: TensorSpec, values: Sequence[Array]) -> Array:
    try:
        return np.concatenate(values)
    except ValueError as error:
        shapes = sorted({str(list(value.shape)) for value in values})
        raise ExportError(
            f"output {spec.name!r} changes its shape from batch to batch ({', '.join(shapes[:3])}), so that it cannot "
            "be compared; give inputs for which it does not"
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


def _are_scores(values: Array, inputs: int) -> bool:
    return values.ndim >= 2 and len(values) == inputs and bool(np.issubdtype(values.dtype, np.floating))


def _label_names(file: OnnxFile, given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of a file's labels: given, told by the file, or numbers."""
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


def _comparable(
    pairs: Sequence[tuple[TensorSpec, TensorSpec]], whole: Sequence[Sequence[Array]], columns: Sequence[int | None]
) -> tuple[list[tuple[str, Array, Array]], tuple[str, ...]]:
    """Outputs by name, the first cut to the labels that both have; and those whose shapes differ."""
    found, faults = [], []
    for place, ((spec, _), left, right) in enumerate(zip(pairs, *whole, strict=True)):
        if place == 0 and columns:
            theirs = [here for here, column in enumerate(columns) if column is not None]
            left, right = left[:, [column for column in columns if column is not None]], right[:, theirs]
        if left.shape != right.shape:
            shapes = f"{list(left.shape)} of the baseline, {list(right.shape)} of the candidate"
            faults.append(f"output {spec.name!r} is {shapes}")
        else:
            found.append((spec.name, left, right))
    return found, tuple(faults)


def label_parity(
    dense: Array,
    pruned: Array,
    columns: Sequence[int | None],
    names: tuple[str, str] = ("baseline", "candidate"),
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
) -> ParityReport:
    """Compare the scores of two models for the labels that both have.

    Args:
        dense: Scores of the dense model ``[N, labels, ...]``.
        pruned: Scores of the pruned model ``[N, outputs, ...]``, of the same inputs.
        columns: For each output of the pruned model the dense one's label; ``None`` for "other".
        names: Of the two.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """
    comparing = Comparing(["scores"], rtol, atol)
    shared = [column for column in columns if column is not None]
    theirs = [place for place, column in enumerate(columns) if column is not None]
    comparing.add([dense[:, shared]], [pruned[:, theirs]])
    same = agreement(dense, pruned, columns)
    return comparing.report(KIND, names, inputs=len(dense), batch_sizes=(len(dense),), top1=same)


def agreement(dense: Array, pruned: Array, columns: Sequence[int | None]) -> float | None:
    """Share of inputs (and positions) that both answer with the same label.

    Where the pruned file can say "other", what the dense one answers with a label that it has not is that; where it
    cannot, only inputs count that the dense one answers with a label of both. Scores that are not finite agree with
    none.

    Args:
        dense: Scores of the baseline ``[N, labels, ...]``.
        pruned: Scores of the candidate ``[N, outputs, ...]``.
        columns: For each output of the candidate the baseline's label; ``None`` for "other".

    Returns:
        The share; ``None`` if no input counts, or there is no choice.

    Example:
        >>> dense, pruned = np.array([[3.0, 1, 2], [1, 2, 3], [1, 3, 2]]), np.array([[9.0, 0], [0, 1], [2, 0]])
        >>> agreement(dense, pruned, [0, None])
        0.667
    """
    shared = [column for column in columns if column is not None]
    theirs = [place for place, column in enumerate(columns) if column is not None]
    if None in columns:
        answer = np.full(dense.shape[1], columns.index(None))
        answer[shared] = theirs
        finite = np.isfinite(dense).all(1) & np.isfinite(pruned).all(1)
        return float(np.mean((answer[dense.argmax(1)] == pruned.argmax(1)) & finite))
    if len(shared) == dense.shape[1]:
        return top1_agreement(dense[:, shared], pruned)
    counts = np.isin(dense.argmax(1), shared)
    if len(shared) < 2 or not counts.any():
        return None
    return float(np.mean(same_answers(dense[:, shared], pruned[:, theirs])[counts]))
