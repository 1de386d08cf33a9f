"""MACs and parameters of a model, as torch-pruning counts them."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nns_plugin.models.preserve import preserved


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Count MACs for one input, and parameters, as torch-pruning counts them.

    Args:
        model: The model; left as it was found.
        example_inputs: A tensor, or a tuple or mapping of tensors; the host averages over their batch.

    Returns:
        MACs for one input, and the number of parameters.
    """
    with preserved(model), torch.no_grad():
        macs, _ = tp.utils.count_ops_and_params(model, example_inputs)
    return round(macs), sum(parameter.numel() for parameter in model.parameters())
