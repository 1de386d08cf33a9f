"""A classifier of four animals, its data, and subnets of it with their accuracy."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from nns_plugin import Subnet
from nns_plugin.evaluation.evaluation import evaluate
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.extraction import extract_subnet
from nns_plugin.jobs.training import train_classifier

LABELS = 4
NAMES = ("ant", "bee", "cat", "dog")


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, LABELS))


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(LABELS, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % LABELS
    inputs = centres[labels] + 0.8 * torch.randn(count, 10, generator=generator)
    return list(zip(inputs.split(100), labels.split(100), strict=True))


@functools.cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = make()
    train_classifier(model, batches(1200, 1), epochs=4, learning_rate=0.01, weight_decay=0.0)
    return model


def extracted(**options: Any) -> Subnet:
    loader = batches(800, 2)
    return extract_subnet(trained(), loader[0][0][:2], loader, **{"label_names": NAMES, **options})


def accuracy(subnet: Subnet, loader: Any) -> float:
    logits, truth = predict(subnet.materialise(make), loader)
    found = evaluate(logits, truth, subnet.labels.outputs, subnet.labels.indices, NAMES).mean_balanced_accuracy
    assert found is not None
    return found


def dense_accuracy(labels: list[int], loader: Any) -> float:
    logits, truth = predict(trained(), loader)
    found = evaluate(logits, truth, (0, 1, 2, 3), labels, NAMES).mean_balanced_accuracy
    assert found is not None
    return found
