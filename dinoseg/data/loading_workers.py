"""Number of loading processes."""

import logging

from dinoseg.utils.cores import cores_here, ranks_here, share_of_cores

log = logging.getLogger(__name__)

LEAST = 2  # one decodes the next batch while the other one hands over its own
_MOST = 8  # each has its own memory; packing a slow dataset helps more than further processes
_MANY = 4  # processes per core above which a warning is logged
_MIN_MANY = 16  # processes in all that are never too many


def count_workers(device_type: str) -> int:
    """Return the number of loading processes of `engine.workers=auto`: 2 to 8, by this rank's share of the cores.

    On a CPU, training itself needs the other cores.
    """
    if device_type == "cpu":
        return LEAST
    return max(LEAST, min(share_of_cores(), _MOST))


def warn_of_many(workers: int) -> None:
    """Warn if there are more loading processes than this machine can use, even if they mostly wait."""
    ranks, cores = ranks_here(), cores_here()
    if workers * ranks > max(_MIN_MANY, _MANY * cores):
        log.warning(
            "engine.workers=%d starts %d loading processes on %d processors, each with its own memory and prefetched "
            "batches. Set fewer, or engine.workers=auto.",
            *(workers, workers * ranks, cores),
        )


def advise_more_workers(workers: int) -> str:
    """Return a sentence of advice on the number of loading processes, for when items are waited for."""
    return f"If cores are idle, use more loading processes (engine.workers is {workers})."
