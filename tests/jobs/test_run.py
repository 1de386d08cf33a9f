"""The main job from recipe to files, on the digits and on a model and data of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nns_plugin import Subnet
from nns_plugin.errors import CriterionError, LabelError, NNSError

pytestmark = pytest.mark.host("onnxruntime")
pytest.importorskip("pydantic", reason="the extra cli is not installed")


@pytest.fixture(scope="module")
def digits_job(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from nns_plugin.jobs.loading import load_recipe
    from nns_plugin.jobs.run import run_job

    output = tmp_path_factory.mktemp("digits") / "out"
    recipe = load_recipe(None, {"measure.samples": 100})
    return run_job(recipe, output), recipe, output


def onnx_answers(path: Path, inputs: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0].argmax(1)


def test_the_default_job_keeps_its_promise(digits_job: Any) -> None:
    report, _, _ = digits_job
    dense, subnet = report.baseline, report.subnet
    assert subnet.parameters <= dense.parameters / 2
    drops = [
        100 * (before.balanced_accuracy - after.balanced_accuracy)
        for before, after in zip(dense.evaluation.labels, subnet.evaluation.labels, strict=True)
    ]
    assert sum(drops) / len(drops) <= 3
    assert max(drops) <= 5
    assert dense.parity.passed
    assert subnet.parity.passed
    assert subnet.outputs == ("3", "5", "other")


def test_the_four_files_and_nothing_else(digits_job: Any) -> None:
    report, _, output = digits_job
    assert sorted(file.name for file in output.iterdir()) == [
        "baseline.onnx",
        "report.json",
        "subnet.onnx",
        "subnet.safetensors",
    ]
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert report.subnet.file_bytes == (output / "subnet.onnx").stat().st_size
    subnet = Subnet.load(output / "subnet.safetensors")
    counted = [value.numel() for name, value in subnet.weights.items() if "running" not in name and "num_" not in name]
    assert sum(counted) == report.subnet.parameters
    assert subnet.output_names == report.subnet.outputs == ("3", "5", "other")
    assert {name: tuple(units.tolist()) for name, units in subnet.kept.items()} == report.kept_units
    from nns_plugin.jobs.models import digits_classifier

    small = subnet.materialise(digits_classifier)
    inputs = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        answers = onnx_answers(output / "subnet.onnx", inputs)
        assert torch.equal(small(inputs).argmax(1), torch.from_numpy(answers))


def test_the_report_names_three_kinds_of_parity_and_what_it_was_measured_on(digits_job: Any) -> None:
    import hashlib
    import os

    import onnxruntime

    from nns_plugin.jobs.data import digits

    report, recipe, output = digits_job
    kinds = [report.baseline.parity.kind, report.subnet.parity.kind, report.removal.kind, report.pruning.kind]
    assert kinds == ["torch against ONNX", "torch against ONNX", "masked against removed", "dense against pruned"]
    assert report.removal.passed
    assert report.removal.max_absolute_error < 1e-3
    assert not report.pruning.passed, "what was removed is missing from the logits"
    data = digits()
    images = torch.cat([inputs for inputs, _ in data.test])
    dense, small = (onnx_answers(output / f"{name}.onnx", images) for name in ("baseline", "subnet"))
    answered = np.where(dense == 3, 0, np.where(dense == 5, 1, 2))
    assert report.pruning.top1_agreement == pytest.approx(np.mean(answered == small), abs=0.003)
    assert report.pruning.inputs == len(images) == 540
    for name, model in (("baseline", report.baseline), ("subnet", report.subnet)):
        file = f"{name}.onnx"
        assert model.sha256 == {file: hashlib.sha256((output / file).read_bytes()).hexdigest()}
    assert report.environment["machine"]["cores"] == os.cpu_count()
    assert report.environment["onnxruntime"]["onnxruntime"] == onnxruntime.__version__
    assert recipe.measure.threads == report.latency.threads


def test_reported_numbers_are_those_of_the_files_on_held_out_data(digits_job: Any) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    report, _, output = digits_job
    pixels, labels = load_digits(return_X_y=True)
    _, inputs, _, truth = train_test_split(pixels, labels, test_size=0.3, stratify=labels, random_state=0)
    images = torch.tensor(inputs, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    dense = onnx_answers(output / "baseline.onnx", images)
    subnet = np.array([3, 5, -1])[onnx_answers(output / "subnet.onnx", images)]
    for answers, model in ((dense, report.baseline), (subnet, report.subnet)):
        for result in model.evaluation.labels:
            digit = int(result.label)
            assert result.recall == pytest.approx((answers[truth == digit] == digit).mean())
            assert result.false_positive_rate == pytest.approx((answers[truth != digit] == digit).mean())
        expected = np.where(np.isin(truth, [3, 5]), truth, -1) == np.where(np.isin(answers, [3, 5]), answers, -1)
        assert model.evaluation.open_set_accuracy == pytest.approx(expected.mean())


def test_the_label_map_travels_in_the_onnx_file(digits_job: Any) -> None:
    import onnx

    _, _, output = digits_job
    metadata = {entry.key: entry.value for entry in onnx.load(output / "subnet.onnx").metadata_props}
    assert json.loads(metadata["nns.labels"]) == ["3", "5", "other"]


def test_figures_that_cannot_be_drawn_do_not_cost_the_job(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nns_plugin.jobs.run import FigureWarning, run_job

    pytest.importorskip("matplotlib", reason="the extra figures is not installed")
    checked = recipe(head="closed", data={"factory": "user_factories:data_inside"})
    run_job(checked, tmp_path / "one", figures=True)  # test data of the set alone is enough
    drawn = {file.name for file in (tmp_path / "one").glob("*.png")}
    assert {"overlap.png", "size.png", "activity-0.png"} <= drawn

    def failing(*_: object) -> Any:
        raise LabelError("nothing to see")
        yield

    monkeypatch.setattr("nns_plugin.jobs.run.job_figures", failing)
    with pytest.warns(FigureWarning, match="some figures are left out: nothing to see"):
        run_job(checked, tmp_path / "two", figures=True)
    assert {"report.json", "subnet.onnx"} <= {file.name for file in (tmp_path / "two").iterdir()}


def test_a_figure_that_is_a_folder_is_found_before_anything_is_moved(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.jobs.run import run_job

    pytest.importorskip("matplotlib", reason="the extra figures is not installed")
    (tmp_path / "out" / "size.png").mkdir(parents=True)
    with pytest.raises(NNSError, match="size.png' is a folder"):
        run_job(recipe(), tmp_path / "out", figures=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["size.png"]


def test_a_checkpoint_is_used(recipe: Any, tmp_path: Path) -> None:
    import user_factories

    from nns_plugin.jobs.run import run_job

    weights = {name: value * 0 for name, value in user_factories.model().state_dict().items()}
    weights["4.bias"] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    save_file(weights, tmp_path / "weights.safetensors")
    section = {"factory": "user_factories:model", "checkpoint": tmp_path / "weights.safetensors"}
    state = torch.get_rng_state()
    report = run_job(recipe(model=section, train={"epochs": 0}, head="keep"), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert [result.recall for result in report.baseline.evaluation.labels] == [1.0, 0.0]  # it always answers "bee"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"factory": "user_factories:data_nan"}}, "NaN, infinite or overflowing activations in batch 0"),
        ({"data": {"factory": "user_factories:data_empty"}}, "yielded no inputs"),
        ({"data": {"factory": "user_factories:data_wide"}}, "cannot run on the example inputs"),
        ({"data": {"factory": "user_factories:data_bare"}}, "no labels"),
        ({"data": {"factory": "user_factories:data_odd"}}, "has 3 parts"),
        ({"data": {"factory": "user_factories:data_unseen"}, "labels": ["cat"]}, "'cat' was never seen"),
        ({"data": {"factory": "user_factories:data_many"}}, r"labels 9\.\.9; expected 0\.\.3"),
        ({"data": {"factory": "user_factories:data_keys"}}, "returned the keys"),
        ({"data": {"factory": "user_factories:data_none"}}, "returned a NoneType"),
        ({"data": {"factory": "user_factories:data_generator"}}, "generator for 'calibration'"),
        ({"data": {"factory": "user_factories:data_train_generator"}}, "generator for 'train'"),
        ({"data": {"factory": "user_factories:data_no_test"}}, "the test loader yielded no inputs"),
        ({"data": {"factory": "user_factories:data_counted"}}, "label_names=4; expected a list"),
        ({"data": {"factory": "user_factories:data_train_wrong"}, "train": {"epochs": 1}}, r"has labels -1\.\.-1"),
        ({"data": {"factory": "user_factories:data_test_wrong"}}, r"the test data has labels 0\.\.9"),
        ({"data": {"factory": "user_factories:data_other_shape"}}, "data.calibration: RuntimeError"),
        ({"data": {"factory": "user_factories:data_missing_file"}}, "data.calibration: FileNotFoundError"),
        ({"data": {"factory": "user_factories:data_exit"}}, "raised SystemExit"),
        ({"criterion": {"name": "semantic", "options": {"labels": [2]}}}, "criterion.options: found 'labels'"),
        ({"criterion": {"name": "semantic", "options": {"statistics": 1}}}, "criterion.options: found 'statistics'"),
        ({"data": {"factory": "user_factories:data_untrained"}}, "train.epochs: the data factory returned no train"),
        ({"model": {"factory": "user_factories:flat"}}, "nothing in this model can be pruned"),
        ({"model": {"factory": "user_factories:data"}}, "expected a torch module"),
        ({"model": {"factory": "user_factories:model", "arguments": {"outputs": 5}}}, r"expected \[N, 4\]"),
        ({"model": {"factory": "user_factories:model", "checkpoint": "none.safetensors"}}, "there is no file"),
        ({"model": {"factory": "user_factories:model", "checkpoint": __file__}}, "not a safetensors file"),
        ({"labels": ["fox"]}, "label 'fox' does not exist"),
        ({"labels": [7]}, "label 7 does not exist"),
        ({"labels": [3], "data": {"factory": "user_factories:data_numbered"}}, "label 3 is ambiguous"),
        ({"ignored_layers": ["nowhere"]}, "ignored layer 'nowhere' is not in the model"),
        ({"criterion": {"name": "semantic", "options": {"measure": "size"}}}, "measure is 'size'"),
        ({"criterion": {"name": "semantic", "options": {"size": 1}}}, "criterion.options"),
        ({"measure": {"samples": 20, "provider": "cuda"}}, "CUDAExecutionProvider"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_left(
    recipe: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from nns_plugin.errors import NNSError
    from nns_plugin.jobs.run import run_job

    quick = {"train": {"epochs": 0}} if "untrained" not in str(changes) else {}
    with pytest.raises(NNSError, match=message):
        run_job(recipe(**{**quick, **changes}), tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


def test_a_closed_head_is_compared_on_the_same_inputs(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.jobs.run import run_job

    report = run_job(recipe(head="closed", train={"epochs": 1}), tmp_path / "out")
    dense, subnet = report.baseline.evaluation, report.subnet.evaluation
    assert (dense.inputs, subnet.inputs) == (64, 64)
    assert [label.inputs for label in dense.labels] == [label.inputs for label in subnet.labels]
    assert dense.open_set_accuracy is None
    assert report.baseline.outputs == ("ant", "bee", "cat", "dog")


def test_names_that_are_numbers_are_names(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.jobs.run import run_job

    section = {"factory": "user_factories:data_numbered"}
    report = run_job(recipe(data=section, labels=["3", "0"], train={"epochs": 0}), tmp_path / "out")
    assert report.subnet.outputs == ("3", "0", "other")


def test_an_output_file_that_is_a_folder_is_found_before_any_work(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.errors import RecipeError
    from nns_plugin.jobs.run import run_job

    (tmp_path / "out" / "report.json").mkdir(parents=True)
    with pytest.raises(RecipeError, match="is a folder"):
        run_job(recipe(data={"factory": "user_factories:never_reached"}), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_checkpoint_that_does_not_fit_names_the_weight(recipe: Any, tmp_path: Path) -> None:
    import user_factories

    from nns_plugin.errors import RecipeError
    from nns_plugin.jobs.run import run_job

    save_file(user_factories.model(hidden=16).state_dict(), tmp_path / "weights.safetensors")
    section = {"factory": "user_factories:model", "checkpoint": tmp_path / "weights.safetensors"}
    with pytest.raises(RecipeError, match=r"'0.weight' is \[16, 12\] in the file and \[32, 12\] in the model"):
        run_job(recipe(model=section), tmp_path / "out")


def test_an_output_that_cannot_be_written_fails_before_any_work(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.errors import RecipeError
    from nns_plugin.jobs.run import run_job

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match="cannot be written"):
        run_job(recipe(data={"factory": "user_factories:never_reached"}), tmp_path / "file" / "out")


def test_earlier_files_survive_a_failure(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin.errors import NNSError
    from nns_plugin.jobs.run import run_job

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("of an earlier run")
    with pytest.raises(NNSError):
        run_job(recipe(labels=["fox"]), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "of an earlier run"


def test_wsf_takes_the_weights_before_training_from_the_job_or_from_a_file(recipe: Any, tmp_path: Path) -> None:
    from nns_plugin import Subnet
    from nns_plugin.jobs.loading import call_factory
    from nns_plugin.jobs.run import run_job
    from nns_plugin.synapses.snapshot import WeightSnapshot

    quick: dict[str, Any] = {"criterion": {"name": "wsf"}, "measure": {"samples": 20, "resamples": 0}}
    run_job(recipe(**quick), tmp_path / "job")
    kept = Subnet.load(tmp_path / "job" / "subnet.safetensors").kept
    made = call_factory("model", "user_factories:model", {})
    other = {name: torch.zeros_like(value) for name, value in made.state_dict().items()}
    WeightSnapshot(other).save(tmp_path / "zeros.safetensors")
    section = {"factory": "user_factories:model", "initial": tmp_path / "zeros.safetensors"}
    run_job(recipe(**quick, model=section), tmp_path / "file")
    from_file = Subnet.load(tmp_path / "file" / "subnet.safetensors").kept
    assert {name: units.tolist() for name, units in kept.items()} != {
        name: units.tolist() for name, units in from_file.items()
    }
    with pytest.raises(CriterionError, match=r"let the job train, or give model.initial"):
        run_job(recipe(**quick, train={"epochs": 0}), tmp_path / "none")
    missing = {"factory": "user_factories:model", "initial": tmp_path / "missing.safetensors"}
    with pytest.raises(NNSError, match=r"there is no file .*missing"):
        run_job(recipe(**quick, model=missing), tmp_path / "none")
