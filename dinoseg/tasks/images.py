"""Training task for images and their masks."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dinoseg.config.checks import check_given
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.core.contracts import Loss
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.class_uniform import class_uniform
from dinoseg.data.doctor.short import check as examine
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.class_counts import class_counts, keep_counts
from dinoseg.data.splits import keep_evenly_spaced, split_table
from dinoseg.data.train_views import ClassUniform
from dinoseg.evaluation.about import EVALUATION
from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.image_report import report_images
from dinoseg.evaluation.images import evaluate_images
from dinoseg.experiment import build, criteria
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.metrics.confusion import commonest_class
from dinoseg.models.model import Segmenter
from dinoseg.report.curves import IMAGE_PLOTS
from dinoseg.tasks.least_batch import check_batch
from dinoseg.tasks.probing.probe import Grid, Probe
from dinoseg.tasks.regime import Regime, share_of
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.key import hash_of
from dinoseg.training.feature_choice import Plan, feature_cache, stored_as
from dinoseg.training.image_feed import ImageFeed
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


class ImageRegime(Regime):
    """Training task for images in which every pixel has a class."""

    what = "images"
    plots = IMAGE_PLOTS
    feed: ImageFeed

    def __init__(self, cfg: DictConfig, engine: Engine, *, pictures: int = 0) -> None:
        drawn = {"views": cfg.data.get("views"), "class_mix": cfg.data.get("class_mix", 0.0)}
        share = share_of(cfg, engine, pictures) | drawn
        check_given("dinoseg.training.image_feed.ImageFeed", drawn, {key: f"data.{key}" for key in drawn})
        self.cfg = cfg
        train = build.dataset(cfg, "train", reduced=True, decided=engine.decided)
        val = build.dataset(cfg, "val")
        self._val_total = len(val)
        self.split = split_table({"train": train, "val": val})
        self.feed = ImageFeed(
            train=train,
            val=_validated(val, cfg.trainer.get("val_images")),
            augment=instantiate(cfg.data.augment),
            background=build.background_of(cfg),
            policy=instantiate(cfg.inference),
            uniform=_uniform(cfg, train, engine),
            **share,
        )
        self.labels = self.labelled = self.feed.train

    @classmethod
    def check_parts(cls, cfg: DictConfig, model: Segmenter, world: int) -> None:
        """Refuse a loss or a batch that the head cannot be trained with."""
        if cfg.loss.class_weights is None:
            raise UserError(
                f"loss={cfg.choices.loss} learns from clips, without labels. Choose trainer=slots with "
                "head=slots, or a loss on labels, such as loss=cross_entropy."
            )
        if cfg.trainer.score == "miou_no_background" and build.background_of(cfg) is None:
            raise UserError(
                f"trainer.score=miou_no_background: data={cfg.choices.data} has no background. Say which class "
                "it is (data.background=NAME), or choose by another score, such as trainer.score=miou."
            )
        names = [str(name) for name in cfg.data.classes]
        instantiate(cfg.loss.class_weights)([1] * len(names), names)  # refuses an unknown scheme or class name
        head = model.head
        with torch.device("meta"):
            loss = criteria.unweighted(cfg)
        if head.slots is not None:
            raise UserError(
                f"head={cfg.choices.head} is trained on clips. Choose trainer=slots "
                "loss=feature_reconstruction, or another head."
            )
        check_batch(cfg, head.least_batch, world)
        if loss.needs_masks and not head.mixture:
            raise UserError(
                "loss=mask_classification needs a head that predicts masks: head=mask2former, head=mask2former_meta or "
                "head=eomt. For other heads choose a loss on pixels, such as loss=cross_entropy or loss=ce_dice."
            )

    @classmethod
    def data_nodes(cls, cfg: DictConfig) -> Iterator[DictConfig]:
        """Yield the reader of pairs and their augmentation."""
        yield from (cfg.data.reader, cfg.data.augment)

    def keep_features(
        self, model: Segmenter, loss: Loss, engine: Engine, epochs: float, *, before: Mapping[str, str | None]
    ) -> dict[str, str]:
        """Let the feed cache the features of the frozen part of a model, if that saves time or is requested."""
        cfg = self.cfg
        options = {"dtype": stored_as(cfg.features.dtype, before), "gib": cfg.features.gib}
        options["noise"] = cfg.data.get("feature_noise", 0.0)
        names = {"noise": "data.feature_noise", "dtype": "features.dtype", "gib": "features.gib"}
        check_given("dinoseg.training.feature_choice.Plan", options, names)
        groups = plain(cfg, resolve=True)
        settings = {group: {**groups[group], "lr": None} for group in ("backbone", "adapter", "head")}
        parts = {name: hash_of(repr(node)) for name, node in settings.items()}
        drawing = hash_of(repr(groups["data"]["augment"]))
        plan = Plan(
            Path(cfg.cache_dir).expanduser(), epochs, drawing, parts, **options, before=before.get("engine.cache")
        )
        cache = self.feed.cache = feature_cache(self.feed, model, loss, engine, plan)
        if cache is None or cache.place is None:
            return {}
        return {"engine.cache": cache.place, "features.dtype": plan.dtype}

    def check_data(self) -> TrainedSizes | None:
        """Run the short dataset checks; return the sizes of the training images, if they are files."""
        data, train, cache_dir = self.cfg.data, self.feed.train, self.cfg.cache_dir
        files = train.source if isinstance(train, PairDataset) and self.cfg.loss.weights != "none" else None
        key = files.fingerprint() if files else ""
        options = {"group": data.group, "data_name": self.cfg.choices.data, "workers": data.workers or count_cores()}
        splits = examine(train, self.feed.val, cache_dir=cache_dir, **options)
        records = splits[0].records if splits else ()
        if files and records:
            keep_counts(files, records, key, cache_dir)  # for the loss, which would otherwise read all masks again
        sizes = [
            [size for record in split.records if (size := record.image_size or record.mask_size)] for split in splits
        ]
        longest, enlarged = self.cfg.resolution.longest, data.augment.scale[1]
        return TrainedSizes.of(*sizes, longest=longest, enlarged=enlarged) if any(sizes[:1]) else None

    def started(self, model: Segmenter, engine: Engine, *, new: bool) -> Segmenter:
        """Return the model; in a new training, `head.init` sets the head to the closed-form linear probe."""
        if model.head.init is None or not new:
            return model
        if engine.sharded:
            raise UserError(
                f"head.init={model.head.init} is solved with whole weights on each rank, and engine.sharding shares "
                "them out. Leave one of the two out."
            )
        data, cfg = self.feed.train, self.cfg
        counts = class_counts(data, cfg.cache_dir).tolist()
        places = list(range(model.backbone.num_layers))
        grid = Grid(group=cfg.data.group, seed=self.feed.seed)
        probe = Probe(model, data, counts, engine, {"head": places}, grid)
        probe.fit()
        (found,) = probe.choose()
        found.start(model.head, sharpened=True)
        logger.info(
            "head.init=%s: mIoU %.4f on %d of %d training images, held out (ridge %g, balance %g)",
            model.head.init,
            found.choice.miou,
            len(probe.held_out),
            len(data),
            found.strength,
            found.balance,
        )
        return model

    def evaluate(
        self, cfg: DictConfig, model: Segmenter, engine: Engine, best: Path, *, metrics_only: bool, report: bool
    ) -> dict[str, Any]:
        """Score by one exact count over the split; warn if the model is no better than a constant prediction."""
        data, out_dir = self.feed.val, best.parent.parent / EVALUATION
        collector = Collector(data, engine.rank, engine.world) if report else None
        scores = evaluate_images(
            model,
            data,
            engine,
            out_dir,
            metrics_only=metrics_only,
            policy=self.feed.policy,
            background=self.feed.background,
            collector=collector,
        )
        if collector is not None:
            report_images(cfg, collector, scores, data, engine, out_dir, split="val", best=best)
        if engine.is_main and len(data) < self._val_total:
            few, every = len(data), self._val_total
            print(f"scored on:    {few} of {every} validation images (trainer.val_images); mode=eval scores all")
        commonest, constant = commonest_class(scores["matrix"])
        if engine.is_main and 0 < constant < 1 and scores["miou"] <= constant:
            logger.warning(
                "mIoU %.4f is not better than the %.4f of always predicting %s, the commonest class: nothing was "
                "learnt. Try a higher or lower optim.optimizer.lr, more trainer.steps, loss.weights=median or "
                "loss=ce_dice for rare classes, and mode=doctor on the data.",
                scores["miou"],
                constant,
                data.classes[commonest],
            )
        return scores

    @property
    def skipped(self) -> dict[str, Mapping[str, str]]:
        """Return the files that were left out, with their reasons, by split."""
        return {"train": self.feed.train.skipped, "val": self.feed.val.skipped}


def _validated(data: Any, count: Any) -> Any:
    """Return at most `count` evenly spaced samples of a dataset; None: all."""
    check_given("dinoseg.data.splits.keep_evenly_spaced", {"count": count}, {"count": "trainer.val_images"})
    return keep_evenly_spaced(data, count)


def _uniform(cfg: DictConfig, train: SegmentationData, engine: Engine) -> ClassUniform | None:
    """Return the class-balanced sampling of `data.class_uniform`, which rank 0 prepares; None if it is off."""
    share = cfg.data.class_uniform if "class_uniform" in cfg.data else 0.0
    if share == 0 and not isinstance(share, bool):
        return None
    check_given("dinoseg.data.class_uniform.class_uniform", {"share": share}, {"share": "data.class_uniform"})
    workers = cfg.data.workers or count_cores()
    return engine.decided(lambda: class_uniform(train, share, cache_dir=cfg.cache_dir, workers=workers))
