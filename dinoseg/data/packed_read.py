"""What goes into a packed store: items read and reduced, in order, by several processes."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from dinoseg.data.packed_store import checksum
from dinoseg.data.pairs import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.errors import UserError

_PAYS_FROM = 50  # items that are read by the time a process has started
_MOST = 8  # more would wait for the one that writes
_AHEAD = 3  # items a process that are read or wait to be written: what memory holds


@dataclass(frozen=True)
class Packed:
    """An item as it is packed: image (H, W, 3) and mask (H, W), uint8, and their checksum."""

    image: np.ndarray
    mask: np.ndarray
    crc: int


def read_all(
    dataset: PairDataset, rows: Iterable[int], longest: int | None, workers: int
) -> Generator[tuple[int, Packed | UserError], None, None]:
    """Yield each row with its item, or with what is wrong with its files, in order.

    Raises:
        UserError: a process was killed.
    """
    if workers <= 1:
        yield from ((row, _read(dataset, row, longest)) for row in rows)
        return
    # spawn: a bar's thread is running, and a fork beside a thread can stand still for ever
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (dataset, longest)) as pool:
        waiting: deque = deque()
        try:
            for row in rows:
                waiting.append((row, pool.submit(_read_here, row)))
                if len(waiting) >= _AHEAD * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(
                f"A process that packs images was killed, most likely for want of memory. Set engine.workers below "
                f"{workers} and run again: it goes on."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def paying_workers(items: int) -> int:
    """Return how many processes pay for so many items on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, items // _PAYS_FROM, _MOST)


def reduced_size(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    """Return (H, W) with the longer side at most `longest`."""
    factor = min(1.0, longest / max(size)) if longest else 1.0
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def reduced(
    image: np.ndarray, mask: np.ndarray, longest: int | None, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return image and mask as `Augment` reduces them to `longest` when it changes nothing else."""
    height, width = mask.shape
    size = reduced_size((height, width), longest)
    if size == (height, width):
        return image, mask
    augment = Augment(size, longest=longest, ignore_index=ignore_index)
    return augment(image, mask, np.random.default_rng(0))  # chance has nothing to decide here


def _read(dataset: PairDataset, row: int, longest: int | None) -> Packed | UserError:
    try:
        sample = dataset[row]
    except UserError as error:
        return error
    pixels = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())  # (H, W, 3)
    image, mask = reduced(pixels, sample["mask"].numpy(), longest, dataset.ignore_index)
    return Packed(image, mask, checksum(sample["name"], (mask.shape[0], mask.shape[1]), image, mask))


_task: tuple[PairDataset, int | None]  # of a worker: sent once, not with every row


def _start_worker(dataset: PairDataset, longest: int | None) -> None:
    global _task
    _task = dataset, longest
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read_here(row: int) -> Packed | UserError:
    dataset, longest = _task
    return _read(dataset, row, longest)
