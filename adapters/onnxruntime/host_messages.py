"""Messages and errors of the exporter and ONNX Runtime: silenced, and condensed to one line."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

_UNKNOWN_OPSET = re.compile(r"Opset (\d+) is under development.* domain (\S+) is till opset (\d+)")
_PLACE_IN_SOURCE = re.compile(
    r"\S+\.(?:cc|h|cpp):\d+ (?:[^()]*\((?:[^()]|\([^()]*\))*\)(?: const)?|\w+) "  # file, line and signature, or name
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter, which warns, logs and prints whole graphs, mostly about itself."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def reason(error: BaseException) -> str:
    """The error at the root of a chain, in one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    if type(error).__module__.startswith("onnxruntime"):
        return _runtime_reason(" ".join(str(error).split()))
    first, _, rest = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")
    if first.endswith(":"):  # a heading
        first += " " + rest.strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def _runtime_reason(text: str) -> str:
    """What ONNX Runtime says, without the places in its source code."""
    if found := _UNKNOWN_OPSET.search(text):
        opset, domain, known = found.groups()
        return f"it asks for opset {opset} of {domain}, and this ONNX Runtime knows those up to {known}"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ([A-Z_]+) : (Load model from .*? failed: ?)?", r"\1: ", text)
    return _PLACE_IN_SOURCE.sub("", text)[:300]
