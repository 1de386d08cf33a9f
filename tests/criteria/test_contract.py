"""The score contract over every registered criterion, its violations, and third-party plug-ins.

A criterion without an entry in ``SETTINGS`` fails the collection of this file.
"""

from __future__ import annotations

import functools
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import zoo
from torch import Tensor, nn

from nns_plugin import Statistics, UnitGroup, calibrate
from nns_plugin.criteria import (
    BUILT_IN,
    ENTRY_POINT_GROUP,
    Criterion,
    Needs,
    UnscoredGroupWarning,
    available,
    broken,
    build,
    find,
    needs_of,
    options_of,
    registry,
    score,
    score_groups,
)
from nns_plugin.criteria.distinctiveness import Distinctiveness
from nns_plugin.criteria.mean_weight import MeanWeight
from nns_plugin.criteria.semantic import Semantic
from nns_plugin.criteria.switcher import Switcher
from nns_plugin.criteria.wsf import WSF
from nns_plugin.errors import CriterionError
from nns_plugin.models.preserve import preserved_rng
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.switcher.switches import Switch
from nns_plugin.synapses.snapshot import WeightSnapshot


def moved_from(model: nn.Module) -> WeightSnapshot:
    """Other weights of the same architecture."""
    generator = torch.Generator().manual_seed(5)
    return WeightSnapshot(
        {name: torch.randn(value.shape, generator=generator) for name, value in model.named_parameters()}
    )


def factors_of(model: nn.Module) -> ScalingFactors:
    """Some factors for every group of a case, whatever reads its units."""
    with preserved_rng():
        name = next(name for name, case in zoo.CASES.items() if type(case.make()) is type(model))
    generator = torch.Generator().manual_seed(6)
    groups = zoo.groups_of(name)
    switches = [Switch(group.name, group.size, group.consumers, group.producers) for group in groups]
    return ScalingFactors(switches, {switch.name: torch.rand(switch.size, generator=generator) for switch in switches})


# For each criterion, ways to build it from a model and its statistics.
SETTINGS: dict[str, dict[str, Callable[[nn.Module, Statistics], Criterion]]] = {
    "semantic": {
        "defaults": lambda model, statistics: Semantic(statistics),
        "frequency": lambda model, statistics: Semantic(statistics, [0, 2], "frequency"),
        "contrast": lambda model, statistics: Semantic(statistics, ["1"], contrast="rest"),
    },
    "distinctiveness": {
        "pairwise": lambda model, statistics: Distinctiveness(statistics, model),
        "centred": lambda model, statistics: Distinctiveness(statistics, model, center="mean"),
        "sigmoid": lambda model, statistics: Distinctiveness(statistics, model, center=0.5),
        "weights": lambda model, statistics: Distinctiveness(statistics, model, vectors="weights"),
        "span": lambda model, statistics: Distinctiveness(statistics, model, mode="span"),
    },
    "wsf": {
        reduction: lambda model, statistics, reduction=reduction: WSF(model, moved_from(model), reduction)  # type: ignore[misc]
        for reduction in ("mean", "sum", "max", "first")
    },
    "switcher": {"factors": lambda model, statistics: Switcher(factors_of(model))},
    "mean_weight": {
        "magnitudes": lambda model, statistics: MeanWeight(model),
        "values": lambda model, statistics: MeanWeight(model, weights="values"),
    },
}

if SETTINGS.keys() != BUILT_IN.keys():
    raise AssertionError(f"criteria {sorted(SETTINGS.keys() ^ BUILT_IN.keys())} have no settings for the contract test")

