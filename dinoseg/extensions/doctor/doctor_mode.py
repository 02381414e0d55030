"""mode=doctor: validation of a dataset before training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.splits import SPLITS
from dinoseg.core.task import ObjectTask
from dinoseg.data.checks.errors import describe_split
from dinoseg.data.checks.files import SKIP
from dinoseg.data.checks.findings import Finding, ScannedSplit, by_severity
from dinoseg.data.custom import CustomDataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.measure import Record, measure_sample
from dinoseg.data.scan.scan import scan, unreadable
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.doctor.details import DETAILS
from dinoseg.extensions.doctor.examine import examine, summary
from dinoseg.extensions.doctor.objects import check_objects, count_objects
from dinoseg.extensions.idd.home_made import home_made_files, report_home_made
from dinoseg.report.html.page import render
from dinoseg.report.overlay import blend, downscale, downscale_mask, legend_of
from dinoseg.utils.atomic import write_json, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.levels import to_display
from dinoseg.utils.ranges import Count, Natural, Range
from dinoseg.utils.wording import count_of, list_first, printable

_NEEDED = ("train", "val")
_NO_TEST = "If the data have no test split, ignore this note: training reads train and val only."
_HEADERS = ("split", "images", "smallest (width x height)", "largest (width x height)")
NearDistance = Annotated[int, Range("a whole number from 0 to 64", 0, 64)]
DoctorData = PairDataset | CustomDataset
_LONGEST = 480  # longer side of an example image, in pixels


def doctor(
    cfg: DictConfig,
    *,
    out_dir: Path,
    workers: Count = 2,
    near_distance: NearDistance = 6,
    images: bool = True,
    samples: Natural = 12,
) -> dict[str, Any]:
    """Scan train, val and, where there is one, test; print the findings and write doctor.json and doctor.html.

    Args:
        cfg: the whole config; only `data`, `cache_dir`, `task` and `head.num_queries` are read.
        out_dir: the run folder.
        workers: threads that scan.
        near_distance: differing bits of 64 up to which two images count as near duplicates.
        images: decode the images too; without it duplicates and swapped masks are not checked.
        samples: example images in doctor.html.

    Raises:
        UserError: the data have errors; only after all files are written.
    """
    builder = Builder(cfg)
    datasets, findings = _open_splits(builder, str(cfg.data.root))
    splits = [
        describe_split(split, data, _records(split, data, images=images, workers=workers, cache_dir=cfg.cache_dir))
        for split, data in datasets.items()
    ]
    name = cfg.choices.data
    has_objects = isinstance(builder.task, ObjectTask)
    if splits:
        options = {"group": cfg.data.get("group"), "near_distance": near_distance, "has_objects": has_objects}
        findings += examine(splits, **options)
    objects: dict[str, Mapping[int, int]] = {}
    for part in splits:
        data = datasets[part.split]
        if isinstance(data, PairDataset) and OBJECTS in data.maps:
            counts = count_objects(data, workers)
            objects[part.split] = counts.by_class
            are_needed = has_objects and part.split in _NEEDED
            findings += check_objects(part, counts, builder.value("head.num_queries"), are_needed=are_needed)
    findings = by_severity(findings)
    report = _printable({"data": name, "root": str(cfg.data.root), **_report(splits, findings, objects)})
    write_json(out_dir / "doctor.json", report)
    cards = list(_example_cards(datasets, splits, findings, samples))
    palette = next(iter(datasets.values())).palette if datasets else ()
    page = render(
        "extensions/doctor/doctor.html.jinja",
        title=f"{name}: {report['root']}",
        subtitle=_count_findings(report),
        warnings=[],
        findings=report["findings"],
        splits=report["splits"],
        palette=palette,
        cards=cards,
    )
    write_text(out_dir / "doctor.html", page)
    print(_text(report))
    print(f"report:       {out_dir}/doctor.html, doctor.json")
    if report["errors"]:
        numbers = [count_of(report[f"{kind}s"], kind) for kind in ("error", "warning")]
        raise UserError(
            f"{' and '.join(numbers)} in data={name} data.root={report['root']}: see {out_dir / 'doctor.html'}. "
            f"{_what_now(findings)}"
        )
    return {key: report[key] for key in ("errors", "warnings", "notes")} | {"run": str(out_dir)}


def _what_now(findings: Sequence[Finding]) -> str:
    errors = [finding for finding in findings if finding.severity == "error"]
    stops = [finding for finding in errors if _stops(finding)]
    if not stops:
        return "Training only warns about these errors: check that its scores are still meaningful."
    which = "Training stops" if len(stops) == len(errors) else f"Training stops on {', '.join(e.code for e in stops)}"
    return f"{which}: fix the errors first."


def _printable(value: Any) -> Any:
    """Return a report without characters that UTF-8 cannot encode, as in some file names."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list | tuple) else value


