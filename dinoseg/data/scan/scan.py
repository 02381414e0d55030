"""Every pair of a data set measured once, by several processes, and kept for the next run."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dinoseg.data.classes.masks import MaskReader
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.scan.cache import ScanCache
from dinoseg.data.scan.measure import measure
from dinoseg.data.scan.record import Record
from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError
from dinoseg.utils.workers import in_processes

_CHUNK = 16  # pairs handed to a process at once
_FEW = 64  # pairs below which starting processes costs more than it saves


def scan(
    pairs: Sequence[Pair],
    reader: MaskReader,
    *,
    images: bool = True,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> list[Record]:
    """Return what each pair holds, in order; a bad file is a problem in its record, never an error.

    Args:
        pairs: what to read.
        reader: how masks are read.
        images: decode the images too: their colours, hashes and edges are known only then.
        workers: processes that read; 1: this one, which also reads alone where there are few pairs.
        cache_dir: where records are kept, so that only files that changed are read again; None: nowhere.

    Raises:
        UserError: `workers` is below 1, or a process was killed.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: give the number of scanning processes, 1 or more.")
    cache = None if cache_dir is None else ScanCache(cache_dir, [pair.mask for pair in pairs], reader)
    known: dict[int, Record] = {}
    for index, pair in enumerate(pairs):
        record = cache.get(pair, images=images) if cache else None
        if record is not None:
            known[index] = record
    missing = [index for index in range(len(pairs)) if index not in known]
    try:
        records = _measured([pairs[index] for index in missing], reader, images, workers)
        for index, record in zip(missing, records, strict=True):
            known[index] = record
            if cache is not None:
                cache.put(record, pairs[index])
    finally:
        if cache is not None:  # after an interruption too: the next run goes on from here
            cache.save()
    return [known[index] for index in range(len(pairs))]


def unreadable(records: Iterable[Record]) -> dict[str, str]:
    """Return name to reason of the pairs that would stop a run when they are read."""
    return {record.name: "; ".join(record.problems.values()) for record in records if record.problems}


def _measured(pairs: Sequence[Pair], reader: MaskReader, images: bool, workers: int) -> Iterator[Record]:
    """Yield the records in order, with a bar."""
    work = functools.partial(_measure_all, reader=reader, images=images)
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    with Bar(total=len(pairs), desc="scanning", unit="pair", delay=2, leave=False) as bar:
        processes = workers if len(pairs) >= _FEW else 1
        for _, records in in_processes(
            work,
            chunks,
            processes,
            remedy=f"Scan with fewer processes than {processes}: data.workers=1, or mode.workers=1 with mode=doctor.",
        ):
            yield from records
            bar.update(len(records))


def _measure_all(pairs: Sequence[Pair], *, reader: MaskReader, images: bool) -> list[Record]:
    return [measure(pair, reader, images=images) for pair in pairs]
