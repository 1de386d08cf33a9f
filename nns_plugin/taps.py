"""Look at what single modules work on or give, and stop the forward there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import CalibrationError
from nns_plugin.forward import device_of, parse_batch, run_model, to_device
from nns_plugin.preserve import preserved


def tap(model: nn.Module, name: str, inputs: Any, side: str) -> Tensor:
    """Run a model in its present modes until one module is reached.

    Args:
        model: The model.
        name: Name of the module.
        inputs: Inputs of the model.
        side: ``"in"`` for what the module works on, ``"out"`` for what it gives.

    Returns:
        The first tensor that the module takes, or gives; of a reused module, the first time.

    Raises:
        CalibrationError: If the module does not run.
    """
    module = model.get_submodule(name)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["input"])

    def write(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    if side == "in":
        handle = module.register_forward_pre_hook(read, with_kwargs=True)
    else:
        handle = module.register_forward_hook(write)
    try:
        run_model(model, inputs)
    except _Reached as reached:
        return reached.tensor
    finally:
        handle.remove()
    raise CalibrationError(f"module {name!r} did not run")


def execution_order(model: nn.Module, names: Iterable[str], inputs: Any) -> list[str]:
    """Names of modules in the order in which they first run."""
    order: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda module, args: order.setdefault(name)

    handles = []
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_pre_hook(note(name)))
        with preserved(model), torch.no_grad():
            model.eval()
            run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


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
        found = tap(model, name, inputs, "in")
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
