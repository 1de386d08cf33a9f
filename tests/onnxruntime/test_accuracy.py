"""Accuracy of a candidate's ONNX file beside its baseline, against scikit-learn and a plain bootstrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
metrics = pytest.importorskip("sklearn.metrics")

from onnx_graphs import NAMES, W, linear, parity, quick_compare  # noqa: E402

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport  # noqa: E402
from nns_plugin.errors import LabelError  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

RNG = np.random.default_rng(1)
X = RNG.standard_normal((240, 3)).astype(np.float32)
TRUTH = (X @ W + 0.5 * RNG.standard_normal((240, 4))).argmax(1)
OFF = W + 0.6 * RNG.standard_normal(W.shape).astype(np.float32)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return linear(tmp_path / "dense.onnx", W, NAMES)


def measured(
    tmp_path: Path, columns: list[int | None], truth: Any = TRUTH, **options: Any
) -> tuple[AccuracyReport, Any, Any]:
    """The report of a candidate with some columns, and both files' scores by NumPy."""
    parts = [np.full(3, 0.3) if column is None else OFF[:, column] for column in columns]
    weights = np.stack(parts, 1).astype(np.float32)
    labels = ["other" if column is None else NAMES[column] for column in columns]
    small = linear(tmp_path / "small.onnx", weights, labels)
    found = quick_compare(linear(tmp_path / "dense.onnx", W, NAMES), small, X, truth, **options)
    assert found.accuracy is not None
    assert found.accuracy_fault is None
    return found.accuracy, X @ W, X @ weights


def softmax(scores: Any) -> Any:
    found = np.exp(scores - scores.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)


def plain_drops(truth: Any, left: Any, right: Any, rows: Any, resamples: int, labels: list[int]) -> dict[str, Any]:
    """Accuracy and each label's balanced accuracy, left less right, of resamples that are drawn one by one."""
    drawn = np.random.default_rng(123)
    lost: dict[str, list[float]] = {name: [] for name in ("", *(NAMES[label] for label in labels))}
    for _ in range(resamples):
        chosen = drawn.integers(len(truth), size=len(truth))
        chosen = chosen[rows[chosen]]
        true, one, two = truth[chosen], left[chosen], right[chosen]
        lost[""].append(np.mean(one == true) - np.mean(two == true))
        for label in labels:
            inside = true == label
            before, after = ((np.mean(s[inside] == label) + np.mean(s[~inside] != label)) / 2 for s in (one, two))
            lost[NAMES[label]].append(before - after)
    return {name: np.array(values) for name, values in lost.items()}


# By scikit-learn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [[0, 1, 2, 3], [3, 1, 0, 2], [2, None, 0], [0, 2], [None, 1]])
def test_accuracy_is_that_of_scikit_learn(columns: list[int | None], tmp_path: Path) -> None:
    found, dense, small = measured(tmp_path, columns)
    chosen = sorted(column for column in columns if column is not None)
    inside = np.isin(TRUTH, chosen)
    closed = None not in columns
    rows = inside if closed else np.ones(240, bool)
    scores = {"baseline": dense[:, chosen] if closed else dense, "candidate": small}
    meanings: dict[str, Any] = {"baseline": chosen if closed else range(4), "candidate": columns}
    for side in ("baseline", "candidate"):
        evaluation = getattr(found, side)
        labels = [-1 if label is None else label for label in meanings[side]]
        said = np.array(labels)[scores[side].argmax(1)]
        probability = softmax(scores[side])
        assert evaluation.inputs == rows.sum()
        assert [each.label for each in evaluation.labels] == [NAMES[label] for label in chosen]
        among = np.array(chosen)[probability[:, [labels.index(label) for label in chosen]].argmax(1)]
        expected = metrics.accuracy_score(TRUTH[inside], among[inside])
        assert evaluation.closed_set_accuracy == pytest.approx(expected)
        seen = [np.where(np.isin(values, chosen), values, -1) for values in (TRUTH, said)]
        if closed and len(chosen) < 4:
            assert evaluation.open_set_accuracy is None
        else:
            assert evaluation.open_set_accuracy == pytest.approx(metrics.accuracy_score(*seen))
        for label, each in zip(chosen, evaluation.labels, strict=True):
            is_label, is_answer = TRUTH[rows] == label, said[rows] == label
            auroc = metrics.roc_auc_score(is_label, probability[rows, labels.index(label)])
            assert each.inputs == is_label.sum()
            assert each.recall == pytest.approx(metrics.recall_score(is_label, is_answer))
            assert each.precision == pytest.approx(metrics.precision_score(is_label, is_answer))
            assert each.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(is_label, is_answer))
            assert each.auroc == pytest.approx(auroc, abs=1e-6)
            assert {"recall", "balanced_accuracy", "auroc"} <= each.intervals.keys()


