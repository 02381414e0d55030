"""Measurement of all pairs of a dataset by several processes, cached between runs."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.annotation.drawing import MaskSource, mask_file, mask_key
from dinoseg.data.classes.masks import MaskReader
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.scan.likeness import SMALL
from dinoseg.data.scan.measure import measure
from dinoseg.data.scan.record import Record
from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.stamps import stamp
from dinoseg.utils.units import finished
from dinoseg.utils.workers import in_processes

_CHUNK = 16  # pairs per task of a process
_FEW = 64  # with fewer pairs, starting processes costs more than it saves


def scan(
    pairs: Sequence[Pair],
    reader: MaskReader,
    *,
    images: bool = True,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> list[Record]:
    """Return the record of each pair, in order; a bad file becomes a problem in its record, never an error.

    Args:
        pairs: what to read.
        reader: reader of the masks.
        images: decode the images too; without it, their hashes and edges are unknown.
        workers: number of reading processes; 1, or few pairs: this process reads alone.
        cache_dir: folder of the cached records, so that only changed files are read again; None: no cache.

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
        if cache is not None:  # also after an interruption: the next run resumes from here
            cache.save()
    return [known[index] for index in range(len(pairs))]


def unreadable(records: Iterable[Record]) -> dict[str, str]:
    """Return name to reason of the pairs that would stop a run when they are read."""
    return {record.name: "; ".join(record.problems.values()) for record in records if record.problems}


def _measured(pairs: Sequence[Pair], reader: MaskReader, images: bool, workers: int) -> Iterator[Record]:
    """Yield the records in order, with a progress bar."""
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


log = logging.getLogger(__name__)

_VERSION = 4  # version of the record format
_MAX_BYTES = 2**30  # of the records: a million images
_SMALL_COPIES = ("edges", "borders")
_TUPLES = ("image_size", "mask_size")  # JSON turns them into lists
_UNREADABLE = {"unreadable_image", "unreadable_mask"}
_SIZE_FORM = forms.maybe(forms.row(forms.whole(1), forms.whole(1)))
_FORM = forms.listing(
    forms.record(
        key=forms.text,
        stamps=forms.listing(forms.whole(-(2**63))),
        record=forms.record(
            **dict.fromkeys(("name", "image", "mask", "mask_format", "mask_digest", "image_digest"), forms.text),
            **dict.fromkeys(("image_size", "mask_size"), _SIZE_FORM),
            decoded=forms.flag,
            pixels=forms.table(forms.whole(), r"[0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5]"),
            raw=forms.table(forms.whole(), r"-?[0-9]{1,10}|\([0-9]{1,3}, [0-9]{1,3}, [0-9]{1,3}\)"),
            problems=forms.table(forms.text),
            look=forms.maybe(forms.whole(0, 2**64 - 1)),
        ),
        edges=forms.whole(0, SMALL**2),
        borders=forms.whole(0, SMALL**2 // 8),
    )
)


class ScanCache:
    """Cached records of the pairs below one folder under one set of mask rules.

    Args:
        folder: folder of the cache file.
        masks: the masks, whose common folder is part of the cache file's key.
        reader: the mask rules.
    """

    def __init__(self, folder: str | Path, masks: Sequence[MaskSource], reader: MaskReader) -> None:
        common = os.path.commonpath([os.path.abspath(mask_file(mask)) for mask in masks]) if masks else ""
        key = hashlib.sha256(repr((_VERSION, common, reader.rules())).encode()).hexdigest()
        self.path = Path(folder) / f"scan_{key[:16]}.npz"
        self._known: dict[str, tuple[list[int], Record]] = self._load()
        self._changed = False

    def get(self, pair: Pair, *, images: bool) -> Record | None:
        """Return the record of a pair if neither file has changed; with `images`, only if its image was decoded."""
        stamps, record = self._known.get(_key(pair), (None, None))
        if record is None or stamps != _stamps(pair) or (images and not record.decoded):
            return None
        return replace(record, name=pair.name)

    def put(self, record: Record, pair: Pair) -> None:
        """Store a record, unless one of its files is missing or unreadable, which the machine may have caused."""
        stamps = _stamps(pair)
        if stamps is not None and not record.problems.keys() & _UNREADABLE:
            self._known[_key(pair)] = (stamps, record)
            self._changed = True

    def save(self) -> None:
        """Write the cache file atomically; if that fails, the next run only has to scan again."""
        if not self._changed:
            return
        rows = [_plain(key, stamps, record) for key, (stamps, record) in self._known.items()]
        arrays: dict[str, Any] = {"records": _joined([json.dumps(rows).encode()])}
        for name in _SMALL_COPIES:
            arrays[name] = _joined([getattr(record, name) for _, record in self._known.values()])
        try:
            with atomic_file(self.path) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            log.warning("Cannot store the scan in %s (%s): the next run scans again.", self.path, error)

    def _load(self) -> dict[str, tuple[list[int], Record]]:
        return finished(self.path, _read, damaged="The stored scan in %s is damaged (%s): scanning again.") or {}


def _read(path: Path) -> dict[str, tuple[list[int], Record]]:
    """Return key to stamps and record of each pair."""
    records = forms.read_arrays(path, {"records": forms.ArrayForm("|u1", 1, _MAX_BYTES)})["records"]
    rows = forms.parse_json(records.tobytes(), _FORM)
    lengths = {name: [row[name] for row in rows] for name in _SMALL_COPIES}
    arrays = forms.read_arrays(path, {name: forms.ArrayForm("|u1", 1, sum(lengths[name])) for name in _SMALL_COPIES})
    copies = (_parted(arrays[name], lengths[name]) for name in _SMALL_COPIES)
    return {
        row["key"]: (row["stamps"], _record(row["record"], edges, borders))
        for row, edges, borders in zip(rows, *copies, strict=True)
    }


def _key(pair: Pair) -> str:
    source = os.path.abspath(pair.image) if isinstance(pair.image, Path) else str(pair.image)
    return f"{source}\0{mask_key(pair.mask)}"


def _stamps(pair: Pair) -> list[int] | None:
    of_image, of_mask = stamp(pair.image), stamp(pair.mask)
    return None if of_image is None or of_mask is None else [*of_image, *of_mask]


def _plain(key: str, stamps: list[int], record: Record) -> dict[str, Any]:
    values = {name: value for name, value in asdict(record).items() if name not in _SMALL_COPIES}
    return {"key": key, "stamps": stamps, "record": values} | {
        name: len(getattr(record, name)) for name in _SMALL_COPIES
    }


def _record(values: Mapping[str, Any], edges: bytes, borders: bytes) -> Record:
    pixels = {int(value): count for value, count in values["pixels"].items()}
    tuples = {name: None if values[name] is None else tuple(values[name]) for name in _TUPLES}
    return Record(**{**values, **tuples, "pixels": pixels}, edges=edges, borders=borders)


def _joined(parts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def _parted(joined: np.ndarray, lengths: Sequence[int]) -> list[bytes]:
    ends = np.cumsum(lengths)
    if len(joined) != (ends[-1] if len(ends) else 0):
        raise forms.SchemaError("the small copies are incomplete")
    return [joined[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]
