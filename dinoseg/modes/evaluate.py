"""mode=eval: evaluation of a trained model on a split, with tables and figures."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.image_report import report_images
from dinoseg.evaluation.images import evaluate_images, list_skipped
from dinoseg.evaluation.official import usable
from dinoseg.evaluation.videos import TrackingOptions, check_slots, evaluate_videos
from dinoseg.experiment.benchmark_videos import benchmark_videos, chosen_supervision
from dinoseg.experiment.builder import Builder, check_split
from dinoseg.experiment.provenance import provenance_of
from dinoseg.experiment.trackers import tracker_maker
from dinoseg.experiment.trained import Trained, check_classes, is_trained, load_trained
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.metrics.rows import MetricRows, check_score_names
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


def run(
    cfg: DictConfig,
    *,
    out_dir: Path,
    split: str = "val",
    metrics_only: bool = False,
    official: bool = True,
    supervision: str | None = None,
    restart: str | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Score the checkpoint of `resume` on a split; slot models and bare backbones track instead, see `evaluate_videos`.

    Args:
        cfg: the whole config, merged with the checkpoint's.
        out_dir: the run folder, for all files.
        split: train, val or test.
        metrics_only: write no figures of single images.
        official: also score with the protocol of the dataset's benchmark, if it has one.
        supervision: for tracking: `first_frame`, `none`, or None for the data set's default.
        restart: for tracking, see `TrackingOptions`.
        report: write report.html, and the files that mode=compare reads.
    """
    check_split(split)
    build = Builder(cfg)
    tracking = TrackingOptions(metrics_only=metrics_only, official=official, restart=restart, report=report)
    if tracks_untrained(build):
        return track_split(build, None, out_dir, split, supervision, tracking)
    trained = load_trained(build)
    if trained.model.head.slots is not None:
        return track_split(build, trained, out_dir, split, supervision, tracking)
    for key, value in (("supervision", supervision), ("restart", restart)):
        if value is not None:
            raise UserError(
                f"mode.{key}={value} is for tracking in videos: without resume, or with head=slots. This model "
                "predicts classes of single images: leave it out."
            )
    metrics = build.metrics
    check_score_names(metrics)
    data = build.dataset(split)
    source = f"resume={cfg.resume}" if cfg.resume else f"head.weights={cfg.head.weights}"
    check_classes(data, trained.info, source)
    limit_to_trained_size(trained.model, TrainedSizes.from_info(trained.info), reduces=False)
    engine, on_error = trained.engine, cfg.data.on_error
    protocol = build.part("data.official") if official and build.value("data.official") is not None else None
    if protocol is not None and not usable(protocol, data, out_dir, on_error=on_error, tells=engine.is_main):
        protocol = None
    place = (data, engine.rank, engine.world_size)
    collector, background = Collector(*place) if report else None, build.background
    rows = MetricRows(metrics, *place)
    provenance = provenance_of(build, out_dir)
    scores = evaluate_images(
        trained.model,
        data,
        engine,
        out_dir,
        metrics_only=metrics_only,
        strategy=trained.strategy,
        background=background,
        protocol=protocol,
        group=provenance.group,
        on_error=on_error,
        collector=collector,
        rows=rows if metrics else None,
    )
    if collector is not None:
        report_images(provenance, collector, scores, rows, data, engine, out_dir, split=split, background=background)
    if engine.is_main:
        print(f"checkpoint:   {cfg.resume or source}")
        list_skipped({split: data.skipped}, out_dir)
    engine.close()
    return {**scores, "run": str(out_dir)}


def tracks_untrained(build: Builder) -> bool:
    """Return whether a backbone alone tracks: on videos, without a checkpoint or a pretrained head."""
    return build.value("data.clips") is not None and not is_trained(build)


def track_split(
    build: Builder,
    trained: Trained | None,
    out_dir: Path,
    split: str,
    supervision: str | None,
    options: TrackingOptions,
) -> dict[str, Any]:
    """Track the objects of a split's videos with the slots of a trained model, or with the backbone alone."""
    if trained is None and chosen_supervision(build, supervision or "first_frame") == "none":
        raise UserError(
            "mode.supervision=none needs a model that finds objects without masks: set resume=RUN of one with "
            "head=slots. Without resume, masks of first frames are propagated (mode.supervision=first_frame)."
        )
    if metrics := build.value("metric"):
        raise UserError(f"metric=[{','.join(metrics)}] scores images, not tracked objects. Leave it out.")
    data = benchmark_videos(build, split, supervision or ("first_frame" if trained is None else None))
    if trained is not None and trained.model.head.slots is not None:
        num_slots, lock_on = trained.model.head.slots.num_slots, bool(build.value("slots.lock_on"))
        check_slots(data, num_slots, lock_on=lock_on, official=options.official)
    engine = build.engine() if trained is None else trained.engine
    make_tracker = tracker_maker(build, engine, trained, batch_size=engine.images_at_once())
    return evaluate_videos(data, make_tracker, engine, out_dir, options, provenance_of(build, out_dir))
