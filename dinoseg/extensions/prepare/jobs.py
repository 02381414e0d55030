"""Preparation of many files or videos: failures are reported at the end, and a second run resumes with them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from dinoseg.report.progress import Bar
from dinoseg.utils.errors import DISK_FULL, UserError
from dinoseg.utils.workers import in_processes

J = TypeVar("J", bound=Hashable)
R = TypeVar("R")


def run_jobs(
    work: Callable[[J], R],
    jobs: Sequence[J],
    bar: Bar,
    *,
    workers: int,
    root: Path,
    ready: str,
    make_room: str = "",
    name_job: Callable[[J], str] = lambda job: "",
) -> tuple[dict[J, R], dict[J, Exception]]:
    """Return the results of the finished jobs, and the errors of the others.

    Args:
        work: processes one job, in any process.
        jobs: several run at once.
        bar: shows their progress.
        workers: number of processes.
        root: folder on the disk that may be full.
        ready: describes finished jobs, such as `files are rasterised`.
        make_room: how to free disk space, in addition to removing files.
        name_job: returns the bar's text for a job.

    Raises:
        UserError: the disk is full, or a process was killed.
    """
    results: dict[J, R] = {}
    failures: dict[J, Exception] = {}
    remedy = f"Choose less than workers={workers} and run again to resume."
    for job, result in in_processes(work, jobs, workers, catch=(UserError, OSError), in_order=False, remedy=remedy):
        if isinstance(result, OSError) and result.errno in DISK_FULL:
            raise UserError(
                f"The disk of {root} is full: {len(results)} of {len(jobs)} {ready}, and no file is incomplete. Free "
                f"some space{make_room and f' ({make_room})'} and run again to resume."
            ) from result
        if isinstance(result, Exception):
            failures[job] = result
        else:
            results[job] = result
        bar.set_postfix_str(name_job(job), refresh=False)
        bar.update()
    return results, failures


def incomplete_error(failures: Iterable[str], state: str) -> UserError:
    """Return the error for jobs that failed, to be raised after all others are finished.

    Args:
        failures: one line per failure.
        state: what failed and what did not, such as `2 of 5 files could not be rasterised, the others are ready`.
    """
    lines = "".join(f"\n- {failure}" for failure in failures)
    return UserError(f"{state}:{lines}\nRun again to retry these.")