def _open_splits(builder: Builder, root: str) -> tuple[dict[str, DoctorData], list[Finding]]:
    """Return the splits that can be listed, with findings for the others and for incomplete pairs."""
    reader = builder.reader()
    name = builder.options["data"]
    datasets: dict[str, DoctorData] = {}
    findings = []
    for split in SPLITS:
        try:
            data = reader(split)
        except Exception as error:  # a dataset class may raise any error for a missing split
            if split not in _NEEDED:
                note = Finding("note", "split_left_out", f"Split {split} is left out: {error}", remedy=_NO_TEST)
                findings.append(note)
            elif isinstance(error, UserError):
                findings.append(Finding("error", "split_unreadable", f"Split {split}: {error}"))
            else:
                raise
            continue
        assert isinstance(data, PairDataset | CustomDataset)
        if split not in _NEEDED and (same := _same_files(data, datasets)):
            findings.append(
                Finding("note", "split_left_out", f"Split {split} is left out: it is {same}, file by file.")
            )
            continue
        datasets[split] = data
        if isinstance(data, PairDataset) and data.lacking:
            findings.append(_report_incomplete_pairs(split, data))
    if name.startswith("idd") and not datasets:
        if files := home_made_files(Path(root).expanduser()):
            findings.append(report_home_made(files, on_purpose=name == "idd_home_made"))
    return datasets, findings


def _report_incomplete_pairs(split: str, data: PairDataset) -> Finding:
    return Finding(
        "error",
        "no_whole_pair",
        f"{count_of(data.lacking, 'name')} of {split} without image, mask or frames; {count_of(data.pairs, 'pair')} "
        "complete.",
        tuple(data.lacking),
        f"{data.remedy} {SKIP}".lstrip(),
        reasons=tuple(f"{name}: {reason}" for name, reason in data.lacking.items()),
    )


def _records(split: str, data: DoctorData, *, images: bool, **options: Any) -> list[Record]:
    """Return the record of each sample; a dataset that reads its own samples is measured here, one by one."""
    if isinstance(data, PairDataset):
        return scan(data.pairs, data.reader, images=images, details=DETAILS if images else None, **options)
    return [
        measure_sample(name, f"{split}: {name}", partial(data.__getitem__, index), data.ignore_index, DETAILS)
        for index, name in enumerate(data.names)
    ]


def _same_files(data: DoctorData, others: Mapping[str, DoctorData]) -> str | None:
    """Return the split with the same files, as in datasets that return another split for a missing test split."""
    if not isinstance(data, PairDataset) or not data.pairs:
        return None
    files = {pair.image for pair in data.pairs}
    for split, other in others.items():
        if isinstance(other, PairDataset) and files == {pair.image for pair in other.pairs}:
            return split
    return None


