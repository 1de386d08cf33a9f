"""A job: its recipe with the options, data, labels and dense model that it resolves to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.criteria import needs_of
from nns_plugin.errors import PruningError, RecipeError
from nns_plugin.jobs.data import Datasets
from nns_plugin.jobs.extraction import Sources
from nns_plugin.jobs.loading import call_factory
from nns_plugin.jobs.models import load_checkpoint
from nns_plugin.jobs.recipe import Recipe
from nns_plugin.jobs.stages import stage
from nns_plugin.jobs.training import train_classifier
from nns_plugin.labels import LabelSet
from nns_plugin.models.batches import batches
from nns_plugin.models.inputs import device_of, repeated, run_model, to_device
from nns_plugin.models.preserve import preserved
from nns_plugin.subnets.options import ExtractionOptions
from nns_plugin.synapses.snapshot import WeightSnapshot


@dataclass(frozen=True, eq=False)
class Job:
    """What a recipe resolves to.

    Attributes:
        recipe: The recipe.
        options: Its options of the extraction.
        data: Its data.
        labels: The labels to keep, with the outputs of the dense model.
        dense: The dense model.
        snapshot: The dense model's weights before training, where the criterion needs them.
        progress: Whether to show progress bars.
    """

    recipe: Recipe
    options: ExtractionOptions
    data: Datasets
    labels: LabelSet
    dense: nn.Module
    snapshot: WeightSnapshot | None = None
    progress: bool = False

    @classmethod
    def of(cls, recipe: Recipe, options: ExtractionOptions, progress: bool = False) -> Job:
        """Load the data, and load or train the dense model.

        Args:
            recipe: The recipe.
            options: Its options of the extraction.
            progress: Whether to show progress bars.

        Raises:
            NNSError: If the data, the labels or the model cannot be used.
        """
        made = call_factory("data.factory", recipe.data.factory, recipe.data.arguments)
        data = Datasets.parse(made, recipe.data.factory)
        labels = LabelSet.of(data.label_names, options.labels)
        inputs_of(data, 1)
        dense, snapshot = _dense_model(recipe, options, data, progress)
        return cls(recipe, options, data, labels, dense, snapshot, progress)

    @property
    def sources(self) -> Sources:
        """What an extraction learns from."""
        data = self.data
        return Sources(data.example_inputs, data.calibration, data.decisive, snapshot=self.snapshot)

    def test_inputs(self, count: int) -> Any:
        """The first inputs of the test data, repeated if they are too few."""
        return inputs_of(self.data, count)


def inputs_of(data: Datasets, count: int) -> Any:
    """The first inputs of the test data, repeated if they are too few."""
    with stage("data.test"):
        batch = next(batches(data.test, name="test loader"))
    return repeated(batch.inputs, count)


def _dense_model(
    recipe: Recipe, options: ExtractionOptions, data: Datasets, progress: bool
) -> tuple[nn.Module, WeightSnapshot | None]:
    """The trained model, and its weights before training if the criterion needs them."""
    section = recipe.model
    model = call_factory("model.factory", section.factory, section.arguments)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model.factory: {section.factory} returned a {type(model).__name__}; expected a torch module"
        )
    if section.checkpoint is not None:
        load_checkpoint(model, section.checkpoint)
    snapshot = None
    if "snapshot" in needs_of(options.criterion_class).requires:
        if section.initial is not None:
            snapshot = WeightSnapshot.load(section.initial)
        elif recipe.train.epochs:
            snapshot = WeightSnapshot(model)
    if recipe.train.epochs:
        train(model, data, recipe, "train", tuple(range(len(data.label_names))), progress)
    model.eval()
    check_runs(model, data.example_inputs, len(data.label_names))
    return model, snapshot


def train(
    model: nn.Module, data: Datasets, recipe: Recipe, field: str, outputs: Sequence[int | None], progress: bool
) -> None:
    """Train a model as a section of a recipe says, in place.

    Args:
        model: The model.
        data: It has the training data.
        recipe: The recipe.
        field: Name of the section: ``"train"`` or ``"fine_tune"``.
        outputs: The label of each output; ``None`` for "other".
        progress: Whether to show a progress bar.

    Raises:
        RecipeError: If there is no training data.
    """
    if data.train is None:
        raise RecipeError(f"{field}.epochs: the data factory returned no train data; expected some, or 0 epochs")
    section = getattr(recipe, field)
    other = outputs.index(None) if None in outputs else -1
    targets = [outputs.index(label) if label in outputs else other for label in range(len(data.label_names))]
    with stage("data.train"):
        train_classifier(
            model,
            data.train,
            epochs=section.epochs,
            learning_rate=section.learning_rate,
            weight_decay=section.weight_decay,
            target_of_label=torch.tensor(targets),
            title="training" if field == "train" else "fine-tuning",
            progress=progress,
        )


def check_runs(model: nn.Module, example_inputs: Any, outputs: int) -> None:
    """Check that a model runs on the example inputs, and returns one column for each output.

    Raises:
        PruningError: If it does not.
    """
    with preserved(model), torch.no_grad():
        model.eval()
        try:
            found = run_model(model, to_device(example_inputs, device_of(model)))
        except Exception as error:
            raise PruningError(
                f"the model cannot run on the example inputs: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != outputs:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PruningError(
            f"the model returns {shape} for the example inputs; expected [N, {outputs}], one column for each label"
        )
