"""Per-label evaluation against numbers counted by hand and a brute-force AUROC."""

from __future__ import annotations

import itertools

import pytest
import torch

from nns_plugin.errors import CalibrationError, LabelError
from nns_plugin.evaluation.evaluation import evaluate
from nns_plugin.evaluation.prediction import predict

NAMES = ("ant", "bee", "cat")


def one_hot(answers: list[int], outputs: int = 3) -> torch.Tensor:
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(answers), outputs)


def test_numbers_counted_by_hand() -> None:
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    logits = one_hot([0, 0, 0, 1, 1, 0, 0, 2, 2, 2])
    result = evaluate(logits, truth, (0, 1, 2), [0], NAMES)
    ant = result.labels[0]
    assert (ant.label, ant.inputs, result.inputs) == ("ant", 4, 10)
    assert ant.recall == pytest.approx(3 / 4)
    assert ant.false_positive_rate == pytest.approx(2 / 6)
    assert ant.precision == pytest.approx(3 / 5)
    assert ant.balanced_accuracy == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert result.open_set_accuracy == pytest.approx(7 / 10)  # one ant missed, two others taken for ants
    assert result.closed_set_accuracy == 1.0  # one label alone cannot be confused


def test_a_network_that_always_answers_one_label_has_full_recall_and_no_more() -> None:
    truth = torch.tensor([0, 1, 2, 2])
    result = evaluate(one_hot([0, 0, 0, 0]), truth, (0, 1, 2), [0], NAMES)
    assert result.labels[0].recall == 1.0
    assert result.labels[0].false_positive_rate == 1.0
    assert result.labels[0].balanced_accuracy == 0.5
    assert result.labels[0].precision == 0.25


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    torch.manual_seed(3)
    truth = torch.randint(3, (60,))
    logits = torch.randn(60, 3) + 1.2 * torch.nn.functional.one_hot(truth, 3)
    score = logits.double().softmax(1)[:, 1]
    pairs = list(itertools.product(score[truth == 1].tolist(), score[truth != 1].tolist()))
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert evaluate(logits, truth, (0, 1, 2), [1], NAMES).labels[0].auroc == pytest.approx(expected)


def test_other_is_the_last_output_of_an_open_head() -> None:
    truth = torch.tensor([0, 0, 2, 2, 1, 1])
    logits = one_hot([0, 1, 1, 2, 2, 0])  # outputs: ant, cat, other
    result = evaluate(logits, truth, (0, 2, None), [0, 2], NAMES)
    ant, cat = result.labels
    assert (ant.recall, cat.recall) == (0.5, 0.5)
    assert (ant.false_positive_rate, cat.false_positive_rate) == (0.25, 0.25)
    assert result.open_set_accuracy == pytest.approx(3 / 6)


def test_a_closed_head_is_judged_on_its_own_inputs_only() -> None:
    truth = torch.tensor([0, 0, 2, 1, 1, 1])
    result = evaluate(one_hot([0, 1, 1, 0, 0, 0], 2), truth, (0, 2), [0, 2], NAMES)
    assert result.inputs == 3
    assert result.open_set_accuracy is None
    assert result.closed_set_accuracy == pytest.approx(2 / 3)
    assert result.labels[0].false_positive_rate == 0.0


def test_a_closed_head_of_one_label_has_no_false_positive_rate() -> None:
    result = evaluate(torch.zeros(3, 1), torch.tensor([0, 0, 1]), (0,), [0], NAMES)
    assert result.labels[0].recall == 1.0
    assert result.labels[0].false_positive_rate is None
    assert result.labels[0].auroc is None
    assert result.mean_balanced_accuracy is None


def test_closed_set_accuracy_of_the_dense_model_is_decided_among_the_set() -> None:
    logits = torch.tensor([[1.0, 5.0, 0.0], [0.0, 5.0, 1.0]])  # "bee" wins, but is not in the set
    result = evaluate(logits, torch.tensor([0, 2]), (0, 1, 2), [0, 2], NAMES)
    assert result.closed_set_accuracy == 1.0
    assert [label.recall for label in result.labels] == [0.0, 0.0]


def test_worst_label_is_named() -> None:
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    assert evaluate(one_hot([0, 0, 1, 2, 2, 2]), truth, (0, 1, 2), [0, 1, 2], NAMES).worst_label == "bee"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = one_hot([0, 1])
    logits[1, 2] = value
    with pytest.raises(CalibrationError, match="the logits of 1 of 2 inputs are not finite"):
        evaluate(logits, torch.tensor([0, 1]), (0, 1, 2), [0, 1], NAMES)


def test_a_label_without_test_inputs_is_an_error() -> None:
    with pytest.raises(LabelError, match="'cat' is not in the test data"):
        evaluate(one_hot([0, 1]), torch.tensor([0, 1]), (0, 1, 2), [2], NAMES)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "yielded no inputs"),
        ([torch.zeros(2, 3)], "inputs alone"),
        ([(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))], "not finite"),
    ],
)
def test_unusable_test_data(loader: list[object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        predict(torch.nn.Linear(3, 2), loader)
