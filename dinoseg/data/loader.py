"""Training views and batches: functions of seed, epoch and sample alone, not of workers, ranks or the resumed step."""

import functools
import itertools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dinoseg.core.object_ids import CROWD, OBJECTS
from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import Batch, Sample, SegmentationData
from dinoseg.utils.cores import share_of_cores
from dinoseg.utils.errors import KilledProcess, UserError
from dinoseg.utils.interrupt import SIGNALS, block_signals, hold_handlers
from dinoseg.utils.waiting import NOTICE, Wait
from dinoseg.utils.wording import count_of
from dinoseg.utils.workers import kill_remaining, without_script

log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")
Item = TypeVar("Item")
Transform = Callable[..., tuple[np.ndarray, np.ndarray]]
"""Map an image (H, W, 3), its mask (H, W) and a generator to a view of both; `Augment.maps` moves maps with them."""
ORDER, VIEW, CLIP = 0, 1, 5  # purposes of random streams, one Philox counter word
_REDRAWS = 10  # of a view without objects; EoMT's are unlimited (tue-mps/eomt, datasets/transforms.py)
_LEAST = 2  # one decodes the next batch while the other one hands over its own
_MOST = 8  # each has its own memory; packing a slow dataset helps more than further processes
POLL = 1.0  # seconds of a DataLoader's timeout, after which torch checks that its workers are alive
if sys.platform == "win32":
    _CHILD_ENDED: list[signal.Signals] = []
else:
    _CHILD_ENDED = [signal.SIGCHLD]
_PATIENCE = 60.0  # seconds before the first warning: reading a batch of large files may take many
_LIMIT = 1800.0  # seconds without a batch that end a training, as engine.rank_timeout does
_ENDING = 5.0  # seconds for all loading processes to end before they are killed; torch waits as long for each of them


