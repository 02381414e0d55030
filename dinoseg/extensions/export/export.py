"""Shared steps of graph exports: load the trained model, verify the exported file, and move it into the run folder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dinoseg import __version__
from dinoseg.checkpoints.source import ModelSource
from dinoseg.checkpoints.trained import find_trained_sizes
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.extensions.export.graph import record_of
from dinoseg.extensions.export.onnx_record import GraphRecord
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.pictures import Picture, pictures
from dinoseg.extensions.export.proof import Reference, compare, meets_limits
from dinoseg.extensions.export.strategy import Strategy, missing_strategy, warn_of_strategy
from dinoseg.inference.trained_sizes import limit_to_trained_size
from dinoseg.models.adapters import has_lora, merge
from dinoseg.models.model import SegmentationModel
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.runtime import Runtime
from dinoseg.segmenter.write import facts_of
from dinoseg.utils.atomic import scratch_folder, write_json
from dinoseg.utils.errors import UserError

REPORT = "export_report.json"
_UNREAD = ("inference", "resolution.crop")


@dataclass(frozen=True)
class Prepared:
    """A trained model ready for export, and the images on which the export is verified."""

    reference: Reference  # the trained model, with the weights that it was trained and scored with
    model: SegmentationModel  # the exported model: the same weights in float32, LoRA updates merged
    record: GraphRecord
    reason: str | None  # why the graph's size is fixed; None: it is dynamic
    facts: ModelFacts
    pictures: list[Picture]
    folder: Path  # scratch folder inside the run folder, removed at the end
    rounding: str | None  # low-precision setting of the trained model; the file computes in float32
    strategy: Strategy | None  # inference strategy of the run, if the graph lacks it


@contextmanager
def prepare_model(
    source: ModelSource, out_dir: Path, options: GraphOptions, *, opset: int | None = None, precision: str = "float32"
) -> Iterator[Prepared]:
    """Load a model, as trained and as exported, and yield it with the images to verify it on.

    Raises:
        UserError: if `source` names no checkpoint, there are no images, the licence restricts redistribution, or the
            model cannot be exported.
    """
    if source.resume is None:
        raise UserError("This export needs a trained model: give resume=<run folder or checkpoint>.")
    warn_unread(out_dir, _UNREAD, "The file accepts whole images, at resolution.scale and up to resolution.longest.")
    with scratch_folder(out_dir, "export") as folder:
        found = pictures(
            options.images,
            options.count,
            folder,
            dataset=source.dataset,
            num_classes=source.num_classes,
            pixels=source.pixels,
        )
        trained = source.load_on_cpu()  # quantised weights cannot move between devices
        sizes = find_trained_sizes(trained, out_dir)
        facts = facts_of(source, trained, sizes)
        _check_licence(facts, source.config["head"].get("weights"), options.gated)
        reference = trained.model
        model = source.in_float32(reference)
        if has_lora(model):
            model = deepcopy(model) if model is reference else model
            merge(model.backbone)
        record, reason = record_of(model, sizes, options, found[0].size, opset=opset, precision=precision)
        limit_to_trained_size(reference, sizes)
        model.limit = reference.limit
        rounding = _rounding(source)
        folders = source.config_dirs
        strategy = missing_strategy(trained, [picture.size for picture in found], folders)
        yield Prepared(Reference(reference, record), model, record, reason, facts, found, folder, rounding, strategy)


def store_if_verified(
    ready: Prepared, runtime: Runtime, files: Sequence[Path], out_dir: Path, options: GraphOptions
) -> dict[str, Any]:
    """Verify an exported file, move `files` to `out_dir` if it agrees with the model, and return the report.

    Args:
        ready: the exported model and its reference.
        runtime: runs the exported file.
        files: the written files; the last one is verified.
        out_dir: the run folder; the report is written there.
        options: the required agreement.

    Raises:
        UserError: if the file misses the required agreement; only the report is written then, with the reason.
    """
    path, classes, task = files[-1], len(ready.facts.classes), ready.model.task
    result = compare(ready.reference, runtime, ready.pictures, classes, ready.facts.ignore_index, task)
    proven = meets_limits(result, options)
    report = {
        "proven": proven,
        "limits": {"agreement": options.min_agreement, "miou_points": options.max_miou_drop},
        **result,
        "file": path.name,
        "bytes": sum(file.stat().st_size for file in files),
        "size": list(ready.record.size) if ready.record.size else "any",
        "size_fixed_because": ready.reason,
        "opset": ready.record.opset,
        "precision": ready.record.precision,
        "trained_with": ready.rounding or "float32",
        "versions": {**ready.facts.versions, **_libraries(), "dinoseg": __version__},
        "images": [picture.name for picture in ready.pictures],
        "missing_strategy": asdict(ready.strategy) if ready.strategy else None,
    }
    write_json(out_dir / REPORT, report)
    if not proven:
        raise UserError(_refusal(path, report))
    for file in files:
        os.replace(file, out_dir / file.name)
    _print(out_dir / path.name, report)
    if ready.strategy is not None:
        warn_of_strategy(ready.strategy, path.name, report)
    return report


def _rounding(source: ModelSource) -> str | None:
    bits, dtype = source.settings("adapter").get("bits"), source.settings("backbone").get("dtype", "float32")
    if bits is not None:
        return f"adapter.bits={bits}"
    return None if dtype == "float32" else f"backbone.dtype={dtype}"


def _check_licence(facts: ModelFacts, head: str | None, gated: bool) -> None:
    """Refuse to write third-party weights whose licence restricts redistribution, unless `gated` is set.

    `head`: third-party source of the head's weights.
    """
    foreign = f"{facts.backbone['weights']} ({facts.backbone['licence']})" if facts.backbone["gated"] else head
    if foreign is not None and not gated:
        raise UserError(
            f"The file would hold weights of {foreign}, whose licence restricts redistribution. If you do not share "
            "the file, or comply with the licence: export.gated=true."
        )


def _refusal(path: Path, report: dict[str, Any]) -> str:
    miou, limits = {name: f"{100 * value:.2f}" for name, value in report["miou"].items()}, report["limits"]
    remedy = "Choose another opset or head."
    if report["precision"] != "float32":
        remedy = "Choose export.precision=float32."
    elif report["trained_with"] != "float32":
        remedy = (
            f"The model computes in {report['trained_with']}, the file in float32 with the same weights. To accept "
            "this agreement, set export.min_agreement and export.max_miou_drop."
        )
    nan = "" if report["finite"] else ", and some of its probabilities are NaN"
    return (
        f"{path.name} was not saved: on {report['pictures']} images {report['agreement']:.4%} of the pixels have the "
        f"class of the trained model (required: at least {limits['agreement']:.2%}), and the mIoU is "
        f"{miou['exported']} instead of {miou['torch']} (allowed: {limits['miou_points']} points){nan}. "
        f"{remedy} The numbers are in {REPORT}."
    )


def _print(path: Path, report: dict[str, Any]) -> None:
    latency, miou = report["latency_ms"], report["miou"]
    print(f"written to {path}: {report['bytes'] / 1e6:.2f} MB, {report['precision']}, size {report['size']}")
    if report["size_fixed_because"]:
        print(f"its size is fixed: {report['size_fixed_because']}")
    if "agreement_with_predict" in report:
        print(f"at that size {report['agreement_with_predict']:.2%} of the pixels have the class of mode=predict")
    print(
        f"verified on {report['pictures']} images: {report['agreement']:.4%} of the pixels agree, mIoU "
        f"{100 * miou['exported']:.2f} (PyTorch {100 * miou['torch']:.2f}; against {report['references']}); "
        f"{latency['exported']:.1f} ms per image (PyTorch eager {latency['torch']:.1f} ms)"
    )


def _libraries() -> dict[str, str]:
    import onnx
    import onnxscript

    from dinoseg.extensions.export.onnx_model import runtime_version

    found = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    return {**found, "onnxruntime": runtime_version()}
