"""The tables of "NNS: Neural network surgery" (Emadi and Davardoust) on MNIST, and what its subnets do to other labels.

A perceptron 784-100-10 is trained as in the paper. Its hidden units are scored by ``Semantic`` on the 60 000 training
images and kept where they reach zeta (eq. 1); everything else is measured on the 10 000 test images. Two rules of
removal stand side by side:

- "bias passes", the paper's rule: a removed unit's incoming weights are zeroed, and it still passes relu(bias) on.
- "removed", this package's rule: the unit is gone, with its bias and its outgoing weights.

The paper trained on 41 000 images and tested on 1 000 others; the counts of kept units depend on the initial weights.
Its published code adds one common step, the sum of all their gradients, to the biases of a layer, where gradient
descent gives each its own: ``--common-bias-step`` does as the code.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import add_data_dir, read_mnist
from nns_paper import (
    PAPER_DENSE_ACCURACY,
    PAPER_DENSE_KB,
    PAPER_DENSE_RECALL,
    PAPER_INTEGRATED_KB,
    PAPER_INTEGRATION,
    PAPER_ORIGINAL_KB,
    PAPER_RECALL,
    PAPER_UNITS,
    PAPER_VECTORIZED_KB,
)
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin import Statistics, UnitGroup, calibrate
from nns_plugin.adapters.torch_pruning.graph import build_graph
from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.adapters.torch_pruning.unit_removal import remove_units
from nns_plugin.criteria import Semantic, score_groups
from nns_plugin.selection import keep_by_threshold

PIXELS, HIDDEN, LABELS = 784, 100, 10
EPOCHS, LEARNING_RATE, INITIAL_BOUND = 200, 0.1, 0.5
ZETAS = (0.4, 0.5)
BATCH_SIZE = 1000

Shares = NDArray[np.float64]


class Perceptron(nn.Module):
    """The paper's network; its softmax is in the loss."""

    def __init__(self, pixels: int = PIXELS) -> None:
        super().__init__()
        self.hidden = nn.Linear(pixels, HIDDEN)
        self.head = nn.Linear(HIDDEN, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(torch.relu(self.hidden(images)))
        return output


@dataclass(frozen=True)
class Performance:
    """How one model answers, one against the rest: an array ``[L]`` of shares for each measure."""

    recall: Shares
    false_positive_rate: Shares
    accuracy: float

    @property
    def balanced_accuracy(self) -> Shares:
        return (self.recall + 1 - self.false_positive_rate) / 2


@dataclass(frozen=True)
class Subnet:
    """The hidden units that a label set keeps, and how the model answers with them alone."""

    kept: Tensor
    bias_passes: Performance
    removed: Performance


@dataclass(frozen=True)
class Outcome:
    """Everything measured for one seed; ``single[zeta][l]`` knows label l, ``integrated[zeta][l]`` labels 0..l."""

    seed: int
    model: Perceptron
    dense: Performance
    single: Mapping[float, Sequence[Subnet]]
    integrated: Mapping[float, Sequence[Subnet]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_data_dir(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="full tables for the first one")
    parser.add_argument("--common-bias-step", action="store_true", help="train the biases as the paper's code does")
    arguments = parser.parse_args()
    train, test = read_mnist(arguments.data_dir, "train"), read_mnist(arguments.data_dir, "t10k")
    outcomes = [run_seed(seed, train, test, arguments.common_bias_step) for seed in arguments.seeds]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print((__doc__ or "").partition("\n\n")[2])
    first = outcomes[0]
    for table in (
        units_table(first),
        recall_table(first),
        *size_tables(first),
        *(integration_table(first, zeta) for zeta in ZETAS),
        *(one_against_rest_table(first, zeta) for zeta in ZETAS),
        seeds_table(outcomes),
        spread_table(outcomes),
    ):
        console.print(table)


def run_seed(seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], common_bias_step: bool) -> Outcome:
    """Train, calibrate, extract the subnets of every label and of labels 0..l, and measure all of them."""
    model = train_as_the_paper(*train, seed, common_bias_step)
    groups = unit_groups(model, test[0][:1], ignored_layers=["head"])
    batches = zip(train[0].split(BATCH_SIZE), train[1].split(BATCH_SIZE), strict=True)
    statistics = calibrate(model, batches, groups)
    single, integrated = {}, {}
    for zeta in ZETAS:
        sets = [kept_units(statistics, groups, [label], zeta) for label in range(LABELS)]
        unions = [kept_units(statistics, groups, range(label + 1), zeta) for label in range(LABELS)]
        check_integration(sets, unions)
        single[zeta] = [measure_subnet(model, groups[0], kept, test) for kept in sets]
        integrated[zeta] = [measure_subnet(model, groups[0], kept, test) for kept in unions]
    return Outcome(seed, model, measure(model, test), single, integrated)


def train_as_the_paper(images: Tensor, labels: Tensor, seed: int, common_bias_step: bool) -> Perceptron:
    """Full-batch gradient descent from weights and biases uniform in [-0.5, 0.5]."""
    generator = torch.Generator().manual_seed(seed)
    model = Perceptron()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -INITIAL_BOUND, INITIAL_BOUND, generator=generator)
    # Pixels that are 0 in every image have weights without a gradient: only the others take part, which is faster.
    inked = images.any(0).nonzero().flatten()
    weight = model.hidden.weight.detach()
    learner = Perceptron(len(inked))
    learner.load_state_dict({**model.state_dict(), "hidden.weight": weight[:, inked]})
    descend(learner, images[:, inked], labels, common_bias_step, f"training, seed {seed}")
    trained = weight.index_copy(1, inked, learner.hidden.weight.detach())
    model.load_state_dict({**learner.state_dict(), "hidden.weight": trained})
    return model.eval()


