"""What ONNX Runtime makes of fewer MACs: ResNet-20 for CIFAR-10 pruned with and without rounded widths.

The trained network loses units by torch-pruning's L2 importance, ranked across all groups, its consumers are refitted,
and nothing is trained. Widths are not rounded, or rounded to multiples of 8 or 16 by torch-pruning, which rounds
down and leaves a group alone that would lose everything: MACs then do not fall steadily with the ratio, and not every
number of them can be reached. The ratio is the smallest that comes close to the wanted MACs, or else the closest;
compare speed-ups with the MACs that were reached in mind.

Each is exported and compared with the dense file on test images that nothing else has seen.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch_pruning as tp
from data import add_data_dir, read_cifar10
from resnet20 import ResNet20, load_resnet20, normalised
from selections import maker
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin import Statistics, calibrate
from nns_plugin.adapters.onnxruntime import CompareOptions, Comparison, SessionMemory, compare, export
from nns_plugin.adapters.torch_pruning import compensated_step, count_macs
from nns_plugin.adapters.torch_pruning.groups import unit_groups

ROUNDINGS = (1, 8, 16)
SPEED_UP, NEAR = 2.1, 0.025  # of MACs; ratios within NEAR of it are as good as each other
RATIO_STEPS = 200
BATCHES = (1, 32)
CALIBRATION_IMAGES, TEST_IMAGES = 1024, 2000

Make = Callable[[nn.Module, float], tp.pruner.BasePruner]


class Deployed(NamedTuple):
    """One pruned network beside the dense one.

    Attributes:
        fewer: How many times fewer MACs it has.
        widths: Channels out of its convolutions.
        comparison: Of the two files.
    """

    fewer: float
    widths: list[int]
    comparison: Comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_dir(parser)
    parser.add_argument("--samples", type=int, default=300, help="timed runs at each batch size (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="within an operator (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images, and of the measurements")
    options = parser.parse_args()
    dense = load_resnet20(options.data_dir)
    torch.manual_seed(options.seed)
    inputs, _ = some(options.data_dir, "train", CALIBRATION_IMAGES)
    test = some(options.data_dir, "test", TEST_IMAGES)
    loader = list(inputs.split(256))
    statistics = calibrate(dense, loader, unit_groups(dense, inputs[:2], ["fc"]), gram=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = export(dense, inputs[:2], Path(folder, "dense.onnx"))
        for rounding in tqdm(ROUNDINGS, leave=False):
            small = pruned(dense, statistics, loader, rounding)
            smaller = export(small, inputs[:2], Path(folder, f"pruned-{rounding}.onnx"))
            comparison = compare(
                file,
                smaller,
                *test,
                CompareOptions(batches=BATCHES, samples=options.samples, threads=options.threads, seed=options.seed),
            )
            widths = [module.out_channels for module in small.modules() if isinstance(module, nn.Conv2d)]
            before, after = (count_macs(model, inputs[:1])[0] for model in (dense, small))
            found[rounding] = Deployed(before / after, widths, comparison)
    show(found, options)


def some(data_dir: Path, split: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor]:
    """Images of one half at random, as the network's inputs, and their labels."""
    images, labels = read_cifar10(data_dir, split)
    chosen = torch.randperm(len(images))[:count]
    return normalised(images[chosen]), labels[chosen]


def pruned(dense: ResNet20, statistics: Statistics, loader: list[Tensor], rounding: int) -> nn.Module:
    """The network with near SPEED_UP times fewer MACs, its widths multiples of a number, refitted."""
    example = loader[0][:1]
    unrounded = maker(tp.importance.MagnitudeImportance(p=2), dense, example, ["fc"], across=True)

    def make(model: nn.Module, ratio: float) -> tp.pruner.BasePruner:
        pruner = unrounded(model, ratio)
        pruner.round_to = rounding
        return pruner

    small = copy.deepcopy(dense)
    compensated_step(make(small, nearest_ratio(make, dense, example)), statistics, "refit", loader)
    return small


def nearest_ratio(make: Make, dense: nn.Module, example: Tensor) -> float:
    """The smallest ratio that comes within NEAR of SPEED_UP, else the one that comes nearest, of all in small steps."""

    whole, _ = count_macs(dense, example)

    def distance(ratio: float) -> float:
        small = copy.deepcopy(dense)
        make(small, ratio).step()
        return abs(whole / count_macs(small, example)[0] - SPEED_UP)

    ratios = [step / RATIO_STEPS for step in range(1, RATIO_STEPS)]
    return min(tqdm(ratios, desc="searching the ratio", leave=False), key=lambda ratio: max(NEAR, distance(ratio)))


def show(found: dict[int, Deployed], options: argparse.Namespace) -> None:
    """One row a network, then what its profiles say."""
    print(
        f"ResNet-20 for CIFAR-10, {CALIBRATION_IMAGES} images for the refit, {TEST_IMAGES} others for the test; "
        f"{options.samples} samples, threads: {options.threads}, seed {options.seed}; intervals and bounds at 95 %\n"
    )
    columns = (
        "widths", "fewer MACs", "accuracy, %", "lost, points (at most)",
        *(f"speed-up, batch {size}" for size in BATCHES), f"session opened / run at batch {max(BATCHES)}, MiB",
        "top-1 agreement, %",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    first = next(iter(found.values())).comparison
    p50 = [f"(p50 {latency.baseline.p50_ms:.3f} ms)" for latency in first.latency]
    row("dense", "1.00", f"{accuracies(first)[0]:.2f}", "", *p50, memory(first.baseline_memory), "")
    for rounding, (times, _, comparison) in found.items():
        row(name(rounding), f"{times:.2f}", *cells(comparison))
    for rounding, (_, widths, comparison) in found.items():
        print(f"\n{name(rounding)}: channels out of the convolutions {widths}")
        for size, profiles in zip(BATCHES, comparison.profiles, strict=True):
            for note in profiles.notes or ("no notes",):
                print(f"- batch {size}: {note}")


def cells(comparison: Comparison) -> list[str]:
    """Accuracy, what is lost, the speed-ups, memory and agreement."""
    report = comparison.accuracy
    if report is None:
        raise SystemExit(f"no accuracy: {comparison.accuracy_fault}")
    speed_ups = [f"{of.ratio:.2f} [{of.ratio_low:.2f}, {of.ratio_high:.2f}]" for of in comparison.latency]
    (agreement,) = (of.top1_agreement for of in comparison.parity if of.kind == "dense against pruned")
    return [
        f"{accuracies(comparison)[1]:.2f}",
        f"{100 * report.drop:.2f} ({100 * report.drop_bound:.2f})",
        *speed_ups,
        memory(comparison.candidate_memory),
        "" if agreement is None else f"{100 * agreement:.1f}",
    ]


def accuracies(comparison: Comparison) -> tuple[float, ...]:
    """Of the dense network and the pruned one, in percent."""
    report = comparison.accuracy
    return () if report is None else tuple(100 * of.closed_set_accuracy for of in (report.baseline, report.candidate))


def memory(found: SessionMemory | None) -> str:
    return "" if found is None else f"{found.session_bytes / 2**20:.1f} / {found.running_bytes / 2**20:.1f}"


def row(*texts: str) -> None:
    print(f"| {' | '.join(texts)} |")


def name(rounding: int) -> str:
    return "not rounded" if rounding == 1 else f"multiples of {rounding}"


if __name__ == "__main__":
    main()
