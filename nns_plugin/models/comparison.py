"""Comparison: whether two models compute the same outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nns_plugin.models.inputs import map_tensors, run_model, tensors_of, to_device
from nns_plugin.models.preserve import copied, preserved_rng


def same_outputs(left: nn.Module, right: nn.Module, inputs: Any, right_inputs: Any = None) -> bool:
    """Whether two models return the same outputs, in evaluation mode and double precision.

    Args:
        left: A model; left as it is.
        right: A model; left as it is.
        inputs: Inputs that ``left`` can run on.
        right_inputs: Inputs that ``right`` can run on; the same by default.
    """
    found = []
    for model, values in ((left, inputs), (right, inputs if right_inputs is None else right_inputs)):
        double = copied(model).to("cpu", torch.float64).eval()
        values = map_tensors(
            to_device(values, torch.device("cpu")),
            lambda value: value.double() if value.is_floating_point() else value,
        )
        with preserved_rng(), torch.no_grad():
            torch.manual_seed(0)  # a forward that draws draws the same
            found.append(tensors_of(run_model(double, values)))
    return len(found[0]) == len(found[1]) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-8)
        for a, b in zip(*found, strict=True)
    )
