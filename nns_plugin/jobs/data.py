"""The data of a job, and scikit-learn's handwritten digits as the default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nns_plugin.errors import MissingExtraError, RecipeError

OPTIONAL = ("train", "validation")


@dataclass(frozen=True)
class Datasets:
    """What a data factory returns: this class, or a mapping with these keys.

    Attributes:
        calibration: Batches ``(inputs, labels)`` that units are scored on; all loaders are iterated repeatedly.
        test: Held-out batches ``(inputs, labels)`` for every reported number.
        example_inputs: A batch of inputs for tracing and export: a tensor, or a tuple or mapping of tensors.
        label_names: Names of the labels, in the order of the model's outputs.
        train: Batches ``(inputs, labels)`` for training and fine-tuning, if the recipe asks for them.
        validation: Batches ``(inputs, labels)`` for decisions: how often to prune, how much a budget allows; the
            calibration data by default.
    """

    calibration: Iterable[Any]
    test: Iterable[Any]
    example_inputs: Any
    label_names: tuple[str, ...]
    train: Iterable[Any] | None = None
    validation: Iterable[Any] | None = None

    @property
    def decisive(self) -> Iterable[Any]:
        """The data for decisions."""
        return self.calibration if self.validation is None else self.validation

    @classmethod
    def parse(cls, made: Any, factory: str) -> Datasets:
        """Check what a data factory returned.

        Raises:
            RecipeError: If it is neither a :class:`Datasets` nor a mapping with its keys.
        """
        if isinstance(made, Mapping):
            known = set(cls.__dataclass_fields__)
            wrong = sorted(set(made) - known) + sorted(known - set(OPTIONAL) - set(made))
            if wrong:
                raise RecipeError(f"data.factory: {factory} returned the keys {sorted(made)}; expected {sorted(known)}")
            made = cls(**made)
        if not isinstance(made, cls):
            raise RecipeError(
                f"data.factory: {factory} returned a {type(made).__name__}; expected Datasets or a mapping"
            )
        if isinstance(made.label_names, str) or not isinstance(made.label_names, Sequence):
            raise RecipeError(
                f"data.factory: {factory} returned label_names={made.label_names!r}; expected a list of names"
            )
        for field in ("calibration", "test", *OPTIONAL):
            loader = getattr(made, field)
            if loader is None and field in OPTIONAL:
                continue
            if isinstance(loader, (str, Tensor, Mapping)) or not hasattr(loader, "__iter__") or iter(loader) is loader:
                raise RecipeError(
                    f"data.factory: {factory} returned a {type(loader).__name__} for {field!r}; expected batches "
                    "that can be iterated repeatedly, such as a DataLoader or a list"
                )
        names = tuple(str(name) for name in made.label_names)
        if not names or len(set(names)) != len(names):
            raise RecipeError(
                f"data.factory: {factory} returned the label names {names}; expected distinct names, at least one"
            )
        return replace(made, label_names=names)


def digits(seed: int = 0, batch_size: int = 64, test_share: float = 0.3) -> Datasets:
    """scikit-learn's 1 797 handwritten digits, 8x8 pixels, in a stratified split of training and held-out data.

    Args:
        seed: Seed of the split and of the order of the training batches.
        batch_size: Inputs per batch.
        test_share: Share of the digits to hold out.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise MissingExtraError("sklearn", "cli") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    places = range(len(labels))
    train, test = train_test_split(places, test_size=test_share, stratify=labels, random_state=seed)
    targets = torch.tensor(labels)

    def subset(chosen: list[int]) -> TensorDataset:
        return TensorDataset(images[chosen], targets[chosen])

    order = torch.Generator().manual_seed(seed)
    return Datasets(
        calibration=DataLoader(subset(train), batch_size),
        test=DataLoader(subset(test), batch_size),
        example_inputs=images[train[:2]],
        label_names=tuple(str(digit) for digit in range(10)),
        train=DataLoader(subset(train), batch_size, shuffle=True, generator=order),
    )
