"""The environment: versions of the hosts, missing extras, the machine, and a way to keep a host quiet."""

from __future__ import annotations

import io
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# Distribution, the module it provides, and the extra that brings it ("" for a base dependency).
HOSTS = (
    ("torch", "torch", ""),
    ("torch-pruning", "torch_pruning", ""),
    ("numpy", "numpy", ""),
    ("safetensors", "safetensors", ""),
    ("onnx", "onnx", "onnx"),
    ("onnxruntime", "onnxruntime", "onnx"),
    ("onnxscript", "onnxscript", "onnx"),
    ("psutil", "psutil", "onnx"),
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
    """A package that nns-plugin works with.

    Attributes:
        name: Name of the distribution.
        version: The installed version, or ``None`` if it is not installed.
        extra: The extra that brings it; empty for a base dependency.
    """

    name: str
    version: str | None
    extra: str

    @property
    def install(self) -> str:
        """The command that installs it; empty if it is installed."""
        if self.version is not None:
            return ""
        return f'pip install "nns-plugin[{self.extra}]"' if self.extra else "pip install nns-plugin"


def hosts() -> tuple[Host, ...]:
    """All hosts with their versions; a GPU build of ONNX Runtime counts as ``onnxruntime``."""
    return tuple(Host(name, _version(name, module), extra) for name, module, extra in HOSTS)


def versions() -> dict[str, str]:
    """Versions of Python, nns-plugin and all hosts; "not installed" for missing ones."""
    found = {host.name: host.version or "not installed" for host in hosts()}
    return {
        "python": platform.python_version(),
        "nns-plugin": _version("nns-plugin", "nns_plugin") or "source",
        **found,
    }


@dataclass(frozen=True)
class Machine:
    """The machine that a measurement ran on.

    Attributes:
        system: Operating system and architecture.
        cpu: Model name of the processor, as reported by the system.
        cpu_flags: Its instruction-set flags on Linux; empty elsewhere.
        cores: Number of logical cores.
        usable_cores: Number of cores that this process may run on.
        cpu_quota: CPU quota of the control group, in cores; ``None`` if there is no limit.
        governor: Frequency governor of the first core; ``None`` if it cannot be read.
        memory_bytes: Total memory; ``None`` if it cannot be read.
    """

    system: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    usable_cores: int
    cpu_quota: float | None
    governor: str | None
    memory_bytes: int | None


def machine() -> Machine:
    """The machine that this process runs on."""
    facts = dict(_fields(_read("/proc/cpuinfo").partition("\n\n")[0]))
    cores = os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    memory = dict(_fields(_read("/proc/meminfo"))).get("MemTotal", "").removesuffix(" kB")
    return Machine(
        system=platform.platform(),
        cpu=facts.get("model name") or platform.processor() or platform.machine(),
        cpu_flags=tuple(sorted((facts.get("flags") or facts.get("Features") or "").split())),
        cores=cores,
        usable_cores=len(affinity(0)) if affinity else cores,
        cpu_quota=int(quota) / int(period) if quota.isdigit() and period.isdigit() else None,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        memory_bytes=1024 * int(memory) if memory.isdigit() else None,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what a host prints, logs and warns of; the levels of its loggers are restored."""
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    levels = [each.level for each in loggers]
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _read(path: str) -> str:
    """Content of a system file; empty if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _version(name: str, module: str) -> str | None:
    for distribution in (name, f"{name}-gpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown" if find_spec(module) is not None else None
