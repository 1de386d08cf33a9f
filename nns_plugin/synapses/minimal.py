"""The minimal network: synapses go, the least significant ones first, as long as accuracy does not drop."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.backends import Backend, find_backend
from nns_plugin.errors import CheckpointError, NNSError, PruningError, SearchError
from nns_plugin.files import read_safetensors, write_safetensors
from nns_plugin.models.fingerprint import digest, fingerprint, fingerprint_of
from nns_plugin.models.preserve import copied, preserved_rng
from nns_plugin.synapses.by_unit import scores_by_unit
from nns_plugin.synapses.compaction import Compact, compact
from nns_plugin.synapses.masks import mask_synapses, scored_layers, significance, synapse_mask
from nns_plugin.synapses.snapshot import WeightSnapshot
from nns_plugin.units import UnitGroup

FORMAT = "nns-plugin minimal network 1"
SCHEDULE = (0.5, 0.35, 0.2, 0.1, 0.05, 0.02, 0.01)

Scores = Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Step:
    """One step of the search.

    Attributes:
        removed: Number of synapses that it removed.
        left: Number that were left then.
        value: What ``evaluate`` said after training.
        accepted: Whether the search went on from there.
    """

    removed: int
    left: int
    value: float
    accepted: bool


@dataclass(frozen=True, eq=False)
class MinimalNetwork:
    """What the search led to.

    Attributes:
        masked: The last accepted network, as wide as the model, masked by ``torch.nn.utils.prune``.
        compact: The same without the units and inputs that no synapse reaches.
        reference: What ``evaluate`` said of the model.
        steps: What was tried, in order.
        finished: Whether nothing more could be removed; False where ``least`` or ``max_steps`` ended the search.
    """

    masked: nn.Module
    compact: Compact
    reference: float
    steps: tuple[Step, ...]
    finished: bool

    @property
    def model(self) -> nn.Module:
        """The compact model."""
        return self.compact.model

    @property
    def value(self) -> float:
        """What ``evaluate`` said of the last accepted network."""
        return next((step.value for step in reversed(self.steps) if step.accepted), self.reference)

    @property
    def synapses(self) -> int:
        """Number of synapses of the compact model."""
        return self.compact.synapses

    @property
    def features(self) -> Tensor | None:
        """``[F]`` int64 indices of the inputs that the compact model works on; ``None`` for all."""
        return None if self.compact.inputs is None else self.compact.inputs.indices


def minimal_network(
    model: nn.Module,
    snapshot: WeightSnapshot | None,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    *,
    example_inputs: Any,
    scores: Scores | None = None,
    schedule: Sequence[float] = SCHEDULE,
    one_by_one: bool = True,
    global_pruning: bool = True,
    by_unit: bool = False,
    max_drop: float = 0.0,
    least: int = 0,
    max_steps: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    ignored_layers: Sequence[str] = (),
    backend: Backend | None = None,
    seed: int = 0,
    progress: bool = False,
) -> MinimalNetwork:
    """Remove synapses, the least significant ones first, and train the others, as long as accuracy does not drop.

    A step removes a share of the synapses that are left, trains, and is kept if accuracy has not dropped. If it has,
    the next smaller share of the schedule is tried from where the step began; after the smallest one, synapses are
    tried one by one, until none can go. What no synapse reaches is removed for real in the end.

    Args:
        model: Trained; left as it is. Synapses that ``torch.nn.utils.prune`` masks already stay masked.
        snapshot: Its weights before training; not needed if ``scores`` are given.
        train: Trains a model, in place. It may exchange synapses
            (:func:`~nns_plugin.synapses.masks.exchange_synapses`), but bring no more back than it masks.
        evaluate: Accuracy of a model, higher is better; on other data than the network is judged by in the end.
        example_inputs: Inputs that the model can run on.
        scores: For each layer's name a score of every synapse, the lowest of which go; by default their
            :func:`~nns_plugin.synapses.masks.significance` to the snapshot.
        schedule: Shares of the synapses that are left to remove in a step, each in (0, 1), falling.
        one_by_one: Whether to go on with single synapses after the schedule.
        global_pruning: Whether to rank the synapses of all layers together, or to take equal shares of each.
        by_unit: Whether a synapse counts for what the weakest hidden unit at its ends counts in total, so that whole
            units go before parts of them: towards fewer units, where plain ranking leaves many with few synapses.
        max_drop: How far accuracy may fall under that of the model.
        least: Stop at this many synapses.
        max_steps: Stop after this many steps, those of former runs included.
        checkpoint: File that is written after every step; if it is there, the search goes on from it.
        ignored_layers: Names of layers whose outputs must stay whole in the end.
        backend: Removes units in the end; torch-pruning by default.
        seed: Of torch, NumPy and ``random`` before every call of ``train``, ``evaluate`` and ``scores``, together with
            the number of the step: a search that was interrupted ends as if it had not been.
        progress: Whether to show a progress bar.

    Returns:
        The network, and every step.

    Raises:
        PruningError: If an option is out of range.
        CheckpointError: If the checkpoint is damaged or belongs to another search; it is left as it is.
        SnapshotError: If the snapshot is of another architecture.
        SearchError: If ``train``, ``evaluate`` or ``scores`` fails; its ``accepted`` is the last accepted network.

    Source:
        Bulin and Smidl, "Optimization of Neural Network".
    """
    if not isinstance(schedule, Sequence):
        raise PruningError(f"schedule is {schedule!r}; expected falling shares in (0, 1), such as (0.5, 0.1)")
    options = _Options(tuple(schedule), one_by_one, global_pruning, by_unit, max_drop, least, seed)
    scored = scores or _significance(model, snapshot)
    if by_unit:
        scored = _by_unit(scored, (backend or find_backend())(copied(model), example_inputs).groups(ignored_layers))
    search = _Search(copied(model), scored, train, evaluate, options)
    with warnings.catch_warnings():  # what stays is told in the end; what cannot be done at all, now
        warnings.simplefilter("ignore")
        compact(search.model, example_inputs, ignored_layers=ignored_layers, backend=backend)
    given = "scores" if snapshot is None or scores is not None else digest(fingerprint_of(snapshot.weights))
    parent = {"parent": digest(fingerprint(model)), "snapshot": given, "layers": list(search.layers)}
    path = None if checkpoint is None else Path(checkpoint)
    try:
        if path is not None and path.exists():
            search.resume(path, parent)
        else:
            search.begin()
            if path is not None:
                search.save(path, parent)
        total = search.left
        with tqdm(total=total, desc="removing synapses", disable=not progress, leave=False) as bar:
            while not search.ended and (max_steps is None or len(search.progress.steps) < max_steps):
                search.step()
                if path is not None:
                    search.save(path, parent)
                bar.update(total - search.left - bar.n)
                bar.set_postfix(left=search.left, value=f"{search.progress.steps[-1].value:.4f}")
        small = compact(search.model, example_inputs, ignored_layers=ignored_layers, backend=backend)
    except CheckpointError:
        raise
    except NNSError as error:
        where = f", and {str(path)!r} holds it: call again to go on" if path is not None and path.exists() else ""
        raise SearchError(
            f"the search stopped in step {len(search.progress.steps)}: {error}; the last accepted network, with "
            f"{search.left} synapses, is the error's 'accepted', and 'steps' is its log{where}",
            search.model,
            tuple(search.progress.steps),
        ) from error
    return MinimalNetwork(
        masked=search.model,
        compact=small,
        reference=search.progress.reference,
        steps=tuple(search.progress.steps),
        finished=search.progress.finished,
    )


def _significance(model: nn.Module, snapshot: WeightSnapshot | None) -> Scores:
    if snapshot is None:
        raise PruningError("there are neither a snapshot nor scores; pass the weights before training, or scores")
    significance(model, snapshot)
    return lambda network: significance(network, snapshot)


def _by_unit(scores: Scores, groups: Sequence[UnitGroup]) -> Scores:
    def of_units(network: nn.Module) -> Mapping[str, Tensor]:
        found = scores(network)
        return scores_by_unit(network, groups, found, _masks(network, list(scored_layers(network, found))))

    return of_units


@dataclass(frozen=True)
class _Options:
    """What two runs of one search have in common."""

    schedule: tuple[float, ...]
    one_by_one: bool
    global_pruning: bool
    by_unit: bool
    max_drop: float
    least: int
    seed: int

    def __post_init__(self) -> None:
        falling = all(left > right for left, right in itertools.pairwise(self.schedule))
        if not falling or not all(0 < share < 1 for share in self.schedule):
            raise PruningError(f"schedule is {self.schedule}; expected falling shares in (0, 1), such as (0.5, 0.1)")
        if not self.schedule and not self.one_by_one:
            raise PruningError("the schedule is empty and one_by_one is off: nothing would be tried")
        if not 0 <= self.max_drop < math.inf or self.least < 0:
            raise PruningError(f"max_drop is {self.max_drop} and least {self.least}; expected at least 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise PruningError(f"seed is {self.seed!r}; expected a whole number of at least 0")


@dataclass
class _Progress:
    """How far a search has come.

    Attributes:
        reference: What was said of the model.
        rung: Place in the schedule; its length for single synapses.
        tried: Single synapses that were tried since the last time that all of them were to be tried.
        changed: Whether one of those was accepted.
        finished: Whether nothing more can go.
        steps: What was tried.
    """

    reference: float
    rung: int = 0
    tried: list[int] = field(default_factory=list)
    changed: bool = False
    finished: bool = False
    steps: list[Step] = field(default_factory=list)


class _Search:
    """The search: the last accepted network, and how far it has come."""

    def __init__(
        self,
        model: nn.Module,
        scores: Scores,
        train: Callable[[nn.Module], object],
        evaluate: Callable[[nn.Module], float],
        options: _Options,
    ) -> None:
        self.model, self._scores, self._train, self._evaluate, self._options = model, scores, train, evaluate, options
        self.progress = _Progress(math.nan)
        self._training = {name: module.training for name, module in model.named_modules()}
        self.layers: tuple[str, ...] = ()
        self.layers = tuple(self._scored())
        for name in self.layers:
            layer = model.get_submodule(name)
            mask_synapses(layer, synapse_mask(layer))

    @property
    def left(self) -> int:
        """Number of synapses that are left."""
        return int(self._mask().sum())

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do."""
        return self.progress.finished or self.left <= self._options.least

    def begin(self) -> None:
        """Judge the model."""
        self.progress.reference = self._judged(self.model)

    def step(self) -> None:
        """Try to remove some synapses.

        Raises:
            SearchError: If something fails; the search is where it was then.
        """
        gone = self._chosen()
        candidate = copied(self.model)
        kept = self._mask()
        kept[gone] = False
        masks = list(self._masks().values())
        parts = kept.split([mask.numel() for mask in masks])
        for name, mask, part in zip(self.layers, masks, parts, strict=True):
            mask_synapses(candidate.get_submodule(name), part.reshape(mask.shape))
        for name, module in candidate.named_modules():
            module.training = self._training[name]
        self._call("train", self._train, candidate)
        there = int(_joined(_masks(candidate, self.layers)).sum())
        if there > int(kept.sum()):
            raise SearchError(
                f"train left {there} synapses of {int(kept.sum())}; it may exchange synapses, but not bring more back"
            )
        value = self._judged(candidate)
        accepted = value >= self.progress.reference - self._options.max_drop
        if accepted:
            self.model = candidate
        self._note(gone, Step(gone.numel(), there, value, accepted))

    def _chosen(self) -> Tensor:
        """Positions of the synapses to remove next, among those of all layers one after the other."""
        scores = self._scored()
        if not self._options.global_pruning:
            scores = {name: _rank(score, self._masks()[name]) for name, score in scores.items()}
        joined = torch.cat([scores[name].detach().double().cpu().flatten() for name in self.layers])
        there = self._mask().nonzero().flatten()
        order = there[joined[there].argsort(stable=True)]
        if not self._single:
            share = self._options.schedule[self.progress.rung]
            return order[: min(max(1, round(share * order.numel())), order.numel() - self._options.least)]
        return order[~torch.isin(order, torch.tensor(self.progress.tried, dtype=order.dtype))][:1]

    @property
    def _single(self) -> bool:
        return self.progress.rung == len(self._options.schedule)

    def _note(self, gone: Tensor, step: Step) -> None:
        """Decide how to go on after a step."""
        progress = self.progress
        progress.steps.append(step)
        if self._single:
            progress.tried += gone.tolist()
            progress.changed |= step.accepted
            if not set(self._mask().nonzero().flatten().tolist()) - set(progress.tried):
                progress.finished = not progress.changed or not self.left
                progress.tried, progress.changed = [], False
            return
        if not step.accepted:
            # Smaller shares that come to as many synapses have been tried with this one.
            progress.rung += 1
            while not self._single and max(1, round(self._options.schedule[progress.rung] * self.left)) >= gone.numel():
                progress.rung += 1
        progress.finished = not self.left or (self._single and not self._options.one_by_one)

    def _scored(self) -> Mapping[str, Tensor]:
        found = self._call("scores", self._scores, copied(self.model))
        if not isinstance(found, Mapping) or not found:
            raise PruningError(f"scores returned a {type(found).__name__}; expected scores for the names of layers")
        scored_layers(self.model, found)
        if self.layers and tuple(found) != self.layers:
            raise PruningError(f"scores are of {', '.join(found)}, and were of {', '.join(self.layers)} before")
        return found

    def _judged(self, model: nn.Module) -> float:
        value = self._call("evaluate", self._evaluate, copied(model))
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError) as error:
            raise SearchError(f"evaluate returned {value!r}; expected a number, higher is better") from error
        if not math.isfinite(number):
            raise SearchError(f"evaluate returned {value!r}; expected a finite number, higher is better")
        return number

    def _call(self, name: str, function: Callable[[nn.Module], Any], model: nn.Module) -> Any:
        """Call what the user gave, seeded by the number of the step; the random states come back."""
        entropy = (self._options.seed, len(self.progress.steps), ("scores", "train", "evaluate").index(name))
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        with preserved_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            try:
                return function(model)
            except Exception as error:
                raise SearchError(f"{name} raised {type(error).__name__}: {error}") from error

    def _masks(self) -> dict[str, Tensor]:
        return _masks(self.model, self.layers)

    def _mask(self) -> Tensor:
        """Which synapses are left, of all layers one after the other."""
        return _joined(self._masks())

    def save(self, path: Path, parent: Mapping[str, Any]) -> None:
        """Write the last accepted network and the progress; the file appears whole or not at all."""
        header = {**parent, "options": asdict(self._options), "progress": asdict(self.progress)}
        write_safetensors(self.model.state_dict(), {"format": FORMAT, "nns": json.dumps(header)}, path)

    def resume(self, path: Path, parent: Mapping[str, Any]) -> None:
        """Go on from a file of :meth:`save`.

        Raises:
            CheckpointError: If it is damaged, or of another search.
        """
        wanted = json.loads(json.dumps({**parent, "options": asdict(self._options)}))
        header, state = read_safetensors(path, FORMAT, CheckpointError, _decoded)
        for name, value in wanted.items():
            if header.get(name) != value:
                raise CheckpointError(
                    f"{str(path)!r} belongs to another search: its {name} is {header.get(name)}, expected {value}; go "
                    "on with the same model, snapshot, scores and options, or choose another file"
                )
        found = {name: (value.shape, value.dtype) for name, value in state.items()}
        if found != {name: (value.shape, value.dtype) for name, value in self.model.state_dict().items()}:
            raise CheckpointError(f"{str(path)!r} belongs to another model: its weights have other shapes")
        if not header["progress"].rung <= len(self._options.schedule):
            raise CheckpointError(f"{str(path)!r} is damaged: it is past the end of its schedule")
        self.model.load_state_dict(state)
        self.progress = header["progress"]


def _decoded(metadata: Mapping[str, str], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(metadata["nns"])
    progress = _Progress(**header["progress"])
    progress.steps = [Step(**step) for step in header["progress"]["steps"]]
    numbers = [progress.rung, *progress.tried, *(part for step in progress.steps for part in (step.removed, step.left))]
    values = [progress.reference, *(step.value for step in progress.steps)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("its counts are no counts")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError("its values are not finite")
    if any(bool(((mask != 0) & (mask != 1)).any()) for name, mask in state.items() if name.endswith("_mask")):
        raise ValueError("its masks are not of zeros and ones")
    return {**header, "progress": progress}, state


def _masks(model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """Which synapses of each layer are there, on the CPU."""
    return {name: synapse_mask(model.get_submodule(name)).cpu() for name in layers}


def _joined(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


def _rank(score: Tensor, mask: Tensor) -> Tensor:
    """Place of each synapse among those of its layer that are left, in [0, 1)."""
    values = score.detach().double().cpu()
    ranks = torch.ones_like(values)
    count = int(mask.sum())
    ranks[mask] = values[mask].argsort(stable=True).argsort().double() / max(count, 1)
    return ranks
