"""mode=features: the features of a backbone as colours, arrays and numbers, in one basis for all inputs."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from omegaconf import DictConfig

from dinoseg.checkpoints.trained import TrainedModel, is_trained, load_trained
from dinoseg.core.channels import PixelFormat
from dinoseg.core.contracts import require_classes
from dinoseg.core.sizes import Size
from dinoseg.core.task import refuse_layers
from dinoseg.experiment.bare import build_bare_model
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.feature_views.basis import HIGHEST, LOWEST, Basis, Moments, Projections, check_components
from dinoseg.extensions.feature_views.drawing import Upsample, enlarge, to_bytes
from dinoseg.extensions.feature_views.patches import Patches, PatchFeatures
from dinoseg.extensions.feature_views.sweep_picture import SUMMARY
from dinoseg.extensions.feature_views.view import describe, removes_position
from dinoseg.extensions.video.length import VIDEO_SUFFIXES, is_video, promised_frames
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.inputs import find_inputs
from dinoseg.inference.results import check_failures
from dinoseg.models.model import SegmentationModel
from dinoseg.report.progress import Bar
from dinoseg.runs.log_file import announce
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import atomic_file, write_json
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.images import write_png
from dinoseg.utils.levels import to_display
from dinoseg.utils.ranges import INTEGERS, Count
from dinoseg.utils.wording import count_of

BASIS = "basis.safetensors"
MAX_SAVED = 2**30  # bytes of an array that `save` writes
Foreground = Literal["none", "component", "classes"]
Frame = tuple[np.ndarray, Fraction | None]  # pixels (H, W, C), and the time in a video


def show_features(
    cfg: DictConfig,
    *,
    out_dir: Path,
    input: str | None,
    layer: Annotated[int, INTEGERS],
    normalise: bool,
    position: str,
    rank: Count | None,
    components: Sequence[int],
    basis: str | None,
    every: Count,
    foreground: Foreground,
    upsample: Upsample,
    save: bool,
    before: bool,
) -> dict[str, Any]:
    """Draw the features of all images and videos in one basis; return the share of variance of its components.

    The features are those of a backbone without adapter or, with `resume`, of a trained model's backbone after it.
    The keys are explained in cfg/mode/features.yaml. Writes NAME_features.png (the image beside its colours), or .mp4
    for a video, basis.safetensors, summary.json and, with `save`, NAME_features.npy and .json. With `before`, the basis
    is fitted to the backbone before and after its training, and a picture shows the colours of both and their cosine
    similarity.

    Each image is one forward pass, and sums are in the order of names, so that colours depend on neither the order of
    the inputs nor what they are batched with. Memory holds one image, its features, and C x C numbers.

    Raises:
        UserError: an option does not fit the model, or nothing can be read; or some inputs failed.
    """
    if not input:
        raise UserError("mode=features needs images: give input=<image, folder, glob or video>.")
    builder = Builder(cfg)
    with name_parameters({name: f"mode.{name}" for name in ("layer", "position", "rank", "components", "basis")}):
        chosen, removes = check_components(components), removes_position(position)
        named = itertools.chain(*find_inputs(input, builder.pixels, VIDEO_SUFFIXES))
        sources = [_Source(name, path, builder.pixels) for path, name in sorted(named, key=lambda each: each[1])]
        if save and all(source.is_video for source in sources):
            raise UserError(
                f"mode.save=true writes the features of images, and input={input} is a video. Leave it out."
            )
        trained, model, engine = _open_model(builder, layer, foreground)
        if before and trained is None:
            raise UserError("mode.before=true compares a trained model with its start. Give resume=RUN.")
        models = [open_bare_model(builder, layer, engine), model] if before else [model]
        views = [
            PatchFeatures(
                each,
                engine.device,
                engine.autocast,
                layer=layer,
                normalise=normalise,
                removes_position=removes,
                rank=rank,
            )
            for each in models
        ]
        info = describe(views[-1], builder.options["backbone"])
        given = None if basis is None else Basis.load(Path(basis).expanduser(), info)
        run = _Run(out_dir, sources, views)
        found = given or Basis.fit(run.sum_moments(every), chosen, info)
        masks = _mask_classes(trained, builder.background) if foreground == "classes" and trained is not None else None
        with Projections(out_dir, len(found.directions)) as projections, Projections(out_dir, 1) as cosines:
            run.project(found, projections, cosines, save=save)
            if given is None:
                found.low, found.high = projections.quantiles(LOWEST, HIGHEST)
            found.save(out_dir / BASIS)
            run.draw(found, projections, cosines, upsample, by_component=foreground == "component", masks=masks)
    return _finish(run, found, save=save)


def _open_model(
    builder: Builder, layer: int, foreground: Foreground
) -> tuple[TrainedModel | None, SegmentationModel, Engine]:
    """Return the trained model that the config names, if any, the model whose features are shown, and its engine."""
    if is_trained(builder):
        trained = load_trained(builder)
        if foreground == "classes":
            require_classes(trained.model.head, f"resume={builder.resume}")
            refuse_layers(trained.model.task, "mode.foreground=classes", "Choose component.")
        return trained, trained.model, trained.engine
    if foreground == "classes":
        raise UserError("mode.foreground=classes needs a trained model. Give resume=RUN, or choose component.")
    engine = builder.engine()
    return None, open_bare_model(builder, layer, engine), engine


def open_bare_model(builder: Builder, layer: int, engine: Engine) -> SegmentationModel:
    """Return a model with the backbone of the config, without adapter and checkpoint."""
    announce(f"Building the backbone, with backbone.weights={builder.value('backbone').get('weights')}")
    return engine.place(build_bare_model(builder, [layer])).eval()


def _mask_classes(trained: TrainedModel, background: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that returns where an image (H, W, C) shows no background, (H, W) bool."""
    if background is None:
        raise UserError(
            "mode.foreground=classes shows all classes but the background, and this model has none. Name one by "
            "data.background=CLASS, or choose component."
        )
    return lambda image: trained.predictor.predict([image])[0].ids != background


