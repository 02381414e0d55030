"""Features and uncertainty of each image of a pool: computed once, cached, and reused when a run resumes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import widths
from dinoseg.core.shapes import Prediction
from dinoseg.data.loader import load_in_order
from dinoseg.data.pairs.pair import image_hash
from dinoseg.data.video.access import read_source
from dinoseg.inference.predictor import Predictor
from dinoseg.models.model import SegmentationModel
from dinoseg.report.progress import Bar
from dinoseg.tasks.selection.pool import PoolImage
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.key import code_hash, hash_of, origin, weights_hash
from dinoseg.training.feature_cache.store import DiskStore
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_FOLDER = "looks"  # folder below cache_dir
_MEASURES = 2  # entropy, margin
_COARSER = 4  # output stride of the scores from which uncertainty is computed


class FeatureExtractor:
    """Feature and uncertainty extractor for single images: results depend on no neighbour, batch or process.

    Args:
        model: segmenter in eval mode; its backbone computes the features.
        engine: device, precision and workers.
        cache_dir: root of the caches.
        predictor: computes the class scores from which uncertainty is derived; None: no uncertainty.
        inference: settings of the predictor's inference strategy, on which cached uncertainty depends.
    """

    def __init__(
        self,
        model: SegmentationModel,
        engine: Engine,
        cache_dir: Path,
        *,
        predictor: Predictor | None = None,
        inference: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.engine = engine
        self._predictor = predictor
        self._width = widths(model.backbone.dim, model.backbone.num_layers)[-1]
        root, whole = cache_dir / _FOLDER, predictor is not None
        parts = {
            "weights": weights_hash((model if whole else model.backbone).state_dict().items()),
            "code": code_hash([model]),
            "resolution": hash_of(repr((model.scale, model.longest))),
            "precision": engine.precision,
            "inference": hash_of(repr(inference)) if whole else "none",
        }
        self._store = DiskStore(root, origin(root, parts), "float32")

    def extract(self, pool: Sequence[PoolImage], *, skip: bool) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
        """Return features and uncertainty of a pool, see `Known`, and the errors of unreadable images by index.

        Args:
            pool: the images.
            skip: leave out unreadable images, whose rows are 0; else the first of them is an error.

        Raises:
            UserError: an image cannot be read, or no image can.
        """
        results: dict[int, list[Tensor]] = {}
        bad: dict[int, str] = {}
        keys = [_key(image) for image in pool]
        for index, key in enumerate(keys):
            cached = None if isinstance(key, UserError) else self._store.get(key)
            if cached is not None and [part.shape for part in cached] == [(self._width,), (_MEASURES,)]:
                results[index] = cached
        rest = [index for index in range(len(pool)) if index not in results]
        if results:
            logger.info("%d of %d images reused from the cache.", len(results), len(pool))
        with Bar(total=len(rest), desc="looking", unit="image", delay=2) as bar:
            for index, pixels in zip(rest, self._read(pool, rest), strict=True):
                if isinstance(pixels, UserError):
                    if not skip:
                        raise UserError(f"{pixels} Fix it, or leave such files out with data.on_error=skip.")
                    bad[index] = str(pixels)
                else:
                    results[index] = self._store.put(str(keys[index]), self._compute(pixels))
                bar.update()
        if not results:
            raise UserError(f"No image of {len(pool)} can be read: {next(iter(bad.values()), 'none found')}")
        least = 1e-12
        features, uncertainty = np.zeros((len(pool), self._width)), np.zeros((len(pool), _MEASURES))
        for index, (feature, measures) in results.items():
            mean = feature.double().numpy()
            features[index] = mean / max(least, np.linalg.norm(mean))
            uncertainty[index] = measures.double().numpy()
        return features, uncertainty if self._predictor is not None else None, bad

    def _read(self, pool: Sequence[PoolImage], places: Sequence[int]) -> Iterator[np.ndarray | UserError]:
        return load_in_order(_Pixels(pool), places, self.engine.workers)

    @torch.inference_mode()
    def _compute(self, pixels: np.ndarray) -> list[Tensor]:
        """Return the mean (C,) of the last map of an image (H, W, 3), and its uncertainty (2,)."""
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.engine.device)
        with self.engine.autocast():
            mean = self.model.backbone.maps(self.model.pixels(images))[-1][0].float().mean(dim=(1, 2))
        if self._predictor is None:
            return [mean, torch.zeros(_MEASURES)]
        height, width = (-(-side // _COARSER) for side in pixels.shape[:2])
        bands = self._predictor.run_bands(images, lambda bands: list(map(_uncertainty, bands)), size=(height, width))
        return [mean, torch.cat(bands, dim=1).mean(dim=1)]


class _Pixels:
    """Reader of a pool's images, also in worker processes; an unreadable image is returned as its error."""

    def __init__(self, pool: Sequence[PoolImage]) -> None:
        self._pool = pool

    def __call__(self, index: int) -> np.ndarray | UserError:
        try:
            return np.array(read_source(self._pool[index].source))
        except UserError as error:
            return error


def _key(image: PoolImage) -> str | UserError:
    try:
        return hash_of(image_hash(image.source))
    except UserError as error:
        return error


def _uncertainty(band: Prediction) -> Tensor:
    """Return normalised entropy and 1 - margin (2, r * W) of each pixel of a band, on the CPU."""
    shares = band.logits().float().softmax(dim=1)[0].flatten(1).double().cpu()  # (K, r * W)
    classes = len(shares)
    entropy = torch.special.entr(shares).sum(dim=0) / np.log(max(2, classes))
    best = shares.topk(min(2, classes), dim=0).values
    return torch.stack([entropy, 1 - (best[0] - best[1:].sum(dim=0))])
