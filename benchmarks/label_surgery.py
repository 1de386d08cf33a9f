"""Subnets for label sets: balanced accuracy against kept units on MNIST, and the smallest subnets of a ResNet-20.

MNIST: a perceptron 784-100-10 and a small convolutional net with 100 units are trained on 50 000 images. For every
label alone, and for random label sets of 2, 3 and 5, subnets of a given number of units are extracted on other training
images and judged on the 10 000 test images, by the mean balanced accuracy of their labels.

- "zeroed": the source paper's method. The units that score lowest are zeroed, with their biases, and the dense head
  answers.
- "semantic": the same units, removed; the others take over (least squares), and the head is shrunk to the labels and
  "other".
- "distinctiveness": the head is shrunk first, then those units go whose loss the others can make up for best, and the
  rest is refitted.

ResNet-20: the smallest subnet whose balanced accuracy lies at most two points under the dense model's, with a
confidence of 95 % by 5 000 of the test images, found by ``max_balanced_accuracy_drop`` with no training; and of ever
smaller ones the last that one epoch of fine-tuning to the dense model's answers brings back there. Judged on the other
5 000, with its size and its latency in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import add_data_dir, read_cifar10, read_mnist
from finetuned import fine_tune
from resnet20 import ResNet20, load_resnet20, normalised
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from nns_plugin import Statistics, Subnet, calibrate
from nns_plugin.adapters.onnxruntime import export, measure_latency
from nns_plugin.adapters.torch_pruning import count_macs
from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.evaluation.evaluation import evaluate
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.accuracy_search import drop_bound
from nns_plugin.jobs.extraction import extract_subnet
from nns_plugin.jobs.training import train_classifier
from nns_plugin.subnets.head import balancing_shift, cross_calibrated, shift_output

Loader = list[tuple[Tensor, Tensor]]

LABELS = 10
KEPT = (3, 5, 8, 12, 20, 50)
SET_SIZES, SETS = (2, 3, 5), 5
MNIST_EPOCHS, MNIST_RATE, MNIST_BATCH, MNIST_TRAIN = 8, 3e-3, 128, 50_000
GOALS = {12: 90.0, 20: 95.0}

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MAX_DROP = 0.02
RESNET_CALIBRATION, RESNET_VALIDATION = 1024, 5000
TUNING_EPOCHS, SHRINK = 1, 0.9


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, LABELS))


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer, 100 units together."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 52),
        nn.ReLU(),
        nn.Linear(52, LABELS),
    )


@dataclass(frozen=True)
class Method:
    """How subnets are extracted.

    Attributes:
        options: Of ``extract_subnet``.
        masked: Whether the dense parent with the rest at zero is judged, and not the small model.
    """

    options: dict[str, Any]
    masked: bool = False


METHODS = {
    "zeroed (paper)": Method({"criterion": "semantic", "compensation": "none", "head": "keep"}, masked=True),
    "semantic, least squares": Method({"criterion": "semantic", "compensation": "least_squares"}),
    "distinctiveness, refit": Method(
        {"criterion": "distinctiveness", "criterion_options": {"mode": "span"}, "compensation": "refit"}
    ),
}
OURS = list(METHODS)[-1]
NETS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {  # factory, calibration images, ranked across groups
    "perceptron": (perceptron, 10_000, False),
    "convolutional": (convolutional, 1_000, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_dir(parser)
    parser.add_argument("--parts", nargs="+", choices=[*NETS, "resnet20"], default=[*NETS, "resnet20"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # consumers that are left at plain removal
    for net in NETS:
        if net in options.parts:
            mnist(options.data_dir, net, options.seeds)
    if "resnet20" in options.parts:
        resnet20(options.data_dir)


def label_sets(seed: int) -> dict[int, list[list[int]]]:
    """Every label alone, and five random sets of each size."""
    generator = np.random.default_rng(seed)
    sets = {1: [[label] for label in range(LABELS)]}
    for size in SET_SIZES:
        every = list(itertools.combinations(range(LABELS), size))
        sets[size] = [list(every[place]) for place in generator.choice(len(every), SETS, replace=False)]
    return sets


def mnist(data_dir: Path, net: str, seeds: Sequence[int]) -> None:
    make, calibration_images, across = NETS[net]
    images, labels = read_mnist(data_dir, "train")
    test = batches(*read_mnist(data_dir, "t10k"))
    found: dict[tuple[str, int, int], list[float]] = {}
    dense: dict[int, list[float]] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        model = make()
        order = torch.randperm(len(images))
        trained, held = order[:MNIST_TRAIN], order[MNIST_TRAIN:]
        loader = DataLoader(TensorDataset(images[trained], labels[trained]), MNIST_BATCH, shuffle=True)
        train_classifier(model, loader, epochs=MNIST_EPOCHS, learning_rate=MNIST_RATE, weight_decay=0.01)
        calibration = batches(images[held[:calibration_images]], labels[held[:calibration_images]])
        statistics = calibrated(model, calibration)
        logits, truth = predict(model, test)
        for size, sets in label_sets(seed).items():
            for chosen in tqdm(sets, desc=f"{net}, seed {seed}, sets of {size}", leave=False):
                dense.setdefault(size, []).append(judged(logits, truth, range(LABELS), chosen))
                for (name, method), kept in itertools.product(METHODS.items(), KEPT):
                    subnet = extraction(model, calibration, statistics, chosen, kept, method, across)
                    small = subnet.mask(model) if method.masked else subnet.materialise(make)
                    outputs = range(LABELS) if method.masked else subnet.labels.outputs
                    value = judged(*predict(small, test), outputs, chosen)
                    found.setdefault((name, size, kept), []).append(value)
    show_mnist(net, found, dense, len(seeds))
    every = [(kept, extraction(model, calibration, statistics, [3], kept, METHODS[OURS], across)) for kept in KEPT]
    show_files({f"{net}, label 3, {kept} of 100 units": stored(subnet) for kept, subnet in every})


def stored(subnet: Subnet) -> tuple[int, int, float]:
    """Bytes of the kept weights and of the file, and milliseconds to load it (median of 21)."""
    weights = sum(value.numel() * value.element_size() for value in subnet.weights.values())
    with tempfile.TemporaryDirectory() as folder:
        path = subnet.save(Path(folder) / "subnet.safetensors")
        times = []
        for _ in range(21):
            start = time.perf_counter()
            Subnet.load(path)
            times.append(1000 * (time.perf_counter() - start))
        return weights, path.stat().st_size, float(np.median(times))


def show_files(files: dict[str, tuple[int, int, float]]) -> None:
    """Files beside the goals: at most 1.02 times the weights plus 4 KiB, loaded in under 50 ms."""
    table = Table(title="subnet files")
    for column in ("subnet", "kept weights, bytes", "file, bytes", "allowed, bytes", "load, ms"):
        table.add_column(column, justify="left" if column == "subnet" else "right")
    holds = True
    for name, (weights, size, load) in files.items():
        allowed = int(1.02 * weights) + 4096
        holds = holds and size <= allowed and load < 50
        table.add_row(name, f"{weights:,}", f"{size:,}", f"{allowed:,}", f"{load:.1f}")
    Console(width=120).print(table)
    print(
        f"files of at most 1.02 times the weights plus 4 KiB, loaded in under 50 ms: {'holds' if holds else 'MISSED'}"
    )


def extraction(
    model: nn.Module, loader: Loader, statistics: Statistics, chosen: list[int], kept: int, method: Method, across: bool
) -> Subnet:
    """A subnet of a number of the 100 units; fewer are asked for where groups that keep one at least add some."""
    for asked in range(kept, 0, -1):
        subnet = extract_subnet(
            model,
            loader[0][0][:2],
            loader,
            labels=chosen,
            ratio=1 - asked / 100,
            global_pruning=across,
            statistics=statistics,
            **method.options,
        )
        if sum(units.numel() for units in subnet.kept.values()) <= kept:
            return subnet
    raise RuntimeError(f"no subnet of {kept} units")


def calibrated(model: nn.Module, loader: Loader) -> Statistics:
    groups = unit_groups(model, loader[0][0][:2])
    return calibrate(model, loader, groups, labels=[str(label) for label in range(LABELS)], gram=True)


def judged(logits: Tensor, truth: Tensor, outputs: Sequence[int | None], chosen: Sequence[int]) -> float:
    """Mean balanced accuracy of the labels in percent."""
    found = evaluate(logits, truth, tuple(outputs), chosen, [str(label) for label in range(LABELS)])
    return 100 * float(found.mean_balanced_accuracy or np.nan)


def batches(inputs: Tensor, labels: Tensor, size: int = 1000) -> Loader:
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def show_mnist(
    net: str, found: dict[tuple[str, int, int], list[float]], dense: dict[int, list[float]], seeds: int
) -> None:
    table = Table(
        title=f"{net} net on MNIST: mean balanced accuracy of the kept labels in %, by kept units of 100; "
        f"{seeds} seeds, mean +- standard deviation over label sets and seeds"
    )
    for column in ("labels", "method", *(str(kept) for kept in KEPT), "dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for size, name in itertools.product(dense, METHODS):
        cells = [spread(found[name, size, kept]) for kept in KEPT]
        first = name == next(iter(METHODS))
        table.add_row(
            str(size) if first else "", name, *cells, spread(dense[size]) if first else "", end_section=name == OURS
        )
    Console(width=150).print(table)
    if net == "perceptron":
        for kept, goal in GOALS.items():
            value = np.mean(found[OURS, 1, kept])
            verdict = "holds" if value >= goal else "MISSED"
            print(f"single labels, {kept} of 100 units: {value:.2f}, goal {goal}: {verdict}")


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} +- {np.std(values, ddof=min(1, len(values) - 1)):.1f}"


def resnet20(data_dir: Path) -> None:
    """Label sets of 1, 2 and 5, without training and with one epoch of it."""
    torch.manual_seed(0)
    model = load_resnet20(data_dir)
    images, labels = read_cifar10(data_dir, "train")
    test_images, test_labels = read_cifar10(data_dir, "test")
    images, test_images = normalised(images), normalised(test_images)
    chosen_images = torch.randperm(len(images))[:RESNET_CALIBRATION]
    calibration = batches(images[chosen_images], labels[chosen_images], 256)
    order = torch.randperm(len(test_images))
    held, judging = order[:RESNET_VALIDATION], order[RESNET_VALIDATION:]
    validation = batches(test_images[held], test_labels[held], 500)
    test = batches(test_images[judging], test_labels[judging], 500)
    statistics = calibrated(model, calibration)
    logits, truth = predict(model, test)
    answers = predict(model, batches(images, labels, 500), progress=True)[0]
    generator = np.random.default_rng(0)
    rows, files = [], {}
    for size in (1, 2, 5):
        chosen = sorted(generator.choice(LABELS, size, replace=False).tolist())
        before = judged(logits, truth, range(LABELS), chosen)
        rows.append(measured("dense", chosen, model, before, before, model))
        shifted = judged(*calibrated_dense(model, validation, test, chosen), chosen)
        rows.append(["", 'dense, "other" calibrated', f"{shifted:.2f}", f"{before - shifted:.2f}", "", "", "", ""])
        tune = tuner(images, answers, validation, TUNING_EPOCHS)
        found = smallest(model, calibration, validation, statistics, chosen, tune)
        for name, (subnet, small) in zip(("no training", f"{TUNING_EPOCHS} epoch"), found, strict=False):
            after = judged(*predict(small, test), subnet.labels.outputs, chosen)
            rows.append(measured(name, chosen, small, before, after, model))
            files[f"ResNet-20, {size} labels, {name}"] = stored(subnet)
            print(f"labels {chosen}, {name}: {before:.2f} -> {after:.2f}", flush=True)
    table = Table(
        title=f"ResNet-20 on CIFAR-10: smallest subnet within {100 * MAX_DROP:.0f} points of balanced accuracy on "
        f"{RESNET_VALIDATION} test images; accuracy on the others"
    )
    for column in (
        "labels",
        "subnet",
        "balanced acc., %",
        "lost",
        "parameters, %",
        "MACs, %",
        "latency, ms",
        "speed-up",
    ):
        table.add_column(column, justify="left" if column in ("labels", "subnet") else "right")
    for row in rows:
        table.add_row(*row)
    table.caption = (
        "latency: ONNX Runtime, CPU, batch 1, one thread; speed-up over the dense model with its 95 % interval"
    )
    Console(width=150).print(table)
    show_files(files)


def smallest(
    model: nn.Module,
    calibration: Loader,
    validation: Loader,
    statistics: Statistics,
    chosen: list[int],
    tune: Callable[[Subnet, nn.Module], None],
) -> list[tuple[Subnet, nn.Module]]:
    """The smallest subnet within the budget, and of it and ever smaller ones the last that holds after training."""

    def extracted(**selection: Any) -> Subnet:
        return extract_subnet(
            model,
            calibration[0][0][:2],
            calibration,
            labels=chosen,
            criterion="distinctiveness",
            global_pruning=True,
            calibrate_head=True,
            validation=validation,
            statistics=statistics,
            progress=True,
            **selection,
        )

    subnet = extracted(max_balanced_accuracy_drop=MAX_DROP)
    found = [(subnet, subnet.materialise(ResNet20))]
    ratio = max(trial.ratio for trial in subnet.provenance.trials if trial.within)
    logits, truth = predict(model, validation)
    while True:
        candidate = extracted(ratio=ratio)
        tuned = candidate.materialise(ResNet20)
        tune(candidate, tuned)
        answers = cross_calibrated(predict(tuned, validation)[0], candidate.labels.outputs, truth)
        bound = drop_bound((logits, range(LABELS)), (answers, candidate.labels.outputs), truth, chosen, CLASSES)
        print(
            f"labels {chosen}, {ratio:.3f} of the units removed, trained: loses at most {100 * bound:.2f}", flush=True
        )
        if bound > MAX_DROP:
            return [found[0], *found[1:][-1:]]
        found.append((candidate, tuned))
        ratio = 1 - SHRINK * (1 - ratio)


def calibrated_dense(
    model: nn.Module, validation: Loader, test: Loader, chosen: list[int]
) -> tuple[Tensor, Tensor, tuple[int | None, ...]]:
    """The dense model with one number for "other", too: all other labels taken together, and shifted as in subnets."""
    outputs = (*chosen, None)
    rest = [label for label in range(LABELS) if label not in chosen]

    def together(logits: Tensor) -> Tensor:
        return torch.cat([logits[:, chosen], logits[:, rest].logsumexp(1, keepdim=True)], 1)

    (known, truth), (logits, labels) = predict(model, validation), predict(model, test)
    shifted = together(logits)
    shifted[:, -1] += balancing_shift(together(known), outputs, truth)
    return shifted, labels, outputs


def tuner(images: Tensor, answers: Tensor, validation: Loader, epochs: int) -> Callable[[Subnet, nn.Module], None]:
    """Fine-tuning on the training images to the dense model's answers, with all other labels taken together."""

    def tune(subnet: Subnet, small: nn.Module) -> None:
        other = len(subnet.labels.indices)
        probabilities = answers.softmax(1)
        known = probabilities[:, list(subnet.labels.indices)]
        fine_tune(small, images, torch.cat([known, 1 - known.sum(1, keepdim=True)], 1), "fine-tuning", epochs)
        head = small.get_submodule(str(subnet.head_layer))
        if isinstance(head, nn.Linear):
            shift_output(head, other, balancing_shift(*answers_to(small, validation, subnet)))

    return tune


