"""A process that waits for its parent to end, and then ends what NNI has left running.

``python -m nns_plugin.adapters.nni_guard PID``: PID is NNI's manager; the parent holds the other end of standard input.
"""

from __future__ import annotations

import contextlib
import select
import sys

import psutil

INTERVAL_SECONDS = 1.0


def main(manager: int) -> None:
    """Remember all descendants of a process until standard input ends; then end those that are left."""
    known: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        known[manager] = psutil.Process(manager)
    while True:
        for process in list(known.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                known.update({child.pid: child for child in process.children(recursive=True)})
        if select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
            break  # nothing is ever written: it has ended
    for process in known.values():
        with contextlib.suppress(psutil.NoSuchProcess):  # which also tells other processes of the same number
            process.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]))