def descend(model: Perceptron, images: Tensor, labels: Tensor, common_bias_step: bool, description: str) -> None:
    """Train in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in tqdm(range(EPOCHS), desc=description, leave=False, disable=None):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        for gradient in (model.hidden.bias.grad, model.head.bias.grad):
            if common_bias_step and gradient is not None:
                gradient.fill_(gradient.sum())
        optimizer.step()


def kept_units(statistics: Statistics, groups: Sequence[UnitGroup], labels: Sequence[int], zeta: float) -> Tensor:
    """Hidden units that eq. 1 keeps for a label set."""
    scores = score_groups(Semantic(statistics, labels=labels), groups)
    return keep_by_threshold(scores, zeta)[groups[0].name]


def check_integration(sets: Sequence[Tensor], unions: Sequence[Tensor]) -> None:
    """Fail unless the subnet of labels 0..l has exactly the units of the subnets of its labels."""
    for label, kept in enumerate(unions):
        expected = torch.cat(list(sets[: label + 1])).unique()
        if not torch.equal(kept, expected):
            raise RuntimeError(f"labels 0..{label} keep units {kept.tolist()}; the union is {expected.tolist()}")


def measure_subnet(model: Perceptron, group: UnitGroup, kept: Tensor, test: tuple[Tensor, Tensor]) -> Subnet:
    """One subnet under both rules."""
    return Subnet(
        kept, measure(let_bias_pass(model, kept), test), measure(remove(model, group, removed_units(kept)), test)
    )


def removed_units(kept: Tensor) -> Tensor:
    """The hidden units that are not kept."""
    return torch.tensor(sorted(set(range(HIDDEN)) - set(kept.tolist())), dtype=torch.int64)


def let_bias_pass(model: Perceptron, kept: Tensor) -> Perceptron:
    """The paper's rule: the incoming weights of the removed units are zero."""
    subnet = copy.deepcopy(model)
    with torch.no_grad():
        subnet.hidden.weight[removed_units(kept)] = 0
    return subnet


def remove(model: Perceptron, group: UnitGroup, units: Tensor) -> Perceptron:
    """This package's rule: the units are gone."""
    subnet = copy.deepcopy(model)
    remove_units(build_graph(subnet, torch.zeros(1, PIXELS)), group, units)
    return subnet


def measure(model: Perceptron, test: tuple[Tensor, Tensor]) -> Performance:
    """Recall and false-positive rate of every label, from the largest of the ten outputs."""
    images, labels = test
    with torch.no_grad():
        answers = model(images).argmax(1)
    counts = confusion_matrix(labels.numpy(), answers.numpy(), labels=range(LABELS))
    hits, present, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
    false_positive_rate = (answered - hits) / (len(labels) - present)
    return Performance(hits / present, false_positive_rate, float(hits.sum() / len(labels)))


def units_table(outcome: Outcome) -> Table:
    """Table 5, left half."""
    table = new_table(
        f"Table 5, kept units: seed {outcome.seed}, parameters are incoming weights ({PIXELS} a unit, "
        f"{PIXELS * HIDDEN:,} in the dense layer)",
        "label",
        *(f"zeta {zeta}\n{column}" for zeta in ZETAS for column in ("units", "paper", "parameters", "paper")),
    )
    for label in range(LABELS):
        cells = []
        for zeta in ZETAS:
            units, paper = len(outcome.single[zeta][label].kept), PAPER_UNITS[zeta][label]
            cells += [str(units), str(paper), f"{units * PIXELS:,}", f"{paper * PIXELS:,}"]
        table.add_row(str(label), *cells)
    return table


