"""Score a model on a data set at the masks' own size: one exact count over all images and ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.contracts import Loss
from dinoseg.data.loader import eval_samples, stack_equal
from dinoseg.geometry import lattice
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.shapes import Batch, SegmentationData
from dinoseg.training.engine import Engine


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: SegmentationData,
    engine: Engine,
    *,
    background: int | None = None,
    loss: Loss | None = None,
    on_batch: Callable[[Batch, Tensor, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Return the scores of `ConfusionMatrix.compute` and, given a loss, `loss`.

    Every rank sees its own images once; counts are summed as integers, so the number of ranks changes nothing.

    Args:
        model: a segmenter, unwrapped; put in eval mode, and back as it was.
        data: images are predicted whole, scores counted at each mask's own size.
        engine: device, precision and ranks.
        background: id of the class that is no object; None: there is none.
        loss: averaged over images.
        on_batch: called with each batch (on the device), its class ids (B, H, W) uint8, and its logits (B, K, h, w)
            float32 at the pixels that `geometry.lattice` names.
    """
    counts = ConfusionMatrix(len(data.classes), data.ignore_index, background)
    losses = torch.zeros(2, dtype=torch.float64)  # sum, images
    training = model.training
    model.eval()
    batches = eval_batches(
        data, batch_size=engine.eval_batch_size, workers=engine.workers, rank=engine.rank, world=engine.world
    )
    for batch in batches:
        batch = batch.to(engine.device)
        with engine.autocast():
            prediction = model(batch.image)
        height, width = batch.mask.shape[-2:]
        scores = prediction.scores((height, width))
        ids = scores.max(dim=1).indices.to(torch.uint8)  # (B, H, W); argmax is 5 x slower on CPU
        counts.update(ids, batch.mask)
        if loss is not None:
            losses += torch.tensor([loss(prediction, batch)[0].item() * len(ids), len(ids)], dtype=torch.float64)
        if on_batch is not None:
            on_batch(batch, ids, prediction.as_logits(scores[..., *lattice((height, width))]).float())
    model.train(training)
    # integers, so that the sum over ranks is exact in any order
    counts.counts = engine.sum(counts.counts.to(engine.device))
    result = counts.compute()
    if loss is not None:
        total, images = engine.sum(losses.float().to(engine.device)).tolist()
        result["loss"] = total / max(1.0, images)
    return result


def eval_batches(data: SegmentationData, *, batch_size: int, workers: int, rank: int, world: int) -> Iterator[Batch]:
    """Yield a rank's share of a data set once, in order, in batches of one size."""
    return stack_equal(eval_samples(data, workers=workers, rank=rank, world=world), batch_size)
