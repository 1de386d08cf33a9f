"""Rules of config lists that NNI's own mask generation breaks: global ranking, and limits of sparsity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace
from torch import Tensor

from nns_plugin.adapters.nni.targets import Metrics, Spaces, changed


def decided_globally(metrics: Metrics, spaces: Spaces) -> tuple[Metrics, Spaces]:
    """Decide globally ranked and limited targets, which NNI gets wrong, in a form that its mask generation carries out.

    NNI ranks the blocks of a ``global_group_id`` on a heap that grows beyond the budget where layers have blocks of
    different sizes: asked for 40 %, it may remove 90 %. It also ignores ``min_sparse_ratio`` and ``max_sparse_ratio``
    there, and in dependency groups.

    Args:
        metrics: The metrics of the targets.
        spaces: The targets, left as they are.

    Returns:
        Metrics and targets in which a group's decisions are metrics of 0 and 1, with a threshold between them.
    """
    decided: Metrics = {name: dict(targets) for name, targets in metrics.items()}
    settled: Spaces = {name: dict(targets) for name, targets in spaces.items()}
    ranked: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    for name, targets in metrics.items():
        for target in targets:
            space = spaces[name][target]
            if space.sparse_ratio is None:
                settled[name][target] = changed(space, dependency_group_id=None, global_group_id=None)
                continue
            if space.dependency_group_id is not None:
                ratio = min(_most(space), max(_least(space), space.sparse_ratio))
                settled[name][target] = changed(space, sparse_ratio=ratio)
            elif space.global_group_id is not None:
                ranked[space.global_group_id].append((name, target))
    for places in ranked.values():
        found = [(metrics[name][target], spaces[name][target]) for name, target in places]
        for (name, target), kept in zip(places, _kept(found), strict=True):
            decided[name][target] = kept
            settled[name][target] = changed(
                spaces[name][target],
                sparse_threshold=0.5,
                sparse_ratio=None,
                global_group_id=None,
                min_sparse_ratio=None,
                max_sparse_ratio=None,
            )
    return decided, settled


def _kept(found: Sequence[tuple[Tensor, PruningTargetSpace]]) -> list[Tensor]:
    """Blocks that stay: the lowest of all layers go, up to the group's share of weights."""
    values, sizes, first, last = [], [], [], []
    for metric, space in found:
        flat = metric.flatten()
        rank = flat.argsort(stable=True).argsort(stable=True)
        values.append(flat)
        sizes.append(torch.full_like(flat, _weights(space) // flat.numel(), dtype=torch.int64))
        first.append(rank < int(flat.numel() * _least(space)))
        last.append(rank >= int(flat.numel() * _most(space)))
    must, may_not, size = torch.cat(first), torch.cat(last), torch.cat(sizes)
    order = torch.cat(values).masked_fill(must, -torch.inf).masked_fill(may_not, torch.inf).argsort(stable=True)
    budget = int(int(size.sum()) * (found[0][1].sparse_ratio or 0.0))
    gone = torch.zeros_like(must)
    gone[order] = size[order].cumsum(0) <= budget
    kept = (~(gone & ~may_not | must)).to(torch.cat(values).dtype)
    parts = kept.split([metric.numel() for metric, _ in found])
    return [part.reshape(metric.shape) for part, (metric, _) in zip(parts, found, strict=True)]


def _weights(space: PruningTargetSpace) -> int:
    return int(torch.Size(space.shape or ()).numel())


def _least(space: PruningTargetSpace) -> float:
    return space.min_sparse_ratio or 0.0


def _most(space: PruningTargetSpace) -> float:
    return space.max_sparse_ratio or 1.0