def recall_table(outcome: Outcome) -> Table:
    """Table 5, right half."""
    table = new_table(
        f"Table 5, recall in % before and after: seed {outcome.seed}, dense test accuracy "
        f"{percent(outcome.dense.accuracy)} (paper {PAPER_DENSE_ACCURACY})",
        "label",
        "dense",
        "dense\npaper",
        *(f"zeta {zeta}\n{column}" for zeta in ZETAS for column in ("bias passes", "paper", "removed")),
    )
    for label in range(LABELS):
        cells = [percent(outcome.dense.recall[label]), f"{PAPER_DENSE_RECALL[label]:.1f}"]
        for zeta in ZETAS:
            subnet = outcome.single[zeta][label]
            paper = f"{PAPER_RECALL[zeta][label]:.1f}"
            cells += [percent(subnet.bias_passes.recall[label]), paper, percent(subnet.removed.recall[label])]
        table.add_row(str(label), *cells)
    table.caption = 'the paper\'s columns follow the rule "bias passes"'
    return table


def size_tables(outcome: Outcome) -> tuple[Table, Table]:
    """Tables 2 and 3, from files that are really written."""
    headings = (
        "matrix, dense\nbytes",
        "paper, dense\nKB",
        "matrix, kept rows\nbytes",
        "paper, vectorized\nKB",
        "whole subnet, removed\nbytes",
    )
    table2 = new_table(f"Table 2, file size at zeta 0.4: seed {outcome.seed}", "label", *headings)
    for label, subnet in enumerate(outcome.single[0.4]):
        dense, rows, whole = file_sizes(outcome.model, subnet.kept)
        paper_dense, paper_rows = PAPER_DENSE_KB[label], PAPER_VECTORIZED_KB[label]
        table2.add_row(str(label), f"{dense:,}", f"{paper_dense:,}", f"{rows:,}", f"{paper_rows:,}", f"{whole:,}")
    table2.caption = (
        "The matrix is the hidden layer's, which is all that the paper stores: with zeroed rows, or the kept rows and "
        "their numbers. The paper writes decimal text, where a zero is shorter than a weight; ours is binary float32. "
        "Its sizes for labels 1-7 fit the units that its Table 5 gives labels 0-6, and its label 0 repeats Table 3."
    )
    table3 = new_table(f"Table 3, file size of the model: seed {outcome.seed}", "", *headings)
    everything = torch.arange(HIDDEN)
    dense, _, whole = file_sizes(outcome.model, everything)
    table3.add_row("original", f"{dense:,}", f"{PAPER_ORIGINAL_KB:,}", "-", "-", f"{whole:,}")
    for zeta in ZETAS:
        dense, rows, whole = file_sizes(outcome.model, outcome.integrated[zeta][-1].kept)
        paper = [f"{size:,}" if zeta == 0.4 else "-" for size in PAPER_INTEGRATED_KB]
        table3.add_row(f"integrated, zeta {zeta}", f"{dense:,}", paper[0], f"{rows:,}", paper[1], f"{whole:,}")
    return table2, table3


