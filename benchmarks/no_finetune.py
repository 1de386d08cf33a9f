"""Accuracy after removal without any training: which importance selects x how the survivors compensate, on MNIST.

A perceptron 784-300-100-10 is trained once a seed. Every importance then removes the same share of both hidden layers,
so that all rows of a column have the same MACs; every compensation sees the same training images. Importances that
need gradients (Taylor, Hessian) get labels as well. Accuracy is that of the 10 000 test images.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from data import add_data_dir, read_mnist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin import calibrate
from nns_plugin.adapters.dependency_graph import unit_groups
from nns_plugin.adapters.torch_pruning import DistinctivenessImportance, compensated_step

RATIOS = (0.5, 0.7, 0.8, 0.9)
GOALS = (97.8, 97.3, 96.5, 93.5)
METHODS = ("none", "least_squares", "refit")
EPOCHS, LEARNING_RATE, BATCH_SIZE = 8, 1e-3, 128
HESSIAN_INPUTS = 256

Importance = Callable[[nn.Module], Any]


def main() -> None:
    """Train, prune in every way, and print one table over all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_dir(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=10_000, help="training images for statistics and refit")
    options = parser.parse_args()
    train, test = (read_mnist(options.data_dir, split) for split in ("train", "t10k"))
    results: dict[tuple[str, str], list[list[float]]] = {}
    dense = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = trained(*train)
        dense.append(accuracy(model, *test))
        chosen = torch.randperm(len(train[0]))[: options.calibration]
        for key, row in pruned(model, train[0][chosen], train[1][chosen], test):
            results.setdefault(key, []).append(row)
    print_table(results, dense)


def trained(images: Tensor, labels: Tensor) -> nn.Sequential:
    """A perceptron 784-300-100-10 after eight epochs of Adam."""
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for _ in tqdm(range(EPOCHS), desc="training", leave=False):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that are answered right."""
    return 100 * float((model(images).argmax(1) == labels).double().mean())


def pruned(
    model: nn.Sequential, images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]
) -> list[tuple[tuple[str, str], list[float]]]:
    """For each importance and compensation the test accuracy at each ratio."""
    loader = list(images.split(1000))
    statistics = calibrate(model, loader, unit_groups(model, images[:2], [model[4]]), gram=True)
    importances: dict[str, Importance] = {
        "random": lambda model: tp.importance.RandomImportance(),
        "L1": lambda model: tp.importance.MagnitudeImportance(p=1),
        "L2": lambda model: tp.importance.MagnitudeImportance(p=2),
        "LAMP": lambda model: tp.importance.LAMPImportance(p=2),
        "Taylor": lambda model: with_gradients(tp.importance.TaylorImportance(), model, images, labels),
        "Hessian": lambda model: with_hessian(tp.importance.HessianImportance(), model, images, labels),
        "pairwise (ours)": lambda model: DistinctivenessImportance(statistics),
        "span (ours)": lambda model: DistinctivenessImportance(statistics, mode="span"),
    }
    rows = []
    for name, make in tqdm(importances.items(), desc="pruning", leave=False):
        for method in METHODS:
            row = []
            for ratio in RATIOS:
                smaller = copy.deepcopy(model)
                pruner = tp.pruner.BasePruner(
                    smaller,
                    images[:2],
                    importance=make(smaller),
                    pruning_ratio=ratio,
                    ignored_layers=[smaller[4]],
                    in_channel_groups={},
                    out_channel_groups={},
                    num_heads={},
                    channel_groups={},
                )
                compensated_step(pruner, statistics, method=method, loader=loader)
                row.append(accuracy(smaller, *test))
            rows.append(((name, method), row))
    return rows


def with_gradients(importance: Any, model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    """An importance whose model holds the gradients of the mean loss."""
    nn.functional.cross_entropy(model(images), labels).backward()
    return importance


def with_hessian(importance: Any, model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    """An importance that has seen the gradient of each input's loss."""
    importance.zero_grad()
    losses = nn.functional.cross_entropy(model(images[:HESSIAN_INPUTS]), labels[:HESSIAN_INPUTS], reduction="none")
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)
    return importance


def print_table(results: dict[tuple[str, str], list[list[float]]], dense: list[float]) -> None:
    """Mean and standard deviation over the seeds; the goals below."""
    table = Table(
        title=f"784-300-100-10 on MNIST, no training after removal; test accuracy in %, {len(dense)} seeds, "
        f"dense {np.mean(dense):.2f} (lowest {min(dense):.2f})"
    )
    for column in ("importance", "compensation"):
        table.add_column(column)
    for ratio in RATIOS:
        table.add_column(f"{100 * ratio:.0f} % removed", justify="right")
    for (name, method), rows in results.items():
        values = np.array(rows)
        spread = values.std(0, ddof=1) if len(rows) > 1 else np.zeros(len(RATIOS))
        cells = [f"{mean:.1f} +- {deviation:.1f}" for mean, deviation in zip(values.mean(0), spread, strict=True)]
        table.add_row(name if method == METHODS[0] else "", method, *cells, end_section=method == METHODS[-1])
    console = Console(width=120)
    console.print(table)
    best = np.array(results["span (ours)", "refit"]).mean(0)
    for ratio, goal, value in zip(RATIOS, GOALS, best, strict=True):
        verdict = "holds" if value >= goal else "MISSED"
        print(f"span with refit, {100 * ratio:.0f} % removed: {value:.2f}, goal {goal}: {verdict}")


if __name__ == "__main__":
    main()
