"""The trained model for inference: images of any kind in, segmentations out, on any runtime."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dinoseg.core.objects import MIN_SCORE, Objects, RunLengths
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.inputs import OnError, Picture, is_many_files, is_one, pictures
from dinoseg.segmenter.runtime import Options, Runtime, list_model_files
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.images import write_png
from dinoseg.utils.mask_files import write_masks
from dinoseg.utils.ranges import Count, check_annotations
from dinoseg.utils.wording import format_text


@dataclass(frozen=True, eq=False)
class SegmentedObject:
    """An object of an image; of a panoptic model also a class of stuff, as a whole.

    Attributes:
        class_name: name of its class.
        class_id: id of its class.
        score: 0..1, higher is more certain.
        box: left, top, width and height in pixels.
        runs: its pixels, see `mask`.
        size: (H, W) of the image.
    """

    class_name: str
    class_id: int
    score: float
    box: tuple[int, int, int, int]
    runs: RunLengths = field(repr=False)
    size: tuple[int, int] = field(repr=False)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.runs.area

    @property
    def mask(self) -> np.ndarray:
        """Its pixels (H, W) bool, decoded with each access."""
        return self.runs.to_mask(self.size)


@dataclass(eq=False, repr=False)
class Segmentation:
    """The segmentation of an image, at the image's own size.

    `probabilities` runs the model once more, so it needs the model unchanged, and is not available after pickling.

    Attributes:
        mask: class ids (H, W) uint8; of a multi-label model (K, H, W) bool, a layer for each class.
        image: the image (H, W, 3) uint8 RGB, or (H, W, C), uint8 or uint16, of a model of other channels.
        facts: of the model.
        source: the image's file, where it came from one.
        found: what `objects` lists.

    Examples:
        >>> import dinoseg, numpy
        >>> model = dinoseg.create_model("rgb", classes=["ground", "leaf"])
        >>> found = model.predict(numpy.zeros((32, 48, 3), numpy.uint8))
        >>> found.mask.shape, found.probabilities.shape, sum(found.areas.values())
        ((32, 48), (2, 32, 48), 1536)
    """

    mask: np.ndarray
    image: np.ndarray
    facts: ModelFacts
    source: Path | None = None
    found: Objects | None = None
    # called only when needed: 4 * K bytes a pixel, and another forward pass
    ask: Callable[[np.ndarray], np.ndarray] = field(kw_only=True)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Class probabilities (K, H, W) float32."""
        return self.ask(self.image)

    @cached_property
    def objects(self) -> list[SegmentedObject] | None:
        """All objects, best first; None if the model predicts classes alone.

        Instances of low scores are mostly wrong, and many objects have several: count `distinct_objects()`.
        """
        return None if self.found is None else self._list(self.found)

    def distinct_objects(self, min_score: float = MIN_SCORE) -> list[SegmentedObject]:
        """Return the objects of at least `min_score` without duplicates, best first: those of `overlay`.

        A duplicate is an object of which more than half lies in others of its class with higher scores; a true object
        inside another one is left out, too.

        Raises:
            UserError: if the model predicts no objects.
        """
        if self.found is None:
            raise UserError("This model predicts classes alone. Objects need a model of task=instance or panoptic.")
        return self._list(self.found.select_distinct(min_score))

    def _list(self, found: Objects) -> list[SegmentedObject]:
        each = zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), found.masks, strict=True)
        return [
            SegmentedObject(self.facts.classes[label], label, score, tuple(box), mask, found.size)
            for label, score, box, mask in each
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ask": _without_model}

    def __repr__(self) -> str:
        """Return the size, the source and the largest classes on one line."""
        found = sorted(self.areas.items(), key=lambda area: -area[1])[:5]
        pixels = math.prod(self.mask.shape[-2:])
        shares = [f"{format_text(name)} {count / pixels:.1%}" for name, count in found if count]
        source = [] if self.source is None else [format_text(str(self.source))]
        height, width = self.mask.shape[-2:]
        return f"dinoseg.Segmentation({', '.join([*source, f'{width} x {height}', *shares])})"

    @property
    def areas(self) -> dict[str, int]:
        """Number of pixels of each class, in the order of the class ids."""
        if self.mask.ndim > 2:
            counts = self.mask.sum(axis=(1, 2))
        else:
            counts = np.bincount(self.mask.ravel(), minlength=len(self.facts.classes))
        return {name: int(count) for name, count in zip(self.facts.classes, counts, strict=False)}

    def overlay(self, opacity: float = 0.5, *, min_score: float = MIN_SCORE) -> np.ndarray:
        """Return the image (H, W, 3) uint8 tinted by class; opacity 0..1, 1 = colours alone.

        Objects of at least `min_score` have colours, outlines and numbers, from 1 in the order of `distinct_objects`.
        """
        from dinoseg.report.object_overlay import draw_prediction
        from dinoseg.utils.levels import to_display

        return draw_prediction(
            to_display(self.image),
            self.mask,
            None if self.found is None else self.found.select_distinct(min_score),
            self.facts.palette,
            ignore_index=self.facts.ignore_index,
            opacity=opacity,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the class ids as a PNG without loss; the file appears whole or not at all.

        Layers become a PNG of 0 and 1 for each class: `masks/x.png` stands for `masks/CLASS/x.png`.

        Raises:
            UserError: if it cannot be written.
        """
        target = Path(path).expanduser()
        with file_errors_as_user_errors(target.parent):
            if self.mask.ndim > 2:
                write_masks(target.parent, target.stem, self.mask, self.facts.classes)
            else:
                write_png(target, self.mask)


def _without_model(image: np.ndarray) -> np.ndarray:
    raise UserError("This segmentation was pickled without its model. Read `probabilities` before you pickle it.")


_NO_FILE = "This model is not stored in a self-contained file. Write one: mode=export export=safetensors resume=RUN."


class Model:
    """A trained model for inference, on any runtime; it needs no torch.

    `dinoseg.load` returns one for an ONNX file, and its subclass `Segmenter` for a file of torch.

    Args:
        runtime: computes the class ids and probabilities.
        facts: its classes, sizes, scores and sources.
        file: the file that it was loaded from, if that is a one-file model.

    Examples:
        >>> import dinoseg
        >>> isinstance(dinoseg.create_model("rgb", num_classes=2), dinoseg.Model)
        True
    """

    facts: ModelFacts
    file: Path | None
    source: Path | None = None  # file or run folder with this model; `dinoseg.load` sets it

    def __init__(self, runtime: Runtime, facts: ModelFacts, file: Path | None = None) -> None:
        self._runtime = runtime
        self.facts = facts
        self.file = None if file is None else file.absolute()

    @property
    def runtime(self) -> Runtime:
        """Name of the backend that computes the class ids and probabilities."""
        return self._runtime

    def __repr__(self) -> str:
        classes = ", ".join(self.facts.classes[:5]) + (", ..." if len(self.facts.classes) > 5 else "")
        backbone = self.facts.backbone.get("name", "unknown")
        text = f"{len(self.facts.classes)} classes: {classes}; backbone {format_text(backbone)}; {self.runtime.name}"
        return f"dinoseg.Model({text})"

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class id."""
        return self.facts.classes

    @property
    def num_classes(self) -> int:
        """The number K of classes."""
        return len(self.facts.classes)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """The colour of each class, (red, green, blue) in 0..255."""
        return self.facts.palette

    @property
    def ignore_index(self) -> int:
        """The mask value of pixels without a label."""
        return self.facts.ignore_index

    @check_annotations
    def predict(self, source: Any, *, batch_size: Count = 4, on_error: OnError = "stop") -> Any:
        """Segment one image or several.

        Args:
            source: a path, an array (H, W, 3) uint8, uint16 or float in 0..1 (RGB), a torch tensor (3, H, W), a Pillow
                image, or, for a model of other channels, C channels instead of 3; a list or a stack of them; a folder,
                a pattern or any iterator. `data.pixels.value_range` maps files and arrays; tensors hold levels.
            batch_size: largest number of consecutive images of one size in a batch.
            on_error: `stop` at an invalid image, or `skip` it with a warning.

        Returns:
            A `Segmentation` for one image, a list for several, and an iterator for a folder, a pattern or an iterator.
            The iterator holds one batch at a time and yields numbered files in natural order.

        Raises:
            UserError: if an image is invalid; the message names it and the accepted kinds.
        """
        results = self._predict_batches(pictures(source, on_error=on_error, pixels=self.facts.format), batch_size)
        if is_one(source):
            found = list(results)
            return found[0] if found else None
        return results if is_many_files(source) or isinstance(source, Iterator) else list(results)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model as one file for `dinoseg.load`, whole or not at all: a copy of the file that it came from.

        Raises:
            UserError: if the model has no file of its own, or the copy cannot be written.
        """
        if self.file is None:
            raise UserError(_NO_FILE)
        target = Path(path).expanduser()
        with file_errors_as_user_errors(target.parent):
            self._copy_file(self.file, target)

    def _copy_file(self, file: Path, target: Path) -> None:
        with atomic_file(target) as part:
            shutil.copyfile(file, part)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model's file and a model card to a folder, for `from_pretrained`; created if missing.

        Raises:
            UserError: as `save`.
        """
        from dinoseg.segmenter.hub import write_card

        target = Path(folder).expanduser()
        self.save(target / list_model_files()[self.runtime.name])
        write_card(self.facts, target.absolute().name, target)

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """Yield a file or run folder with this model, which modes read.

        Raises:
            UserError: if there is none.
        """
        if self.source is None:
            raise UserError(_NO_FILE)
        yield self.source

    @classmethod
    def from_pretrained(
        cls, source: str | PathLike[str], *, revision: str | None = None, token: str | None = None, **options: Any
    ) -> "Model":
        """Return the model in a hub repository, or in a local folder with `model.safetensors` or `model.onnx`.

        Args:
            source: `ORG/NAME`, or a folder.
            revision: branch, tag or commit of the repository.
            token: of the hub, never stored; None: the one that `hf auth login` has stored.
            options: as of `dinoseg.load`.

        Raises:
            UserError: if there is no model, the hub does not answer, or as `dinoseg.load`.
        """
        from dinoseg import load
        from dinoseg.segmenter.hub import fetch_model_file

        file = fetch_model_file(source, revision=revision, token=token, runtime=Options(**options).runtime)
        return load(file, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Upload the model's file and a model card to a hub repository; return the commit's address.

        Args:
            repo_id: `ORG/NAME`, created if missing.
            private: visibility of a new repository; None: the organisation's default.
            revision: the branch to write to; None: main.
            token: of the hub, never stored; None: the one that `hf auth login` has stored.
            gated: upload weights whose licence restricts redistribution; you must follow its terms.

        Raises:
            UserError: if the model has no file, holds such weights, or the hub refuses the upload.
        """
        from dinoseg.segmenter.hub import push

        with TemporaryDirectory() as name:
            folder = Path(name)
            self.save(folder / list_model_files()[self.runtime.name])
            return push(folder, self.facts, repo_id, private=private, revision=revision, token=token, gated=gated)

    def _predict_batches(self, found: Iterator[Picture], batch_size: int) -> Iterator[Segmentation]:
        runtime = self.runtime  # once: that of a model in training takes milliseconds
        for batch in _batches(found, batch_size):
            results = runtime.predict([image for _, image in batch])
            for (path, image), (mask, objects) in zip(batch, results, strict=True):
                stable = image if path is not None else image.copy()  # a caller may reuse the memory of an array
                mask = mask.astype(bool) if mask.ndim > 2 else mask
                yield Segmentation(mask, stable, self.facts, path, objects, ask=self._probabilities)

    def _probabilities(self, image: np.ndarray) -> np.ndarray:
        return self.runtime.probabilities([image])[0]


def _batches(found: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    """Yield batches of consecutive images of one size and type, at most `size` long."""
    batch: list[Picture] = list(islice(found, 1))
    for picture in found:
        first, image = batch[0][1], picture[1]
        if len(batch) == size or (first.shape, first.dtype) != (image.shape, image.dtype):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch
