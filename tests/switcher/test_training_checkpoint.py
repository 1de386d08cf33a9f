"""Checkpoints of switched training: training resumes bit for bit, and files of other trainings are rejected."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from switch_models import ROWS, switcher_for  # noqa: E402
from switch_training import same_state, task, trained  # noqa: E402

from nns_plugin.errors import (  # noqa: E402
    CheckpointError,
)
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.switcher.network import SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.training import Switched  # noqa: E402


class Halved:
    """A loader whose order and inputs are drawn from the random numbers of torch, NumPy and Python."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place in torch.randperm(len(self.batches)).tolist():
            x, y = self.batches[place]
            yield x + random.random() + torch.from_numpy(np.random.rand(6)).float(), y


@pytest.mark.parametrize("kind", ["global", "generator", "batches"])
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path, stop: int, kind: str) -> None:
    def run(checkpoint: Path | None, stop_after: int | None) -> tuple[nn.Module, SwitcherNetwork, Switched]:
        model, batches = task(2, dropout=0.3)
        loader: Any = Halved(batches)
        if kind == "generator":
            data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
            generator = torch.Generator().manual_seed(3)
            loader = torch.utils.data.DataLoader(data, 12, shuffle=True, generator=generator)
        if kind == "batches":
            data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
            order = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(4))
            loader = torch.utils.data.DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(order, 12, False))
        switcher = switcher_for(model, ROWS)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        result = trained(
            model,
            loader,
            switcher,
            epochs=5,
            optimizer=optimizer,
            schedulers=[torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)],
            validation=batches[:2],
            checkpoint=checkpoint,
            callbacks=[lambda epoch: epoch.number == stop_after],
        )
        return model, switcher, result

    def seed(value: int) -> None:
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value)

    seed(11)
    whole = run(None, None)
    file = tmp_path / "training.safetensors"
    seed(11)
    assert len(run(file, stop)[2].epochs) == stop
    seed(99)  # comes back from the file
    again = run(file, None)
    assert same_state(whole[0], again[0])
    assert same_state(whole[1], again[1])
    assert whole[2].epochs == again[2].epochs
    assert all(torch.equal(values, again[2].factors[name]) for name, values in whole[2].factors.items())


def test_a_checkpoint_that_does_not_fit_is_not_changed(tmp_path: Path) -> None:
    model, batches = task()
    switcher = switcher_for(model, ROWS)
    file = tmp_path / "training.safetensors"
    trained(model, batches, switcher, checkpoint=file)
    content = file.read_bytes()
    before = copied(model)
    other = switcher_for(model, ROWS, channels=3)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        trained(model, batches, other, checkpoint=file)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        trained(model, batches, switcher, checkpoint=file, optimizer=optimizer, schedulers=[scheduler])
    for options in ({"optimizer": torch.optim.Adam(model.parameters())}, {"optimizer": torch.optim.SGD([
        {"params": [*model[0].parameters()]}, {"params": [*model[4].parameters()]}
    ], 0.1, momentum=0.9)}):  # fmt: skip
        with pytest.raises(CheckpointError, match="belongs to another training"):
            trained(model, batches, switcher, checkpoint=file, **options)
    with pytest.raises(CheckpointError, match="other options: its task_steps is 2, not 3"):
        trained(model, batches, switcher, checkpoint=file, task_steps=3)
    assert same_state(before, model)
    assert file.read_bytes() == content
    file.write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        trained(model, batches, switcher, checkpoint=file)
    assert same_state(before, model)


def test_buffers_outside_the_state_dictionary_resume(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def get_extra_state(self) -> Any:
            return {"kind": "counting"}

        def set_extra_state(self, state: Any) -> None:
            """Nothing to do."""

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.head(torch.relu(self.first(x))) / (1 + self.seen)

    found = []
    for stops in ((None,), (2, None)):
        torch.manual_seed(0)
        model = Counting()
        for stop in stops:
            trained(
                model, task()[1], switcher_for(model, ROWS), epochs=4, checkpoint=tmp_path / str(len(stops)),
                callbacks=[lambda epoch, stop=stop: epoch.number == stop],
            )  # fmt: skip
            if stop:
                model.seen.zero_()
        found.append(model)
    whole, again = ([*model.parameters(), *model.buffers()] for model in found)
    assert all(torch.equal(left, right) for left, right in zip(whole, again, strict=True))
