"""Figures: they show the values that they are given, and label their axes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the extra cli is not installed")

from nns_plugin.errors import CriterionError, MissingExtraError
from nns_plugin.jobs.figures import (
    activity_figure,
    inputs_figure,
    integration_figure,
    jaccard,
    latency_figure,
    new_figure,
    overlap_figure,
    paths_figure,
    scaling_figure,
    size_figure,
    states_figure,
)
from nns_plugin.switcher.scaling_factors import Counts


@pytest.fixture(autouse=True)
def matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="the extra figures is not installed")


def texts(axis: Any) -> tuple[str, str]:
    return axis.get_xlabel(), axis.get_ylabel()


def lines(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axis.lines
        if len(line.get_xdata()) and not str(line.get_label()).startswith("_")
    }


@pytest.mark.host("onnxruntime")
def test_stalls_of_the_machine_do_not_squeeze_the_latency_distributions() -> None:
    from nns_plugin.adapters.onnxruntime import LatencyComparison, latency_report

    fast = np.linspace(0.1, 0.12, 195)
    reports = [latency_report(name, np.append(fast * factor, [20.0] * 5)) for name, factor in (("a", 2), ("b", 1))]
    compared = LatencyComparison(*reports, 2.0, 1.9, 2.1, "CPU", 1, False, False, 1, 200, 1, 0, True, 0)
    (axis,) = latency_figure([compared]).axes
    assert 0.24 <= axis.get_xlim()[1] < 1
    assert "10 slower runs not shown" in axis.get_title()


def test_activity_before_and_after_the_threshold() -> None:
    """Units are sorted by the label that they respond to most, the strongest first, silent ones last."""
    activity = torch.tensor([[0.2, 0.0, 1.0, 0.5], [1.0, 0.0, 0.3, 0.7]])
    figure = activity_figure(activity, ["ant", "bee"], 0.4, "conv")
    before, after = figure.axes[0], figure.axes[1]
    order = [2, 0, 3, 1]
    assert np.allclose(before.images[0].get_array(), activity[:, order])
    assert np.allclose(after.images[0].get_array(), [[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.7, 0.0]])
    assert [tick.get_text() for tick in before.get_yticklabels()] == ["ant", "bee"]
    assert texts(after) == ("unit, sorted by the label that it responds to most", "label")
    assert "4 units of group conv" in before.get_title()
    assert "zeta = 0.40: 2 to 2 units per label" in after.get_title()
    with pytest.raises(CriterionError, match=r"expected \[3, units\]"):
        activity_figure(activity, ["a", "b", "c"], 0.4)


KEPT = {
    "ant": {"x": torch.tensor([0, 1, 2]), "y": torch.tensor([0])},
    "bee": {"x": torch.tensor([2]), "y": torch.tensor([0, 1])},
    "cat": {"x": torch.tensor([5]), "y": torch.tensor([7])},
}


def test_the_overlap_of_subnets() -> None:
    expected = [[1, 2 / 5, 0], [2 / 5, 1, 0], [0, 0, 1]]
    assert np.allclose(jaccard(KEPT), expected)
    axis = overlap_figure(KEPT).axes[0]
    assert np.allclose(axis.images[0].get_array(), expected)
    assert [text.get_text() for text in axis.texts][:3] == ["1.00", "0.40", "0.00"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["ant", "bee", "cat"]


def test_accuracy_as_labels_are_integrated() -> None:
    figure = integration_figure([{"b": 0.9}, {"b": 0.8, "a": 1.0}], {"a": 0.97, "b": 0.95, "c": 0.1})
    axis = figure.axes[0]
    shown = lines(axis)
    assert shown["b"] == [(1, 90.0), (2, 80.0)]
    assert shown["a"] == [(2, 100.0)]
    assert shown["mean"] == [(1, 90.0), (2, 90.0)]
    assert [value for _, value in shown["dense, mean"]] == [96.0, 96.0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1\n+ b", "2\n+ a"]
    assert texts(axis)[1] == "balanced accuracy, %"


def test_accuracy_against_size() -> None:
    axis = size_figure({"one": [(30.0, 0.9), (10.0, 0.7)]}, 0.95, 40).axes[0]
    assert lines(axis)["one"] == [(10.0, 70.0), (30.0, 90.0)]
    assert texts(axis) == ("kept units, of 40", "mean balanced accuracy, %")


def test_names_are_not_read_as_mathematics(tmp_path: Path) -> None:
    names = ["$x^$", "a $5 $b_{"]
    activity_figure(torch.rand(2, 3), names, 0.4, names[0]).savefig(tmp_path / "a.png")
    steps = [{names[0]: 0.9}, dict.fromkeys(names, 0.8)]
    integration_figure(steps, dict.fromkeys(names, 1.0)).savefig(tmp_path / "b.png")
    size_figure({names[1]: [(3, 0.5)]}, 0.9, 4).savefig(tmp_path / "c.png")
    overlap_figure({name: {"x": torch.tensor([1])} for name in names}).savefig(tmp_path / "d.png")


def test_drawing_nothing_is_refused() -> None:
    for draw in (lambda: overlap_figure({}), lambda: integration_figure([], {}), lambda: size_figure({}, 0.9, 4)):
        with pytest.raises(CriterionError, match="nothing to draw"):
            draw()


def test_lines_differ_without_colours() -> None:
    names = [f"label {place}" for place in range(10)]
    steps = [dict.fromkeys(names[: count + 1], 0.9) for count in range(10)]
    found = integration_figure(steps, dict.fromkeys(names, 0.9)).axes[0].lines[:10]
    assert len({(line.get_marker(), line.get_linestyle()) for line in found}) == 10


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"nns-plugin\[figures\]"):
        new_figure(1, 1)


@pytest.mark.host("onnxruntime")
def test_a_job_draws_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    from nns_plugin.jobs.loading import load_recipe
    from nns_plugin.jobs.run import run_job

    recipe = load_recipe(
        None,
        {
            "train.epochs": 1,
            "measure.samples": 20,
            "measure.resamples": 0,
            "model.arguments": {"width": 8},
            "ratio": 0.6,
        },
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "activity-old.png").touch()
    (out / "mine.png").touch()
    report = run_job(recipe, out, figures=True)
    (out / "mine.png").unlink()  # only what an earlier job drew goes by itself
    drawn = {file.stem for file in out.glob("*.png")}
    assert drawn == {"overlap", "integration", "size", *(f"activity-{name}" for name in report.units)}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in out.glob("*.png"))


def test_the_pixels_that_are_used_by_each_label() -> None:
    first = torch.zeros(2, 3, 4, dtype=torch.bool)  # labels, units, pixels
    first[0, 0, 1] = first[0, 2, 1] = first[1, 2, 1] = first[1, 1, 3] = True
    figure = inputs_figure({"0": first, "2": torch.ones(2, 2, 3, dtype=torch.bool)}, ["ant", "bee"], (2, 2))
    shown = [axis.images[0].get_array().tolist() for axis in figure.axes if axis.images and axis.get_title()]
    assert shown == [[[0, 2], [0, 1]], [[0, 2], [0, 0]], [[0, 1], [0, 1]]]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["all labels: 2 pixels", "label ant: 1 pixels", "label bee: 2 pixels"]
    with pytest.raises(CriterionError, match="2 outputs and 4 inputs; expected 2 and 3 x 2 pixels"):
        inputs_figure({"0": first}, ["ant", "bee"], (3, 2))


def test_paths_of_one_label_are_black_and_the_others_grey() -> None:
    first = torch.zeros(2, 2, 3, dtype=torch.bool)
    second = torch.zeros(2, 2, 2, dtype=torch.bool)
    first[0, 0, 0] = second[0, 0, 0] = True  # input 0, unit 0, label 0
    first[1, 1, 2] = second[1, 1, 1] = first[1, 1, 0] = True  # inputs 0 and 2, unit 1, label 1
    figure = paths_figure({"0": first, "2": second}, ["ant", "bee"])
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["label ant: 2 synapses", "label bee: 3 synapses"]
    for axis, black, grey in zip(panels, (2, 3), (3, 2), strict=True):
        drawn = [line for line in axis.lines if line.get_linestyle() == "-"]
        assert sum(line.get_color() == "black" for line in drawn) == black
        assert sum(line.get_color() == "0.85" for line in drawn) == grey
    ends = [line.get_ydata().tolist() for line in panels[0].lines if line.get_color() == "black"][:2]
    assert ends == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(CriterionError, match="expected each to read the previous one"):
        paths_figure({"0": first, "2": torch.ones(2, 2, 5, dtype=torch.bool)}, ["ant", "bee"])


def test_the_scaling_pattern_is_black_green_and_yellow_and_readable_in_grey() -> None:
    figure = scaling_figure(torch.tensor([0.0, 0.3, 1.0, 2.0, 0.999, 0.0]), (2, 3), "inputs of 0")
    image = np.asarray(figure.axes[0].images[0].get_array())
    states = [[0, 1, 2], [2, 1, 0]]
    colours = [(0.0, 0.0, 0.0), (0.2, 0.55, 0.3), (1.0, 0.9, 0.35)]
    assert np.allclose(image, [[colours[state] for state in row] for row in states])
    grey = [np.dot(colour, (0.299, 0.587, 0.114)) for colour in colours]
    assert grey[1] - grey[0] > 0.3
    assert grey[2] - grey[1] > 0.3
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["pruned (0): 2", "weakened (below 1): 2", "strengthened (1 or more): 2"]
    with pytest.raises(CriterionError, match=r"the factors have shape \[6\]; expected one for each of 2 x 2 pixels"):
        scaling_figure(torch.ones(6), (2, 2))


def test_states_over_the_epochs() -> None:
    epochs = [
        {"0": Counts(1, 2, 3), "inputs of 0": Counts(4, 0, 0)},
        {"0": Counts(2, 1, 3), "inputs of 0": Counts(3, 1, 0)},
    ]
    figure = states_figure(epochs)
    shown = [[line.get_ydata() for line in axis.lines] for axis in figure.axes]
    assert np.array_equal(shown, [[[1, 2], [2, 1], [3, 3]], [[4, 3], [0, 1], [0, 0]]])
    assert [axis.get_title() for axis in figure.axes] == ["0", "inputs of 0"]
    assert all(texts(axis) == ("epoch", "factors") for axis in figure.axes)
    assert len({(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}) == 3
    assert figure.legends[0].get_texts()[0].get_text() == "pruned (0)"
    with pytest.raises(CriterionError, match="nothing to draw"):
        states_figure([])
