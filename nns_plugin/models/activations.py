"""Look at what single modules work on or give, and stop the forward there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from nns_plugin.errors import CalibrationError
from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import device_of, parse_batch, run_model, to_device
from nns_plugin.models.preserve import preserved

ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})


def tap(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """What one module works on; the model runs in its present modes until the module is reached.

    Args:
        model: The model.
        name: Name of the module.
        inputs: Inputs of the model.

    Returns:
        The first tensor that the module takes; of a reused module, the first time.

    Raises:
        CalibrationError: If the module does not run.
    """

    def stop(x: Any) -> None:
        if not isinstance(x, Tensor):
            raise CalibrationError(f"module {name!r} takes a {type(x).__name__} first; expected a tensor")
        raise _Reached(x)

    try:
        with hooked((model.get_submodule(name), "input", stop)):
            run_model(model, inputs)
    except _Reached as reached:
        return reached.tensor
    raise CalibrationError(f"module {name!r} did not run")


@dataclass(frozen=True, eq=False)
class Passage:
    """What a module works on and gives, and what its output is added to further on, if that was asked for."""

    inputs: Tensor
    output: Tensor
    beside: Tensor | None


def passage(model: nn.Module, name: str, inputs: Any, added: str | None = None) -> Passage:
    """Run a model in its present modes until one module has run, or until its output is added to something.

    Args:
        model: The model.
        name: Name of the module.
        inputs: Inputs of the model.
        added: Name of a module, itself or a later one: go on until what it gives is one of two equally shaped summands,
            the other of which is ``beside``; if it never is, the model runs to its end and ``beside`` is ``None``.

    Raises:
        CalibrationError: If the module does not run.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def note(x: Tensor, output: Tensor) -> None:
        if not seen:
            if added is None:
                seen.append((x, output))
                raise _Reached(output)
            seen.append((x.clone(), output.clone()))  # the forward goes on, and may work in place

    summing = _Summing()
    hooks: list[Hook] = [(model.get_submodule(name), "output", note)]
    if added is not None:
        hooks.append((model.get_submodule(added), "output", summing.watch))
    try:
        with hooked(*hooks), nullcontext() if added is None else summing:
            run_model(model, inputs)
        beside = None
    except _Reached as reached:
        beside = None if added is None else reached.tensor
    if not seen:
        raise CalibrationError(f"module {name!r} did not run")
    return Passage(*seen[0], beside)


def only_summed(model: nn.Module, name: str, inputs: Any) -> bool:
    """Whether what a module gives is read once, by a sum with a tensor of its own shape.

    Where it is read elsewhere as well, the other summand may depend on it.

    Args:
        model: The model, in its present modes.
        name: Name of the module.
        inputs: Inputs of the model.
    """
    summing = _Summing(stops=False)
    with hooked((model.get_submodule(name), "output", summing.watch)), summing:
        run_model(model, inputs)
    return summing.sums == summing.reads == 1


class _Summing(TorchFunctionMode):
    """Stops a forward where a watched tensor is added to another one, and carries the other one out.

    Without stopping, it counts what reads the tensor, and how often that is a sum.
    """

    def __init__(self, stops: bool = True) -> None:
        super().__init__()
        self.watched: Tensor | None = None
        self.stops = stops
        self.reads = self.sums = 0

    def watch(self, x: Any, output: Any) -> None:
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
                    raise _Reached(others[0])
                self.sums += 1
        result = func(*args, **kwargs)
        self.reads += isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size)
        return result


def _mentions(values: Any, tensor: Tensor) -> bool:
    return any(
        value is tensor or (isinstance(value, (tuple, list)) and any(part is tensor for part in value))
        for value in values
    )


def execution_order(model: nn.Module, names: Iterable[str], inputs: Any) -> dict[str, int]:
    """Names of the modules that run, in the order in which they first do, and how often."""
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
    """What one module works on, input by input; memory grows with the data, unlike :func:`nns_plugin.calibrate`.

    Args:
        model: The model; left exactly as it was found.
        name: Name of the module, whose input must be ``[N, features]``.
        loader: As for :func:`nns_plugin.calibrate`.
        progress: Whether to show a progress bar.

    Returns:
        ``[N, features]`` inputs of the module, and ``[N]`` int64 labels or ``None``, both on the CPU.

    Raises:
        CalibrationError: If the loader is empty, or the module does not run or its input is not ``[N, features]`` and
            finite.
    """
    features: list[Tensor] = []
    labels: list[Tensor | None] = []
    for size, inputs, label in _batches(model, loader, "collecting features", progress):
        found = tap(model, name, inputs)
        if found.dim() != 2 or found.shape[0] != size:
            raise CalibrationError(
                f"module {name!r} works on a tensor of shape {list(found.shape)}; expected [{size}, features]"
            )
        features.append(found.cpu())
        labels.append(label)
    if not features:
        raise CalibrationError("the loader yielded no inputs; it must yield at least one batch")
    joined = torch.cat(features)
    if not bool(torch.isfinite(joined).all()):
        raise CalibrationError(f"module {name!r} works on NaN or infinite activations")
    known = [label for label in labels if label is not None]
    return joined, torch.cat(known) if len(known) == len(labels) else None


def _batches(
    model: nn.Module, loader: Iterable[Any], title: str, progress: bool
) -> Iterator[tuple[int, Any, Tensor | None]]:
    device = device_of(model)
    with preserved(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        for number, item in enumerate(tqdm(loader, desc=title, disable=not progress, leave=False)):
            batch = parse_batch(item, number)
            yield batch.size, to_device(batch.inputs, device), batch.labels


class _Reached(BaseException):
    """Carries a tensor out of a forward; no model catches it by accident."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
