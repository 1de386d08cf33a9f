"""Memory that a session adds to a process; run as a script, this file measures itself.

The script must not import the package, whose imports would make up most of the process that is measured. Therefore
``_measure`` sets its session options itself instead of calling ``session.create_session``, and the imports of
``session_memory`` stand in the function.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = 3


@dataclass(frozen=True)
class SessionMemory:
    """Resident memory that a session adds to a process.

    Attributes:
        session_bytes: Once it is open: the graph, and the weights, including copies packed for its kernels.
        running_bytes: After some runs: activations as well.
    """

    session_bytes: int
    running_bytes: int


def session_memory(
    path: str | os.PathLike[str], feed: dict[str, Any], *, provider: str = "CPUExecutionProvider", threads: int = 1
) -> SessionMemory:
    """Open and run an ONNX file in a new process, and measure what that adds to its resident memory.

    Args:
        path: The file.
        feed: Arrays by name of the input.
        provider: ONNX Runtime's name of the execution provider.
        threads: Intra-op threads.

    Raises:
        ExportError: If the process fails.
    """
    import numpy as np

    from nns_plugin.errors import ExportError

    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder, "feed.npz")
        np.savez(arrays, *feed.values())  # input names may not be valid names in an archive
        names = json.dumps(list(feed))
        command = [sys.executable, "-P", __file__, os.fspath(path), str(arrays), names, provider, str(threads)]
        paths = os.pathsep.join(part for part in sys.path if part)  # the new process finds the same libraries
        environment = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ExportError(f"the memory of {str(path)!r} cannot be measured ({last[:300]}); check whether it runs alone")
    return SessionMemory(**json.loads(done.stdout.splitlines()[-1]))


def _measure(path: str, arrays: str, names: str, provider: str, threads: int) -> dict[str, int]:
    import numpy as np
    import onnxruntime
    import psutil

    process = psutil.Process()
    with np.load(arrays, allow_pickle=False) as archive:
        feed = {name: archive[f"arr_{place}"] for place, name in enumerate(json.loads(names))}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    before = process.memory_info().rss
    session = onnxruntime.InferenceSession(path, options, providers=[provider], enable_fallback=0)
    opened = process.memory_info().rss
    for _ in range(RUNS):
        session.run(None, feed)
    return {"session_bytes": max(0, opened - before), "running_bytes": max(0, process.memory_info().rss - before)}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))))