def _report(
    splits: Sequence[ScannedSplit], findings: Sequence[Finding], objects: Mapping[str, Mapping[int, int]]
) -> dict[str, Any]:
    rows = []
    for finding in findings:
        row = {key: value for key, value in asdict(finding).items() if key not in ("look", "stops")}
        rows.append(row | {"count": len(finding.files), "stops_training": _stops(finding)})
    return {
        **{f"{kind}s": sum(each.severity == kind for each in findings) for kind in ("error", "warning", "note")},
        "findings": rows,
        "splits": {part.split: summary(part, objects.get(part.split, {})) for part in splits},
        "unreadable": {part.split: unreadable(part.records) for part in splits},
    }


def _stops(finding: Finding) -> bool:
    return finding.severity == "error" and finding.stops


def _text(report: Mapping[str, Any]) -> str:
    rows = [
        (split, f"{each['images']:,}", *(_size(each[key]) for key in ("smallest", "largest")))
        for split, each in report["splits"].items()
    ]
    lines = [tabulate(rows, headers=_HEADERS), ""] if rows else []
    for finding in report["findings"]:
        weak = finding["severity"] == "error" and not finding["stops_training"]
        also = " (training does not stop on it)" if weak else ""
        files = list_first(finding["reasons"] or finding["files"], "    ")
        lines.append(f"{finding['severity'].upper()} {finding['code']}{also}: {finding['message']}{files}")
        lines += [f"    -> {finding['remedy']}"] if finding["remedy"] else []
    return "\n".join([*lines, "", f"findings:     {_count_findings(report)}"])


def _count_findings(report: Mapping[str, Any]) -> str:
    return ", ".join(count_of(report[f"{kind}s"], kind) for kind in ("error", "warning", "note"))


def _size(size: Mapping[str, int] | None) -> str:
    return f"{size['width']} x {size['height']}" if size else "-"


def _example_cards(
    datasets: Mapping[str, DoctorData], splits: Sequence[ScannedSplit], findings: Sequence[Finding], samples: int
) -> Iterator[dict[str, Any]]:
    """Yield cards of pairs: first those with findings, then examples of each class and each split."""
    wanted: dict[tuple[str, str], str] = {}
    for finding in findings:
        for key in finding.look[:4]:
            wanted.setdefault(key, finding.code)
    for key, caption in _of_classes(splits):
        wanted.setdefault(key, caption)
    for key, caption in [*wanted.items()][:samples]:
        data = datasets[key[0]]
        try:
            sample = data[data.names.index(key[1])]
        except UserError:
            continue
        frame = to_display(sample["image"].permute(1, 2, 0).numpy())
        yield {"title": f"{key[0]}/{key[1]}", "summary": caption, **_draw_pair(frame, sample["mask"].numpy(), data)}


def _of_classes(splits: Sequence[ScannedSplit]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the pair with most pixels of each class, rarest class first, then evenly spaced pairs of each split."""
    total = sum((part.counts for part in splits), np.zeros(len(splits[0].classes) if splits else 0, dtype=np.int64))
    for index in sorted(np.flatnonzero(total).tolist(), key=lambda index: total[index]):
        most = max(
            ((record.pixels.get(index, 0), part, record) for part in splits for record in part.records),
            key=lambda entry: entry[0],
        )
        yield (most[1].split, most[2].name), f"most of {splits[0].classes[index]}"
    for part in splits:
        for record in part.records[:: max(1, len(part.records) // 3)]:
            yield (part.split, record.name), "one of many"


def _draw_pair(frame: np.ndarray, mask: np.ndarray, data: DoctorData) -> dict[str, Any]:
    """Return an image, its mask over it, and the legend of the classes, downscaled."""
    frame, mask = downscale(frame, _LONGEST), downscale_mask(mask, _LONGEST)
    tinted = blend(frame, mask, data.palette, ignore_index=data.ignore_index, opacity=0.6)
    legend = legend_of([mask], data.classes, data.palette, ignore_index=data.ignore_index)
    return {"panels": [("image", frame), ("mask", tinted)], "legend": legend}
