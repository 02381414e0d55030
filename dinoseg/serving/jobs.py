"""Uploads of the app: each in its own folder, under an unguessable id, for a limited time."""

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

from dinoseg.serving.answers import MaskStyle
from dinoseg.serving.limits import ClipLimits, Refused, not_stored
from dinoseg.utils.atomic import remove_dead, scratch_folder
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_UPLOADS = "uploads"
_FORGOTTEN = 60.0  # seconds without a request after which work is cancelled: its page was closed


class State(StrEnum):
    """State of an upload."""

    COMING = "coming"
    READY = "ready"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Cancelled(Exception):
    """The work on an upload was cancelled."""


@dataclass
class UploadJob:
    """An upload, its results and its progress."""

    id: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)  # sent with its state
    state: State = State.COMING
    style: MaskStyle | None = None  # of its results, if any
    done: int = 0  # frames
    total: int = 0
    error: str = ""
    last_request: float = field(default_factory=time.monotonic)  # time of the last request for it
    cancelled: threading.Event = field(default_factory=threading.Event)
    removed: bool = False
    interrupt: Callable[[], None] = lambda: None  # called on cancellation, to unblock its thread
    work: Future | None = None  # the current work

    @property
    def busy(self) -> bool:
        """True if work on the upload is waiting or running."""
        return self.state in (State.WAITING, State.RUNNING)

    def check(self) -> None:
        """Raise `Cancelled` if the work was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled


class Jobs:
    """All uploads of a server; to be used from its event loop.

    Args:
        folder: this server's own; its subfolders are removed with their uploads.
        limits: of the number and the lifetime of uploads.
    """

    def __init__(self, folder: Path, limits: ClipLimits) -> None:
        self._folder, self._limits = folder, limits
        self._jobs: dict[str, UploadJob] = {}  # in order of arrival
        self._pool = ThreadPoolExecutor(limits.at_once, thread_name_prefix="clips")

    def new(self) -> UploadJob:
        """Create a job for an upload; if the maximum is stored, the oldest one that is not in use is removed.

        Raises:
            Refused: if all stored uploads are being received or worked on, or the disk is full.
        """
        while len(self._jobs) >= self._limits.held:
            finished = next((job for job in self._jobs.values() if not job.busy and job.state != State.COMING), None)
            if finished is None:
                raise Refused(
                    503, "busy", f"{len(self._jobs)} clips are being processed. Try again later.", retry_after=30
                )
            self.remove(finished)
        job = UploadJob(secrets.token_urlsafe(24), self._folder / secrets.token_hex(16))
        try:
            job.folder.mkdir(mode=0o700)
        except OSError as error:
            raise not_stored(error) from error
        self._jobs[job.id] = job
        return job

    def arrived(self, job: UploadJob) -> None:
        """Mark an upload as complete: from now on, it expires like others."""
        job.state, job.last_request = State.READY, time.monotonic()

    def get(self, name: str) -> UploadJob:
        """Return an upload by its id.

        Raises:
            Refused: if the id is unknown, or its upload has expired.
        """
        job = self._jobs.get(name)
        if job is None:
            minutes = f"{self._limits.keep_minutes:g}"
            raise Refused(
                404, "gone", f"The upload has expired: uploads are deleted after {minutes} minutes. Send it again."
            )
        job.last_request = time.monotonic()
        return job

    def start(self, job: UploadJob, work: Callable[[UploadJob], None]) -> None:
        """Queue the work on a job.

        Raises:
            Refused: if work on it is already waiting or running.
        """
        if job.busy:
            raise Refused(409, "started", "This clip is being processed. Wait for it, or cancel it first.")
        before, job.state, job.done, job.error = job.state, State.WAITING, 0, ""
        job.cancelled.clear()
        job.work = self._pool.submit(self._run, job, work, before)
        # work that is cancelled while queued never reaches `_run`
        job.work.add_done_callback(lambda work: self._cancelled(job, before) if work.cancelled() else None)

    def ahead_of(self, job: UploadJob) -> int:
        """Return the number of waiting jobs before a waiting job."""
        waiting = [other.id for other in self._jobs.values() if other.state is State.WAITING]
        return waiting.index(job.id) if job.id in waiting else 0

    def cancel(self, job: UploadJob) -> None:
        """Cancel the work on an upload; its earlier results stay as they were."""
        job.cancelled.set()
        job.interrupt()
        if job.work is not None:
            job.work.cancel()

    def remove(self, job: UploadJob) -> None:
        """Remove an upload, and cancel the work on it."""
        job.removed = True
        self._jobs.pop(job.id, None)
        self.cancel(job)
        if not job.busy:  # else its thread removes the folder
            shutil.rmtree(job.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the uploads without recent requests."""
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.state != State.COMING]:
            patience = _FORGOTTEN if job.busy else 60 * self._limits.keep_minutes
            if now - job.last_request > patience:
                self.remove(job)

    def interrupt_coming(self) -> None:
        """Interrupt the reading of uploads that are still being received."""
        for job in [job for job in list(self._jobs.values()) if job.state is State.COMING]:
            job.interrupt()

    def close(self) -> None:
        """Cancel all work, and remove all uploads."""
        for job in list(self._jobs.values()):
            self.remove(job)
        self._pool.shutdown()

    def _run(self, job: UploadJob, work: Callable[[UploadJob], None], before: State) -> None:
        try:
            job.check()
            job.state = State.RUNNING
            work(job)
            self._end(job, State.DONE)
        except Cancelled:
            self._cancelled(job, before)
        except OSError as error:
            job.error = not_stored(error).message
            self._end(job, State.FAILED)
        except UserError as error:
            if job.cancelled.is_set():  # the error comes from killing the decoder
                self._cancelled(job, before)
                return
            logger.warning("Processing a clip failed: %s", error)
            job.error = str(error).replace(f"{job.folder}/", "").replace(str(job.folder), "its folder")
            self._end(job, State.FAILED)
        except Exception:
            logger.exception("Processing a clip failed")
            job.error = "The server failed on this clip; see its log."
            self._end(job, State.FAILED)

    def _cancelled(self, job: UploadJob, before: State) -> None:
        job.error = "Cancelled."
        self._end(job, before)

    def _end(self, job: UploadJob, state: State) -> None:
        job.state = state
        if job.removed:
            shutil.rmtree(job.folder, ignore_errors=True)


@contextmanager
def uploads_folder(run: Path) -> Iterator[Path]:
    """Yield a folder for uploads in a run folder, removed at the end; remove those of killed runs next to it."""
    for left in run.absolute().parent.glob(f"*/.{_UPLOADS}.*"):
        remove_dead(left.parent)
    with scratch_folder(run, _UPLOADS) as folder:
        yield folder
