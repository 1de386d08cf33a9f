"""Trace a model into a torch-pruning dependency graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.norms import norm_pruners
from nns_plugin.errors import GroupError
from nns_plugin.models.inputs import device_of, map_tensors, run_model
from nns_plugin.models.preserve import preserved


class TracedGraph(tp.DependencyGraph):
    """A dependency graph that remembers the inputs it was traced on, and its groups until units are removed."""

    example_inputs: Any

    def __init__(self) -> None:
        super().__init__()
        self._known_groups: dict[Any, list[tp.dependency.Group]] = {}

    def get_all_groups(
        self, ignored_layers: Sequence[nn.Module], root_module_types: Sequence[type[nn.Module]]
    ) -> list[tp.dependency.Group]:
        """All full groups, built once for each state of the model."""
        # Others may remove units, too, such as NNI: the history lists torch-pruning's removals alone.
        state = str(self._pruning_history), tuple(parameter.shape for parameter in self.model.parameters())
        key = state, frozenset(ignored_layers), frozenset(root_module_types)
        if key not in self._known_groups:
            self._known_groups = {known: groups for known, groups in self._known_groups.items() if known[0] == state}
            found = super().get_all_groups(list(ignored_layers), list(root_module_types))
            self._known_groups[key] = list(found)
        return self._known_groups[key]


def build_graph(model: nn.Module, example_inputs: Any) -> TracedGraph:
    """Trace a model into a fresh dependency graph, leaving the model as it was found.

    Raises:
        GroupError: If the model cannot run on the example inputs or cannot be traced.
    """
    graph = TracedGraph()
    with preserved(model), no_hooks_left(model), torch.inference_mode(False), torch.enable_grad():
        # torch-pruning follows gradients, which frozen parameters would stop.
        for parameter in model.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        try:
            # Tensors of inference mode have no gradients; clone() turns them into ordinary ones.
            graph.example_inputs = map_tensors(example_inputs, lambda value: value.to(device_of(model)).clone())
            # Without forward_fn, the host unpacks a batch and passes its rows to the model as separate arguments.
            graph.build_dependency(
                model,
                graph.example_inputs,
                forward_fn=run_model,
                output_transform=_own_operations,
                customized_pruners=norm_pruners(),
                verbose=False,
            )
        except Exception as error:
            raise GroupError(
                f"the model cannot be traced on example inputs of shape {_shapes(example_inputs)}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
    return graph


def _own_operations(outputs: Any) -> list[Tensor]:
    """Give every output an operation of its own, so that the graph has a node for it."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        if value.requires_grad:
            found.append(value + 0)
        return value

    map_tensors(outputs, keep)
    if not found:
        raise GroupError("no output of the model has a gradient")
    return found


@contextmanager
def no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that the host leaves behind when the model's forward raises."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for handle in [handle for handle in module._forward_hooks if handle not in known]:
                del module._forward_hooks[handle]


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return str(list(inputs.shape))
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    )
    return ", ".join(_shapes(value) if isinstance(value, Tensor) else type(value).__name__ for value in values)
