"""One of two processes that calibrate together; test_distributed.py runs it, and it prints what happened as JSON."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nns_plugin import Port, Statistics, UnitGroup, calibrate

rank, folder = int(sys.argv[1]), Path(sys.argv[2])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.producer, self.layer = nn.Linear(1, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def failing() -> Iterator[Tensor]:
    raise RuntimeError("from the loader")
    yield


torch.set_num_threads(1)
torch.manual_seed(0)
model = Model()
x, labels = torch.randint(-9, 10, (20, 4)) / 4, torch.arange(20) % 3
units = torch.arange(4)
groups = (UnitGroup("producer", 4, (Port("producer", units, units),), (Port("layer", units, units),)),)
whole = calibrate(model, [(x, labels)], groups)
mine = [(x[:13], labels[:13])] if rank == 0 else [(x[13:15], labels[13:15]), (x[15:], labels[15:])]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
)
other = Model()
torch.nn.init.constant_(other.layer.weight, float(rank))


def together() -> Statistics:
    return calibrate(model, mine, groups)


scenarios: dict[str, Callable[[], Statistics]] = {
    "whole": together,
    "empty": lambda: calibrate(model, mine if rank == 0 else [], groups),
    "nan": lambda: calibrate(model, mine if rank == 0 else [(x * torch.nan, labels)], groups),
    "raises": lambda: calibrate(model, mine if rank == 0 else failing(), groups),
    "no groups": lambda: calibrate(model, mine, groups if rank == 0 else ()),
    "other weights": lambda: calibrate(other, mine, groups),
    "unlabelled": lambda: calibrate(model, mine if rank == 0 else [x[13:]], groups),
    "both": lambda: calibrate(model, [], groups),
    "again": together,
}
answers = {}
for name, scenario in scenarios.items():
    try:
        statistics = scenario()
        answers[name] = "ok"
        if name == "whole":
            statistics.save(folder / f"rank{rank}.safetensors")
            if rank == 0:
                whole.save(folder / "whole.safetensors")
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
torch.distributed.barrier()
torch.distributed.destroy_process_group()
print(json.dumps(answers))
