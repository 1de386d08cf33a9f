"""Calibration by several processes: sums over all of them, and the check that they collect the same."""

from __future__ import annotations

import torch
from torch import Tensor

from nns_plugin.errors import CalibrationError


def is_distributed() -> bool:
    """Whether this process belongs to a ``torch.distributed`` group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def distributed_sum(value: Tensor) -> Tensor:
    """The sum of a CPU tensor over all processes of the default ``torch.distributed`` group, on the CPU."""
    on_gpu = "nccl" in torch.distributed.get_backend()
    summed = value.to("cuda" if on_gpu else "cpu", copy=True)
    torch.distributed.all_reduce(summed)
    return summed.cpu()


def check_agreement(digest: int | None) -> None:
    """Raise in every process if one failed or collects something else, instead of waiting for its sums forever.

    Args:
        digest: A number that processes share if their sums may be added, not negative; ``None`` if this process failed.

    Raises:
        CalibrationError: If another process failed, or the digests differ; not in a process that failed itself.
    """
    count = torch.distributed.get_world_size()
    outcomes = torch.zeros(count, dtype=torch.int64)
    outcomes[torch.distributed.get_rank()] = -1 if digest is None else digest
    outcomes = distributed_sum(outcomes)
    failures = int((outcomes < 0).sum())
    if failures and digest is not None:
        raise CalibrationError(f"calibration failed in {failures} of {count} processes; see their errors")
    if not failures and outcomes.unique().numel() > 1:
        raise CalibrationError(
            "the processes calibrate different models, groups or labels; give all of them the same weights and "
            "buffers, groups, labels and threshold"
        )