@pytest.mark.parametrize("columns", [[0, 1, 2, 3], [2, None, 0], [0, 2]])
def test_what_is_lost_and_its_bounds_are_those_of_a_plain_bootstrap(columns: list[int | None], tmp_path: Path) -> None:
    found, dense, small = measured(tmp_path, columns, confidence=0.9, resamples=4000)
    chosen = sorted(column for column in columns if column is not None)
    closed = None not in columns
    left = np.array(chosen)[dense[:, chosen].argmax(1)] if closed else dense.argmax(1)
    right = np.array([-1 if column is None else column for column in columns])[small.argmax(1)]
    inside = np.isin(TRUTH, chosen)
    truth, left, right = (np.where(np.isin(values, chosen), values, -1) for values in (TRUTH, left, right))
    rows = inside if closed else np.ones(240, bool)
    assert found.drop == pytest.approx(np.mean((left == truth)[rows]) - np.mean((right == truth)[rows]))
    assert found.confidence == 0.9
    lost = plain_drops(truth, left, right, rows, 4000, chosen)
    assert found.drop_bound == pytest.approx(np.percentile(lost[""], 90), abs=0.006)
    assert found.drop_bound > found.drop
    assert [each.label for each in found.labels] == [NAMES[label] for label in chosen]
    for label, each in zip(chosen, found.labels, strict=True):
        one, two = (metrics.balanced_accuracy_score(truth[rows] == label, s[rows] == label) for s in (left, right))
        assert each.drop == pytest.approx(one - two)
        assert each.bound == pytest.approx(np.percentile(lost[NAMES[label]], 90), abs=0.008)


def test_bounds_follow_confidence_and_seed(tmp_path: Path) -> None:
    bounds = [measured(tmp_path, [2, None, 0], confidence=level)[0].drop_bound for level in (0.5, 0.9, 0.99)]
    assert bounds == sorted(set(bounds))
    again, other = (measured(tmp_path, [2, None, 0], confidence=0.9, seed=seed)[0] for seed in (0, 1))
    assert again.drop_bound == bounds[1]
    assert other.drop_bound == pytest.approx(again.drop_bound, abs=0.02)
    assert [each.bound for each in other.labels] != [each.bound for each in again.labels]


def test_nothing_is_lost_by_the_same_weights(dense: Path, tmp_path: Path) -> None:
    for labels in (NAMES, ["owl", "cat"]):
        columns = [NAMES.index(name) for name in labels]
        small = linear(tmp_path / "small.onnx", W[:, columns], labels, metadata={"another": "file"})
        accuracy = quick_compare(dense, small, X, TRUTH).accuracy
        assert accuracy is not None
        assert accuracy.drop == 0
        assert accuracy.drop_bound == pytest.approx(-np.log(0.05) / accuracy.candidate.inputs), "the rule of three"
        for each, result in zip(accuracy.labels, accuracy.candidate.labels, strict=True):
            assert (each.drop, each.bound) == (0, pytest.approx(-np.log(0.05) / 2 / result.inputs))
        estimate = quick_compare(dense, small, X, TRUTH, confidence=0.5).accuracy
        assert estimate is not None
        assert [estimate.drop_bound, *(each.bound for each in estimate.labels)] == [0] * (1 + len(labels))
    same = quick_compare(dense, dense, X, TRUTH).accuracy
    assert same is not None
    assert [same.drop_bound, *(each.bound for each in same.labels)] == [0] * 5, "one and the same file"


