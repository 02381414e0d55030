"""What loading processes give, waited for: a disk that does not answer is told of, not waited for in silence."""

import logging
import time
from typing import Any

log = logging.getLogger(__name__)

POLL = 5.0  # seconds of a DataLoader's timeout, after which torch itself looks whether its processes live
_PATIENCE, _RARER = 60.0, 5  # seconds until it is told that nothing comes, and times as long until it is told again


def awaited(iterator: Any, number: int, workers: int) -> Any:
    """Return the next item of a DataLoader; tell where it does not come for long.

    Args:
        iterator: of a DataLoader whose timeout is POLL, or that has no processes.
        number: of the item, from 0.
        workers: its processes.

    Raises:
        StopIteration: there is none.
        EOFError: the thread that pins items has ended, as it does where an item is lost on its way.
    """
    start, patience = time.monotonic(), _PATIENCE
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            pinning = getattr(iterator, "_pin_memory_thread", None)
            if pinning is not None and not pinning.is_alive():  # which torch does not look at where it times out
                raise EOFError("the thread that pins batches has ended") from error
        if (waited := time.monotonic() - start) >= patience:
            patience = _RARER * waited
            process = number % workers  # they take turns
            log.warning(
                "Nothing is loaded since %.0f s: item %d of this pass is to come from loading process %d of %d (id "
                "%d). Look at what it waits for (py-spy dump --pid %d), such as a file on a disk that does not answer, "
                "or load without processes: engine.workers=0.",
                *(waited, number + 1, process + 1, workers, *2 * (iterator._workers[process].pid,)),
            )
