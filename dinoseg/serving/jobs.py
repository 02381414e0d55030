"""Uploads of the app: each in a folder of its own, under a name that nobody guesses, for a time."""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dinoseg.serving.answers import Look
from dinoseg.serving.limits import ClipLimits, Refused, not_kept
from dinoseg.utils.atomic import remove_dead, scratch_folder
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_UPLOADS = "uploads"
_FORGOTTEN = 60.0  # seconds without a question after which work is given up: its page is closed


class State(StrEnum):
    """Where an upload stands."""

    COMING = "coming"
    READY = "ready"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Cancelled(Exception):
    """Nobody wants it any more."""


@dataclass
class Job:
    """An upload, what is made of it, and how far that is."""

    id: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)  # told with its state
    state: State = State.COMING
    look: Look | None = None  # of its results, where there are any
    done: int = 0  # frames
    total: int = 0
    error: str = ""
    asked: float = field(default_factory=time.monotonic)  # when somebody last asked for it
    cancelled: threading.Event = field(default_factory=threading.Event)
    removed: bool = False
    interrupt: Callable[[], None] = lambda: None  # called when it is cancelled, whatever its thread waits for
    work: Future | None = None  # what is made of it now

    @property
    def busy(self) -> bool:
        """Whether something is being made of it, or will be."""
        return self.state in (State.WAITING, State.RUNNING)

    def check(self) -> None:
        """Raise `Cancelled` where it is."""
        if self.cancelled.is_set():
            raise Cancelled


class Jobs:
    """All uploads of a server; to be used from its event loop.

    Args:
        folder: this server's own; what is below is removed.
        limits: how many and how long.
    """

    def __init__(self, folder: Path, limits: ClipLimits) -> None:
        self._folder, self._limits = folder, limits
        self._jobs: dict[str, Job] = {}  # in the order in which they came
        self._pool = ThreadPoolExecutor(limits.at_once, thread_name_prefix="clips")

    def new(self) -> Job:
        """Make room for an upload.

        Raises:
            Refused: as many as are held are all on their way or being worked on, or the disk is full.
        """
        while len(self._jobs) >= self._limits.held:
            finished = next((job for job in self._jobs.values() if not job.busy and job.state != State.COMING), None)
            if finished is None:
                raise Refused(
                    503, "busy", f"{len(self._jobs)} clips are being worked on. Try again later.", retry_after=30
                )
            self.remove(finished)
        job = Job(secrets.token_urlsafe(24), self._folder / secrets.token_hex(16))
        try:
            job.folder.mkdir(mode=0o700)
        except OSError as error:
            raise not_kept(error) from error
        self._jobs[job.id] = job
        return job

    def arrived(self, job: Job) -> None:
        """Note that an upload is whole, from when on it is kept as long as others."""
        job.state, job.asked = State.READY, time.monotonic()

    def get(self, name: str) -> Job:
        """Return an upload by its id.

        Raises:
            Refused: there is none of that id, or not any more.
        """
        job = self._jobs.get(name)
        if job is None:
            minutes = f"{self._limits.keep_minutes:g}"
            raise Refused(
                404, "gone", f"It is not here any more: uploads are kept for {minutes} minutes. Send it anew."
            )
        job.asked = time.monotonic()
        return job

    def start(self, job: Job, work: Callable[[Job], None]) -> None:
        """Let a job's work be done when its turn comes.

        Raises:
            Refused: something is made of it already.
        """
        if job.busy:
            raise Refused(409, "started", "This clip is being worked on. Wait for it, or cancel that first.")
        before, job.state, job.done, job.error = job.state, State.WAITING, 0, ""
        job.cancelled.clear()
        job.work = self._pool.submit(self._run, job, work, before)
        # what is cancelled before its turn has no other end
        job.work.add_done_callback(lambda work: self._cancelled(job, before) if work.cancelled() else None)

    def ahead_of(self, job: Job) -> int:
        """Return how many wait before a job that waits."""
        waiting = [other.id for other in self._jobs.values() if other.state is State.WAITING]
        return waiting.index(job.id) if job.id in waiting else 0

    def cancel(self, job: Job) -> None:
        """End the work on an upload: what was made of it before is there as it was."""
        job.cancelled.set()
        job.interrupt()
        if job.work is not None:
            job.work.cancel()

    def remove(self, job: Job) -> None:
        """Forget an upload, and end the work on it."""
        job.removed = True
        self._jobs.pop(job.id, None)
        self.cancel(job)
        if not job.busy:  # else its thread does
            shutil.rmtree(job.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Give up what nobody asks for any more."""
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.state != State.COMING]:
            patience = _FORGOTTEN if job.busy else 60 * self._limits.keep_minutes
            if now - job.asked > patience:
                self.remove(job)

    def interrupt_coming(self) -> None:
        """End what is done with uploads that were not taken in yet."""
        for job in [job for job in list(self._jobs.values()) if job.state is State.COMING]:
            job.interrupt()

    def close(self) -> None:
        """End all work, and remove all uploads."""
        for job in list(self._jobs.values()):
            self.remove(job)
        self._pool.shutdown()

    def _run(self, job: Job, work: Callable[[Job], None], before: State) -> None:
        try:
            job.check()
            job.state = State.RUNNING
            work(job)
            self._end(job, State.DONE)
        except Cancelled:
            self._cancelled(job, before)
        except OSError as error:
            job.error = not_kept(error).message
            self._end(job, State.FAILED)
        except UserError as error:
            if job.cancelled.is_set():  # its clip's process was ended for that
                self._cancelled(job, before)
                return
            logger.warning("Work on a clip has failed: %s", error)
            job.error = str(error).replace(f"{job.folder}/", "").replace(str(job.folder), "its folder")
            self._end(job, State.FAILED)
        except Exception:
            logger.exception("Work on a clip has failed")
            job.error = "The server has failed on this clip; its log says why."
            self._end(job, State.FAILED)

    def _cancelled(self, job: Job, before: State) -> None:
        job.error = "Cancelled."
        self._end(job, before)

    def _end(self, job: Job, state: State) -> None:
        job.state = state
        if job.removed:
            shutil.rmtree(job.folder, ignore_errors=True)


@contextmanager
def uploads_folder(run: Path) -> Iterator[Path]:
    """Give a folder for uploads in a run folder, removed at the end; remove what killed runs beside it have left."""
    for left in run.absolute().parent.glob(f"*/.{_UPLOADS}.*"):
        remove_dead(left.parent)
    with scratch_folder(run, _UPLOADS) as folder:
        yield folder
