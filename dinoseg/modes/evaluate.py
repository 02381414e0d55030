"""mode=eval: evaluation of a trained model on a split, with tables and figures."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from dinoseg.checkpoints.trained import TrainedModel, check_classes, is_trained, load_trained
from dinoseg.core.shapes import SegmentationData
from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.image_report import report_images
from dinoseg.evaluation.images import evaluate_images, list_skipped
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.provenance import provenance_of
from dinoseg.metrics.rows import MetricRows, check_score_names
from dinoseg.runs.folder import find_typed_keys
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_EDITED = (
    "Average precision and precision-recall curves are of edited probabilities, 0 in removed regions: set "
    "inference.min_region=0 inference.largest_component=[] to score those of the model."
)


def run(
    cfg: DictConfig,
    *,
    out_dir: Path,
    split: Literal["train", "val", "test"] = "val",
    metrics_only: bool = False,
    official: bool = True,
    supervision: str | None = None,
    restart: str | None = None,
    report: bool = True,
    scorer: Callable[..., Any] | None = None,
    regions: Callable[..., Any] | None = None,
    choose_thresholds: Callable[..., list[float]] | None = None,
    draw_curves: Callable[..., list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Score the checkpoint of `resume` on a split.

    `head.scoring` of a trained model, or `data.scoring` of a backbone alone, name a function that does it instead.

    Args:
        cfg: the whole config, merged with the checkpoint's.
        out_dir: the run folder, for all files.
        split: train, val or test.
        metrics_only: write no figures of single images.
        official: also score with the protocol of the dataset's benchmark, if it has one.
        supervision: for tracking: `first_frame`, `none`, or None for the data set's default.
        restart: for tracking, see `TrackingOptions`.
        report: write report.html, and the files that mode=compare reads.
        scorer: makes the scorer of a benchmark's protocol; None: no official scores.
        regions: makes the comparison with predictions whose small regions stay; None: no comparison.
        choose_thresholds: chooses thresholds on the validation split for `task.threshold=auto`; None: 0.5.
        draw_curves: writes and draws the curves of metrics; None: no curves.
    """
    builder = Builder(cfg)
    options = {"metrics_only": metrics_only, "official": official, "report": report}
    instead = find_scoring(builder)
    if instead is not None:
        return instead(builder, out_dir, split, supervision, restart=restart, **options)
    for key, value in (("supervision", supervision), ("restart", restart)):
        if value is not None:
            raise UserError(
                f"mode.{key}={value} is for tracking in videos, and this model predicts classes of single images. "
                "Leave it out."
            )
    return evaluate_split(
        builder,
        out_dir,
        split,
        scorer=scorer,
        regions=regions,
        choose_thresholds=choose_thresholds,
        draw_curves=draw_curves,
        **options,
    )


def find_scoring(builder: Builder) -> Callable[..., dict[str, Any]] | None:
    """Return the function that scores a split in another way than by its images; None: images are scored."""
    key = "head.scoring" if is_trained(builder) else "data.scoring"
    scoring: Callable[..., dict[str, Any]] | None = None if builder.value(key) is None else builder.part(key)
    return scoring


def evaluate_split(
    builder: Builder,
    out_dir: Path,
    split: str,
    *,
    metrics_only: bool,
    official: bool,
    report: bool,
    scorer: Callable[..., Any] | None,
    regions: Callable[..., Any] | None,
    choose_thresholds: Callable[..., list[float]] | None = None,
    draw_curves: Callable[..., list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Score a trained model on the images of a split; arguments as of `run`."""
    builder = builder.with_metrics(builder.task.eval_metrics)
    cfg = builder.cfg
    trained = load_trained(builder)
    check_score_names(builder.metrics)
    data = trained.open_split(builder, split)
    source = f"resume={cfg.resume}" if cfg.resume else f"head.weights={cfg.head.weights}"
    check_classes(data, trained.info, source)
    trained.limit_size(reduces=False)
    engine = trained.engine
    benchmark = _open_benchmark(builder, data, out_dir, scorer, warns=engine.is_main) if official else None
    place = (data, engine.rank, engine.world_size)
    collector, background = Collector(*place) if report else None, builder.background
    receiver = trained.watch(collector)
    effect = None if regions is None else regions(trained.strategy, data, engine)
    if effect is not None:
        receiver = effect.watch(receiver)
    rows = MetricRows(builder.metrics, *place, None if collector is None else collector.add_errors)
    is_edited = trained.strategy.base is not trained.strategy
    if is_edited and any(metric.needs_bins for metric in builder.metrics):
        logger.warning(_EDITED)
    if choose_thresholds is not None and _needs_thresholds(builder, trained, out_dir):
        trained.choose_thresholds(choose_thresholds, builder, data, split)
    provenance = provenance_of(builder, out_dir)
    scores = evaluate_images(
        trained.model,
        data,
        engine,
        out_dir,
        metrics_only=metrics_only,
        strategy=trained.strategy,
        background=background,
        write_prediction=None if benchmark is None else benchmark.write_prediction,
        collector=receiver,
        rows=rows if builder.metrics else None,
        batches=trained.batches(data),
        split=split,
        thresholds_by_fold=trained.thresholds_by_fold,
    )
    by_protocol = None
    if benchmark is not None and engine.is_main:
        by_protocol = benchmark.score(data, provenance.group)
        scores = {**scores, "official": by_protocol and by_protocol["scores"]}
    if collector is not None:
        report_images(
            provenance,
            collector,
            scores,
            rows,
            data,
            engine,
            out_dir,
            split=split,
            background=background,
            official=by_protocol,
            charts=draw_curves(rows, data, out_dir) if draw_curves is not None and engine.is_main else (),
            calibrates=not is_edited,
        )
        scores = {**scores, **trained.report(out_dir)}
    if effect is not None:
        scores = {**scores, "regions": effect.report(out_dir, split, provenance.group)}
    if engine.is_main:
        print(f"checkpoint:   {', '.join(builder.checkpoints) or source}")
        list_skipped({split: data.skipped}, out_dir)
    engine.close()
    return {**scores, "run": str(out_dir)}


def _open_benchmark(
    builder: Builder, data: SegmentationData, out_dir: Path, scorer: Callable[..., Any] | None, *, warns: bool
) -> Any:
    """Return the scorer of the dataset's benchmark; None: there is none, or it cannot score this split."""
    if scorer is None or builder.value("data.official") is None:
        return None
    benchmark = scorer(builder.part("data.official"), out_dir, builder.cfg.data.on_error)
    return benchmark if benchmark.can_score(data, warns=warns) else None


def _needs_thresholds(builder: Builder, trained: TrainedModel, out_dir: Path) -> bool:
    """Return whether to choose thresholds; chosen ones are chosen again if the command sets `auto`."""
    is_asked = builder.value("task.threshold") == "auto" and "task.threshold" in find_typed_keys(out_dir)
    return trained.model.task.is_auto or is_asked