@dataclass(frozen=True)
class TrainViews:
    """Training views of a dataset's images.

    Args:
        data: images and masks; an epoch has one sample per image.
        augment: samples a view of an image and its mask.
        seed: determines the views, together with epoch and sample.
        views: number of fixed views per sample, used in turn; None: new views in each epoch.
        needs_objects: whether a view without any object of its image is sampled again, up to `_REDRAWS` times.
    """

    data: SegmentationData
    augment: Transform
    seed: int
    views: int | None = None
    needs_objects: bool = False

    def view_number(self, epoch: int) -> int:
        """Return the number of the view that each sample shows in an epoch."""
        return epoch if self.views is None else epoch % self.views

    def make_rng(self, epoch: int, sample: int, redraws: int = 0) -> np.random.Generator:
        """Return the random generator of a sample's view in an epoch, after it was sampled again some times."""
        return make_rng(self.seed, self.view_number(epoch), sample, VIEW, redraws)

    def read(self, epoch: int, sample: int) -> Sample:
        """Return the view of a sample in an epoch."""
        return self.draw(epoch, sample)[0]

    def draw(self, epoch: int, sample: int) -> tuple[Sample, int]:
        """Return the view of a sample in an epoch, and how many times it was sampled again."""
        whole = self.data[sample]
        pixels = np.ascontiguousarray(whole["image"].permute(1, 2, 0).numpy())  # (H, W, 3)
        ids = whole["mask"].numpy()
        maps = whole.get("maps", {})
        has_object = self.needs_objects and _has_object(maps[OBJECTS])
        # objects are searched in the maps alone: the image is warped once, for the view that is used
        for redraws in range(_REDRAWS + 1):
            seen = self._view_maps(maps, ids, self.make_rng(epoch, sample, redraws))
            if not has_object or _has_object(seen[OBJECTS]):
                break
        image, mask = self.augment(pixels, ids, self.make_rng(epoch, sample, redraws))
        view = Sample(image=torch.from_numpy(image).permute(2, 0, 1), mask=torch.from_numpy(mask), name=whole["name"])
        if maps:
            view["maps"] = seen
        return view, redraws

    def _view_maps(self, maps: Mapping[str, Tensor], ids: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return the views of a sample's maps, which show the same pixels as the view of its mask `ids`."""
        if not maps:
            return {}
        arrays = {name: values.numpy() for name, values in maps.items()}
        moved = self.augment.maps(arrays, get_map_kinds(self.data), ids, rng)  # type: ignore[attr-defined]
        return {name: torch.from_numpy(values) for name, values in moved.items()}


def _has_object(objects: Tensor) -> bool:
    """Return whether an `ObjectMap` has an object that is no crowd."""
    return bool(((objects > 0) & (objects < CROWD)).any())


def make_rng(seed: int, epoch: int, sample: int, purpose: int, redraws: int = 0) -> np.random.Generator:
    """Return the random generator of a sample in an epoch for one purpose."""
    # Philox has an independent stream per key and counter; sampling advances only the lowest counter word
    return np.random.Generator(np.random.Philox(key=seed, counter=[redraws << 32, sample, epoch, purpose]))


def train_batches(
    views: TrainViews, *, batch_size: int, start: int = 0, workers: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield this rank's share of each training batch from number `start` on, indefinitely; see `sample_batches`."""
    options = {
        "batch_size": batch_size,
        "seed": views.seed,
        "start": start,
        "rank": rank,
        "world_size": world_size,
    }
    return sample_batches(views.read, Batch.stack, len(views.data), workers=workers, **options)


def sample_batches(
    read: Callable[[int, int], Item],
    join: Callable[[list[Item]], V],
    samples: int,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[V]:
    """Yield this rank's share of each batch, indefinitely: `join` applied to the list of `read(epoch, sample)`.

    Every epoch is a new permutation. Epochs follow one another without a gap: a batch may hold the end of one epoch and
    the beginning of the next. Each rank takes a contiguous share of a batch.

    Raises:
        UserError: the batch is larger than the dataset, or is not a multiple of the number of ranks; while iterating:
            any error of `read`.
    """
    check_batch_size(batch_size, samples, world_size)
    shares = _shares(samples, batch_size, seed, start=start, rank=rank, world_size=world_size)
    return load_in_order(functools.partial(_read_batch, read, join), shares, workers, pin=True)


def check_batch_size(batch_size: int, samples: int, world_size: int, what: str = "image") -> None:
    """Raise a UserError if a batch is larger than the dataset, or is not a multiple of the number of ranks."""
    if not 1 <= batch_size <= samples:
        raise UserError(
            f"data.batch_size={batch_size} with {count_of(samples, f'training {what}')}: choose "
            f"{'1' if samples == 1 else f'a number from 1 to {samples}'}, or add {what}s (data.labelled leaves some "
            "out)."
        )
    if batch_size % world_size:
        raise UserError(
            f"data.batch_size={batch_size} cannot be shared by {world_size} devices: use a multiple of {world_size}."
        )


def eval_samples(
    dataset: SegmentationData, *, workers: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Sample]:
    """Yield this rank's samples once, in order and without augmentation: rank, rank + world, ..."""
    return load_in_order(dataset.__getitem__, range(rank, len(dataset), world_size), workers)


def stack_equal(samples: Iterable[Sample], batch_size: Callable[[tuple[int, int]], int]) -> Iterator[Batch]:
    """Stack consecutive samples of one size (H, W) into batches of at most `batch_size((H, W))` samples."""
    for size, same in itertools.groupby(samples, key=lambda sample: tuple(sample["image"].shape[1:])):
        while group := list(itertools.islice(same, batch_size(size))):
            yield Batch.stack(group)


def _shares(
    count: int, batch_size: int, seed: int, *, start: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield (epoch, sample) of this rank's share of batch `start`, `start + 1`, ..."""
    size = batch_size // world_size
    epoch, order = -1, np.empty(0, dtype=np.int64)
    for batch in itertools.count(start):
        first = batch * batch_size + rank * size
        share = []
        for position in range(first, first + size):
            # one permutation per epoch, so that resuming at any batch costs a single one
            if position // count != epoch:
                epoch = position // count
                order = make_rng(seed, epoch, 0, ORDER).permutation(count)
            share.append((epoch, int(order[position % count])))
        yield share


def _read_batch(read: Callable[[int, int], Item], join: Callable[[list[Item]], V], share: list[tuple[int, int]]) -> V:
    return join([read(epoch, index) for epoch, index in share])


def count_workers(device_type: str) -> int:
    """Return the number of loading processes of `engine.workers=auto`: 2 to 8, by this rank's share of the cores.

    On a CPU, training itself needs the other cores.
    """
    if device_type == "cpu":
        return _LEAST
    return max(_LEAST, min(share_of_cores(), _MOST))


def advise_more_workers(workers: int) -> str:
    """Return a sentence of advice on the number of loading processes, for when items are waited for."""
    return f"If cores are idle, use more loading processes (engine.workers is {workers})."


class _Keyed(Generic[K, V]):
    """Map-style dataset around a function; returns a UserError as a value, so that it does not crash a worker."""

    def __init__(self, read: Callable[[K], V]) -> None:
        self._read = read

    def __getitem__(self, key: K) -> V | UserError:
        try:
            return self._read(key)
        except UserError as error:
            return error


def load_in_order(read: Callable[[K], V], keys: Iterable[K], workers: int, *, pin: bool = False) -> Iterator[V]:
    """Yield `read(key)` for each key in order, prefetched by `workers` processes (0: loaded in this process).

    With `pin`, and if this process uses CUDA, a thread moves items that have `pin_memory` to pinned memory.
    """
    return map(read, keys) if workers == 0 else _load_ahead(read, keys, workers, pin=pin)


def _load_ahead(
    read: Callable[[K], V], keys: Iterable[K], workers: int, *, pin: bool = False
) -> Generator[V, None, None]:
    with warnings.catch_warnings():
        # more workers than cores is the user's choice, and pays off where reading waits for a disk
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader = DataLoader(
            _Keyed(read),  # type: ignore[arg-type]
            sampler=keys,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin and torch.cuda.is_initialized(),  # models are placed before data is read
            timeout=POLL,  # see `wait_for_item`
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise the DataLoader advances the global RNG
        )
    iterator = WorkerIterator(loader)
    try:
        for number in itertools.count():
            try:
                item = wait_for_item(iterator, number, workers)
            except StopIteration:
                return
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        iterator.close()


class WorkerIterator(_MultiProcessingDataLoaderIter):
    """Iterator over a DataLoader with processes, which neither starting nor a killed process leaves half built.

    torch's SIGCHLD handler would raise at any line of the program, also while another error is handled. It therefore
    does not watch these processes: `wait_for_item` notices within POLL seconds that one has ended.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._workers_status = [True] * loader.num_workers  # torch sets it last, and needs it if starting fails
        signal_handling._set_SIGCHLD_handler()  # before the first process, so that it is held
        with warnings.catch_warnings(), block_signals(*SIGNALS), hold_handlers(*_CHILD_ENDED), without_script():
            # fork, where it is the default, shares the parent's memory and starts in milliseconds; workers use neither
            # CUDA nor a thread pool, which a fork would break
            warnings.filterwarnings("ignore", ".* use of fork", DeprecationWarning)
            super().__init__(loader)
            signal_handling._remove_worker_pids(id(self))
            self._worker_pids_set = False

    def close(self) -> None:
        """End the processes; a signal waits until they have ended, or its error would be lost in a destructor."""
        # a stopped training saves its checkpoint afterwards, and all processes hang if a disk does not respond
        with block_signals(*SIGNALS), kill_remaining(self._workers, _ENDING):
            self._shutdown_workers()


def _start_worker(_: int) -> None:
    # Ctrl-C and Slurm's SIGTERM reach all processes; the parent finishes its step and still needs this worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # SIGTERM stays blocked, as inherited from the parent
        threading.Thread(target=_end_on_sigterm, args=(os.getppid(),), daemon=True).start()
    elif sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _end_on_sigterm(parent: int) -> None:
    """End this process when its parent sends SIGTERM; ignore SIGTERM from any other process."""
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
    os._exit(0)


def _as_it_is(item: V) -> V:
    return item


def wait_for_item(iterator: Any, number: int, workers: int) -> Any:
    """Return the next item of a DataLoader; log a warning if none arrives for a long time.

    Args:
        iterator: iterator of a DataLoader whose timeout is POLL.
        number: index of the item, from 0.
        workers: number of worker processes.

    Raises:
        StopIteration: no item is left.
        KilledProcess: a loading process has ended, or the pinning thread, which happens when an item is lost in
            transit.
        WaitEnded: no item has arrived for half an hour, or until some seconds after a stop request.
    """

    def describe(seconds: float) -> str:
        process = number % workers  # workers take turns
        pid = iterator._workers[process].pid
        return (
            f"No batch for {seconds:.0f} s: item {number + 1} of this epoch is due from loading process {process + 1} "
            f"of {workers} (id {pid}). Check why it hangs (py-spy dump --pid {pid}), such as a file on a disk that "
            "does not respond, or load without processes: engine.workers=0."
        )

    wait = Wait(describe, limit=_LIMIT, notice=_PATIENCE, grace=NOTICE)
    while True:
        try:
            return next(iterator)
        except (ConnectionError, EOFError) as error:  # the process died while it sent an item
            raise _killed_process_error(error) from error
        except RuntimeError as error:
            if str(error).startswith("DataLoader worker"):
                raise _killed_process_error(error) from error
            if not str(error).startswith("DataLoader timed out"):
                raise
            pinning = getattr(iterator, "_pin_memory_thread", None)
            if pinning is not None and not pinning.is_alive():  # torch does not check it on a timeout
                raise _killed_process_error("the thread that pins batches has stopped") from error
        wait.check()


def _killed_process_error(reason: object) -> KilledProcess:
    return KilledProcess(
        f"A data-loading process was killed, most likely because memory ran out ({reason}). Free some, or use fewer "
        "loading processes (engine.workers=1; 0: load in the main process), and run it again: resume a training with "
        "resume=auto."
    )
