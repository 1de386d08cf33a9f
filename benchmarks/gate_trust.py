"""Can the gate be trusted? A file measured against itself, and against one with twice the work.

Measured against itself, a file must not look faster or slower: the interval of the ratio has to hold 1. Measured
against two nets of its kind in one file, the interval has to lie wholly on one side of 1, the right one. The first is
also shown with a single pair of sessions, whose interval knows nothing of where the weights happen to lie in memory.

Weights are random, so that no data is needed; every measurement has a seed of its own. An interval that holds the truth
in 95 % of all measurements holds it in 19 of 20 or more with a probability of 74 % only: judge by many runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from resnet20 import ResNet20
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin.adapters.onnxruntime import LatencyComparison, LatencyOptions, export, measure_latency

ITSELF_GOAL, TWICE_GOAL = 0.95, 1.0  # shares of the runs
ITSELF, ONE_PAIR, TWICE = "itself", "itself, one pair of sessions", "twice the work"


class Twice(nn.Module):
    """Two nets of one kind on the same input; as their weights differ, nothing of them can be merged."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (64,)),
    "convolutional": (convolutional, (3, 32, 32)),
    "resnet20": (ResNet20, (3, 32, 32)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runs", type=int, default=20, help="measurements of each kind (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=300, help="timed runs of each file in one of them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = {name: measured(name, options) for name in options.models}
    show(found, options)


def measured(name: str, options: argparse.Namespace) -> dict[str, list[LatencyComparison]]:
    """All measurements of one model; the kinds take turns, so that what else the machine does meets each of them."""
    make, shape = MODELS[name]
    torch.manual_seed(options.seed)
    inputs = torch.randn(options.batch, *shape)
    found: dict[str, list[LatencyComparison]] = {ITSELF: [], ONE_PAIR: [], TWICE: []}
    with tempfile.TemporaryDirectory() as folder:
        once = export(make(), inputs, Path(folder, "once.onnx"))
        twice = export(Twice(make), inputs, Path(folder, "twice.onnx"))
        for run in tqdm(range(options.runs), desc=name, leave=False):
            for kind, measurements in found.items():
                measurements.append(
                    measure_latency(
                        {"baseline": twice if kind == TWICE else once, "candidate": once},
                        inputs,
                        LatencyOptions(
                            samples=options.samples,
                            seed=options.seed + run,
                            **({"sessions": 1} if kind == ONE_PAIR else {}),
                        ),
                    )
                )
    return found


def holds_one(found: LatencyComparison) -> bool:
    return found.ratio_low <= 1 <= found.ratio_high


def show(found: dict[str, dict[str, list[LatencyComparison]]], options: argparse.Namespace) -> None:
    """One row a model, and whether the goals hold."""
    sessions = next(iter(found.values()))[ITSELF][0].sessions
    print(
        f"{options.runs} runs of {options.samples} samples, batch {options.batch}, one thread; 95 % intervals of the "
        f"ratio of medians, out of {sessions} pairs of sessions\n"
    )
    columns = (
        "model", "p50 ms", "itself: contains 1.0", "median width", "one pair of sessions: contains 1.0", "median width",
        "twice the work: told apart", "median ratio",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    missed = []
    for name, kinds in found.items():
        p50 = np.median([one.baseline.p50_ms for one in kinds[ITSELF]])
        cells = [name, f"{p50:.4f}"]
        for kind in (ITSELF, ONE_PAIR):
            width = np.median([one.ratio_high - one.ratio_low for one in kinds[kind]])
            cells += [f"{sum(map(holds_one, kinds[kind]))} of {options.runs}", f"{width:.4f}"]
        apart = sum(one.ratio_low > 1 for one in kinds[TWICE])
        cells += [f"{apart} of {options.runs}", f"{np.median([one.ratio for one in kinds[TWICE]]):.3f}"]
        print(f"| {' | '.join(cells)} |")
        if sum(map(holds_one, kinds[ITSELF])) < ITSELF_GOAL * options.runs:
            missed.append(f"{name} against itself")
        if apart < TWICE_GOAL * options.runs:
            missed.append(f"{name} against twice the work")
    goals = f"itself in at least {ITSELF_GOAL:.0%} of the runs, twice the work in {TWICE_GOAL:.0%}"
    print(f"\nGoals ({goals}): {'MISSED by ' + ', '.join(missed) if missed else 'hold'}")


if __name__ == "__main__":
    main()
