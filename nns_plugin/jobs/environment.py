"""What a job runs on: versions of the hosts, missing extras, and the execution providers a session really gets."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# Distribution, the module it provides, and the extra that brings it ("" for a base dependency).
HOSTS = (
    ("torch", "torch", ""),
    ("torch-pruning", "torch_pruning", ""),
    ("numpy", "numpy", ""),
    ("safetensors", "safetensors", ""),
    ("onnx", "onnx", "onnx"),
    ("onnxruntime", "onnxruntime", "onnx"),
    ("onnxscript", "onnxscript", "onnx"),
    ("scikit-learn", "sklearn", "cli"),
    ("pydantic", "pydantic", "cli"),
    ("typer", "typer", "cli"),
    ("rich", "rich", "cli"),
    ("PyYAML", "yaml", "cli"),
    ("matplotlib", "matplotlib", "figures"),
    ("nni", "nni", "nni"),
)


@dataclass(frozen=True)
class Host:
    """One package that nns-plugin works with.

    Attributes:
        name: Of the distribution.
        version: Installed version, or ``None`` if it is missing.
        extra: The extra that brings it; empty for a base dependency.
    """

    name: str
    version: str | None
    extra: str

    @property
    def install(self) -> str:
        """The command that installs it; empty where it is there."""
        if self.version is not None:
            return ""
        return f'pip install "nns-plugin[{self.extra}]"' if self.extra else "pip install nns-plugin"


def hosts() -> tuple[Host, ...]:
    """Every host with its version; a GPU build of ONNX Runtime counts as ``onnxruntime``."""
    return tuple(Host(name, _version(name, module), extra) for name, module, extra in HOSTS)


def versions() -> dict[str, str]:
    """Versions of Python, nns-plugin and every host; "not installed" where missing."""
    found = {host.name: host.version or "not installed" for host in hosts()}
    return {
        "python": platform.python_version(),
        "nns-plugin": _version("nns-plugin", "nns_plugin") or "source",
        **found,
    }


def providers() -> dict[str, list[str]]:
    """For each execution provider that ONNX Runtime offers, those that a session asking for it really gets.

    Raises:
        MissingExtraError: If the extra ``onnx`` is not installed.
    """
    from nns_plugin.adapters.onnxruntime import session_providers

    return session_providers()


def _version(name: str, module: str) -> str | None:
    for distribution in (name, f"{name}-gpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown" if find_spec(module) is not None else None
