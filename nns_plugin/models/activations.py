"""Capture the inputs and outputs of single modules, by hooks that can stop the forward."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nns_plugin.errors import CalibrationError
from nns_plugin.models.batches import batches
from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import run_model
from nns_plugin.models.preserve import preserved

ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})


def capture_input(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """The input of one module; the model runs in its current modes until it reaches the module.

    Args:
        model: The model.
        name: Name of the module.
        inputs: Inputs of the model.

    Returns:
        The module's first argument; of its first call, if it is reused.

    Raises:
        CalibrationError: If the module does not run, or its first argument is not a tensor.
    """

    def stop(x: Any) -> None:
        if not isinstance(x, Tensor):
            raise CalibrationError(f"the first argument of module {name!r} is a {type(x).__name__}; expected a tensor")
        raise _StopForward(x)

    try:
        with hooked((model.get_submodule(name), "input", stop)):
            run_model(model, inputs)
    except _StopForward as stopped:
        return stopped.tensor
    raise CalibrationError(f"module {name!r} did not run")


@dataclass(frozen=True, eq=False)
class Call:
    """The first call of a module.

    Attributes:
        inputs: Its first argument.
        output: Its output.
        addend: The tensor that a later sum adds to the output of a module, see :func:`capture_call`; ``None`` if there
            is no such sum.
    """

    inputs: Tensor
    output: Tensor
    addend: Tensor | None


def capture_call(model: nn.Module, name: str, inputs: Any, summed: str | None = None) -> Call:
    """Run a model in its current modes until one module has run, or on until an output is added to something.

    Args:
        model: The model.
        name: Name of the module.
        inputs: Inputs of the model.
        summed: Name of this or a later module: go on until its output is one of two summands of equal shape, and return
            the other one as ``addend``. If there is no such sum, the model runs to its end.

    Raises:
        CalibrationError: If the module does not run.
    """
    captured: list[tuple[Tensor, Tensor]] = []

    def capture(x: Tensor, output: Tensor) -> None:
        if not captured:
            if summed is None:
                captured.append((x, output))
                raise _StopForward(output)
            captured.append((x.clone(), output.clone()))  # the forward goes on, and may work in place

    watch = _SumWatch()
    hooks: list[Hook] = [(model.get_submodule(name), "output", capture)]
    if summed is not None:
        hooks.append((model.get_submodule(summed), "output", watch.start))
    addend = None
    try:
        with hooked(*hooks), nullcontext() if summed is None else watch:
            run_model(model, inputs)
    except _StopForward as stopped:
        addend = None if summed is None else stopped.tensor
    if not captured:
        raise CalibrationError(f"module {name!r} did not run")
    return Call(*captured[0], addend)


def only_summed(model: nn.Module, name: str, inputs: Any) -> bool:
    """Whether the only operation that reads a module's output is a sum with another tensor of the same shape.

    If other operations read it as well, the other summand may depend on it.

    Args:
        model: The model, in its current modes.
        name: Name of the module.
        inputs: Inputs of the model.
    """
    watch = _SumWatch(stops=False)
    with hooked((model.get_submodule(name), "output", watch.start)), watch:
        run_model(model, inputs)
    return watch.sums == watch.reads == 1


def execution_order(model: nn.Module, names: Iterable[str], inputs: Any) -> dict[str, int]:
    """Which of the named modules run: their names in order of their first calls, and their numbers of calls."""
    calls: dict[str, int] = {}

    def count(name: str, x: Any) -> None:
        calls[name] = calls.get(name, 0) + 1

    hooks: list[Hook] = [(model.get_submodule(name), "input", partial(count, name)) for name in names]
    with hooked(*hooks), preserved(model), torch.no_grad():
        model.eval()
        run_model(model, inputs)
    return calls


def collect_inputs(
    model: nn.Module, name: str, loader: Iterable[Any], progress: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The inputs of one module over a whole loader; unlike in :func:`nns_plugin.calibrate`, memory grows with the data.

    Args:
        model: The model; left exactly as it was.
        name: Name of the module, whose input must be ``[N, features]``.
        loader: As for :func:`nns_plugin.calibrate`.
        progress: Whether to show a progress bar.

    Returns:
        ``[N, features]`` inputs of the module, and ``[N]`` int64 labels or ``None``, both on the CPU.

    Raises:
        CalibrationError: If the loader yields no inputs, the module does not run, or its input is not ``[N, features]``
            and finite.
    """
    features: list[Tensor] = []
    labels: list[Tensor | None] = []
    with preserved(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        for batch in batches(loader, model, title="collecting features", progress=progress):
            captured = capture_input(model, name, batch.inputs)
            if captured.dim() != 2 or captured.shape[0] != batch.size:
                raise CalibrationError(
                    f"the input of module {name!r} has shape {list(captured.shape)}; expected [{batch.size}, features]"
                )
            features.append(captured.cpu())
            labels.append(batch.labels)
    joined = torch.cat(features)
    if not bool(torch.isfinite(joined).all()):
        raise CalibrationError(f"the input of module {name!r} has NaN or infinite activations")
    known = [label for label in labels if label is not None]
    return joined, torch.cat(known) if len(known) == len(labels) else None


class _SumWatch(TorchFunctionMode):
    """Stops a forward where a watched tensor is added to another one, and carries the other one out.

    With ``stops=False``, it counts the operations that read the tensor, and the sums among them.
    """

    def __init__(self, stops: bool = True) -> None:
        super().__init__()
        self.watched: Tensor | None = None
        self.stops = stops
        self.reads = self.sums = 0

    def start(self, x: Any, output: Any) -> None:
        """An output hook: watch the first output that is a tensor."""
        if self.watched is None and isinstance(output, Tensor):
            self.watched = output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watched is None or not _mentions((*args, *kwargs.values()), self.watched):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ADDITIONS and len(args) == 2 and not kwargs:
            others = [part for part in args if part is not self.watched]
            if len(others) == 1 and isinstance(others[0], Tensor) and others[0].shape == self.watched.shape:
                if self.stops:
                    raise _StopForward(others[0])
                self.sums += 1
        result = func(*args, **kwargs)
        self.reads += isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size)
        return result


def _mentions(values: Any, tensor: Tensor) -> bool:
    return any(
        value is tensor or (isinstance(value, (tuple, list)) and any(part is tensor for part in value))
        for value in values
    )


class _StopForward(BaseException):
    """Carries a tensor out of a forward; no model catches it by accident."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
