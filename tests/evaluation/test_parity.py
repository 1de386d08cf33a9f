"""Errors of outputs, the tolerances that they need, and the first value that differs too much."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nns_plugin.errors import ExportError
from nns_plugin.evaluation.parity import Divergence, ParityAccumulator, ParityReport, check_tolerances, output_errors

NAN, INF = math.nan, math.inf


def array(*values: float) -> Any:
    return np.array(values, np.float64)


def report_of(comparing: ParityAccumulator, inputs: int = 1, **options: Any) -> ParityReport:
    return comparing.report(
        "dense against pruned", ("dense", "pruned"), inputs=inputs, batch_sizes=(inputs,), top1=None, **options
    )


def compared(outputs: dict[str, tuple[Any, Any]], rtol: float = 0.0, atol: float = 0.0, **options: Any) -> ParityReport:
    """The report of one batch of outputs by name."""
    comparing = ParityAccumulator(list(outputs), rtol, atol)
    comparing.add(
        [np.asarray(left) for left, _ in outputs.values()], [np.asarray(right) for _, right in outputs.values()]
    )
    return report_of(comparing, **options)


# By hand --------------------------------------------------------------------------------------------------------


def test_errors_against_numbers_by_hand() -> None:
    found = output_errors(array(1, -2, 0, 10, 4), array(1.5, -2.25, 0.125, 10, 3), rtol=0.125, atol=0.5)
    assert found.absolute.tolist() == [0.5, 0.25, 0.125, 0, 1]
    assert found.relative == 0.5  # of 1; the value 0 is not over atol
    assert found.excess == 1  # 1 / (0.5 + 0.125 * 4), which passes
    assert found.place is None
    assert found.rtol == pytest.approx(0.125)  # (1 - 0.5) / 4
    assert found.atol == pytest.approx(0.5)  # 1 - 0.125 * 4


@pytest.mark.parametrize(
    ("expected", "found", "absolute", "relative", "excess"),
    [
        (2.0, 2.0, 0, 0, 0),
        (2.0, 2.5, 0.5, 0.25, 0.5 / 0.21),
        (-2.0, -2.1, 0.1, 0.05, 0.1 / 0.21),
        (0.0, 0.005, 0.005, 0, 0.5),
        (0.01, 0.02, 0.01, 0, 0.01 / 0.011),
        (INF, INF, 0, 0, 0),
        (INF, 1.0, INF, NAN, INF),
        (1.0, INF, INF, INF, INF),
        (INF, -INF, INF, NAN, INF),
        (NAN, NAN, NAN, NAN, INF),
        (NAN, 1.0, NAN, NAN, INF),
        (1.0, NAN, NAN, NAN, INF),
    ],
)
def test_errors_by_hand(expected: float, found: float, absolute: float, relative: float, excess: float) -> None:
    of = output_errors(np.array([expected]), np.array([found]), rtol=0.1, atol=0.01)
    np.testing.assert_allclose(of.absolute, [absolute], atol=1e-12)
    np.testing.assert_allclose(of.relative, [relative], atol=1e-12)
    np.testing.assert_allclose(of.excess, excess, atol=1e-12)


def test_errors_without_tolerance() -> None:
    same, other = np.array([0.0, 3.0]), np.array([0.0, 3.0 + 1e-9])
    assert output_errors(same, same, rtol=0, atol=0).excess == 0
    assert output_errors(same, other, rtol=0, atol=0).excess == INF
    assert output_errors(np.array([True, False]), np.array([True, True]), rtol=0, atol=0).excess == INF


def test_the_tolerances_that_pass_come_from_different_values() -> None:
    found = output_errors(array(100, 0.5), array(110, 0.75), rtol=0.05, atol=0.125)
    assert found.rtol == pytest.approx(0.25)  # (0.25 - 0.125) / 0.5, and (10 - 0.125) / 100 is less
    assert found.atol == pytest.approx(5)  # 10 - 5, and 0.25 - 0.025 is less
    assert found.excess == pytest.approx(10 / 5.125)
    assert found.place == 0


def test_what_is_at_the_tolerance_passes_and_above_it_fails() -> None:
    for found, passes in ((2.5, True), (np.nextafter(2.5, 3), False), (1.5, True), (np.nextafter(1.5, 1), False)):
        report = compared({"y": (array(2), array(found))}, rtol=0.125, atol=0.25)
        assert report.passed == passes
        assert (report.first_divergence is None) == passes


@pytest.mark.parametrize(
    ("expected", "found", "rtol", "atol"),
    [
        (0, 0.5, None, 0.5),  # no relative tolerance passes where nothing was expected
        (2, 2.5, 0.25, 0.5),
        (2, 2, 0, 0),
        (INF, INF, 0, 0),
        (-INF, INF, None, None),
        (INF, 1, None, None),
        (1, INF, None, None),
        (NAN, NAN, None, None),
        (1, NAN, None, None),
        (NAN, 1, None, None),
    ],
)
def test_the_tolerances_that_would_pass(expected: float, found: float, rtol: Any, atol: Any) -> None:
    report = compared({"y": (array(1, expected), array(1, found))})
    assert report.passing_rtol == (None if rtol is None else pytest.approx(rtol))
    assert report.passing_atol == (None if atol is None else pytest.approx(atol))
    assert report.passed == (rtol == 0)


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(["float16", "float32", "float64", "int64", "uint8", "bool"], repeat=2))
)
def test_element_types_do_not_matter(dtypes: tuple[str, str]) -> None:
    found = output_errors(np.array([0, 1, 1]).astype(dtypes[0]), np.array([1, 1, 0]).astype(dtypes[1]), rtol=0, atol=0)
    assert found.absolute.tolist() == [1, 0, 1]
    assert (found.place, found.atol) == (0, pytest.approx(1))


# Properties -----------------------------------------------------------------------------------------------------

numbers = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6))
pairs = st.integers(1, 6).flatmap(lambda size: st.tuples(*[arrays.arrays(np.float64, size, elements=numbers)] * 2))
tolerances = st.one_of(st.just(0.0), st.floats(1e-9, 10))


@given(pairs, tolerances, tolerances)
def test_the_smallest_relative_tolerance_passes_and_less_fails(pair: tuple[Any, Any], rtol: float, atol: float) -> None:
    expected, found = pair
    needed = compared({"y": pair}, rtol, atol).passing_rtol
    if needed is None:
        assert (np.abs(found - expected)[expected == 0] > atol).any()
        return
    assert compared({"y": pair}, needed, atol).passed
    assume(needed > 0)
    rounding = 20 * np.finfo(float).eps * np.abs(found - expected).max() / np.abs(expected[expected != 0]).min()
    assert needed <= rounding or not compared({"y": pair}, (needed - rounding) * (1 - 1e-12), atol).passed


@given(pairs, tolerances, tolerances)
def test_the_smallest_absolute_tolerance_passes_and_less_fails(pair: tuple[Any, Any], rtol: float, atol: float) -> None:
    expected, found = pair
    needed = compared({"y": pair}, rtol, atol).passing_atol
    assert needed is not None
    assert compared({"y": pair}, rtol, needed).passed
    assume(needed > 0)
    rounding = 20 * np.finfo(float).eps * (np.abs(found - expected).max() + rtol * np.abs(expected).max())
    assert needed <= rounding or not compared({"y": pair}, rtol, needed - rounding).passed


@given(pairs, tolerances, tolerances)
def test_a_report_is_that_of_a_loop(pair: tuple[Any, Any], rtol: float, atol: float) -> None:
    report = compared({"y": pair}, rtol, atol)
    differences = [abs(found - expected) for expected, found in zip(*pair, strict=True)]
    assume(all(abs(d - (atol + rtol * abs(e))) > 1e-9 * d for d, e in zip(differences, pair[0], strict=True) if d))
    over = [d > atol + rtol * abs(e) for d, e in zip(differences, pair[0], strict=True)]
    assert report.passed == (not any(over))
    first = report.first_divergence
    assert (first and first.position) == ((over.index(True),) if any(over) else None)
    assert report.max_absolute_error == max(differences)
    relative = [d / abs(e) for d, e in zip(differences, pair[0], strict=True) if abs(e) > atol]
    assert report.max_relative_error == max(relative, default=0)
    levels = report.p50_absolute_error, report.p90_absolute_error, report.p99_absolute_error
    np.testing.assert_allclose(levels, np.percentile(differences, (50, 90, 99)))


@given(pairs, tolerances, tolerances)
def test_reports_do_not_depend_on_batches(pair: tuple[Any, Any], rtol: float, atol: float) -> None:
    comparing = ParityAccumulator(["y"], rtol, atol)
    for place in range(len(pair[0])):
        comparing.add([pair[0][place : place + 1]], [pair[1][place : place + 1]], first_input=place)
    assert report_of(comparing) == compared({"y": pair}, rtol, atol)


# Reports --------------------------------------------------------------------------------------------------------


def test_the_first_divergence_is_first_in_order_not_the_largest() -> None:
    expected = np.zeros((2, 2, 3), np.float32)
    found = expected.copy()
    found[0, 1, 2], found[1, 0, 0], found[0, 0, 0] = 0.5, 9, 0.0625
    report = compared({"a": (expected[:, 0, 0], expected[:, 0, 0]), "b": (expected, found)}, atol=0.125)
    assert report.first_divergence == Divergence("b", (0, 1, 2), 0.0, 0.5)
    assert report.max_absolute_error == 9


def test_the_first_divergence_counts_inputs_over_batches_and_outputs_in_order() -> None:
    comparing = ParityAccumulator(["a", "b"], 0, 0)
    zeros, ones = np.zeros((2, 1)), np.ones((2, 1))
    comparing.add([zeros, zeros], [zeros, zeros], first_input=0)
    comparing.add([zeros, zeros], [zeros, ones], first_input=2)
    comparing.add([zeros, zeros], [np.array([[0.0], [2]]), ones], first_input=4)
    assert report_of(comparing).first_divergence == Divergence("a", (5, 0), 0.0, 2.0)


def test_the_worst_output_is_furthest_from_passing() -> None:
    outputs = {"a": (array(100), array(101)), "b": (array(0.5), array(0.75)), "c": (array(1), array(1))}
    report = compared(outputs, rtol=0.125)
    assert (report.worst_output, report.outputs, report.passed) == ("b", ("a", "b", "c"), False)
    assert report.first_divergence is not None
    assert report.first_divergence.output == "b"


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("sides", ["expected", "found", "both"])
def test_a_nan_never_passes_and_is_found(place: int, sides: str) -> None:
    expected, found = array(1, 2, 3), array(1, 2, 3)
    if sides != "found":
        expected[place] = NAN
    if sides != "expected":
        found[place] = NAN
    report = compared({"a": (array(1), array(1)), "y": (expected, found)}, rtol=10, atol=10)
    assert not report.passed
    assert math.isnan(report.max_absolute_error)
    assert (report.passing_rtol, report.passing_atol, report.worst_output) == (None, None, "y")
    assert report.first_divergence is not None
    assert report.first_divergence.position == (place,)


def test_infinities_that_differ_are_reported_without_a_warning() -> None:
    report = compared({"y": (array(1, INF, -INF, INF), array(INF, INF, INF, 2))}, rtol=10, atol=10)
    assert not report.passed
    assert report.max_absolute_error == INF
    assert not math.isfinite(report.p99_absolute_error)
    assert (report.passing_rtol, report.passing_atol) == (None, None)
    assert report.first_divergence == Divergence("y", (0,), 1.0, INF)


def test_equal_infinities_do_not_differ() -> None:
    report = compared({"y": (array(INF, -INF, 1), array(INF, -INF, 1))})
    assert report.passed
    assert (report.max_absolute_error, report.max_relative_error, report.passing_atol) == (0, 0, 0)


def test_nothing_passes_that_cannot_be_compared() -> None:
    report = compared({"y": (array(1), array(1))}, incomparable=("output 'z' is missing",))
    assert not report.passed
    assert (report.passing_rtol, report.passing_atol, report.first_divergence) == (None, None, None)
    alone = report_of(ParityAccumulator([], 0, 0), incomparable=("output 'z' is missing",))
    assert not alone.passed
    assert (alone.outputs, alone.worst_output) == ((), "")


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ExportError, match="dense and pruned return no values to compare"):
        report_of(ParityAccumulator([], 0, 0))
    with pytest.raises(ExportError, match="no values to compare"):
        compared({"y": (np.zeros((0, 3)), np.zeros((0, 3)))})


@pytest.mark.parametrize("tolerance", [-1e-9, NAN, INF])
def test_tolerances_are_numbers_from_zero_on(tolerance: float) -> None:
    for rtol, atol in ((tolerance, 0.0), (0.0, tolerance)):
        with pytest.raises(ExportError, match="expected finite numbers of at least 0"):
            check_tolerances(rtol, atol)
        with pytest.raises(ExportError, match="expected finite numbers of at least 0"):
            ParityAccumulator(["y"], rtol, atol)
    check_tolerances(0, 0)
