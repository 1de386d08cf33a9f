"""Recipes for a model and data of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CENTRES = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 3

def model(hidden=32, outputs=4):
    torch.manual_seed(1)
    layers = nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)

def flat():
    return nn.Sequential(nn.Linear(12, 4))

def loader(count, seed, nan=False):
    labels = torch.arange(count) % 4
    inputs = CENTRES[labels] + torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    if nan:
        inputs[0, 0] = torch.nan
    return DataLoader(TensorDataset(inputs, labels), 32)

def data(**changes):
    made = {
        "calibration": loader(256, 1), "test": loader(128, 2), "train": loader(256, 3), "validation": loader(256, 4),
        "example_inputs": torch.randn(2, 12), "label_names": ["ant", "bee", "cat", "dog"],
    }
    return {**made, **changes}

def data_nan():
    return data(calibration=loader(64, 1, nan=True))

def data_empty():
    return data(calibration=[])

def data_wide():
    return data(example_inputs=torch.randn(2, 13))

def data_bare():
    return data(calibration=[torch.randn(8, 12)])

def data_odd():
    return data(calibration=[("a", "b", "c")])

def data_untrained():
    return data(train=None)

def data_unseen():
    inputs, labels = loader(256, 1).dataset.tensors
    keep = labels != 2
    return data(calibration=DataLoader(TensorDataset(inputs[keep], labels[keep]), 32))

def data_many():
    return data(calibration=[(torch.randn(8, 12), torch.full((8,), 9))])

def data_keys():
    return {"calibration": [], "tests": []}

def data_none():
    return None

def data_generator():
    return data(calibration=(batch for batch in loader(64, 1)))

def data_train_generator():
    return data(train=(batch for batch in loader(64, 1)))

def only(whole, chosen=(1, 3)):
    inputs, labels = whole.dataset.tensors
    keep = torch.isin(labels, torch.tensor(chosen))
    return DataLoader(TensorDataset(inputs[keep], labels[keep]), 32)

def data_inside():
    return data(test=only(loader(128, 2)))

def data_undecided():
    return data(validation=None)

def data_no_test():
    return data(test=[])

def data_counted():
    return data(label_names=4)

def data_train_wrong():
    return data(train=[(torch.randn(8, 12), torch.full((8,), -1))])

def data_test_wrong():
    return data(test=[(torch.randn(8, 12), torch.tensor([0, 1, 2, 3, 9, 1, 3, 3]))])

def data_other_shape():
    return data(calibration=[(torch.randn(8, 5), torch.arange(8) % 4)])

def data_missing_file():
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, place):
            raise FileNotFoundError(2, "No such file", "image.png")
    return data(calibration=DataLoader(Images(), 4))

def data_numbered():
    return data(label_names=["3", "1", "0", "2"])

def data_exit():
    raise SystemExit(0)

def normed():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes recipes for the factories above; training is short, measuring shorter."""
    from nns_plugin.jobs.recipe import Recipe

    (tmp_path / "user_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "user_factories", raising=False)

    def make(**changes: Any) -> Recipe:
        content: dict[str, Any] = {
            "model": {"factory": "user_factories:model"},
            "data": {"factory": "user_factories:data"},
            "labels": ["bee", "dog"],
            "ratio": 0.5,
            "train": {"epochs": 3},
            "measure": {"samples": 20},
        }
        return Recipe.model_validate({**content, **changes})

    return make
