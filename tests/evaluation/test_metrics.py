"""Metrics against scikit-learn, weighted and not, and probabilities by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nns_plugin.evaluation.evaluation import evaluate
from nns_plugin.evaluation.metrics import accuracy, label_metrics, log_probabilities, probabilities, rates

reference = pytest.importorskip("sklearn.metrics", reason="the extra cli is not installed")


@given(seed=st.integers(0, 10_000))
def test_weighted_metrics_are_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    inputs = int(generator.integers(4, 40))
    truth, said = (generator.random((2, inputs)) < 0.4).astype(bool)
    score = np.round(generator.random(inputs), 1)  # with ties
    weights = generator.integers(0, 4, (5, inputs)).astype(float)
    found = label_metrics(weights, truth, said, score)
    for row, weight in enumerate(weights):
        there = weight > 0
        if len(set(truth[there])) < 2 or not said[there].any():
            continue
        expected = {
            "recall": reference.recall_score(truth, said, sample_weight=weight),
            "false_positive_rate": 1 - reference.recall_score(~truth, ~said, sample_weight=weight),
            "precision": reference.precision_score(truth, said, sample_weight=weight),
            "f1": reference.f1_score(truth, said, sample_weight=weight),
            "balanced_accuracy": reference.balanced_accuracy_score(truth, said, sample_weight=weight),
            "auroc": reference.roc_auc_score(truth, score, sample_weight=weight),
        }
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(value, abs=1e-12), name


def test_several_labels_at_once_are_each_label_alone() -> None:
    generator = np.random.default_rng(0)
    is_label, is_predicted = generator.random((2, 30, 4)) < 0.3
    weights = generator.integers(0, 3, (6, 30)).astype(float)
    together = rates(weights, is_label, is_predicted)
    for label in range(4):
        alone = rates(weights, is_label[:, label], is_predicted[:, label])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][:, label], values, rtol=1e-12)


def test_a_metric_without_its_inputs_is_nan() -> None:
    nobody, everybody = np.zeros(3, bool), np.ones(3, bool)
    of_all = label_metrics(np.ones((1, 3)), everybody, nobody, np.arange(3.0))
    defined = {name for name, (value,) in of_all.items() if not np.isnan(value)}
    assert defined == {"recall", "f1"}
    of_none = label_metrics(np.ones((1, 3)), nobody, everybody, np.arange(3.0))
    assert {name for name, (value,) in of_none.items() if np.isnan(value)} == {"recall", "balanced_accuracy", "auroc"}


def test_accuracy_is_a_weighted_share() -> None:
    assert accuracy(np.array([[1.0, 1, 2], [0, 3, 1]]), np.array([True, False, True])).tolist() == [0.75, 0.25]


@given(seed=st.integers(0, 10_000), outputs=st.sampled_from([(0, 1, 2, 3), (3, None, 1), (1, 3)]))
def test_evaluations_are_those_of_scikit_learn(seed: int, outputs: tuple[int | None, ...]) -> None:
    generator = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(4), generator.integers(0, 4, 40)])
    logits = np.round(2 * generator.standard_normal((44, len(outputs)))) / 2  # with ties
    found = evaluate(logits, truth, outputs, (1, 3), ("a", "b", "c", "d"))
    rows = np.isin(truth, (1, 3)) if outputs == (1, 3) else np.ones(44, bool)
    predicted = np.array([-1 if label is None else label for label in outputs])[logits.argmax(1)]
    score: Any = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found.inputs == rows.sum()
    for label, result in zip((1, 3), found.labels, strict=True):
        is_label, is_predicted = truth[rows] == label, predicted[rows] == label
        expected = {
            "recall": reference.recall_score(is_label, is_predicted),
            "f1": reference.f1_score(is_label, is_predicted, zero_division=0.0),
            "balanced_accuracy": reference.balanced_accuracy_score(is_label, is_predicted),
            "auroc": reference.roc_auc_score(is_label, np.round(score[rows, outputs.index(label)], 12)),
        }
        for name, value in expected.items():
            assert getattr(result, name) == pytest.approx(value, abs=1e-12), name
        if is_predicted.any():
            assert result.precision == pytest.approx(reference.precision_score(is_label, is_predicted))
        else:
            assert result.precision is None


def test_probabilities_are_a_softmax_and_those_of_a_softmax_are_left_alone() -> None:
    logits = np.array([[0.0, np.log(3)], [1000.0, 1000.0]])
    np.testing.assert_allclose(probabilities(logits), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-12)
    given_ones = np.array([[0.25, 0.75], [1.0, 0.0]])
    assert probabilities(given_ones).tolist() == given_ones.tolist()
    assert probabilities(np.ones((2, 1))).tolist() == [[1.0], [1.0]], "one logit of 1 is no probability by itself"
    np.testing.assert_allclose(probabilities(log_probabilities(given_ones)), given_ones, atol=1e-12)
