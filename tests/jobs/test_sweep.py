"""Sweeps on NNI's engine: plans, tables and figures; a real one, killed midway, leaves no process and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning"), pytest.mark.host("onnxruntime")]
pytest.importorskip("nni")
pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")
pytest.importorskip("typer", reason="the extra cli is not installed")
psutil = pytest.importorskip("psutil")

from nns_plugin.adapters.nni_engine import experiment as nni_experiment  # noqa: E402
from nns_plugin.adapters.nni_engine.experiment import Ended  # noqa: E402
from nns_plugin.cli import main  # noqa: E402
from nns_plugin.errors import RecipeError, SweepError  # noqa: E402
from nns_plugin.jobs.sweep import Sweep, run_sweep  # noqa: E402
from nns_plugin.jobs.sweep_state import SweepTrial  # noqa: E402
from nns_plugin.jobs.trial import number_of, run_trial  # noqa: E402

RECIPE = """
model: {factory: "nns_plugin.jobs.models:digits_classifier"}
data: {factory: "nns_plugin.jobs.data:digits"}
labels: ["3", "5"]
train: {epochs: 1}
measure: {samples: 20, resamples: 0}
sweep:
  search: {ratio: [0.3, 0.6], criterion.name: [semantic, mean_weight]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


class Engine:
    """Replaces NNI: finishes the trials of the space in order, without running their jobs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: set[int] = frozenset(), stop_after: int = 99) -> None:
        self.calls: list[dict[str, Any]] = []
        self.fail, self.stop_after = fail, stop_after
        monkeypatch.setattr(nni_experiment, "ended_trials", self)

    def __call__(self, command: str, folder: Path, space: Any, options: Any, *, working_folder: Path) -> Any:
        self.calls.append({"command": command, "space": space, **vars(options)})
        plan = json.loads((folder / "plan.json").read_text())
        self.calls[-1]["plan"] = plan
        for place, number in enumerate(space["trial"]["_value"] if "trial" in space else range(options.trials)):
            if place == self.stop_after:
                raise KeyboardInterrupt
            parameters = {"trial": number} if "trial" in space else {"ratio": 0.1 * (number + 1)}
            failed = number in self.fail
            numbers = {"default": 0.9, "balanced_accuracy": 0.9 - 0.1 * number, "latency_ms": 1.0 - 0.2 * number}
            yield Ended(place, parameters, None if failed else numbers, "FAILED" if failed else "SUCCEEDED")


def test_a_grid_is_planned_run_and_drawn(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    found = run_sweep(recipe, tmp_path / "out")
    assert [trial.parameters for trial in found.trials] == [
        {"ratio": ratio, "criterion.name": name} for ratio in (0.3, 0.6) for name in ("semantic", "mean_weight")
    ]
    call = engine.calls[0]
    assert call["space"] == {"trial": {"_type": "choice", "_value": [0, 1, 2, 3]}}
    assert (call["tuner"], call["trials"], call["concurrency"]) == ("GridSearch", 4, 1)
    assert call["command"] == f"{sys.executable} -m nns_plugin.jobs.trial"
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    again = run_sweep(recipe, tmp_path / "out")
    assert again == found
    assert len(engine.calls) == 1, "there is nothing left to do"
    with pytest.raises(SweepError, match="holds another sweep"):
        run_sweep(recipe, tmp_path / "out", {"labels": ["3"]})


def test_without_matplotlib_a_sweep_finishes_and_says_how_to_install_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Engine(monkeypatch)
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["sweep", str(recipe), "--output", str(output), "--quiet"])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    (note,) = [line for line in captured.out.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: pareto.png is left out: 'matplotlib' is not installed")
    assert 'run pip install "nns-plugin[figures]"' in note
    assert "4 of 4 trials" in captured.out
    assert captured.out.splitlines()[-1] == f"written to {output}: sweep.json, trials"
    assert not (output / "pareto.png").exists()


def test_an_interrupted_sweep_resumes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(monkeypatch, fail={0}, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(trial["number"], trial["error"]) for trial in content["trials"]] == [(0, "failed, see .nni"), (1, None)]
    engine = Engine(monkeypatch)
    found = run_sweep(recipe, tmp_path / "out", {"sweep.concurrency": 2})
    assert engine.calls[0]["space"]["trial"]["_value"] == [0, 2, 3], "what failed is tried again"
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3]
    (tmp_path / "out" / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match="is damaged"):
        run_sweep(recipe, tmp_path / "out")


def test_trials_are_bounded_and_tuners_get_distributions(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)
    found = run_sweep(recipe, tmp_path / "few", {"sweep.trials": 3})
    assert len(found.trials) == 3
    assert found == run_sweep(recipe, tmp_path / "same", {"sweep.trials": 3}), "which ones is a matter of the seed"
    search = {"ratio": {"_type": "uniform", "_value": [0.1, 0.9]}, "criterion.name": ["semantic"]}
    free = {"sweep.search": search, "sweep.tuner": "TPE", "sweep.trials": 2}
    run_sweep(recipe, tmp_path / "free", free)
    assert engine.calls[-1]["space"] == {
        "ratio": search["ratio"],
        "criterion.name": {"_type": "choice", "_value": ["semantic"]},
    }
    assert engine.calls[-1]["tuner"] == "TPE"
    more = run_sweep(recipe, tmp_path / "free", free | {"sweep.trials": 5})
    assert engine.calls[-1]["trials"] == 3
    assert [call["seed"] for call in engine.calls[-2:]] == [0, 2]
    assert [trial.number for trial in more.trials] == [0, 1, 2, 3, 4]
    assert engine.calls[-1]["plan"]["first"] == 2, "folders of trials go on where they ended"


def test_trials_of_a_tuner_are_numbered_as_their_folders(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order they finish, and whatever failed before."""
    free = {"sweep.search": {"ratio": [0.1, 0.2]}, "sweep.tuner": "Random"}
    Engine(monkeypatch, fail={0})
    run_sweep(recipe, tmp_path / "out", free | {"sweep.trials": 2})

    def ended(command: str, folder: Path, *args: Any, **options: Any) -> Any:
        plan = json.loads((folder / "plan.json").read_text())
        for number in (1, 0):  # as with two at a time
            yield Ended(number, {"ratio": 0.3}, {"balanced_accuracy": 0.5, "latency_ms": plan["first"] + number}, "")

    monkeypatch.setattr(nni_experiment, "ended_trials", ended)
    found = run_sweep(recipe, tmp_path / "out", free | {"sweep.trials": 3})
    assert [trial.number for trial in found.trials] == [1, 2, 3]
    assert [trial.numbers["latency_ms"] for trial in found.trials[1:] if trial.numbers] == [2, 3]


@pytest.mark.parametrize("tuner", ["GridSearch", "Random"])
def test_what_a_trial_reports_of_itself_counts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuner: str
) -> None:
    """NNI may list the parameters of one trial for another if several run at a time."""
    ratios = [0.1, 0.2, 0.3, 0.4]

    def ended(command: str, folder: Path, *args: Any, **options: Any) -> Any:
        for listed, number in ((0, 1), (1, 0), (2, 2)):
            parameters = {"trial": listed} if tuner == "GridSearch" else {"ratio": ratios[listed]}
            numbers = {"number": number, "chosen": {"ratio": ratios[number]}, "parameters": 7, "latency_ms": number}
            yield Ended(listed, parameters, numbers, "SUCCEEDED")
        (folder.parent / "trials" / "003.error").write_text("it is so\n")
        yield Ended(0, {"trial": 0} if tuner == "GridSearch" else {"ratio": ratios[3]}, None, "FAILED")

    monkeypatch.setattr(nni_experiment, "ended_trials", ended)
    options = {"sweep.search": {"ratio": ratios}, "sweep.tuner": tuner, "sweep.trials": 4}
    found = run_sweep(recipe, tmp_path / "out", options)
    assert [(trial.number, trial.parameters) for trial in found.trials] == [(n, {"ratio": ratios[n]}) for n in range(4)]
    assert [trial.numbers for trial in found.trials[:3]] == [{"parameters": 7, "latency_ms": n} for n in range(3)]
    assert found.trials[3].error == "it is so"