def test_few_inputs_on_which_nothing_is_lost_prove_little(dense: Path, tmp_path: Path) -> None:
    """A candidate that answers some inputs otherwise, but none of the eight that are given."""
    off = linear(tmp_path / "off.onnx", OFF, NAMES)
    logits = X @ W, X @ OFF
    alike = np.flatnonzero(logits[0].argmax(1) == logits[1].argmax(1))
    rows = np.concatenate([alike[TRUTH[alike] == label][:2] for label in range(4)])
    accuracy = quick_compare(dense, off, X[rows], TRUTH[rows]).accuracy
    assert accuracy is not None
    assert accuracy.drop == 0
    assert accuracy.drop_bound == pytest.approx(-np.log(0.05) / 8)
    assert [each.bound for each in accuracy.labels] == [0.5] * 4


def test_a_single_label_without_other_has_no_accuracy(dense: Path, tmp_path: Path) -> None:
    found = quick_compare(dense, linear(tmp_path / "small.onnx", OFF[:, :1], ["cat"]), X, TRUTH)
    assert found.accuracy is None
    assert found.accuracy_fault == "label 'cat' alone cannot be confused with another, so it has no accuracy"


# What is found out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["dog", "cat", "owl", "pig"], ["owl", "cat"]])
def test_a_wrong_order_of_labels_costs_accuracy(labels: list[str], dense: Path, tmp_path: Path) -> None:
    columns = sorted(NAMES.index(name) for name in labels)
    accuracy = quick_compare(dense, linear(tmp_path / "small.onnx", W[:, columns], labels), X, TRUTH).accuracy
    assert accuracy is not None
    assert accuracy.drop > 0.3
    assert max(each.drop for each in accuracy.labels) > 0.3


def test_inputs_that_fill_up_a_fixed_batch_do_not_count(tmp_path: Path) -> None:
    inputs = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    two = linear(tmp_path / "two.onnx", W[:, [0, 2, 1]], NAMES[:3], batch=4)
    one = linear(tmp_path / "one.onnx", W[:, :3], NAMES[:3])
    found = quick_compare(one, two, inputs, [0, 1, 2, 0, 1, 0], **{"batches": (4,)})
    assert found.accuracy is not None
    assert found.accuracy.baseline.inputs == found.accuracy.candidate.inputs == 6
    assert found.accuracy.baseline.closed_set_accuracy == pytest.approx(5 / 6)
    assert found.accuracy.candidate.closed_set_accuracy == pytest.approx(2 / 6)
    assert found.accuracy.drop == pytest.approx(3 / 6)


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_outputs_that_are_not_finite_leave_no_accuracy(side: str, dense: Path, tmp_path: Path) -> None:
    broken = linear(tmp_path / "broken.onnx", W * np.float32(np.nan), NAMES)
    found = quick_compare(*((broken, dense) if side == "baseline" else (dense, broken)), X, TRUTH)
    assert found.accuracy is None
    assert found.accuracy_fault == f"the {side} returns outputs that are not finite for 240 of 240 inputs"
    assert not parity(found).passed


@pytest.mark.parametrize(
    "labels",
    [TRUTH.astype(float), TRUTH[:5], TRUTH[:, None], TRUTH > 0, TRUTH + 1, TRUTH - 1, ["cat"] * 240, [None] * 240],
)
def test_labels_are_integers_one_an_input(labels: Any, dense: Path) -> None:
    with pytest.raises(LabelError, match="labels") as failure:
        quick_compare(dense, dense, X, labels)
    assert len(str(failure.value).splitlines()) == 1


def test_a_label_without_inputs_is_an_error(dense: Path) -> None:
    with pytest.raises(LabelError, match="label 'pig' is not in the test data"):
        quick_compare(dense, dense, X, np.minimum(TRUTH, 2))


def test_a_missing_first_output_fails_parity_also_where_there_are_labels(tmp_path: Path) -> None:
    one = linear(tmp_path / "one.onnx", W, NAMES, more={"a": W})
    found = quick_compare(one, linear(tmp_path / "two.onnx", W, out="a"), X, TRUTH)
    assert not parity(found).passed
    assert found.accuracy is None
    assert found.accuracy_fault is not None
