"""Recipes: a mistake is one line that names the field, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="the extra cli is not installed")
pytest.importorskip("pydantic", reason="the extra cli is not installed")

from nns_plugin.errors import RecipeError  # noqa: E402
from nns_plugin.jobs.loading import call_factory, default_recipe, load_recipe, parse_settings  # noqa: E402
from nns_plugin.jobs.recipe import Recipe  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipe.yaml"


def written(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_example_says_what_the_default_does() -> None:
    assert load_recipe(EXAMPLE) == load_recipe(
        None,
        {
            "model.arguments": {"width": 32},
            "data.arguments": {"seed": 0},
            "criterion": {"name": "semantic", "options": {"measure": "mean", "contrast": None}},
            "compensation.method": "none",
            "head": "open",
        },
    )


@pytest.mark.parametrize(
    ("change", "criterion", "options", "method"),
    [
        ({}, "semantic", {}, "none"),
        ({"labels": None, "head": "keep"}, "distinctiveness", {"mode": "span"}, "refit"),
        ({"labels": None, "head": "keep", "criterion.options": {"ridge": 0.1}}, "distinctiveness", None, "refit"),
        ({"criterion": "distinctiveness"}, "distinctiveness", {"mode": "span"}, "refit"),
        (
            {"criterion": {"name": "distinctiveness", "options": {"mode": "pairwise"}}},
            "distinctiveness",
            {"mode": "pairwise"},
            "refit",
        ),
        ({"angle": {}, "round_to": 1}, "distinctiveness", {}, "merge"),
        ({"labels": None, "criterion": "semantic", "compensation.method": "mean"}, "semantic", {}, "mean"),
        ({"criterion": "mean_weight"}, "mean_weight", {}, "none"),
    ],
)
def test_criterion_and_compensation_by_default(
    change: dict[str, Any], criterion: str, options: dict[str, Any] | None, method: str
) -> None:
    recipe = load_recipe(None, change)
    assert recipe.to_options().effective_criterion == criterion
    assert recipe.to_options().effective_criterion_options == (
        {"mode": "span", "ridge": 0.1} if options is None else options
    )
    assert recipe.to_options().effective_method == method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angle": {}, "ratio": 0.5}, "ratio and angle exclude each other"),
        ({"angle": {"similar": 170, "complementary": 20}}, "similar must be at most complementary"),
        ({"angle": {}, "criterion": "semantic"}, "angle requires criterion distinctiveness, not semantic"),
        ({"angle": {}, "compensation.method": "refit"}, "angle requires compensation merge, not refit"),
        ({"angle": {}, "global_pruning": True, "round_to": 1}, "global_pruning requires ratio"),
        ({"angle": {}}, "round_to requires ratio or zeta"),
        ({"compensation.sequential": True}, "sequential requires refit or least_squares, not none"),
        ({"compensation.method": "magic"}, "field 'compensation.method': found 'magic'"),
        ({"calibrate_head": True, "head": "closed"}, "calibrate_head requires head open, not closed"),
        ({"confidence": 0.9}, "confidence requires max_balanced_accuracy_drop"),
        ({"iterative": {}}, "iterative fine-tunes after each removal"),
        (
            {"iterative": {}, "fine_tune.epochs": 1, "max_balanced_accuracy_drop": 0.1},
            "iterative has its own max_drop",
        ),
        ({"synapses": {"rule": "none"}}, "field 'synapses.rule': found 'none'"),
        ({"angle": {"merge": "twice"}}, "field 'angle.merge': found 'twice'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, change)


def test_a_selection_that_overrides_a_budget_drops_its_confidence(tmp_path: Path) -> None:
    content = default_recipe()
    del content["ratio"]
    file = written(tmp_path, {**content, "max_balanced_accuracy_drop": 0.02, "confidence": 0.9})
    assert load_recipe(file).to_options().selection["confidence"] == 0.9
    assert load_recipe(file, {"max_balanced_accuracy_drop": 0.1}).to_options().selection["confidence"] == 0.9
    assert "confidence" not in load_recipe(file, {"ratio": 0.25}).to_options().selection
    assert load_recipe(None, {"max_balanced_accuracy_drop": 0.1}).to_options().selection["confidence"] == 0.95
    with pytest.raises(RecipeError, match="confidence"):
        load_recipe(file, {"confidence": 0.9999})


def test_the_example_names_every_field() -> None:
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert set(Recipe.model_fields) - set(example) == {
        "zeta",
        "angle",
        "max_balanced_accuracy_drop",
        "confidence",
        "iterative",
        "config_list",
        "roundings",
        "sweep",
        "synapses",
        "target_latency_ms",
        "target_speedup",
    }
    for name in ("zeta", "target_latency_ms", "target_speedup", "roundings"):
        assert f"# {name}: " in EXAMPLE.read_text(encoding="utf-8")


def test_a_target_goes_with_a_budget_and_roundings_alone(tmp_path: Path) -> None:
    given = load_recipe(None, {"target_speedup": 2.0})
    assert given.to_options().effective_roundings == (1, 8, 16)
    assert given.to_options().selection == {"target_speedup": 2.0, "roundings": [1, 8, 16]}
    both = {"target_speedup": 2.0, "target_latency_ms": 1.0, "max_balanced_accuracy_drop": 0.05, "roundings": [8, 8]}
    assert load_recipe(None, both).to_options().selection == {**both, "roundings": [8], "confidence": 0.95}
    file = written(tmp_path, {**default_recipe(), "ratio": None, "round_to": 1, **both})
    assert load_recipe(file, {"target_speedup": 3.0}).to_options().selection == {
        **both, "roundings": [8], "confidence": 0.95, "target_speedup": 3.0
    }  # fmt: skip
    assert load_recipe(file, {"ratio": 0.25}).to_options().selection == {"ratio": 0.25}
    assert load_recipe(None, {"target_speedup": 2.0, "framework": "nni"}).to_options().effective_roundings == (1,)
    for wrong, message in (
        ({"target_speedup": 2.0, "ratio": 0.5}, "ratio and target_speedup exclude each other"),
        ({"target_speedup": 2.0, "round_to": 8}, "round_to is 8; with a target for latency give roundings"),
        ({"roundings": [8]}, "roundings require target_latency_ms or target_speedup"),
        ({"target_speedup": 0.0}, "'target_speedup': found 0.0"),
        ({"target_speedup": 2.0, "roundings": [0]}, "roundings"),
        ({"target_speedup": 2.0, "roundings": [8], "framework": "nni"}, "NNI's masks cannot be rounded"),
        (
            {"target_speedup": 2.0, "iterative": {}, "fine_tune": {"epochs": 1}},
            "iterative removes the same share in each turn",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(None, wrong)


@pytest.mark.parametrize(
    ("change", "field", "found", "allowed"),
    [
        ({"ratio": 1.0}, "ratio", "1.0", "less than 1"),
        ({"ratio": -0.1}, "ratio", "-0.1", "greater than or equal to 0"),
        ({"ratio": "half"}, "ratio", "'half'", "valid number"),
        ({"zeta": 2}, "zeta", "2", "less than or equal to 1"),
        ({"head": "round"}, "head", "'round'", "'keep', 'closed' or 'open'"),
        ({"labels": []}, "labels", "[]", "at least 1 item"),
        ({"round_to": 0}, "round_to", "0", "greater than or equal to 1"),
        (
            {"criterion": "magic"},
            "criterion.name",
            "'magic'",
            "expected one of distinctiveness, mean_weight, semantic, switcher, wsf",
        ),
        ({"model.factory": "nowhere"}, "model.factory", "'nowhere'", "pattern"),
        ({"measure.samples": 3}, "measure.samples", "3", "greater than or equal to 20"),
        ({"measure.rtol": float("inf")}, "measure.rtol", "inf", "finite number"),
        ({"seed": 2**64}, "seed", str(2**64), "less than"),
        ({"labels": [True]}, "labels", "True", "valid"),
        ({"speed": 3}, "speed", "3", "no such field"),
        ({"fine_tune.epoch": 3}, "fine_tune.epoch", "3", "no such field"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str, found: str, allowed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, change)
    message = str(caught.value)
    assert f"field '{field}" in message
    assert f"found {found}" in message
    assert allowed in message
    assert "\n" not in message


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    content = default_recipe()
    del content["data"]
    with pytest.raises(RecipeError, match=r"field 'data': found nothing; it is required"):
        load_recipe(written(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.5, "zeta": 0.4}, "ratio and zeta exclude each other"),
        ({"labels": None, "head": "closed"}, "head 'closed' needs labels"),
        ({"ratio": None, "zeta": 0.4, "global_pruning": True}, "global_pruning requires ratio"),
    ],
)
def test_fields_that_contradict_each_other_each_other(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, {**default_recipe(), **change}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "contains a list"),
        ("a: [", "is not valid YAML"),
        ("model: 3", "field 'model'"),
        ("", "contains a NoneType"),
    ],
)
def test_files_without_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_an_override_of_the_ratio_replaces_zeta(tmp_path: Path) -> None:
    content = default_recipe()
    del content["ratio"]
    path = written(tmp_path, {**content, "zeta": 0.4})
    assert load_recipe(path).ratio is None
    recipe = load_recipe(path, {"ratio": 0.6})
    assert (recipe.ratio, recipe.zeta) == (0.6, None)


def test_overrides_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(RecipeError, match="ratio and zeta exclude each other"):
        load_recipe(None, {"ratio": 0.9, "zeta": 0.0})


def test_settings_are_overrides_read_as_yaml() -> None:
    given = parse_settings(["angle.similar=20", "labels=[1, 8]", "train.epochs=2", "head=keep", "criterion.name="])
    assert given == {
        "angle.similar": 20,
        "labels": [1, 8],
        "train.epochs": 2,
        "head": "keep",
        "criterion.name": None,
    }
    recipe = load_recipe(None, {**given, "round_to": 1})
    assert recipe.angle is not None
    assert (recipe.angle.similar, recipe.angle.complementary, recipe.ratio) == (20, 165, None)


@pytest.mark.parametrize("text", ["ratio", "=3", "a b=3", "ratio=[", "angle.=1"])
def test_a_malformed_setting_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--set: "):
        parse_settings([text])


def test_fine_tuning_has_a_lower_learning_rate_than_training_by_default() -> None:
    recipe = load_recipe(None, {"fine_tune.epochs": 1})
    assert recipe.fine_tune.learning_rate == 0.001
    assert recipe.train.learning_rate == 0.003


def test_half_of_the_units_are_removed_by_default(tmp_path: Path) -> None:
    content = default_recipe()
    del content["ratio"]
    assert load_recipe(written(tmp_path, content)).ratio == 0.5


def test_the_head_follows_the_labels() -> None:
    assert load_recipe(None).to_options().effective_head == "open"
    assert load_recipe(None, {"labels": None}).to_options().effective_head == "keep"
    assert load_recipe(None, {"head": "closed"}).to_options().effective_head == "closed"


def test_a_checkpoint_is_relative_to_the_recipe(tmp_path: Path) -> None:
    content = default_recipe()
    content["model"]["checkpoint"] = "weights.safetensors"
    assert load_recipe(written(tmp_path, content)).model.checkpoint == tmp_path / "weights.safetensors"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package:model", "cannot be imported: ModuleNotFoundError"),
        ("torch.nn:NoSuchLayer", "cannot be imported: AttributeError"),
        ("torch:__version__", "expected a callable"),
        ("torch.nn:Linear", "raised TypeError"),
    ],
)
def test_factories_that_fail(reference: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        call_factory("model.factory", reference, {})
    assert "model.factory" in str(caught.value)
    assert "\n" not in str(caught.value)