class _UnreadableError(UserError):
    """Error of an input; the others go on."""


@dataclass(eq=False)
class _Source:
    """Image or video, and what is known of its features."""

    name: str
    path: Path
    pixels: PixelFormat
    shapes: list[tuple[Size, Size]] = field(default_factory=list)  # of each frame: (h, w); (H, W) that was seen
    patches: int = 0
    outliers: int = 0
    position_energy: float = 0.0
    cosine: float = 0.0  # between both views of a patch, summed
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of the features, minus the mean of the basis
    squares: float = 0.0
    projected: Moments = field(default_factory=Moments)

    @property
    def is_video(self) -> bool:
        """Return whether the source is a video."""
        return is_video(self.path)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames; an image is one.

        Raises:
            _UnreadableError: the file cannot be read to its end.
        """
        try:
            if self.is_video:
                with VideoReader(self.path) as reader:
                    yield from reader.timed_frames()
            else:
                yield self.pixels.read(self.path), None
        except UserError as error:  # those of the caller do not arrive here
            raise _UnreadableError(str(error)) from error

    def count(self, patches: Patches, projected: np.ndarray, mean: np.ndarray) -> None:
        """Add the features of a frame to the sums."""
        height, width, channels = patches.values.shape
        centred = patches.values.reshape(-1, channels) - mean
        self.shapes.append(((height, width), patches.size))
        self.patches += height * width
        self.outliers += patches.outliers
        self.position_energy += patches.position_energy
        self.sums = centred.sum(0) if not self.sums.size else self.sums + centred.sum(0)
        self.squares += float((centred**2).sum())
        self.projected += Moments.of(projected)

    def summary(self, *, compares: bool) -> dict[str, Any]:
        """Return the figures of the source; `compares`: whether there are two views."""
        total = self.squares - float((self.sums**2).sum()) / self.patches
        within = self.projected.scatter.diagonal()[1:]
        return {
            "frames": len(self.shapes),
            "patches": self.patches,
            "variance_shares": (within / total if total > 0 else 0 * within).tolist(),
            "outlier_share": self.outliers / self.patches,
            "position_energy_share": self.position_energy / self.patches,
            **({"cosine": self.cosine / self.patches} if compares else {}),
        }


class _Run:
    """Passes over all inputs; one that cannot be read is left out of the following ones.

    Args:
        folder: the run folder.
        sources: the inputs, in the order of their names.
        views: the features that are shown; of two, the last are those after training.
    """

    def __init__(self, folder: Path, sources: Sequence[_Source], views: Sequence[PatchFeatures]) -> None:
        self.folder, self.views = folder, views
        self.sources = list(sources)
        self.failures: list[str] = []

    def sum_moments(self, every: int) -> Moments:
        """Return the moments of the features of all images, and of every n-th frame of videos."""
        moments = Moments()
        for source in self._each("basis"):
            with self._leaving_out(source):
                own = Moments()
                for number, (image, _) in enumerate(self._frames(source)):
                    if number % every == 0:
                        for view in self.views:
                            own += Moments.of(view(image).values)
                moments += own
        return moments

    def project(self, basis: Basis, projections: Projections, cosines: Projections, *, save: bool) -> None:
        """Write the projections of all frames to one file, cosines of two views to another, and arrays of images."""
        for source in self._each("projections"):
            before, compared = projections.count, cosines.count
            with self._leaving_out(source):
                for image, _ in self._frames(source):
                    found = [view(image, with_energy=True) for view in self.views]
                    for patches in found:
                        basis.check(patches.values)
                        projected = basis.project(patches.values)
                        projections.add(projected)
                    source.count(patches, projected, basis.mean)
                    if len(found) == 2:
                        cosine = _cosine(found[0].values, found[1].values)
                        cosines.add(cosine)
                        source.cosine += float(cosine.sum())
                    if save and not source.is_video:
                        self._save(source, patches)
            if source not in self.sources:
                projections.cut(before)
                cosines.cut(compared)

    def draw(
        self,
        basis: Basis,
        projections: Projections,
        cosines: Projections,
        upsample: Upsample,
        *,
        by_component: bool,
        masks: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        """Write the pictures of all inputs from the projections in the file, and the cosines of two views in grey."""
        patch_size = self.views[-1].backbone.patch_size
        projections.rewind()
        cosines.rewind()
        for source in self._each("pictures"):
            with self._writer(source) as write:
                for (image, time), ((height, width), seen) in zip(self._frames(source), source.shapes, strict=True):
                    size = (image.shape[0], image.shape[1])
                    shown = []
                    for _ in self.views:
                        projected = projections.read(height * width).reshape(height, width, -1)
                        colours = basis.colours(projected)
                        if by_component:
                            colours *= projected[..., :1] > 0
                        shown.append(to_bytes(enlarge(colours, size, seen, patch_size, upsample)))
                    if masks is not None:
                        mask = masks(image)[..., None]
                        shown = [picture * mask for picture in shown]
                    if len(shown) == 2:
                        cosine = cosines.read(height * width).reshape(height, width, 1).clip(0, 1)
                        shown.append(to_bytes(enlarge(cosine, size, seen, patch_size, upsample)))
                    write(np.concatenate([to_display(image), *shown], axis=1), time)

    @contextmanager
    def _writer(self, source: _Source) -> Iterator[Callable[[np.ndarray, Fraction | None], None]]:
        """Yield what writes the picture of an image, or a frame of a video."""
        if not source.is_video:
            yield lambda picture, _: write_png(self.folder / f"{source.name}_features.png", picture)
            return
        with VideoReader(source.path) as reader:
            panels = 2 if len(self.views) == 1 else 4
            rate, size, traits = reader.rate, (reader.size[0], panels * reader.size[1]), reader.traits
        with VideoWriter(self.folder / f"{source.name}_features.mp4", rate, size, like=traits) as writer:
            yield writer.write

    def _each(self, what: str) -> Iterator[_Source]:
        """Yield each source, with a progress bar.

        Raises:
            UserError: none is left.
        """
        frames = sum(promised_frames(source.path) if source.is_video else 1 for source in self.sources)
        with Bar(total=frames, desc=what, unit="frame") as self._bar:
            yield from [*self.sources]
        if not self.sources:
            raise UserError("\n  ".join(["No input can be read:", *self.failures]))

    def _frames(self, source: _Source) -> Iterator[Frame]:
        """Yield the frames of a source, and advance the progress bar."""
        for frame in source.frames():
            yield frame
            self._bar.update()

    @contextmanager
    def _leaving_out(self, source: _Source) -> Iterator[None]:
        """Leave a source that cannot be read out of the following passes."""
        try:
            yield
        except _UnreadableError as error:
            self.sources.remove(source)
            self.failures.append(str(error))

    def _save(self, source: _Source, patches: Patches) -> None:
        values = patches.values.astype(np.float16)
        if values.nbytes > MAX_SAVED:
            raise UserError(
                f"mode.save=true: the features of {source.path} take {values.nbytes / 2**30:.1f} GB, more than "
                f"{MAX_SAVED // 2**30}. Set resolution.longest, or leave mode.save out."
            )
        with atomic_file(self.folder / f"{source.name}_features.npy") as part, part.open("wb") as file:
            np.save(file, values)
        facts = {
            "grid": values.shape[:2],
            "patch_size": self.views[-1].backbone.patch_size,
            "resized": patches.size,
            "layer": self.views[-1].layer,
        }
        write_json(self.folder / f"{source.name}_features.json", facts)


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine similarity (h, w, 1) of features (h, w, C); 0 where one of them is 0."""
    lengths = np.linalg.norm(first, axis=2) * np.linalg.norm(second, axis=2)
    return ((first * second).sum(2) / np.where(lengths > 0, lengths, 1))[..., None]