WAYS = [(name, way) for name, ways in SETTINGS.items() for way in ways]
CASES = ("mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "twice", "transposed", "recurrent")


@functools.cache
def calibrated(case: str) -> tuple[nn.Module, tuple[UnitGroup, ...], Statistics, Statistics]:
    """A model, its groups, and statistics of the same data: collected at once, and merged from two parts."""
    torch.manual_seed(0)
    model, groups, loader = zoo.CASES[case].make().eval(), zoo.groups_of(case), zoo.labelled(case, 18, batch=6)
    whole, first, rest = (calibrate(model, part, groups, gram=True) for part in (loader, loader[:1], loader[1:]))
    return model, groups, whole, first.merge(rest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_contract(name: str, way: str, case: str) -> None:
    """One finite float per unit; deterministic; merge = whole; survives pickle and a file; the model is untouched."""
    build = SETTINGS[name][way]
    model, groups, whole, merged = calibrated(case)
    untouched = zoo.Snapshot(model)
    scores = score_groups(build(model, whole), groups)
    untouched.check()

    assert list(scores) == [group.name for group in groups], "every group of these models can be scored"
    for group in groups:
        assert scores[group.name].shape == (group.size,)
        assert scores[group.name].dtype == torch.float64
        assert bool(torch.isfinite(scores[group.name]).all())

    def assert_equal(other: dict[str, Tensor], what: str, exact: bool = True) -> None:
        for key, value in scores.items():
            same = torch.equal(other[key], value) if exact else torch.allclose(other[key], value, rtol=1e-4, atol=1e-6)
            assert same, f"{what}: {key}"

    criterion = build(model, whole)
    assert_equal(score_groups(criterion, groups), "a second criterion")
    assert_equal(score_groups(criterion, groups), "a second call")
    assert_equal(score_groups(criterion, groups[::-1]), "another order of the groups")
    assert_equal(score_groups(pickle.loads(pickle.dumps(criterion)), groups), "pickle")
    assert_equal(score_groups(build(model, merged), groups), "merge", exact=False)
    untouched.check()


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_scores_survive_a_file(name: str, way: str, tmp_path: Path) -> None:
    build, groups = SETTINGS[name][way], zoo.groups_of("conv_norm")
    model = zoo.CASES["conv_norm"].make()
    statistics = calibrate(model, zoo.labelled("conv_norm", 12), groups, gram=True)
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors", model)
    before = score_groups(build(model, statistics), groups)
    after = score_groups(build(model, loaded), loaded.groups)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", BUILT_IN)
def test_declarations(name: str) -> None:
    found = find(name)
    assert found is BUILT_IN[name]
    assert needs_of(found).requires
    model = zoo.CASES["mlp"].make()
    statistics = calibrate(model, zoo.labelled("mlp", 6), zoo.groups_of("mlp"), gram=True)
    assert all(isinstance(build(model, statistics), Criterion) for build in SETTINGS[name].values())
    assert found.__doc__
    assert "Source:" in found.__doc__


# --- violations ----------------------------------------------------------------------------------------------------

GROUP = zoo.unit_group("conv1", zoo.Expected({"conv1": zoo.one_each(3)}, {"conv2": zoo.one_each(3)}))


class Returns:
    """A criterion that returns what it was given."""

    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, group: UnitGroup) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([0.0, torch.nan, 1.0]), "Returns scored unit 1 of group 'conv1' nan; scores must be finite"),
        (torch.tensor([torch.inf, 0.0, 1.0]), "Returns scored unit 0 of group 'conv1' inf"),
        (torch.tensor([0.0, 0.0, -torch.inf]), "Returns scored unit 2 of group 'conv1' -inf"),
        (torch.zeros(2), r"Returns returned torch.float32\[2\] for group 'conv1'; expected a vector of 3 scores"),
        (torch.zeros(3, 1), r"Returns returned .*\[3, 1\] for group 'conv1'"),
        (torch.zeros(()), r"Returns returned .*\[\] for group 'conv1'"),
        ([0.0, 1.0, 2.0], "Returns returned list for group 'conv1'"),
        (1.0, "Returns returned float for group 'conv1'"),
        (torch.zeros(3, dtype=torch.complex64), "Returns returned .*complex64.* for group 'conv1'"),
    ],
)
def test_violations_are_named(value: Any, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        score(Returns(value), GROUP)


def test_a_group_that_cannot_be_scored_is_named_in_a_warning() -> None:
    with pytest.warns(
        UnscoredGroupWarning, match="Returns cannot score group 'conv1': missing inputs; none of its 3 units"
    ):
        assert score(Returns(None), GROUP) is None
    with pytest.warns(UnscoredGroupWarning):
        assert score_groups(Returns(None), [GROUP]) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.bool])
def test_scores_of_any_real_type_become_doubles(dtype: torch.dtype) -> None:
    given = torch.tensor([0, 1, 1], dtype=dtype)
    found = score(Returns(given), GROUP)
    assert found is not None
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0, 1.0, 1.0]
    attached = score(Returns(torch.zeros(3, requires_grad=True)), GROUP)
    assert attached is not None
    assert not attached.requires_grad


# --- plug-ins ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Pretend that packages with these entry points are installed; the values name objects in a module ``third``."""
    (tmp_path / "third.py").write_text(
        "class Good:\n"
        "    requires = ('statistics',)\n"
        "    def __init__(self, statistics, scale=1): self.given = (statistics, scale)\n"
        "    def __call__(self, group): return None\n"
        "class Child(Good): pass\n"
        "class NotCallable:\n"
        "    requires = ()\n"
        "class NoRequires:\n"
        "    def __call__(self, group): return None\n"
        "class TextRequires(Good):\n"
        "    requires = 'statistics'\n"
        "def function(group): return None\n"
    )
    (tmp_path / "third_raises.py").write_text("raise OSError('no licence file')\n")
    (tmp_path / "third_exits.py").write_text("raise SystemExit('no licence')\n")
    (tmp_path / "third_imports.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)

    def install(*entries: tuple[str, str]) -> None:
        found = tuple(EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in entries)
        monkeypatch.setattr(registry, "entry_points", lambda *, group: found if group == ENTRY_POINT_GROUP else ())

    yield install
    for name in [name for name in sys.modules if name.startswith("third")]:
        del sys.modules[name]


def test_a_package_can_add_a_criterion(plug_ins: Callable[..., None]) -> None:
    plug_ins(("good", "third:Good"), ("child", "third:Child"))
    assert sorted(available()) == sorted(["child", "good", *BUILT_IN])
    assert find("good").__name__ == "Good"
    assert broken() == {}


def test_a_plug_in_declares_only_what_it_requires(plug_ins: Callable[..., None]) -> None:
    """It gets the evidence it requires, its options, and neither other evidence nor the label set."""
    plug_ins(("good", "third:Good"))
    assert needs_of(find("good")) == Needs(("statistics",))
    assert options_of(find("good")) == ("scale",)
    built = build(find("good"), {"statistics": 1, "model": 2, "cost": 3}, {"scale": 4}, labels=[5])
    assert vars(built) == {"given": (1, 4)}


def test_a_criterion_is_built_from_what_it_declares() -> None:
    class Declares:
        requires = ("model",)
        optional = ("cost", "sensitivity")
        accepts_labels = True
        needs_gram = True

        def __init__(self, model: Any, cost: Any = None, sensitivity: Any = None, labels: Any = None, power: Any = 1):
            self.given = (model, cost, sensitivity, labels, power)

        def __call__(self, group: UnitGroup) -> None: ...

    assert needs_of(Declares) == Needs(("model",), ("cost", "sensitivity"), labels=True, gram=True)
    assert options_of(Declares) == ("power",)
    built = build(Declares, {"model": 1, "statistics": 2, "cost": 3}, {"power": 5}, labels=[4])
    assert vars(built) == {"given": (1, 3, None, [4], 5)}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("third_raises:Any", "OSError: no licence file"),
        ("third_exits:Any", "SystemExit: no licence"),
        ("third_imports:Any", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("third_missing:Any", "ModuleNotFoundError: No module named 'third_missing'"),
        ("third:Nobody", "AttributeError: .*'Nobody'"),
        ("third:function", "CriterionError: 'third:function' is not a class whose instances can be called"),
        ("third:NotCallable", "CriterionError: 'third:NotCallable' is not a class whose instances can be called"),
        ("third:NoRequires", "CriterionError: NoRequires has no attribute 'requires'"),
        ("third:TextRequires", "CriterionError: TextRequires has no attribute 'requires', a tuple"),
        ("third", "CriterionError: 'third' is not a class"),
    ],
)
def test_a_broken_plug_in_is_isolated_and_named(plug_ins: Callable[..., None], value: str, reason: str) -> None:
    plug_ins(("bad", value), ("good", "third:Good"))
    with pytest.warns(RuntimeWarning, match=f"criterion plug-in 'bad' is left out: {reason}"):
        assert sorted(available()) == sorted(["good", *BUILT_IN])
    assert list(broken()) == ["bad"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("good").__name__ == "Good", "one broken plug-in is no matter of another"
        assert find("semantic") is Semantic
    with pytest.raises(CriterionError, match=f"criterion 'bad' cannot be used, its plug-in is broken: {reason}"):
        find("bad")


def test_a_built_in_criterion_cannot_be_replaced(plug_ins: Callable[..., None]) -> None:
    plug_ins(("semantic", "third:Good"))
    assert find("semantic") is Semantic
    with pytest.warns(
        RuntimeWarning, match="'semantic' is left out: CriterionError: a built-in criterion has this name"
    ):
        assert available()["semantic"] is Semantic


def test_two_packages_that_want_one_name_get_none(plug_ins: Callable[..., None]) -> None:
    plug_ins(("good", "third:Good"), ("good", "third:Child"))
    with pytest.raises(CriterionError, match="several packages add a criterion of this name: third:Child, third:Good"):
        find("good")


def test_an_unknown_criterion_names_those_there_are(plug_ins: Callable[..., None]) -> None:
    plug_ins(("good", "third:Good"))
    with pytest.raises(
        CriterionError,
        match="criterion 'magnitude' cannot be used, it is not installed; "
        "available: distinctiveness, good, mean_weight, semantic",
    ):
        find("magnitude")


def test_the_real_entry_points_are_asked() -> None:
    """Nothing but the built-in criteria in an environment without plug-ins."""
    assert set(BUILT_IN) <= set(available())