def file_sizes(model: Perceptron, kept: Tensor) -> tuple[int, int, int]:
    """Bytes of the hidden matrix with zeroed rows, of its kept rows alone, and of a whole subnet without the others."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    rows = state["hidden.weight"][kept]
    files = (
        {"hidden.weight": torch.zeros(HIDDEN, PIXELS).index_copy(0, kept, rows)},
        {"hidden.weight": rows, "units": kept},
        {
            "hidden.weight": rows,
            "hidden.bias": state["hidden.bias"][kept],
            "head.weight": state["head.weight"][:, kept].contiguous(),
            "head.bias": state["head.bias"],
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        sizes = []
        for tensors in files:
            save_file(tensors, path)
            sizes.append(path.stat().st_size)
    return sizes[0], sizes[1], sizes[2]


def integration_table(outcome: Outcome, zeta: float) -> Table:
    """Table 4 for one zeta."""
    subnets = outcome.integrated[zeta]
    table = new_table(
        f"Table 4, integration at zeta {zeta}: seed {outcome.seed}, recall in % of each label (row) in the union of "
        "the subnets of labels 0..j (column j)",
        "label",
        "rule",
        *(str(label) for label in range(LABELS)),
        "dense",
    )
    table.add_row("", "kept units", *(str(len(subnet.kept)) for subnet in subnets), str(HIDDEN), end_section=True)
    for label in range(LABELS):
        dense = percent(outcome.dense.recall[label])
        passing = [percent(subnet.bias_passes.recall[label]) for subnet in subnets]
        removed = [percent(subnet.removed.recall[label]) for subnet in subnets]
        paper = [f"{value:.1f}" for value in PAPER_INTEGRATION[zeta][label]]
        table.add_row(str(label), "bias passes", *passing, dense)
        table.add_row("", "  paper", *paper, f"{PAPER_DENSE_RECALL[label]:.1f}")
        table.add_row("", "removed", *removed, dense, end_section=True)
    table.caption = "The paper prints label 9's two rows under the other zeta each; they are swapped back."
    return table


def one_against_rest_table(outcome: Outcome, zeta: float) -> Table:
    """What the paper lacks: how often a label's subnet answers its label on inputs of other labels."""
    table = new_table(
        f"What the paper lacks, zeta {zeta}: seed {outcome.seed}, each label's subnet against the rest, in %",
        "label",
        *(
            f"{model}\n{measure}"
            for model in ("dense", "bias passes", "removed")
            for measure in ("recall", "FPR", "bal. acc.")
        ),
    )
    columns: list[list[float]] = []
    for label, subnet in enumerate(outcome.single[zeta]):
        models = (outcome.dense, subnet.bias_passes, subnet.removed)
        measures = [(m.recall, m.false_positive_rate, m.balanced_accuracy) for m in models]
        columns.append([float(values[label]) for triple in measures for values in triple])
        table.add_row(str(label), *map(percent, columns[-1]), end_section=label == LABELS - 1)
    table.add_row("mean", *map(percent, np.mean(columns, axis=0)))
    table.caption = (
        "FPR: share of the other labels' images that get this label; balanced accuracy: (recall + 1 - FPR) / 2"
    )
    return table


def seeds_table(outcomes: Sequence[Outcome]) -> Table:
    """One line a seed."""
    table = new_table(
        "Seeds: test accuracy and mean over the labels of the single-label subnets' balanced accuracy, in %",
        "seed",
        "accuracy",
        "dense\nbalanced acc.",
        *(f"zeta {zeta}\n{column}" for zeta in ZETAS for column in ("bias passes", "removed", "units of all labels")),
    )
    for outcome in outcomes:
        cells = [percent(outcome.dense.accuracy), percent(outcome.dense.balanced_accuracy.mean())]
        for zeta in ZETAS:
            cells += [
                mean_over_labels(outcome.single[zeta], lambda subnet: subnet.bias_passes),
                mean_over_labels(outcome.single[zeta], lambda subnet: subnet.removed),
                str(len(outcome.integrated[zeta][-1].kept)),
            ]
        table.add_row(str(outcome.seed), *cells)
    return table


def mean_over_labels(subnets: Sequence[Subnet], rule: Callable[[Subnet], Performance]) -> str:
    """Balanced accuracy of each label in its own subnet, averaged, in percent."""
    return percent(np.mean([rule(subnet).balanced_accuracy[label] for label, subnet in enumerate(subnets)]))


def spread_table(outcomes: Sequence[Outcome]) -> Table:
    """Kept units over the seeds, beside the paper's one run."""
    table = new_table(
        f"Kept units over seeds {', '.join(str(outcome.seed) for outcome in outcomes)}",
        "label",
        *(f"zeta {zeta}\n{column}" for zeta in ZETAS for column in ("mean", "std", "min-max", "paper")),
    )
    totals = {zeta: np.array([[len(s.kept) for s in outcome.single[zeta]] for outcome in outcomes]) for zeta in ZETAS}
    for label in range(LABELS):
        cells = []
        for zeta in ZETAS:
            cells += [*spread(totals[zeta][:, label]), str(PAPER_UNITS[zeta][label])]
        table.add_row(str(label), *cells, end_section=label == LABELS - 1)
    cells = []
    for zeta in ZETAS:
        cells += [*spread(totals[zeta].mean(1)), f"{np.mean(PAPER_UNITS[zeta]):.1f}"]
    table.add_row("mean", *cells)
    return table


def spread(values: NDArray[np.float64]) -> tuple[str, str, str]:
    """Mean, sample standard deviation and range."""
    deviation = f"{values.std(ddof=1):.1f}" if len(values) > 1 else "-"
    return f"{values.mean():.1f}", deviation, f"{values.min():.4g}-{values.max():.4g}"


def new_table(title: str, *headings: str) -> Table:
    """An empty table of right-aligned columns; the first is the row's name."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table


def percent(share: float | np.floating) -> str:
    """A share in percent, one decimal."""
    return f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