def _finish(run: _Run, basis: Basis, *, save: bool) -> dict[str, Any]:
    """Write the summary and print where results are; return the share of variance of each component."""
    numbers = basis.info["components"]
    shares = {f"component_{number}": float(basis.shares[number - 1]) for number in numbers}
    summary = {
        **basis.info,
        "variance_shares": list(shares.values()),
        "effective_rank": basis.effective_rank,
        "inputs": {source.name: source.summary(compares=len(run.views) == 2) for source in run.sources},
    }
    write_json(run.folder / SUMMARY, summary)
    images = sum(not source.is_video for source in run.sources)
    if images:
        arrays = ", and arrays in *_features.npy" if save else ""
        print(f"pictures:     {run.folder}/*_features.png, of {count_of(images, 'image')}{arrays}")
    if images < len(run.sources):
        print(f"videos:       {run.folder}/*_features.mp4, of {count_of(len(run.sources) - images, 'video')}")
    told = ", ".join(f"{number}: {share:.1%}" for number, share in zip(numbers, shares.values(), strict=True))
    print(f"variance:     components {told}; effective rank {basis.effective_rank:.1f} of {len(basis.mean)}")
    print(f"basis:        {run.folder / BASIS}, for other inputs: mode.basis={run.folder / BASIS}")
    print(f"summary:      {run.folder / SUMMARY}")
    check_failures(run.failures, len(run.failures) + len(run.sources), run.folder)
    return {**shares, "effective_rank": basis.effective_rank, "run": str(run.folder)}
