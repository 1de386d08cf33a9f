"""Accuracy after two epochs of fine-tuning: the shared ResNet-20 at 2.1x fewer MACs, per importance.

Importances rank the units of all groups together, at the ratio that reaches the speed-up. torch-pruning's get batch
norms recalibrated after removal, ours its compensation as well; then all are trained with the same schedule, data order
and seed. Test accuracy before and after.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from data import add_data_dir, read_cifar10
from no_finetune import BALANCED
from resnet20 import load_resnet20, normalised
from rich.console import Console
from rich.table import Table
from selections import accuracy, host_importances, maker, ratio_for
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin import calibrate
from nns_plugin.adapters.torch_pruning import DistinctivenessImportance, compensated_step, count_macs
from nns_plugin.adapters.torch_pruning.groups import unit_groups

SPEED_UP, EPOCHS, RATE, MOMENTUM, DECAY, BATCH = 2.1, 2, 0.05, 0.9, 5e-4, 128
CALIBRATION_IMAGES = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_dir(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--importances", nargs="+", help="only these")
    options = parser.parse_args()
    model = load_resnet20(options.data_dir)
    images, labels = read_cifar10(options.data_dir, "train")
    images = normalised(images)
    test_images, test_labels = read_cifar10(options.data_dir, "test")
    test = normalised(test_images), test_labels
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in options.seeds:
        torch.manual_seed(seed)
        chosen = torch.randperm(len(images))[:CALIBRATION_IMAGES]
        for name, pruned in candidates(model, images[chosen], labels[chosen], options.importances):
            before = accuracy(pruned, *test)
            torch.manual_seed(seed)
            fine_tune(pruned, images, labels, name)
            speed_up = count_macs(model, images[:1])[0] / count_macs(pruned, images[:1])[0]
            rows.setdefault(name, []).append((before, accuracy(pruned, *test), speed_up))
            print(f"seed {seed}, {name}: {before:.2f} -> {rows[name][-1][1]:.2f} at {speed_up:.2f}x", flush=True)
    show(rows, accuracy(model, *test))


def candidates(
    dense: nn.Module, inputs: Tensor, labels: Tensor, wanted: list[str] | None
) -> list[tuple[str, nn.Module]]:
    """Pruned models, one an importance."""
    loader, example = list(inputs.split(256)), inputs[:1]
    statistics = calibrate(dense, loader, unit_groups(dense, inputs[:2], ["fc"]), gram=True)
    source = copy.deepcopy(dense)
    importances = {name: (found, source) for name, found in host_importances(source, inputs, labels).items()}
    importances[BALANCED] = DistinctivenessImportance.for_macs(dense, example, loader, statistics), dense
    pruned = []
    for name, found in importances.items():
        if wanted is None or name in wanted:
            make = maker(*found, example, ["fc"], across=True)
            smaller = copy.deepcopy(dense)
            pruner = make(smaller, ratio_for(SPEED_UP, make, dense, example))
            compensated_step(pruner, statistics, "refit" if name == BALANCED else "none", loader)
            pruned.append((name, smaller))
    return pruned


def fine_tune(model: nn.Module, images: Tensor, labels: Tensor, title: str, epochs: int = EPOCHS) -> None:
    """SGD with a one-cycle schedule, random crops and flips, in mixed precision (bfloat16).

    Labels are their numbers, or probabilities.
    """
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    model.train().to(memory_format=torch.channels_last)
    with tqdm(total=steps, desc=title, leave=False) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                inputs = augmented(images[batch]).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(inputs), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


def augmented(images: Tensor) -> Tensor:
    """Each image flipped by chance and cropped out of itself padded by 4."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = nn.functional.pad(flipped, (4, 4, 4, 4))
    rows, columns = torch.randint(0, 9, (2, len(images), 1)) + torch.arange(32)
    index = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def show(rows: dict[str, list[tuple[float, float, float]]], dense: float) -> None:
    """Mean and standard deviation over the seeds."""
    seeds = len(next(iter(rows.values())))
    table = Table(
        title=f"ResNet-20 on CIFAR-10 at {SPEED_UP}x fewer MACs, {EPOCHS} epochs of fine-tuning; test accuracy in %, "
        f"{seeds} seeds, dense {dense:.2f}"
    )
    for column in ("importance", "before training", "after training", "each seed", "speed-up"):
        table.add_column(column, justify="left" if column == "importance" else "right")
    for name, found in rows.items():
        values = np.array(found)
        spread = values.std(0, ddof=min(1, seeds - 1))
        cells = [f"{values[:, place].mean():.2f} +- {spread[place]:.2f}" for place in (0, 1)]
        each = " ".join(f"{value:.2f}" for value in values[:, 1])
        table.add_row(name, *cells, each, f"{values[:, 2].mean():.2f}")
    Console(width=130).print(table)
    hosts = {name: np.mean([row[1] for row in found]) for name, found in rows.items() if name != BALANCED}
    if hosts and BALANCED in rows:
        best = max(hosts, key=lambda name: hosts[name])
        ours = np.mean([row[1] for row in rows[BALANCED]])
        verdict = "holds" if ours >= hosts[best] else "MISSED"
        print(f"{BALANCED} with refit {ours:.2f}; best of torch-pruning: {best} {hosts[best]:.2f}: {verdict}")


if __name__ == "__main__":
    main()
