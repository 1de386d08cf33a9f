"""The checkpoint of the search: interrupted searches resume, and files of other searches are rejected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from searches import INPUTS, by_magnitude, net, same, searched, task  # noqa: E402

from nns_plugin.errors import CheckpointError, NNSError  # noqa: E402
from nns_plugin.synapses.minimal import MinimalNetwork, minimal_network  # noqa: E402
from nns_plugin.synapses.options import MinimalNetworkOptions  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

OPTIONS = MinimalNetworkOptions(schedule=(0.5, 0.2, 0.05), max_drop=0.05, max_steps=14)


@pytest.mark.parametrize("fails_at", [0, 1, 3, 6])
def test_an_interrupted_search_ends_as_an_uninterrupted_one(fails_at: int, tmp_path: Path) -> None:
    model, before, train, evaluate = task()
    whole = minimal_network(model, before, train, evaluate, example_inputs=INPUTS, options=OPTIONS)
    file = tmp_path / "search.safetensors"
    calls = 0

    def killed(model: nn.Module) -> None:
        nonlocal calls
        calls += 1
        train(model)
        if calls == fails_at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimal_network(
            model, before, killed, evaluate, example_inputs=INPUTS, options=replace(OPTIONS, checkpoint=file)
        )
    assert file.exists()
    again = minimal_network(
        model, before, train, evaluate, example_inputs=INPUTS, options=replace(OPTIONS, checkpoint=file)
    )
    assert same(whole, again)

    def untouchable(model: nn.Module) -> None:
        raise AssertionError("a search that has ended trains nothing")

    assert same(
        whole,
        minimal_network(
            model, before, untouchable, evaluate, example_inputs=INPUTS, options=replace(OPTIONS, checkpoint=file)
        ),
    )


def test_modes_left_behind_by_evaluate_do_not_matter(tmp_path: Path) -> None:
    """With batch norm and dropout, an evaluation in evaluation mode, and a training that sets no mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.randn(64, 4), torch.arange(64) % 2
    seen: list[bool] = []

    def train(model: nn.Module) -> None:
        seen.append(model.training)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(model(x), y))

    def run(**more: Any) -> MinimalNetwork:
        options = MinimalNetworkOptions(schedule=(0.2,), max_drop=1.0, **more)
        return minimal_network(model, None, train, evaluate, example_inputs=x[:2], scores=by_magnitude, options=options)

    whole = run(max_steps=5)
    assert seen == [True] * 5
    for steps in (2, 5):
        again = run(max_steps=steps, checkpoint=tmp_path / "file")
    assert same(whole, again)


def forge(file: Path, change: dict[str, Any]) -> None:
    """Change the progress in a checkpoint."""
    with safe_open(file, "pt") as content:
        metadata, tensors = dict(content.metadata()), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    header = json.loads(metadata["nns"])
    header["progress"] |= change
    save_file(tensors, file, metadata={**metadata, "nns": json.dumps(header)})


def test_a_checkpoint_of_another_search_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "search.safetensors"
    options: dict[str, Any] = {"schedule": (0.5,), "max_steps": 1, "checkpoint": file}
    searched(net(), lambda model: 1.0, **options)
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"belongs to another search: its options"):
        searched(net(), lambda model: 1.0, **options, seed=3)
    with pytest.raises(CheckpointError, match=r"belongs to another search: its parent"):
        searched(net(1), lambda model: 1.0, **options)
    snapshots = [WeightSnapshot(net(seed)) for seed in (1, 2)]
    with pytest.raises(CheckpointError, match=r"belongs to another search: its snapshot is scores"):
        searched(net(), lambda model: 1.0, **{**options, "scores": None}, snapshot=snapshots[0])
    assert file.read_bytes() == content
    file.write_bytes(content[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        searched(net(), lambda model: 1.0, **options)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="its format is None, expected 'nns-plugin minimal network 1'"):
        searched(net(), lambda model: 1.0, **options)
    metadata = {"format": "nns-plugin minimal network 1", "nns": json.dumps({"parent": "x"})}
    save_file({"weight": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        searched(net(), lambda model: 1.0, **options)
    for change in ({"rung": 99}, {"rung": -1}, {"rung": "x"}, {"tried": "abc"}, {"reference": float("nan")}):
        file.write_bytes(content)
        forge(file, change)
        with pytest.raises(CheckpointError, match="damaged"):
            searched(net(), lambda model: 1.0, **options)
    with pytest.raises(NNSError, match="choose a folder that exists"):
        searched(net(), lambda model: 1.0, **{**options, "checkpoint": tmp_path / "no" / "file"})
