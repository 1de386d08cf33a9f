"""The main job on the digits over several seeds: what the subnet loses against the dense model, with its spread."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nns_plugin.jobs.loading import load_recipe
from nns_plugin.jobs.run import run_job

MEAN_GOAL, LABEL_GOAL, SHARE_GOAL = 3.0, 5.0, 0.5


def main() -> None:
    """Run the job once a seed (training, split and measurement follow it) and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--labels", default="3,5")
    parser.add_argument("--ratio", type=float, default=None, help="default: the default recipe's")
    options = parser.parse_args()
    table = Table(title=f"nns run --labels {options.labels}, held-out digits; balanced accuracy in %")
    for column in (
        "seed",
        "parameters kept, %",
        "dense, mean",
        "subnet, mean",
        "mean drop",
        "worst label's drop",
        "speed-up",
    ):
        table.add_column(column, justify="right")
    rows = []
    for seed in options.seeds:
        overrides = {"seed": seed, "data.arguments": {"seed": seed}, "labels": options.labels.split(",")}
        if options.ratio is not None:
            overrides["ratio"] = options.ratio
        with tempfile.TemporaryDirectory() as folder:
            report = run_job(load_recipe(None, overrides), Path(folder))
        dense, subnet = (
            np.array([100 * label.balanced_accuracy for label in model.evaluation.labels])
            for model in (report.baseline, report.subnet)
        )
        share = 100 * report.subnet.parameters / report.baseline.parameters
        rows.append(
            (share, dense.mean(), subnet.mean(), (dense - subnet).mean(), (dense - subnet).max(), report.latency.ratio)
        )
        table.add_row(str(seed), *(f"{value:.2f}" for value in rows[-1]))
    values = np.array(rows)
    table.add_section()
    table.add_row("mean", *(f"{value:.2f}" for value in values.mean(0)))
    table.add_row("sd", *(f"{value:.2f}" for value in values.std(0, ddof=1 if len(rows) > 1 else 0)))
    table.add_row(
        "worst",
        *(
            f"{value:.2f}"
            for value in (
                values[:, 0].max(),
                values[:, 1].min(),
                values[:, 2].min(),
                values[:, 3].max(),
                values[:, 4].max(),
                values[:, 5].min(),
            )
        ),
    )
    Console(width=120).print(table)
    holds = (
        values[:, 0].max() <= 100 * SHARE_GOAL and values[:, 3].max() <= MEAN_GOAL and values[:, 4].max() <= LABEL_GOAL
    )
    print(
        f"goals: at most {100 * SHARE_GOAL:.0f} % of the parameters, mean drop at most {MEAN_GOAL}, no label more than "
        f"{LABEL_GOAL} (points): {'hold in every seed' if holds else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
