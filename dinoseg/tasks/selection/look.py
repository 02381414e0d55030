"""Features and uncertainty of each image of a pool: computed once, cached, and reused when a run resumes."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.core.contracts import Head
from dinoseg.core.geometry import widths
from dinoseg.core.shapes import Prediction
from dinoseg.data.loader import load_in_order
from dinoseg.data.pairs.pair import image_hash
from dinoseg.data.video.access import read_source
from dinoseg.experiment import build
from dinoseg.experiment.trained import is_trained, load_trained
from dinoseg.inference.predictor import Predictor
from dinoseg.models.model import Segmenter
from dinoseg.report.progress import Bar
from dinoseg.tasks.selection.pool import Candidate
from dinoseg.training.engine import Engine
from dinoseg.training.feature_cache.key import code_hash, hash_of, origin, weights_hash
from dinoseg.training.feature_cache.store import DiskStore
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_FOLDER = "looks"  # folder below cache_dir
_DOUBTS = 2  # entropy, margin
_COARSER = 4  # output stride of the scores from which uncertainty is computed


class Looker:
    """Feature and uncertainty extractor for single images: results depend on no neighbour, batch or process.

    Args:
        cfg: the whole config; with `resume` its model is used, else the backbone alone.
        doubts: also compute how uncertain the model is of its classes.

    Raises:
        UserError: uncertainty needs a trained model, and there is none, or it has no classes.
    """

    def __init__(self, cfg: DictConfig, *, doubts: bool) -> None:
        trained = load_trained(cfg) if is_trained(cfg) else None
        if doubts and (trained is None or trained.model.head.slots is not None):
            raise UserError(
                "selection=uncertainty asks a trained segmenter what it doubts. Give resume=RUN_FOLDER, or "
                "selection=k_centre or typical, which need none."
            )
        self._predictor: Predictor | None = trained.predictor if trained and doubts else None
        self.engine: Engine = trained.engine if trained else instantiate(cfg.engine)
        if trained:
            self.model = trained.model
        else:
            sizes = {"scale": cfg.resolution.scale, "longest": cfg.resolution.longest}
            self.model = self.engine.place(Segmenter(build.backbone(cfg), Head(), **sizes)).eval()
        self._width = widths(self.model.backbone.dim, self.model.backbone.num_layers)[-1]
        self._store = self._opened(cfg)

    def look(self, pool: Sequence[Candidate], *, skip: bool) -> tuple[np.ndarray, np.ndarray | None, dict[int, str]]:
        """Return features and doubts of a pool, see `Known`, and the errors of unreadable images by index.

        Args:
            pool: the images.
            skip: leave out unreadable images, whose rows are 0; else the first of them is an error.

        Raises:
            UserError: an image cannot be read, or no image can.
        """
        said: dict[int, list[Tensor]] = {}
        bad: dict[int, str] = {}
        keys = [_key(candidate) for candidate in pool]
        for place, key in enumerate(keys):
            kept = None if isinstance(key, UserError) else self._store.get(key)
            if kept is not None and [part.shape for part in kept] == [(self._width,), (_DOUBTS,)]:
                said[place] = kept
        rest = [place for place in range(len(pool)) if place not in said]
        if said:
            logger.info("%d of %d images were looked at before: taken over from the cache.", len(said), len(pool))
        with Bar(total=len(rest), desc="looking", unit="image", delay=2) as bar:
            for place, pixels in zip(rest, self._read(pool, rest), strict=True):
                if isinstance(pixels, UserError):
                    if not skip:
                        raise UserError(f"{pixels} Mend it, or leave such files out with data.on_error=skip.")
                    bad[place] = str(pixels)
                else:
                    said[place] = self._store.put(str(keys[place]), self._look_at(pixels))
                bar.update()
        if not said:
            raise UserError(f"None of the {len(pool)} images can be read: {next(iter(bad.values()), 'there is none')}")
        least = 1e-12
        features, doubts = np.zeros((len(pool), self._width)), np.zeros((len(pool), _DOUBTS))
        for place, (feature, doubt) in said.items():
            mean = feature.double().numpy()
            features[place], doubts[place] = mean / max(least, np.linalg.norm(mean)), doubt.double().numpy()
        return features, doubts if self._predictor is not None else None, bad

    def _read(self, pool: Sequence[Candidate], places: Sequence[int]) -> Iterator[np.ndarray | UserError]:
        return load_in_order(_Pixels(pool), places, self.engine.workers)

    @torch.inference_mode()
    def _look_at(self, pixels: np.ndarray) -> list[Tensor]:
        """Return the mean (C,) of the last map of an image (H, W, 3), and its uncertainty (2,)."""
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.engine.device)
        with self.engine.autocast():
            mean = self.model.backbone.maps(self.model.pixels(images))[-1][0].float().mean(dim=(1, 2))
        if self._predictor is None:
            return [mean, torch.zeros(_DOUBTS)]
        height, width = (-(-side // _COARSER) for side in pixels.shape[:2])
        bands = self._predictor.asked(images, lambda bands: list(map(_doubts, bands)), size=(height, width))
        return [mean, torch.cat(bands, dim=1).mean(dim=1)]

    def _opened(self, cfg: DictConfig) -> DiskStore:
        model, root = self.model, Path(cfg.cache_dir).expanduser() / _FOLDER
        whole = self._predictor is not None
        parts = {
            "weights": weights_hash((model if whole else model.backbone).state_dict().items()),
            "code": code_hash([model]),
            "resolution": hash_of(repr((model.scale, model.longest))),
            "precision": self.engine.precision,
            "inference": hash_of(repr(plain(cfg.inference, resolve=True))) if whole else "none",
        }
        return DiskStore(root, origin(root, parts), "float32")


class _Pixels:
    """Reader of a pool's images, also in worker processes; an unreadable image is returned as its error."""

    def __init__(self, pool: Sequence[Candidate]) -> None:
        self._pool = pool

    def __call__(self, place: int) -> np.ndarray | UserError:
        try:
            return np.array(read_source(self._pool[place].source))
        except UserError as error:
            return error


def _key(candidate: Candidate) -> str | UserError:
    try:
        return hash_of(image_hash(candidate.source))
    except UserError as error:
        return error


def _doubts(band: Prediction) -> Tensor:
    """Return normalised entropy and 1 - margin (2, r * W) of each pixel of a band, on the CPU."""
    shares = band.logits().float().softmax(dim=1)[0].flatten(1).double().cpu()  # (K, r * W)
    classes = len(shares)
    entropy = torch.special.entr(shares).sum(dim=0) / np.log(max(2, classes))
    best = shares.topk(min(2, classes), dim=0).values
    return torch.stack([entropy, 1 - (best[0] - best[1:].sum(dim=0))])
