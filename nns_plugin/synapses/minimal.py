"""The minimal network: remove the least significant synapses, and retrain, as long as accuracy does not drop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.backends import Backend, find_backend
from nns_plugin.errors import CheckpointError, NNSError, PruningError, SearchError
from nns_plugin.models.fingerprint import digest, fingerprint, fingerprint_of
from nns_plugin.models.preserve import copied
from nns_plugin.synapses.by_unit import scores_by_unit
from nns_plugin.synapses.compaction import Compact, compact
from nns_plugin.synapses.masks import scored_layers
from nns_plugin.synapses.options import MinimalNetworkOptions
from nns_plugin.synapses.search import Evaluate, Scores, Search, Step, Train, synapse_masks
from nns_plugin.synapses.search_checkpoint import resume_search, save_search
from nns_plugin.synapses.significance import significance
from nns_plugin.synapses.snapshot import WeightSnapshot
from nns_plugin.units import UnitGroup


@dataclass(frozen=True, eq=False)
class MinimalNetwork:
    """The result of `minimal_network`.

    Attributes:
        masked: The last accepted network, as wide as the model, masked by ``torch.nn.utils.prune``.
        compact: The same network without dead units and unused inputs.
        reference: What ``evaluate`` returned for the model.
        steps: All steps, in order.
        finished: Whether nothing more can be removed; False if ``min_synapses`` or ``max_steps`` ended the search.
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
        """What ``evaluate`` returned for the last accepted network."""
        return next((step.value for step in reversed(self.steps) if step.accepted), self.reference)

    @property
    def synapses(self) -> int:
        """Number of synapses of the compact model."""
        return self.compact.synapses

    @property
    def features(self) -> Tensor | None:
        """``[F]`` int64 indices of the inputs that the compact model uses; ``None`` for all."""
        return None if self.compact.inputs is None else self.compact.inputs.indices


def minimal_network(
    model: nn.Module,
    snapshot: WeightSnapshot | None,
    train: Train,
    evaluate: Evaluate,
    *,
    example_inputs: Any,
    scores: Scores | None = None,
    options: MinimalNetworkOptions | None = None,
    backend: Backend | None = None,
) -> MinimalNetwork:
    """Remove the least significant synapses, and retrain the others, as long as accuracy does not drop.

    A step removes a share of the remaining synapses, trains, and is accepted if accuracy has not dropped. If it has,
    the next smaller share of the schedule is tried from where the step began; after the smallest share, synapses are
    tried one by one until none can be removed. Finally, dead units and unused inputs are removed.

    Args:
        model: Trained; not changed. Synapses that ``torch.nn.utils.prune`` already masks stay masked.
        snapshot: Its weights before training; not needed if ``scores`` is given.
        train: Trains a model in place. It may exchange synapses
            (:func:`~nns_plugin.synapses.exchange.exchange_synapses`), but not restore more than it masks.
        evaluate: Accuracy of a model, higher is better; use other data than for the final evaluation.
        example_inputs: Inputs that the model can run on.
        scores: Scores every synapse of a model, by name of the layer; the lowest are removed first. By default their
            :func:`~nns_plugin.synapses.significance.significance` relative to the snapshot.
        options: How to search; :class:`~nns_plugin.synapses.options.MinimalNetworkOptions` by default.
        backend: Removes units after the search; torch-pruning by default.

    Returns:
        The network and every step.

    Raises:
        PruningError: If there are neither a snapshot nor scores, or the scores do not fit the model.
        CheckpointError: If the checkpoint is damaged or belongs to another search; it is not changed.
        SnapshotError: If the snapshot belongs to another architecture.
        SearchError: If ``train``, ``evaluate`` or ``scores`` fails; its ``accepted`` is the last accepted network.

    Source:
        Bulin and Smidl, "Optimization of Neural Network".
    """
    options = options or MinimalNetworkOptions()
    scored = scores or _significance(model, snapshot)
    if options.by_unit:
        groups = (backend or find_backend())(copied(model), example_inputs).groups(options.ignored_layers)
        scored = _by_unit(scored, groups)
    search = Search(copied(model), scored, train, evaluate, options)

    def compacted() -> Compact:
        return compact(search.model, example_inputs, ignored_layers=options.ignored_layers, backend=backend)

    # Fail early if compaction is impossible; what it has to keep is reported at the end.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compacted()
    path = None if options.checkpoint is None else Path(options.checkpoint)
    try:
        _run(search, path, _origin(search, model, None if scores is not None else snapshot))
        small = compacted()
    except CheckpointError:
        raise
    except NNSError as error:
        resume = f"; {str(path)!r} holds it: call again to resume" if path is not None and path.exists() else ""
        raise SearchError(
            f"the search stopped in step {len(search.progress.steps)}: {error}; the error's 'accepted' is the last "
            f"accepted network, with {search.left} synapses, and its 'steps' are the log{resume}",
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


def _run(search: Search, path: Path | None, origin: Mapping[str, Any]) -> None:
    """Search to the end, or until ``max_steps``."""
    if path is not None and path.exists():
        resume_search(search, path, origin)
    else:
        search.begin()
        if path is not None:
            save_search(search, path, origin)
    options, total = search.options, search.left
    with tqdm(total=total, desc="removing synapses", disable=not options.progress, leave=False) as bar:
        while not search.ended and (options.max_steps is None or len(search.progress.steps) < options.max_steps):
            search.step()
            if path is not None:
                save_search(search, path, origin)
            bar.update(total - search.left - bar.n)
            bar.set_postfix(left=search.left, value=f"{search.progress.steps[-1].value:.4f}")


def _origin(search: Search, model: nn.Module, snapshot: WeightSnapshot | None) -> dict[str, Any]:
    """Describe what the search started from, as JSON types."""
    known = "scores" if snapshot is None else digest(fingerprint_of(snapshot.weights))
    return {"parent": digest(fingerprint(model)), "snapshot": known, "layers": list(search.layers)}


def _significance(model: nn.Module, snapshot: WeightSnapshot | None) -> Scores:
    if snapshot is None:
        raise PruningError("there are neither a snapshot nor scores; pass the weights before training, or scores")
    significance(model, snapshot)
    return lambda network: significance(network, snapshot)


def _by_unit(scores: Scores, groups: Sequence[UnitGroup]) -> Scores:
    def of_units(network: nn.Module) -> Mapping[str, Tensor]:
        found = scores(network)
        return scores_by_unit(network, groups, found, synapse_masks(network, list(scored_layers(network, found))))

    return of_units
