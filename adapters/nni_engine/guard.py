"""A process that waits for another to end, and then ends what NNI has left running.

``python -m nns_plugin.adapters.nni_engine.guard FOLDER``: NNI's managers are known by their folder of experiments; who
starts them holds the other end of standard input.
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
    """Remember what NNI runs for a folder until standard input ends; then end what is left of it."""
    known: dict[int, psutil.Process] = {}
    while True:
        _look(folder, known)
        if select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
            break  # nothing is ever written: it has ended
    for _ in range(LAST_LOOKS):
        _look(folder, known)
        _end(known)
        time.sleep(INTERVAL_SECONDS)


def _look(folder: str, known: dict[int, psutil.Process]) -> None:
    """Add managers, and the descendants of all that are known."""
    for process in psutil.process_iter():
        with contextlib.suppress(*GONE):
            words = process.cmdline()
            if folder in words and any(MANAGER in word for word in words):
                known[process.pid] = process
    for process in list(known.values()):
        with contextlib.suppress(*GONE):
            known.update({child.pid: child for child in process.children(recursive=True)})


def _end(known: dict[int, psutil.Process]) -> None:
    """Stop all, so that they start no others; look once more; end all."""
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
            with contextlib.suppress(*GONE):  # which also tells other processes of the same number
                process.kill()
    known.clear()


if __name__ == "__main__":
    main(sys.argv[1])
