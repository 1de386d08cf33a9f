"""The search for a minimal network: which synapses each step removes, and how it continues from there."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nns_plugin.errors import PruningError, SearchError
from nns_plugin.models.preserve import copied, preserved_rng
from nns_plugin.synapses.masks import mask_synapses, scored_layers, synapse_mask
from nns_plugin.synapses.options import MinimalNetworkOptions

Scores = Callable[[nn.Module], Mapping[str, Tensor]]
Train = Callable[[nn.Module], object]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Step:
    """One step of the search.

    Attributes:
        removed: Number of synapses that it removed.
        left: Number of synapses that remained.
        value: What ``evaluate`` returned after training.
        accepted: Whether the search continued from there.
    """

    removed: int
    left: int
    value: float
    accepted: bool


@dataclass
class Progress:
    """How far a search has come.

    Attributes:
        reference: What ``evaluate`` returned for the model.
        rung: Position in the schedule; its length once single synapses are tried.
        tried: Single synapses tried in the current round over all of them.
        changed: Whether one of those was accepted.
        finished: Whether nothing more can be removed.
        steps: The steps so far.
    """

    reference: float
    rung: int = 0
    tried: list[int] = field(default_factory=list)
    changed: bool = False
    finished: bool = False
    steps: list[Step] = field(default_factory=list)


class Search:
    """The last accepted network and the progress of the search.

    Args:
        model: Changed in place: all layers with scores get masks.
        scores: Scores the synapses of a model.
        train: Trains a model in place.
        evaluate: Accuracy of a model.
        options: How to search.

    Raises:
        PruningError: If the scores do not fit the model.
        SearchError: If ``scores`` fails.
    """

    def __init__(
        self, model: nn.Module, scores: Scores, train: Train, evaluate: Evaluate, options: MinimalNetworkOptions
    ) -> None:
        self.model, self.options = model, options
        self._scores, self._train, self._evaluate = scores, train, evaluate
        self.progress = Progress(math.nan)
        self._modes = {name: module.training for name, module in model.named_modules()}
        self.layers: tuple[str, ...] = ()
        self.layers = tuple(self._scored())
        for name in self.layers:
            layer = model.get_submodule(name)
            mask_synapses(layer, synapse_mask(layer))

    @property
    def left(self) -> int:
        """Number of remaining synapses."""
        return int(self._mask().sum())

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do."""
        return self.progress.finished or self.left <= self.options.min_synapses

    def begin(self) -> None:
        """Evaluate the model."""
        self.progress.reference = self._evaluated(self.model)

    def step(self) -> None:
        """Try to remove some synapses.

        Raises:
            SearchError: If something fails; the search keeps its state from before the step.
        """
        removed = self._chosen()
        candidate = copied(self.model)
        kept = self._mask()
        kept[removed] = False
        masks = list(synapse_masks(self.model, self.layers).values())
        parts = kept.split([mask.numel() for mask in masks])
        for name, mask, part in zip(self.layers, masks, parts, strict=True):
            mask_synapses(candidate.get_submodule(name), part.reshape(mask.shape))
        for name, module in candidate.named_modules():
            module.training = self._modes[name]
        self._call("train", self._train, candidate)
        left = int(_joined(synapse_masks(candidate, self.layers)).sum())
        if left > int(kept.sum()):
            raise SearchError(
                f"train returned {left} synapses, but it was given {int(kept.sum())}; it may exchange synapses, but "
                "not restore more than it masks"
            )
        value = self._evaluated(candidate)
        accepted = value >= self.progress.reference - self.options.max_drop
        if accepted:
            self.model = candidate
        self._record(removed, Step(removed.numel(), left, value, accepted))

    def _chosen(self) -> Tensor:
        """Return the synapses to remove next, as positions in the joined weights of all layers."""
        scores = self._scored()
        if not self.options.global_pruning:
            masks = synapse_masks(self.model, self.layers)
            scores = {name: _rank(score, masks[name]) for name, score in scores.items()}
        joined = torch.cat([scores[name].detach().double().cpu().flatten() for name in self.layers])
        left = self._mask().nonzero().flatten()
        order = left[joined[left].argsort(stable=True)]
        if not self._single:
            share = self.options.schedule[self.progress.rung]
            return order[: min(max(1, round(share * order.numel())), order.numel() - self.options.min_synapses)]
        return order[~torch.isin(order, torch.tensor(self.progress.tried, dtype=order.dtype))][:1]

    @property
    def _single(self) -> bool:
        return self.progress.rung == len(self.options.schedule)

    def _record(self, removed: Tensor, step: Step) -> None:
        """Note a step and decide how to continue."""
        progress = self.progress
        progress.steps.append(step)
        if self._single:
            progress.tried += removed.tolist()
            progress.changed |= step.accepted
            if not set(self._mask().nonzero().flatten().tolist()) - set(progress.tried):
                progress.finished = not progress.changed or not self.left
                progress.tried, progress.changed = [], False
            return
        if not step.accepted:
            # Skip smaller shares that round to as many synapses: this step has already tried them.
            progress.rung += 1
            while not self._single and max(1, round(self.options.schedule[progress.rung] * self.left)) >= step.removed:
                progress.rung += 1
        progress.finished = not self.left or (self._single and not self.options.one_by_one)

    def _scored(self) -> Mapping[str, Tensor]:
        scores = self._call("scores", self._scores, copied(self.model))
        if not isinstance(scores, Mapping) or not scores:
            raise PruningError(f"scores returned a {type(scores).__name__}; expected scores by name of the layer")
        scored_layers(self.model, scores)
        if self.layers and tuple(scores) != self.layers:
            raise PruningError(
                f"scores returned the layers {', '.join(scores)}; expected {', '.join(self.layers)}, as before"
            )
        return scores

    def _evaluated(self, model: nn.Module) -> float:
        value = self._call("evaluate", self._evaluate, copied(model))
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError) as error:
            raise SearchError(f"evaluate returned {value!r}; expected a number, higher is better") from error
        if not math.isfinite(number):
            raise SearchError(f"evaluate returned {value!r}; expected a finite number, higher is better")
        return number

    def _call(self, name: str, function: Callable[[nn.Module], Any], model: nn.Module) -> Any:
        """Call the user's function, seeded by the number of the step; the random states are restored afterwards."""
        entropy = (self.options.seed, len(self.progress.steps), ("scores", "train", "evaluate").index(name))
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        with preserved_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            try:
                return function(model)
            except Exception as error:
                raise SearchError(f"{name} raised {type(error).__name__}: {error}") from error

    def _mask(self) -> Tensor:
        """Mark the remaining synapses in the joined weights of all layers."""
        return _joined(synapse_masks(self.model, self.layers))


def synapse_masks(model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """Mark the synapses of each layer that are not masked, on the CPU."""
    return {name: synapse_mask(model.get_submodule(name)).cpu() for name in layers}


def _joined(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


def _rank(score: Tensor, mask: Tensor) -> Tensor:
    """Rank each synapse among the remaining ones of its layer, in [0, 1)."""
    values = score.detach().double().cpu()
    ranks = torch.ones_like(values)
    count = int(mask.sum())
    ranks[mask] = values[mask].argsort(stable=True).argsort().double() / max(count, 1)
    return ranks
