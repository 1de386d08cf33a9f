"""What a recipe extracts: heads, criteria, compensation and turns, without the cost of exporting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.host("onnxruntime")
pytest.importorskip("pydantic", reason="the extra cli is not installed")


def extraction_from(dense: Any, data: Any, checked: Any) -> Any:
    """The extraction of a recipe from a model and data that are there."""
    from nns_plugin.jobs.job import Job
    from nns_plugin.jobs.run import extract_in_job
    from nns_plugin.labels import LabelSet

    options = checked.to_options()
    return extract_in_job(Job(checked, options, data, LabelSet.of(data.label_names, options.labels), dense))[0]


def pruned(
    recipe: Any, chosen: list[int] | None = None, factory: str = "user_factories:data", **changes: Any
) -> tuple[Any, Any]:
    """The pruned model of a recipe and its evaluation, without the cost of exporting it."""
    from nns_plugin.evaluation.evaluation import evaluate
    from nns_plugin.evaluation.prediction import predict
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory
    from nns_plugin.jobs.training import train_classifier

    checked = recipe(**changes)
    data = Datasets.parse(call_factory("data", factory, {}), "")
    dense = call_factory("model", "user_factories:model", {})
    train_classifier(dense, data.train, epochs=3, learning_rate=0.003, weight_decay=0.01)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    result = extraction_from(dense, data, checked)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    logits, labels = predict(result.model, data.test)
    label_set = list(range(4)) if chosen is None else chosen
    return result, evaluate(logits, labels, result.labels.outputs, label_set, data.label_names)


def test_the_same_seed_gives_the_same_subnet(recipe: Any) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # of the caller: the training order comes from the data, not from here
        results.append(pruned(recipe, [1, 3]))
    (first, one), (second, two) = results
    assert {name: units.tolist() for name, units in first.kept.items()} == {
        name: units.tolist() for name, units in second.kept.items()
    }
    assert one == two


def test_kept_units_are_the_best_by_the_criterion(recipe: Any) -> None:
    """A brute-force reading of eq. 1 on the dense model picks the same units."""
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory

    checked = recipe(train={"epochs": 0})
    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    dense = call_factory("model", "user_factories:model", {})
    kept = extraction_from(dense, data, checked).kept
    with torch.no_grad():
        inputs, labels = data.calibration.dataset.tensors
        hidden = {"0": dense[:2](inputs), "2": dense[:4](inputs)}
    for name, activation in hidden.items():
        means = torch.stack([activation[labels == label].abs().mean(0) for label in (1, 3)])
        scores = (means / means.amax(1, keepdim=True)).amax(0)
        assert kept[name].tolist() == sorted(scores.argsort(descending=True)[:16].tolist())


@pytest.mark.parametrize(("head", "outputs"), [("keep", (0, 1, 2, 3)), ("closed", (1, 3)), ("open", (1, 3, None))])
def test_every_head(recipe: Any, head: str, outputs: tuple[int | None, ...]) -> None:
    result, evaluation = pruned(recipe, [1, 3], head=head, fine_tune={"epochs": 1})
    assert result.labels.outputs == outputs
    assert evaluation.closed_set_accuracy > 0.9
    assert (evaluation.open_set_accuracy is None) == (head == "closed")


def test_without_labels_all_are_kept(recipe: Any) -> None:
    result, evaluation = pruned(recipe, None, labels=None)
    assert result.labels.outputs == (0, 1, 2, 3)
    assert [label.label for label in evaluation.labels] == ["ant", "bee", "cat", "dog"]


def test_without_labels_survivors_take_over(recipe: Any) -> None:
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory

    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    dense = call_factory("model", "user_factories:model", {})
    inputs = data.test.dataset.tensors[0]
    errors = {}
    for method in (None, "none"):
        result = extraction_from(dense, data, recipe(labels=None, ratio=0.6, compensation={"method": method}))
        assert result.model[0].out_features == 13
        with torch.no_grad():
            errors[method] = float((result.model(inputs) - dense(inputs)).square().mean())
    assert errors[None] < 0.2 * errors["none"]


def test_with_labels_and_distinctiveness_units_count_for_what_the_kept_labels_do_with_them(recipe: Any) -> None:
    """A unit that only a dropped label uses goes, and one that a kept label uses stays."""
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory

    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    dense = call_factory("model", "user_factories:model", {"hidden": 8})
    with torch.no_grad():
        dense[4].weight.zero_()
        for unit, label in enumerate([0, 0, 1, 2, 2, 3, 0, 2]):
            dense[4].weight[label, unit] = 1.0
    checked = recipe(criterion={"name": "distinctiveness", "options": {"mode": "span"}}, ratio=0.7, head="closed")
    result = extraction_from(dense, data, checked)
    assert {2, 5} <= set(result.kept["2"].tolist())
    assert result.labels.outputs == (1, 3)


@pytest.mark.parametrize("head", ["keep", "closed", "open"])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_distinctiveness_with_every_head(recipe: Any, head: str, global_pruning: bool) -> None:
    criterion = {"name": "distinctiveness", "options": {"mode": "span"}}
    result, evaluation = pruned(
        recipe, [1, 3], head=head, criterion=criterion, ratio=0.7, global_pruning=global_pruning
    )
    assert result.labels.outputs == {"keep": (0, 1, 2, 3), "closed": (1, 3), "open": (1, 3, None)}[head]
    assert result.model[4].out_features == len(result.labels.outputs)
    assert evaluation.closed_set_accuracy > 0.95
    if head == "open":
        assert evaluation.open_set_accuracy > 0.9


@pytest.mark.parametrize("merge", ["none", "add", "scaled"])
def test_units_may_go_by_angles(recipe: Any, merge: str) -> None:
    result, _ = pruned(
        recipe, None, labels=None, ratio=None, angle={"similar": 60, "complement": "both", "merge": merge}
    )
    assert all(1 <= units.numel() < 32 for units in result.kept.values())


@pytest.mark.parametrize("method", ["least_squares", "merge", "mean", "refit"])
def test_any_criterion_may_be_compensated(recipe: Any, method: str) -> None:
    result, evaluation = pruned(recipe, [1, 3], compensation={"method": method}, ratio=0.7)
    assert result.labels.outputs == (1, 3, None)
    assert evaluation.closed_set_accuracy > 0.9


def test_turns_go_on_until_accuracy_falls(recipe: Any) -> None:
    """Each turn removes a third of what is left; kept units are counted from the dense model."""
    changes = {"ratio": 1 / 3, "fine_tune": {"epochs": 1}}
    once, _ = pruned(recipe, [1, 3], **changes)
    result, evaluation = pruned(recipe, [1, 3], iterative={"max_rounds": 3, "max_drop": 0.5}, **changes)
    assert [result.kept[name].numel() for name in ("0", "2")] == [10, 10]  # 32 -> 22 -> 15 -> 10
    assert [result.model[place].out_features for place in (0, 2, 4)] == [10, 10, 3]
    assert set(result.kept["0"].tolist()) <= set(range(32))
    assert set(result.kept["0"].tolist()) <= set(once.kept["0"].tolist())
    assert result.kept["0"].max() > 10
    assert evaluation.mean_balanced_accuracy > 0.9
    rows = result.kept["0"]
    assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_a_head_is_calibrated_to_what_training_has_made_of_it(recipe: Any, turns: bool, rejected: bool) -> None:
    """On the data that decides there is nothing left to gain, whatever came last."""
    from nns_plugin.evaluation.prediction import predict
    from nns_plugin.jobs.data import Datasets
    from nns_plugin.jobs.loading import call_factory
    from nns_plugin.subnets.head import balancing_shift

    changes: dict[str, Any] = {"ratio": 0.96 if rejected else 0.6, "calibrate_head": True}
    if turns:
        changes["iterative"] = {"max_rounds": 2, "max_drop": 0.0 if rejected else 0.5}
    rate = 1e-9 if rejected else 0.01
    result, _ = pruned(recipe, [1, 3], fine_tune={"epochs": 1, "learning_rate": rate}, **changes)
    assert turns is False or bool(result.kept) != rejected
    data = Datasets.parse(call_factory("data", "user_factories:data", {}), "")
    logits, labels = predict(result.model, data.decisive)
    shift = balancing_shift(logits, result.labels.outputs, labels)
    moved = logits + torch.tensor([0.0, 0.0, shift])
    assert torch.equal(moved.argmax(1), logits.argmax(1))


def test_decisions_on_calibration_data_are_told(recipe: Any) -> None:
    from nns_plugin.jobs.run import CalibrationDataWarning

    with pytest.warns(CalibrationDataWarning, match="there is no validation data"):
        pruned(recipe, [1, 3], "user_factories:data_undecided", ratio=None, max_balanced_accuracy_drop=0.5)


def test_a_turn_that_costs_accuracy_is_taken_back(recipe: Any) -> None:
    result, _ = pruned(
        recipe,
        [1, 3],
        ratio=0.96,
        iterative={"max_rounds": 5, "max_drop": 0.01},
        fine_tune={"epochs": 1, "learning_rate": 1e-9},
    )
    assert result.kept == {}
    assert result.model[0].out_features == 32
    assert result.labels.outputs == (1, 3, None)


def test_synapses_stay_masked_through_fine_tuning(recipe: Any) -> None:
    changes: dict[str, Any] = {"ratio": 0.0, "fine_tune": {"epochs": 1}}
    result, evaluation = pruned(recipe, [1, 3], synapses={}, **changes)
    for place in (0, 2):
        weight = result.model[place].weight
        assert type(weight) is torch.nn.Parameter
        assert 0.3 < (weight == 0).float().mean() < 0.8
    assert bool((result.model[4].weight != 0).all())  # the head
    assert evaluation.closed_set_accuracy > 0.9
    assert not hasattr(result.model[0], "weight_mask")
    only, _ = pruned(recipe, [1, 3], synapses={"layers": ["2"]}, **changes)
    assert bool((only.model[0].weight != 0).all())
    assert bool((only.model[2].weight == 0).any())


def test_zeta_and_rounding(recipe: Any) -> None:
    result, _ = pruned(recipe, [1, 3], ratio=None, zeta=0.3, round_to=8)
    assert all(units.numel() % 8 == 0 for units in result.kept.values())


def test_an_ignored_layer_stays_whole(recipe: Any) -> None:
    result, _ = pruned(recipe, [1, 3], ignored_layers=["2"])
    assert set(result.kept) == {"0"}
    assert result.model[2].out_features == 32


def test_a_layer_with_a_computed_weight_is_left_alone() -> None:
    """torch-pruning itself fails on it in the middle of a removal."""
    import warnings

    from nns_plugin.adapters.torch_pruning.groups import unit_groups

    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.ReLU(),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 6)),
        torch.nn.ReLU(),
        torch.nn.Linear(6, 2),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert unit_groups(model, torch.randn(2, 4)) == ()
    assert any("computes its weight from others" in str(entry.message) for entry in caught)
