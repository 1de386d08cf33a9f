"""The gate: every threshold, at the end of the interval that is worse for the candidate."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import W, X, linear, quick_compare  # noqa: E402

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport, LabelDrop  # noqa: E402
from nns_plugin.adapters.onnxruntime.comparison import Comparison  # noqa: E402
from nns_plugin.adapters.onnxruntime.file import OnnxFile  # noqa: E402
from nns_plugin.adapters.onnxruntime.gate import Gate  # noqa: E402
from nns_plugin.adapters.onnxruntime.latency import LatencyComparison, LatencyReport  # noqa: E402
from nns_plugin.adapters.onnxruntime.profiling import NodeTime, Profile, ProfileComparison  # noqa: E402
from nns_plugin.errors import GateError  # noqa: E402
from nns_plugin.evaluation.parity import Divergence, ParityReport  # noqa: E402

pytestmark = pytest.mark.host("onnxruntime")

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PARITY = ParityReport(
    kind="dense against pruned",
    reference="baseline dense.onnx",
    candidate="candidate small.onnx",
    passed=True,
    max_absolute_error=0.25,
    max_relative_error=0.5,
    p50_absolute_error=0.0,
    p90_absolute_error=0.0,
    p99_absolute_error=0.0,
    passing_rtol=0.1,
    passing_atol=0.1,
    top1_agreement=0.9,
    worst_output="y",
    outputs=("y",),
    incomparable=(),
    first_divergence=None,
    inputs=10,
    batch_sizes=(10,),
    rtol=1e-3,
    atol=1e-5,
    provider=CPU,
)
FAILED = replace(PARITY, passed=False, first_divergence=Divergence("y", (3, 1), 1.5, 1.75))
EVALUATION: Any = None  # the gate reads the drops alone
ACCURACY = AccuracyReport(
    EVALUATION, EVALUATION, 0.01, 0.03, (LabelDrop("cat", 0.02, 0.05), LabelDrop("dog", 0.04, 0.045)), 0.95
)


def of_latency(batch: int = 1, low: float = 1.25, p90_high: float | None = 3.0) -> LatencyComparison:
    def report(name: str) -> LatencyReport:
        many = p90_high is not None
        interval = (1.0, p90_high) if p90_high is not None else None
        return LatencyReport(name, 300 if many else 50, 1.0, 2.0 if many else None, None, (0.9, 1.1), interval, ())

    return LatencyComparison(
        report("baseline"), report("candidate"), 1.5, low, 1.75, CPU, 1, False, False, batch,
        300 if p90_high is not None else 50, 10, 20, True, 0,
    )  # fmt: skip


def of_profiles(baseline: list[str], candidate: list[str], provider: str = CUDA) -> ProfileComparison:
    one, two = (
        Profile(provider, 1, 1, tuple(NodeTime(f"n{i}", "Add", by, 1.0, (), (), False) for i, by in enumerate(ran)))
        for ran in (baseline, candidate)
    )
    return ProfileComparison(one, two, (), ())


def comparison(**changes: Any) -> Comparison:
    dense, small = (OnnxFile(f"{name}.onnx", {}, 1, 17, "", (), (), None, {}) for name in ("dense", "small"))
    found = Comparison(
        dense, small, ("cat", "dog"), 10, False, (PARITY,), ACCURACY, None, (of_latency(),),
        (of_profiles([CUDA], [CUDA]),), None, None, {},
    )  # fmt: skip
    return replace(found, **changes)


# Thresholds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit", "worse", "found"),
    [
        ("min_speedup", 1.25, 1.26, 1.25),  # the ratio itself is 1.5
        ("max_p90_ms", 3.0, 2.99, 3.0),  # the percentile itself is 2
        ("max_accuracy_drop", 0.03, 0.029, 0.03),  # the drop itself is 0.01
        ("max_label_drop", 0.05, 0.049, 0.05),  # 0.04 is the largest drop, 0.05 the largest bound
        ("min_top1_agreement", 0.9, 0.91, 0.9),
    ],
)
def test_a_threshold_is_held_to_the_end_that_is_worse(name: str, limit: float, worse: float, found: float) -> None:
    for value, passes in ((limit, True), (worse, False)):
        verdict = Gate(**{name: value}).judge(comparison())
        (check,) = (check for check in verdict.checks if check.subject != "provider")
        assert verdict.passed == check.passed == passes
        assert verdict.failures == (() if passes else (check,))
        assert check.name.split(",")[0] == name
        assert (check.found, check.limit) == (found, value)
        assert len(check.text.splitlines()) == 1
        assert f"{100 * value:g}" in check.text or f"{value:g}" in check.text


def test_the_label_with_the_worst_bound_is_named() -> None:
    (check,) = Gate(max_label_drop=0.01).judge(comparison()).failures
    assert check.name == "max_label_drop, cat"
    assert check.text == "label 'cat' falls by 2.00 points, by at most 5.00 at 95 %; 1 are allowed"
    (check,) = Gate(max_label_drop=0.04).judge(comparison()).failures
    assert check.text.endswith("4 are allowed (more inputs narrow this bound)")


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_tolerance_asks_for_parity(name: str) -> None:
    gate = Gate(**{name: getattr(PARITY, name)})
    verdict = gate.judge(comparison())
    assert verdict.passed
    assert [check.name for check in verdict.checks if check.subject == "parity"] == ["tolerance, dense against pruned"]
    (check,) = gate.judge(comparison(parity=(FAILED,))).failures
    assert (check.subject, check.found) == ("parity", 0.25)
    assert check.text.endswith("over rtol 0.001, atol 1e-05, first at y[3, 1]: 1.75 instead of 1.5")


def test_what_cannot_be_compared_fails_with_a_reason() -> None:
    report = replace(PARITY, passed=False, top1_agreement=None, incomparable=("output 'a' is missing", "b"))
    verdict = Gate(rtol=1e-3, min_top1_agreement=0.5).judge(comparison(parity=(report,)))
    assert [check.name for check in verdict.failures] == ["tolerance, dense against pruned", "min_top1_agreement"]
    assert all("output 'a' is missing; b" in check.text for check in verdict.failures)


def test_every_batch_size_is_checked() -> None:
    latency = (of_latency(1), of_latency(8, low=1.0), of_latency(32, p90_high=9.0))
    verdict = Gate(min_speedup=1.2, max_p90_ms=5).judge(comparison(latency=latency))
    assert [check.name for check in verdict.failures] == ["min_speedup, batch 8", "max_p90_ms, batch 32"]
    assert len([check for check in verdict.checks if check.subject == "latency"]) == 6


def test_thresholds_that_are_none_cannot_fail() -> None:
    bad = comparison(
        parity=(FAILED,),
        accuracy=None,
        accuracy_fault="the candidate returns outputs that are not finite",
        latency=(of_latency(low=0.1, p90_high=1e6),),
    )
    verdict = Gate().judge(bad)
    assert verdict.passed
    assert {check.subject for check in verdict.checks} == {"provider"}
    assert Gate().judge(replace(bad, latency=(), profiles=(), accuracy_fault=None)).checks == ()


def test_torch_models_are_judged_without_a_threshold() -> None:
    for kind in ("torch against ONNX", "masked against removed"):
        parity = (replace(FAILED, kind=kind), PARITY)
        verdict = Gate().judge(comparison(parity=parity))
        assert [check.name for check in verdict.failures] == [f"tolerance, {kind}"]
        assert Gate(rtol=PARITY.rtol).judge(comparison(parity=(replace(PARITY, kind=kind, rtol=0.5), PARITY))).passed


def test_outputs_without_accuracy_fail_where_accuracy_is_asked_for() -> None:
    broken = comparison(
        accuracy=None, accuracy_fault="the candidate returns outputs that are not finite for 1 of 2 inputs"
    )
    for gate in (Gate(max_accuracy_drop=1), Gate(max_label_drop=1)):
        (check,) = gate.judge(broken).failures
        assert (check.subject, check.text) == ("accuracy", broken.accuracy_fault)


def test_checks_come_in_order() -> None:
    gate = Gate(1.3, 2.0, 0.0, 0.0, 1e-3, 1e-5, 1.0)
    parity = (replace(FAILED, kind="torch against ONNX"), FAILED)
    profiles = (of_profiles([CPU], [CPU]),)
    verdict = gate.judge(comparison(parity=parity, profiles=profiles, latency=(of_latency(1), of_latency(2))))
    assert not any(check.passed for check in verdict.checks)
    assert verdict.failures == verdict.checks
    assert [check.name for check in verdict.checks] == [
        "nodes, baseline",
        "nodes, candidate",
        "tolerance, torch against ONNX",
        "tolerance, dense against pruned",
        "min_top1_agreement",
        "max_accuracy_drop",
        "max_label_drop, cat",
        "min_speedup, batch 1",
        "max_p90_ms, batch 1",
        "min_speedup, batch 2",
        "max_p90_ms, batch 2",
    ]
    assert [check["name"] for check in verdict.to_dict()["checks"]] == [check.name for check in verdict.checks]
    assert verdict.to_dict()["passed"] is False


def test_a_verdict_on_nan_is_json() -> None:
    report = replace(FAILED, max_absolute_error=math.nan, first_divergence=Divergence("y", (0,), 1.0, math.nan))
    verdict = Gate(rtol=1e-3).judge(comparison(parity=(report,)))
    assert not verdict.passed
    saved = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert saved["checks"][-1]["found"] is None


# Providers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "candidate", "failures"),
    [
        ([CUDA, CUDA], [CUDA], []),
        ([CUDA, CPU], [CPU, CUDA], []),
        ([CPU, CPU], [CUDA], ["nodes, baseline"]),
        ([CUDA], [CPU, CPU], ["nodes, candidate"]),
        ([CPU], [CPU], ["nodes, baseline", "nodes, candidate"]),
    ],
)
def test_only_if_all_nodes_have_fallen_back_the_provider_fails(
    baseline: list[str], candidate: list[str], failures: list[str]
) -> None:
    verdict = Gate().judge(comparison(profiles=(of_profiles(baseline, candidate),)))
    assert [check.name for check in verdict.failures] == failures
    for check, nodes, path in zip(verdict.checks, (baseline, candidate), ("dense", "small"), strict=True):
        assert (check.found, check.limit) == (nodes.count(CPU), len(nodes))
        assert check.text == f"{path}.onnx: {CUDA} ran {nodes.count(CUDA)} of {len(nodes)} nodes"


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="this build has no such provider"
)
@pytest.mark.parametrize("batches", [(1,), ()])
def test_a_provider_that_runs_nothing_fails(batches: tuple[int, ...], tmp_path: Path) -> None:
    path = linear(tmp_path / "model.onnx", W)
    found = quick_compare(path, path, X, provider="azure", **{"batches": batches})
    assert found.profiles[0].candidate.provider == "AzureExecutionProvider"
    verdict = Gate().judge(found)
    assert [check.name for check in verdict.failures] == ["nodes, baseline", "nodes, candidate"]
    assert Gate().judge(quick_compare(path, path, X, **{"batches": batches})).passed


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"min_speedup": 1}, {"latency": ()}, "need latencies, found none"),
        (
            {"min_speedup": 1},
            {"latency": (replace(of_latency(), sessions=1),)},
            "min_speedup needs at least two pairs of sessions",
        ),
        ({"max_p90_ms": 1}, {"latency": ()}, "need latencies, found none"),
        ({"max_p90_ms": 1}, {"latency": (of_latency(p90_high=None),)}, "needs at least 100 samples, found 50"),
        ({"max_accuracy_drop": 1}, {"accuracy": None}, "need inputs with labels"),
        ({"max_label_drop": 1}, {"accuracy": None}, "need inputs with labels"),
        ({"rtol": 0.01}, {}, "rtol is 0.01, but the comparison was made with 0.001"),
        ({"rtol": 1e-3, "atol": 1.0}, {}, "atol is 1, but the comparison was made with 1e-05"),
        ({"min_top1_agreement": 0.5}, {"parity": (replace(PARITY, top1_agreement=None),)}, "min_top1_agreement needs"),
    ],
)
def test_what_was_not_measured_is_an_error(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GateError, match=message) as failure:
        Gate(**options).judge(comparison(**changes))
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize("name", list(asdict(Gate())))
def test_thresholds_are_numbers_from_zero_on_and_shares_up_to_one(name: str) -> None:
    share = name.endswith(("_drop", "_agreement"))
    for value in (-0.1, math.nan, math.inf, *([1.5] if share else [])):
        with pytest.raises(GateError, match=f"{name} is {value}; expected a {'share' if share else 'number'}"):
            Gate(**{name: value})
    for value in (0, 1, *([] if share else [1.5])):
        assert getattr(Gate(**{name: value}), name) == value


def test_only_accuracy_needs_labels() -> None:
    needing = {name for name in asdict(Gate()) if Gate(**{name: 0.5}).needs_labels}
    assert needing == {"max_accuracy_drop", "max_label_drop"}