def test_the_pareto_front_by_hand() -> None:
    points = [(0.9, 1.0), (0.8, 0.5), (0.8, 0.6), (0.95, 2.0), (0.7, 0.5), (0.9, 1.0), (0.6, 0.4)]
    trials = [
        SweepTrial(number, {}, {"balanced_accuracy": accuracy, "latency_ms": latency})
        for number, (accuracy, latency) in enumerate(points)
    ]
    trials += [SweepTrial(7, {}, None, "no"), SweepTrial(8, {}, {"balanced_accuracy": None, "latency_ms": 0.1})]
    assert [trial.number for trial in Sweep(tuple(trials), 9, "m").pareto] == [6, 1, 0, 5, 3]


def test_mistakes_are_reported_before_anything_runs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)
    for overrides, message in (
        ({"sweep": None}, "'sweep': found nothing"),
        ({"sweep.search": {}}, "field 'sweep.search'"),
        ({"sweep.search": {"ratio": []}}, r"ratio is \[\]; expected a list of values"),
        ({"sweep.search": {"a b": [1]}}, "'a b' is not a field"),
        ({"sweep.search": {"ratio": [0.5, 1.5]}}, "sweep.search: {'ratio': 1.5} is not a valid recipe"),
        ({"sweep.search": {"ratio": [0.5], "zeta": [0.5]}}, "exclude each other"),
        ({"sweep.search": {"nothing": [0.5]}}, "there is no such field"),
        ({"sweep.search": {"ratio": {"_type": "uniform", "_value": [0, 1]}}}, "needs tuner Random or TPE"),
        ({"sweep.search": {"criterion.name": ["none"]}, "sweep.tuner": "Random"}, "expected one of"),
        ({"sweep.trials": 0}, "field 'sweep.trials'"),
        ({"sweep.metric": "accuracy"}, "sweep.metric: found 'accuracy'; expected one of recipe"),
        ({"sweep.metric": "subnet.parity"}, "'subnet.parity' is not a number; it has the fields kind"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_sweep(recipe, tmp_path / "out", overrides)
    assert not engine.calls
    assert not (tmp_path / "out").exists()
    Engine(monkeypatch, fail={0, 1, 2, 3})
    with pytest.raises(SweepError, match="no trial succeeded: failed, see .nni"):
        run_sweep(recipe, tmp_path / "out")


def test_configs_of_nni(recipe: Path, tmp_path: Path) -> None:
    """Only the training service of an NNI config is used."""
    with pytest.raises(SweepError, match="is not an experiment config of NNI"):
        run_sweep(recipe, tmp_path / "out", nni_config=tmp_path / "none.yaml")
    assert not (tmp_path / "out").exists()
    config = tmp_path / "nni.yaml"
    config.write_text(
        "trialCommand: python3 -c 'import nni; nni.get_next_parameter(); nni.report_final_result(0.5)'\n"
        "trialConcurrency: 1\nsearchSpace: {x: {_type: choice, _value: [1]}}\n"
        "tuner: {name: Evolution, classArgs: {population_size: 20}}\ntrainingService: {platform: local}\n"
    )
    found = nni_experiment.experiment_config(config)
    assert found.training_service.platform == "local"
    process = start(recipe, tmp_path / "out", "--nni-config", str(config), "--trials", "1")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert printed.strip().startswith("nns: no trial succeeded: ")
    assert printed.strip().endswith("see .nni")


def test_paths_of_weights_become_absolute(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    search = {"model.checkpoint": ["a.safetensors", "b.safetensors"]}
    run_sweep(recipe, tmp_path / "out", {"sweep.search": search, "model.initial": "c.safetensors"})
    files = [trial["model.checkpoint"] for trial in engine.calls[0]["plan"]["trials"]]
    assert files == [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert str(tmp_path / "c.safetensors") in (tmp_path / "out" / ".plan" / "recipe.yaml").read_text()


def test_numbers_of_reports() -> None:
    report = {"a": {"b": 2, "c": None, "d": True}}
    assert number_of(report, "a.b") == 2.0
    for name, message in (("a.x", "expected one of b, c, d instead of 'x'"), ("a.c", "is None"), ("a.d", "is True")):
        with pytest.raises(RecipeError, match=message):
            number_of(report, name)


def test_a_trial_does_the_job(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(monkeypatch)
    monkeypatch.chdir(tmp_path)
    run_sweep(recipe, tmp_path / "out", {"sweep.metric": "subnet.macs", "sweep.maximize": False})
    folder = tmp_path / "out" / ".plan"
    numbers = run_trial(folder, {"trial": 3}, 0)
    report = json.loads((tmp_path / "out" / "trials" / "003" / "report.json").read_text())
    assert report["recipe"]["ratio"] == 0.6
    assert report["recipe"]["criterion"]["name"] == "mean_weight"
    assert numbers["default"] == -report["subnet"]["macs"]
    assert numbers["number"] == 3
    assert numbers["chosen"] == {"ratio": 0.6, "criterion.name": "mean_weight"}
    assert Path.cwd() == tmp_path, "where nns sweep was called"
    assert numbers["balanced_accuracy"] == report["subnet"]["evaluation"]["mean_balanced_accuracy"]
    assert numbers["latency_ms"] == report["latency"]["candidate"]["p50_ms"]
    with pytest.raises(SweepError, match="does not reproduce its torch model"):
        run_trial(folder, {"measure.rtol": 0, "measure.atol": 0}, 5)
    assert "does not reproduce" in (tmp_path / "out" / "trials" / "005.error").read_text()


def start(recipe: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from nns_plugin.cli import main; main()", "sweep", str(recipe), "--quiet"]
    return subprocess.Popen(
        [*command, "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
        start_new_session=True,
    )


def descendants(process: subprocess.Popen[str]) -> list[Any]:
    return psutil.Process(process.pid).children(recursive=True)


def ended(output: Path) -> int:
    file = output / "sweep.json"
    return len(json.loads(file.read_text())["trials"]) if file.exists() else 0


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, "nni_node"),
        (signal.SIGINT, "nni_node"),
        (signal.SIGTERM, "nns_plugin.jobs.trial"),
        (signal.SIGINT, "nns_plugin.jobs.trial"),
    ],
)
def test_interrupted_at_any_time_it_leaves_no_process(tmp_path: Path, number: int, moment: str) -> None:
    """As soon as NNI's manager starts, and as soon as a trial does."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    process = start(recipe, tmp_path / "out")
    seen: dict[int, Any] = {}
    deadline = time.monotonic() + 300
    while not any(moment in " ".join(command(each)) for each in seen.values()):
        seen.update({each.pid: each for each in descendants(process)})
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
    process.send_signal(number)
    printed = process.communicate(timeout=120)[0]
    _, alive = psutil.wait_procs(list(seen.values()), timeout=60)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    left = [each for each in psutil.process_iter() if str(tmp_path) in " ".join(command(each))]
    assert left == []
    assert "Traceback" not in printed
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "rerun to resume" in printed


def command(process: Any) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return []


def test_killed_midway_it_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("[semantic, mean_weight]", "[semantic]"))
    output = tmp_path / "out"
    first = start(recipe, output)
    seen: dict[int, Any] = {}
    deadline = time.monotonic() + 300
    while not ended(output):
        seen.update({process.pid: process for process in descendants(first)})
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    seen.update({process.pid: process for process in descendants(first)})
    first.kill()
    first.communicate(timeout=120)
    assert len(seen) >= 3
    _, alive = psutil.wait_procs(list(seen.values()), timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    report = (output / "trials" / "000" / "report.json").stat().st_mtime
    second = start(recipe, output)
    printed = second.communicate(timeout=300)[0]
    assert second.returncode == 0, printed
    assert "2 of 2 trials" in printed
    assert (output / "trials" / "000" / "report.json").stat().st_mtime == report, "the first is not done again"
    assert (output / "pareto.png").exists()
