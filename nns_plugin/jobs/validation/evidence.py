"""What a recipe contributes to a validation: test data, label names and torch models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nns_plugin.adapters.onnxruntime import OnnxFile, TorchModels, values_of
from nns_plugin.errors import LabelError, RecipeError
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.loading import call_factory
from nns_plugin.jobs.models import load_checkpoint
from nns_plugin.jobs.recipe import Recipe
from nns_plugin.jobs.stages import stage
from nns_plugin.labels import OTHER, LabelSet
from nns_plugin.models.batches import batches
from nns_plugin.subnets.subnet import InexactMaskWarning, Subnet


@dataclass(frozen=True)
class Evidence:
    """What two files are compared on.

    Attributes:
        inputs: Inputs in order or by name; ``None`` for random ones.
        labels: ``[N]`` their labels, if known.
        label_names: Names of the baseline's labels, if known.
        candidate_labels: Names of the candidate's labels, if its file does not have them.
        models: Torch models to compare as well.
    """

    inputs: Any = None
    labels: Any = None
    label_names: tuple[str, ...] | None = None
    candidate_labels: tuple[str, ...] | None = None
    models: TorchModels | None = None


def evidence_of(recipe: Recipe, files: Sequence[OnnxFile], subnet: Path | None) -> Evidence:
    """The test data of a recipe, the labels that it keeps and, with a subnet's file, its torch models.

    Args:
        recipe: The recipe.
        files: The baseline and the candidate.
        subnet: The file of the candidate's subnet.

    Raises:
        NNSError: If the recipe's data or models cannot be used, or do not fit the files.
    """
    made = call_factory("data.factory", recipe.data.factory, recipe.data.arguments)
    data = Datasets.parse(made, recipe.data.factory)
    with stage("data.test"):
        found = list(batches(data.test, name="test loader"))
    if any(batch.labels is None for batch in found):
        raise RecipeError("data.test: yields inputs without labels; expected (inputs, labels)")
    parts = [values_of(batch.inputs, files[0]) for batch in found]
    by_name = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    inputs = by_name if isinstance(found[0].inputs, Mapping) else tuple(by_name.values())
    labels = torch.cat([batch.labels for batch in found if batch.labels is not None])
    names = None
    options = recipe.to_options()
    kept, head = LabelSet.of(data.label_names, options.labels), options.effective_head
    if files[1].labels is None and options.labels is not None and head != "keep":
        names = kept.opened().output_names if head == "open" else kept.kept_names
    models = None if subnet is None else _models(recipe, data, subnet)
    if files[0].labels is None:
        return Evidence(inputs, labels, data.label_names, names, models)
    return Evidence(inputs, _renumbered(labels, data.label_names, files[0]), None, names, models)


def _renumbered(labels: Tensor, names: Sequence[str], file: OnnxFile) -> Tensor:
    """The data's labels as indices into a file's own label names."""
    theirs = {name: place for place, name in enumerate(file.labels or ())}
    places = [theirs.get(name, theirs.get(OTHER)) for name in names]
    unknown = [names[label] for label in sorted(set(labels.tolist())) if places[label] is None]
    if unknown:
        raise LabelError(
            f"{file.path!r} has the labels {list(theirs)[:20]}, but the recipe's data also {unknown[:20]}; give data "
            "with the same labels"
        )
    return torch.tensor([-1 if place is None else place for place in places])[labels.long()]


def _models(recipe: Recipe, data: Datasets, path: Path) -> TorchModels:
    """The subnet in torch; with a checkpoint, also the dense model and, where masking is exact, the masked one."""

    def parent() -> nn.Module:
        model: nn.Module = call_factory("model.factory", recipe.model.factory, recipe.model.arguments)
        return model.eval()

    subnet = Subnet.load(path)
    small = subnet.materialise(parent, data.example_inputs)
    if recipe.model.checkpoint is None or recipe.train.epochs:
        return TorchModels(candidate=small)  # the job trained the dense model, which exists in its ONNX file only
    dense = parent()
    load_checkpoint(dense, recipe.model.checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masked = subnet.mask(dense, data.example_inputs)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    inexact = any(issubclass(warning.category, InexactMaskWarning) for warning in caught)
    return TorchModels(baseline=dense, candidate=small, masked=None if inexact else masked)
