"""Initial weights of a linear head from the closed-form linear probe, for `head.init=probe`."""

import logging

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.scan.scan import class_counts
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.probe.probe import Grid, Probe
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)


def init_head(builder: Builder, model: SegmentationModel, data: SegmentationData, engine: Engine) -> None:
    """Set a linear head to the closed-form linear probe of the training images.

    Args:
        builder: builds the parts of the experiment.
        model: on the device.
        data: training images and their masks.
        engine: device, precision and ranks.

    Raises:
        UserError: the weights are sharded over the ranks, or no pixel is labelled.
    """
    if engine.sharded:
        raise UserError(
            f"head.init={model.head.init} needs the full weights on each rank, but engine.sharding shards them. "
            "Leave one of the two out."
        )
    counts = class_counts(data, builder.cache_dir).tolist()
    places = list(range(model.backbone.num_layers))
    grid = Grid(group=builder.value("data.group"), seed=builder.seed)
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
