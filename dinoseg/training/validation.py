"""Scores of a model on a dataset at the masks' own size, with exact counts over all images and ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Loss
from dinoseg.core.geometry import lattice
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import MapKind, get_map_kinds, resize_map, resize_nearest
from dinoseg.core.shapes import Batch, FeatureBatch, Prediction, SegmentationData, tree_map
from dinoseg.core.task import probability_bins
from dinoseg.data.loader import eval_samples, stack_equal
from dinoseg.inference.objects import ObjectCollector
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.strategy import InferenceStrategy, Place
from dinoseg.inference.windows import Whole
from dinoseg.metrics.confusion import make_counts
from dinoseg.metrics.rows import MetricRows
from dinoseg.models.model import SegmentationModel, Size
from dinoseg.training.engine import Engine

OnBatch = Callable[[Batch, Tensor, Tensor], None]


@torch.no_grad()
def evaluate(
    model: SegmentationModel,
    data: SegmentationData,
    engine: Engine,
    *,
    strategy: InferenceStrategy | None = None,
    background: int | None = None,
    loss: Loss | None = None,
    on_batch: OnBatch | None = None,
    rows: MetricRows | None = None,
    batches: Iterable[Any] | None = None,
) -> dict[str, Any]:
    """Return the scores of `ConfusionMatrix.compute`, those of further metrics and, given a loss, `loss`.

    Every rank processes its own images once. Counts are summed as integers, so scores do not depend on the number of
    ranks.

    Args:
        model: a segmenter, unwrapped; its train or eval mode is restored at the end.
        data: dataset, scored at each mask's own size.
        engine: device, precision and ranks.
        strategy: inference strategy; None: whole images.
        background: ID of the background class; None: there is none.
        loss: averaged over images, or over the windows in which they are predicted.
        on_batch: called with each batch on the device, its class IDs (B, H, W) uint8, and its logits. These are
            (B, K, h, w) float32 at the pixels of `geometry.lattice`.
        rows: further metrics, whose counts it receives.
        batches: this rank's images once and in order, if they are not to be read here; cached features are predicted
            without the strategy.
    """
    if batches is None:
        batches = eval_batches(
            data,
            batch_size=engine.images_at_once,
            workers=engine.workers,
            rank=engine.rank,
            world_size=engine.world_size,
        )
    maps = get_map_kinds(data)
    counts = make_counts(model.task, len(data.classes), data.ignore_index, background)
    predictor = Predictor(model, engine.device, engine.autocast, strategy or Whole())
    # tensors until the end: reading each batch's loss would wait for the device
    losses: list[Tensor] = []
    training = model.training
    model.eval()
    for drawn in batches:
        batch = drawn.to(engine.device)
        size = (batch.mask.shape[-2], batch.mask.shape[-1])
        ids, logits, bins, objects, added = _predict_batch(predictor, batch, loss, maps, size, rows)
        losses += added
        counts.update(ids, batch.mask)
        if rows is not None:
            rows.add(batch, ids, logits, bins, objects)
        if on_batch is not None:
            on_batch(batch, ids, logits)
    model.train(training)
    # integers, so that the sum over ranks is exact in any order
    counts.counts = engine.sum(counts.counts.to(engine.device))
    result = counts.compute()
    if rows is not None:
        rows.add_scores(result, engine.gather)
    if loss is not None:
        values = torch.stack(losses).tolist() if losses else []
        total, images = engine.total(sum(values), len(values)).tolist()
        result["loss"] = total / max(1.0, images)
    return result


def _predict_batch(
    predictor: Predictor,
    batch: Batch,
    loss: Loss | None,
    kinds: Mapping[str, MapKind],
    size: Size,
    rows: MetricRows | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Objects] | None, list[Tensor]]:
    """Return what `MetricRows.add` takes of a batch that is predicted at `size` (H, W), and the losses."""
    losses: list[Tensor] = []
    needs_bins, needs_objects = (False, False) if rows is None else (rows.needs_bins, rows.needs_objects)
    # cached features are of whole images, so there are no windows
    if isinstance(batch, FeatureBatch):
        with predictor.autocast():
            prediction = predictor.model(batch.image)
        if loss is not None:
            losses += _losses_of_images(loss, prediction, batch)
        read = _read([prediction], size, needs_bins=needs_bins)
        return *read, prediction.objects(size) if needs_objects else None, losses
    found = ObjectCollector(predictor.model.task, batch.count, size)

    def on_pass(prediction: Prediction, parts: Tensor, places: Sequence[Place], whole: Size) -> None:
        if loss is not None:
            losses.extend(_losses_of_images(loss, prediction, _cut_parts(batch, kinds, parts, places, whole)))
        if needs_objects:
            found(prediction, parts, places, whole)

    def take(bands: Iterable[Prediction]) -> tuple[Tensor, Tensor, Tensor | None]:
        # of an attempt that ran out of memory
        losses.clear()
        found.clear()
        return _read(bands, size, needs_bins=needs_bins)

    needs_passes = loss is not None or needs_objects
    read = predictor.run_bands(batch.image, take, size=size, on_pass=on_pass if needs_passes else None)
    return *read, found.objects() if needs_objects else None, losses


def _read(bands: Iterable[Prediction], size: Size, *, needs_bins: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return class IDs (B, H, W), or layers (B, K, H, W), and logits (B, K, h, w) float32 at the lattice's pixels.

    The third is the bin of each probability (B, K, H, W), or None unless `needs_bins`.
    """
    ids, logits, bins = [], [], []
    rows, columns = lattice(size)
    due, top = rows.start, 0  # next row of the lattice; first row of the band
    for band in bands:
        some, chosen = band.class_ids_and_logits((slice(due - top, None, rows.step), columns))
        ids.append(some)
        logits.append(chosen)
        if needs_bins:
            bins.append(probability_bins(band.probabilities()))
        # the lattice continues over the borders of bands, so that scores do not depend on them
        due, top = due + rows.step * chosen.shape[2], top + some.shape[-2]
    return torch.cat(ids, dim=-2), torch.cat(logits, dim=2), torch.cat(bins, dim=2) if needs_bins else None


