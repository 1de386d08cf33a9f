"""The classifier of the default job, and loading weights into the model of a recipe."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nns_plugin.errors import RecipeError
from nns_plugin.files import read_safetensors


def digits_classifier(width: int = 32, labels: int = 10) -> nn.Module:
    """A small convolutional classifier of 8x8 greyscale images.

    Args:
        width: Channels of the first of three convolutions; the second and third have two and four times as many.
        labels: Number of labels.
    """
    return nn.Sequential(
        *_block(1, width),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * 4, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, labels),
    )


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights into a model that they fit exactly.

    Raises:
        RecipeError: If the file is missing, is not a safetensors file or belongs to another model.
    """
    try:
        weights = read_safetensors(path, None, RecipeError, lambda metadata, tensors: tensors)
    except RecipeError as error:
        raise RecipeError(f"model.checkpoint: {error}") from error
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            raise RecipeError(
                f"model.checkpoint: {str(path)!r} does not fit the model: {name!r} is {found.get(name, 'missing')} in "
                f"the file and {expected.get(name, 'missing')} in the model"
            )
    model.load_state_dict(weights)