def answers_to(model: nn.Module, loader: Loader, subnet: Subnet) -> tuple[Tensor, tuple[int | None, ...], Tensor]:
    logits, truth = predict(model, loader)
    return logits, subnet.labels.outputs, truth


def measured(
    name: str, chosen: list[int], small: nn.Module, before: float, after: float, dense: nn.Module
) -> list[str]:
    example = torch.randn(2, 3, 32, 32)
    macs, parameters = count_macs(small, example)
    dense_macs, dense_parameters = count_macs(dense, example)
    with tempfile.TemporaryDirectory() as folder:
        paths = {part: Path(folder) / f"{part}.onnx" for part in ("baseline", "candidate")}
        export(copy.deepcopy(dense), example, paths["baseline"])
        export(copy.deepcopy(small), example, paths["candidate"])
        latency = measure_latency(paths, example[:1])
    return [
        ", ".join(CLASSES[label] for label in chosen) if name == "dense" else "",
        name,
        f"{after:.2f}",
        f"{before - after:.2f}",
        f"{100 * parameters / dense_parameters:.1f}",
        f"{100 * macs / dense_macs:.1f}",
        f"{latency.candidate.p50_ms:.3f}",
        f"{latency.ratio:.2f} [{latency.ratio_low:.2f}, {latency.ratio_high:.2f}]",
    ]


if __name__ == "__main__":
    main()
