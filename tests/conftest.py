"""What all tests share: hosts and whether they must be there, fixed seeds, hypothesis settings, the data folder.

A test that needs a host says so with ``@pytest.mark.host("onnxruntime")``. A file that imports a host at its head
begins with ``pytest.importorskip``; that hides nothing, because a host named in ``NNS_HOSTS`` ends the session below if
it cannot be imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import random
import types
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# What has to be importable for a host to count as present.
HOST_MODULES = {
    "torch_pruning": ("torch_pruning",),
    "nni": ("nni",),
    "onnxruntime": ("onnx", "onnxruntime", "onnxscript"),
}

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def required_hosts() -> frozenset[str] | None:
    """The hosts that ``NNS_HOSTS`` asks for; None if the variable is not set, and nothing is asked for."""
    value = os.environ.get("NNS_HOSTS")
    if value is None:
        return None
    hosts = frozenset(name.strip() for name in value.split(",") if name.strip())
    unknown = sorted(hosts - HOST_MODULES.keys())
    if unknown:
        raise pytest.UsageError(f"NNS_HOSTS={value!r} names unknown hosts {unknown}; known: {sorted(HOST_MODULES)}")
    return hosts


@functools.cache
def import_failure(host: str) -> str | None:
    """Why a host cannot be imported; None if it can. What a host warns about on import is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in HOST_MODULES[host]:
            try:
                importlib.import_module(module)
            except Exception as error:  # a broken installation raises anything
                return f"import {module}: {type(error).__name__}: {error}"
    return None


def skip_reason(host: str, required: frozenset[str] | None) -> str | None:
    """Why tests of a host do not run here; None if they do."""
    if required is not None:
        return None if host in required else f"host {host} is not in NNS_HOSTS"
    failure = import_failure(host)
    return failure and f"host {host} is not there: {failure}"


def pytest_configure(config: pytest.Config) -> None:
    """End the session if a host that this environment asked for is missing: a failure, not a skip."""
    failures = [failure for host in sorted(required_hosts() or ()) if (failure := import_failure(host))]
    if failures:
        raise pytest.UsageError(
            f"NNS_HOSTS={os.environ['NNS_HOSTS']!r} asks for hosts that cannot be imported: {'; '.join(failures)}"
        )


def pytest_report_header() -> str:
    """Name the hosts that this environment asked for, with their versions."""
    required = required_hosts()
    if required is None:
        return "hosts: NNS_HOSTS is not set, tests of missing hosts are skipped"
    return f"hosts: {', '.join(f'{host} {version(host)}' for host in sorted(required)) or 'none'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of hosts that are not meant to be here."""
    required = required_hosts()
    for item in items:
        for host in (name for marker in item.iter_markers("host") for name in marker.args):
            if host not in HOST_MODULES:
                raise pytest.UsageError(f"{item.nodeid}: unknown host {host!r}; known: {sorted(HOST_MODULES)}")
            if reason := skip_reason(host, required):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets: ``NNS_DATA_DIR``, or ``shared/data`` beside the repository."""
    given = os.environ.get("NNS_DATA_DIR")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if given:
        pytest.fail(f"NNS_DATA_DIR={given!r} is not a folder")
    pytest.skip("no real data: set NNS_DATA_DIR to a folder with the data sets")


@pytest.fixture(scope="session")
def zoo() -> types.ModuleType:
    """The models of ``zoo.py``."""
    return importlib.import_module("zoo")
