"""Processes of a sweep's jobs: where they begin, and that they end when the process of their sweep has died."""

import os
import signal
import threading
import time

import psutil

_SWEEP = "DINOSEG_SWEEP"  # environment variable, which jobs inherit: process number of the sweep
_SECONDS = 1.0  # between two looks at that process
_STATUS = 128 + signal.SIGTERM
_watched: list[psutil.Process] = []  # the sweep of this process's jobs


def enter_folder() -> None:
    """Change to the folder in which a sweep was started; Ray calls it in each process of a job."""
    os.chdir(os.environ["DINOSEG_FOLDER"])


def note_sweep() -> None:
    """Tell the processes that this one starts that it is the sweep of their jobs."""
    os.environ[_SWEEP] = str(os.getpid())


def end_with_sweep() -> None:
    """Let a job that starts in this process save and end when its sweep dies; end the process if it has died before."""
    if not _watched:
        try:
            _watched.append(psutil.Process(int(os.environ[_SWEEP])))
        except psutil.NoSuchProcess:
            os._exit(_STATUS)
        threading.Thread(target=_watch, daemon=True).start()
    if not _is_alive(_watched[0]):  # the worker of a pool, which still has jobs in its queue
        os._exit(_STATUS)


def _watch() -> None:
    while _is_alive(_watched[0]):
        time.sleep(_SECONDS)
    signal.raise_signal(signal.SIGTERM)  # a training saves its last step
    while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        time.sleep(_SECONDS)
    os._exit(_STATUS)  # an idle worker would wait for jobs


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
