"""mode=eval: evaluation of a trained model on a split, with tables and figures."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.nodes import instantiate
from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.image_report import report_images
from dinoseg.evaluation.images import evaluate_images, list_skipped
from dinoseg.evaluation.official import usable
from dinoseg.evaluation.videos import EvalOptions, follow_slots, needs_no_training, propagate
from dinoseg.experiment import build
from dinoseg.experiment.folder import first_ranks
from dinoseg.experiment.trained import check_classes, load_trained
from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale

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
        supervision: for tracking, see `EvalOptions`.
        restart: for tracking, see `EvalOptions`.
        report: write report.html, and the files that mode=compare reads.
    """
    build.check_split(split)
    options = EvalOptions(split, metrics_only, official, supervision, restart, report)
    if needs_no_training(cfg):
        return propagate(cfg, out_dir, options)
    trained = load_trained(cfg)
    if trained.model.head.slots is not None:
        return follow_slots(cfg, trained, out_dir, options)
    options.refuse_tracking()
    out_dir = first_ranks(out_dir, trained.engine.share)
    data = build.dataset(cfg, split)
    source = f"resume={cfg.resume}" if cfg.resume else f"head.weights={cfg.head.weights}"
    check_classes(data, trained.info, source)
    keep_scale(trained.model, TrainedSizes.from_info(trained.info), reduces=False)
    engine, on_error = trained.engine, cfg.data.on_error
    protocol = instantiate(cfg.data.official) if official and cfg.data.official is not None else None
    if protocol is not None and not usable(protocol, data, out_dir, on_error=on_error, tells=engine.is_main):
        protocol = None
    collector = Collector(data, engine.rank, engine.world) if report else None
    scores = evaluate_images(
        trained.model,
        data,
        engine,
        out_dir,
        metrics_only=metrics_only,
        policy=trained.policy,
        background=build.background_of(cfg),
        protocol=protocol,
        on_error=on_error,
        collector=collector,
    )
    if collector is not None:
        report_images(cfg, collector, scores, data, engine, out_dir, split=split)
    if engine.is_main:
        _tell_origin(cfg, source)
        list_skipped({split: data.skipped}, out_dir)
    engine.close()
    return {**scores, "run": str(out_dir)}


def _tell_origin(cfg: DictConfig, source: str) -> None:
    board = Path(cfg.resume or ".").parent.parent / "tensorboard"
    print(f"TensorBoard:  tensorboard --logdir {board}" if board.is_dir() else "TensorBoard:  none beside it")
    print(f"checkpoint:   {cfg.resume or source}")
