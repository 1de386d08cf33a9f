"""What scoring and removal cost on a ResNet-50: span elimination against torch-pruning's L2, without calibration."""

from __future__ import annotations

import argparse
import copy
import statistics as summary
import time

import torch
import torch_pruning as tp
from data import torchvision_models
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from nns_plugin import calibrate
from nns_plugin.adapters.torch_pruning import DistinctivenessImportance, MeanWeightImportance
from nns_plugin.adapters.torch_pruning.groups import unit_groups

GOAL = 3.0  # times torch-pruning's L2
RATIO, IMAGE_SIZE, CALIBRATION_IMAGES = 0.5, 224, 64  # more positions than the widest stream has units


def main() -> None:
    """Time full steps of pruners that differ in their importance alone, one after the other, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3, help="steps of each importance (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision_models().resnet50(weights=None).eval()
    example = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    groups = unit_groups(model, example, ["fc"])
    images = [torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE) for _ in range(CALIBRATION_IMAGES)]
    statistics = calibrate(model, images, groups, gram=True)
    importances = {
        "L2 (torch-pruning)": lambda: tp.importance.MagnitudeImportance(p=2),
        "mean weight": MeanWeightImportance,
        "pairwise": lambda: DistinctivenessImportance(statistics),
        "span": lambda: DistinctivenessImportance(statistics, mode="span"),
    }
    times: dict[str, list[float]] = {name: [] for name in importances}
    for _ in tqdm(range(options.repetitions), desc="measuring", leave=False):
        for name, importance in importances.items():
            times[name].append(step_seconds(copy.deepcopy(model), example, importance()))
    table = Table(title=f"Scoring and removing {RATIO:.0%} of a ResNet-50's units, {torch.get_num_threads()} threads")
    for column in ("importance", "median, s", "min, s", "max, s", "times L2 (medians)"):
        table.add_column(column, justify="left" if column == "importance" else "right")
    base = summary.median(times["L2 (torch-pruning)"])
    for name, values in times.items():
        median = summary.median(values)
        table.add_row(name, f"{median:.2f}", f"{min(values):.2f}", f"{max(values):.2f}", f"{median / base:.2f}")
    verdict = "holds" if summary.median(times["span"]) <= GOAL * base else "missed"
    table.caption = f"goal: span at most {GOAL} times L2: {verdict}"
    Console(width=110).print(table)


def step_seconds(model: nn.Module, example: torch.Tensor, importance: tp.importance.Importance) -> float:
    """Seconds of building the pruner, which traces the model, and of one step."""
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=RATIO,
        ignored_layers=[model.fc],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
