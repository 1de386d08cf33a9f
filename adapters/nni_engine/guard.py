"""A process that waits for its parent to end, and then ends the processes that NNI has left running.

``python -m nns_plugin.adapters.nni_engine.guard FOLDER``: NNI's managers are recognised by their folder of experiments;
the parent holds the other end of standard input. It must not import NNI, which takes seconds.
"""

from __future__ import annotations

import contextlib
import select
import sys
import time

import psutil

INTERVAL_SECONDS = 0.5
LAST_LOOKS = 4  # a manager may be just starting
MANAGER = "nni_node"
GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


def main(folder: str) -> None:
    """Follow the processes that NNI runs for a folder until standard input closes; then end those that are left."""
    known: dict[int, psutil.Process] = {}
    while True:
        _look(folder, known)
        if select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
            break  # nothing is ever written, so it was closed
    for _ in range(LAST_LOOKS):
        _look(folder, known)
        _end(known)
        time.sleep(INTERVAL_SECONDS)


def _look(folder: str, known: dict[int, psutil.Process]) -> None:
    """Add managers, and the descendants of all known processes."""
    for process in psutil.process_iter():
        with contextlib.suppress(*GONE):
            words = process.cmdline()
            if folder in words and any(MANAGER in word for word in words):
                known[process.pid] = process
    for process in list(known.values()):
        with contextlib.suppress(*GONE):
            known.update({child.pid: child for child in process.children(recursive=True)})


def _end(known: dict[int, psutil.Process]) -> None:
    """Suspend all, so that they start no others; look once more; kill all."""
    ended: set[int] = set()
    while left := [process for pid, process in known.items() if pid not in ended]:
        for process in left:
            with contextlib.suppress(*GONE):
                process.suspend()
        for process in left:
            with contextlib.suppress(*GONE):
                known.update({child.pid: child for child in process.children(recursive=True)})
        for process in left:
            ended.add(process.pid)
            with contextlib.suppress(*GONE):  # psutil refuses a process that took over the number
                process.kill()
    known.clear()


if __name__ == "__main__":
    main(sys.argv[1])
