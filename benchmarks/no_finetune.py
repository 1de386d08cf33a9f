"""Accuracy after removal without any training: which importance selects x how the kept units compensate.

MNIST: a perceptron 784-300-100-10 is trained once a seed; every importance removes the same share of both hidden
layers. ResNet-20 on CIFAR-10: importances rank the units of all groups together (torch-pruning's global mode), with
the ratio that reaches a given reduction of MACs, found by bisection; statistics, batch norms
and refit see the same unlabelled training images, those of a seed. Importances that need gradients get the labels, too.
Accuracy is that of the 10 000 test images.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from data import add_data_dir, read_cifar10, read_mnist
from resnet20 import load_resnet20, normalised
from rich.console import Console
from rich.table import Table
from selections import accuracy, host_importances, maker, ratio_for
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin import calibrate
from nns_plugin.adapters.torch_pruning import (
    DistinctivenessImportance,
    MeanWeightImportance,
    compensated_step,
    count_macs,
)
from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.jobs.training import train_classifier

METHODS = ("none", "least_squares", "refit")
MNIST_RATIOS, MNIST_GOALS = (0.5, 0.7, 0.8, 0.9), (97.8, 97.3, 96.5, 93.5)
MNIST_EPOCHS, MNIST_RATE, MNIST_BATCH, MNIST_IMAGES = 8, 3e-3, 128, 10_000
SPEED_UPS, RESNET_GOALS = (1.48, 1.89, 2.94, 4.10), (84.5, 82.5, 74.5, 62.5)
RESNET_IMAGES = 1024
SPAN, BALANCED = "span (ours)", "span per MAC (ours)"

Row = tuple[str, str, list[float], list[float]]  # importance, compensation, accuracies, speed-ups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_dir(parser)
    parser.add_argument("--parts", nargs="+", choices=["mnist", "resnet20"], default=["mnist", "resnet20"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--importances", nargs="+", help="only these rows of the table")
    options = parser.parse_args()
    for part, run in (("mnist", mnist), ("resnet20", resnet20)):
        if part in options.parts:
            run(options)


def mnist(options: argparse.Namespace) -> None:
    train, test = (read_mnist(options.data_dir, split) for split in ("train", "t10k"))
    rows: list[Row] = []
    dense = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        data = torch.utils.data.TensorDataset(*train)
        loader = torch.utils.data.DataLoader(data, MNIST_BATCH, shuffle=True)
        train_classifier(model, loader, epochs=MNIST_EPOCHS, learning_rate=MNIST_RATE, weight_decay=0.01)
        dense.append(accuracy(model, *test))
        chosen = torch.randperm(len(train[0]))[:MNIST_IMAGES]
        rows += compared(
            model, train[0][chosen], train[1][chosen], test, options.importances, MNIST_RATIOS, across=False
        )
    columns = [f"{100 * ratio:.0f} % removed" for ratio in MNIST_RATIOS]
    show("784-300-100-10 on MNIST", rows, dense, columns, MNIST_GOALS, SPAN)


def resnet20(options: argparse.Namespace) -> None:
    model = load_resnet20(options.data_dir)
    images, labels = read_cifar10(options.data_dir, "train")
    test_images, test_labels = read_cifar10(options.data_dir, "test")
    test = normalised(test_images), test_labels
    rows: list[Row] = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        chosen = torch.randperm(len(images))[:RESNET_IMAGES]
        inputs = normalised(images[chosen])
        rows += compared(model, inputs, labels[chosen], test, options.importances, SPEED_UPS, across=True)
    columns = [f"{speed_up}x fewer MACs" for speed_up in SPEED_UPS]
    dense = [accuracy(model, *test)] * len(options.seeds)
    show("ResNet-20 on CIFAR-10, global pruning at equal MACs", rows, dense, columns, RESNET_GOALS, BALANCED)


def compared(
    dense: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    test: tuple[Tensor, Tensor],
    wanted: list[str] | None,
    points: tuple[float, ...],
    across: bool,
) -> list[Row]:
    """For each importance and compensation the test accuracy at each point: a ratio, or a speed-up across groups."""
    head = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)][-1]
    loader, example = list(inputs.split(256 if across else 1000)), inputs[:1]
    statistics = calibrate(dense, loader, unit_groups(dense, inputs[:2], [head]), gram=True)
    model = copy.deepcopy(dense)  # holds the gradients that some importances read
    importances: dict[str, tuple[Any, nn.Module]] = {
        name: (importance, model) for name, importance in host_importances(model, inputs, labels).items()
    }
    importances["mean weight (ours)"] = MeanWeightImportance(), model
    importances["pairwise (ours)"] = DistinctivenessImportance(statistics), dense
    importances[SPAN] = DistinctivenessImportance(statistics, mode="span"), dense
    if across:
        importances[BALANCED] = DistinctivenessImportance.for_macs(dense, example, loader, statistics), dense
    rows = []
    bar = tqdm([name for name in importances if wanted is None or name in wanted], leave=False)
    for name in bar:
        make = maker(*importances[name], example, [head], across)
        ratios = [ratio_for(point, make, dense, example) if across else point for point in points]
        for method in METHODS:
            accuracies, speed_ups = [], []
            for ratio in ratios:
                bar.set_description(f"{name}, {method}, {ratio:.2f}")
                smaller = copy.deepcopy(dense)
                compensated_step(make(smaller, ratio), statistics, method, loader)
                accuracies.append(accuracy(smaller, *test))
                speed_ups.append(count_macs(dense, example)[0] / count_macs(smaller, example)[0])
            rows.append((name, method, accuracies, speed_ups))
    return rows


def show(
    title: str, rows: list[Row], dense: list[float], columns: list[str], goals: tuple[float, ...], best: str
) -> None:
    """Mean and standard deviation over the seeds, the MACs left, and whether the goals are met."""
    seeds = len(dense)
    table = Table(
        title=f"{title}, no training after removal; test accuracy in %, {seeds} seeds, dense {np.mean(dense):.2f} "
        f"(lowest {min(dense):.2f})"
    )
    for column in ("importance", "compensation", *columns, "MACs / dense"):
        table.add_column(column, justify="left" if column in ("importance", "compensation") else "right")
    means: dict[tuple[str, str], np.ndarray] = {}
    for name, method in dict.fromkeys(row[:2] for row in rows):
        values = np.array([row[2] for row in rows if row[:2] == (name, method)])
        reached = np.array([row[3] for row in rows if row[:2] == (name, method)]).mean(0)
        means[name, method] = values.mean(0)
        spread = values.std(0, ddof=1) if seeds > 1 else np.zeros(len(columns))
        cells = [f"{mean:.1f} +- {deviation:.1f}" for mean, deviation in zip(values.mean(0), spread, strict=True)]
        share = " ".join(f"{1 / factor:.2f}" for factor in reached)
        table.add_row(name if method == METHODS[0] else "", method, *cells, share, end_section=method == METHODS[-1])
    Console(width=140).print(table)
    hosts = [name for name, method in means if method == "none" and "ours" not in name]
    for place, (column, goal) in enumerate(zip(columns, goals, strict=True)):
        if (best, "refit") in means:
            value = means[best, "refit"][place]
            print(f"{best} with refit, {column}: {value:.2f}, goal {goal}: {'holds' if value >= goal else 'MISSED'}")
        for method in METHODS if hosts else ():
            winner = max(hosts, key=lambda name: means[name, method][place])
            print(f"  best of torch-pruning's with {method}: {winner} {means[winner, method][place]:.2f}", end="")
        if hosts:
            gains = [means[name, "refit"][place] - means[name, "none"][place] for name in hosts]
            print(f"  refit adds {min(gains):.1f} to {max(gains):.1f} to them")


if __name__ == "__main__":
    main()