def _losses_of_images(loss: Loss, prediction: Prediction, batch: Batch) -> list[Tensor]:
    """Return the loss of each image by itself, so that it does not depend on the batch size."""
    if batch.count == 1:
        return [loss(prediction, batch)[0]]
    return [loss(prediction.of_images(slice(row, row + 1)), one)[0] for row, one in enumerate(batch.split(batch.count))]


def _cut_parts(batch: Batch, kinds: Mapping[str, MapKind], parts: Tensor, places: Sequence[Place], size: Size) -> Batch:
    """Return parts (n, 3, h, w), cut from a batch's images after resizing to `size`, with the labels there."""
    height, width = part = (parts.shape[-2], parts.shape[-1])
    mask, maps = batch.mask, batch.maps
    if part != size:
        # windows are cut from the resized images, so the labels need their size
        mask = resize_nearest(mask, size)
        maps = {name: resize_map(values, kinds[name], size) for name, values in maps.items()}

    def cut(labels: Tensor) -> Tensor:
        if part == size:
            return torch.stack([labels[position.image] for position in places])
        return torch.stack([labels[image, ..., top : top + height, left : left + width] for image, top, left in places])

    names = [batch.names[position.image] for position in places]
    return replace(batch, image=parts, names=names, **tree_map({"mask": mask, "maps": maps}, cut))


def eval_batches(
    data: SegmentationData, *, batch_size: Callable[[Size], int], workers: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Yield a rank's share of a dataset once and in order, in batches of one image size (H, W).

    `batch_size` returns the number of images in a batch of that size.
    """
    return stack_equal(eval_samples(data, workers=workers, rank=rank, world_size=world_size), batch_size)
