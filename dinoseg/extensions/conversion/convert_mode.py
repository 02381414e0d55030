"""mode=convert: a dataset in the format of another tool, read back and compared."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import DictConfig

from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.core.shapes import Sample
from dinoseg.core.splits import SPLITS
from dinoseg.core.task import refuse_layers
from dinoseg.data.classes.labels import Labels
from dinoseg.data.loader import load_in_order
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.conversion.formats import (
    FORMATS,
    AnnotatedShapes,
    Classes,
    Format,
    collect_objects,
    remove_overlaps,
)
from dinoseg.inference.outputs import ImagePrediction
from dinoseg.report.progress import Bar
from dinoseg.runs.folder import LOG
from dinoseg.utils.atomic import atomic_file, write_json
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.images import IMAGE_SUFFIXES, write_png
from dinoseg.utils.ranges import Natural, NotNegative
from dinoseg.utils.wording import count_of, format_override, join_names

MANIFEST = "conversion.json"  # in the run folder
_OWN_FILES = {"config", LOG}  # of the run
_OF_OBJECTS = ("coco_panoptic", "ids")  # formats that need data with objects
_PARTS = ".parts"  # files that are joined at the end of a split


@dataclass
class Difference:
    """Numbers of images, pixels and objects of a split, and how many are read back otherwise.

    Args:
        images: number of images.
        pixels: of all masks.
        changed_pixels: whose class is another one.
        lost_ignored: those of these that were ignored, and have a class now.
        objects: annotated ones, and crowds.
        changed_objects: those that are not read back with their class, mask and crowd flag.
        new_objects: those that are read back, and were not there.
    """

    images: int = 0
    pixels: int = 0
    changed_pixels: int = 0
    lost_ignored: int = 0
    objects: int = 0
    changed_objects: int = 0
    new_objects: int = 0

    def add(self, first: Sample, second: Sample, ignore_index: int) -> None:
        """Count the differences between a sample and its conversion."""
        mask, other = (sample["mask"].numpy() for sample in (first, second))
        differs = mask != other
        held, found = (_identify(_objects_of(sample)) for sample in (first, second))
        self.images += 1
        self.pixels += mask.size
        self.changed_pixels += int(differs.sum())
        self.lost_ignored += int((differs & (mask == ignore_index)).sum())
        self.objects += len(held)
        self.changed_objects += len(held - found)
        self.new_objects += len(found - held)


def convert(
    cfg: DictConfig,
    *,
    out_dir: Path,
    to: Literal["coco", "coco_panoptic", "yolo", "labelme", "masks", "ids"] | None,
    split: str | Sequence[str] | None = None,
    shapes: Literal["polygons", "rle"] = "polygons",
    tolerance: NotNegative = 0.0,
    objects: Literal["component", "class"] = "component",
    workers: Natural = 2,
) -> dict[str, Any]:
    """Write a dataset in another format into the run folder, read it back, and return what differs.

    Images are copies; frames of videos become PNG files. The keys are explained in cfg/mode/convert.yaml.

    Raises:
        UserError: no format is given, it does not hold such data, a file cannot be read, or the folder holds other
            files.
    """
    if to is None:
        raise UserError(f"mode=convert needs a format: give mode.to={'|'.join(FORMATS)}.")
    _refuse_files(out_dir)
    builder = Builder(cfg)
    refuse_layers(builder.task, "mode=convert", "Choose task=semantic: masks of layers have no other format.")
    datasets = _open_splits(builder, split)
    first = next(iter(datasets.values()))
    kind = first.maps.get(OBJECTS)
    things = sorted(kind.things) if isinstance(kind, ObjectMap) else None
    classes = Classes(Labels.of(first.classes, first.palette, first.ignore_index), builder.background, things)
    with name_parameters({"mode.shapes.tolerance": "mode.tolerance"}):
        options = AnnotatedShapes(format=shapes, objects=objects, tolerance=tolerance)
    written = FORMATS[to](out_dir, classes, options)
    if things is None and to in _OF_OBJECTS:
        raise UserError(
            f"mode.to={to} holds single objects, and data={cfg.choices.data} has none. Choose mode.to=masks."
        )
    for name, data in datasets.items():
        _write_split(written, name, data, workers)
    written.finish([*datasets])
    shutil.rmtree(out_dir / _PARTS, ignore_errors=True)
    option = written.object_reader if things is not None and written.object_reader else written.reader
    keys = {"data": option, "data.root": str(out_dir), **written.options}
    if first.ignore_index != 255:  # the default of data.ignore_index
        keys["data.ignore_index"] = first.ignore_index
    reader = builder.with_options(keys).reader()
    differences = {name: _compare(data, reader(name), workers) for name, data in datasets.items()}
    words = " ".join(shlex.quote(f"{key}={format_override(value)}") for key, value in keys.items())
    return _report(out_dir, to, words, differences)


def _refuse_files(folder: Path) -> None:
    """Refuse a run folder with files of something else, which would be overwritten, or read as part of the dataset."""
    others = sorted({each.name for each in folder.iterdir()} - _OWN_FILES)
    if others:
        raise UserError(
            f"hydra.run.dir={folder} holds {join_names(others)}. Choose a new folder: mode=convert replaces files."
        )


def _open_splits(builder: Builder, split: str | Sequence[str] | None) -> dict[str, PairDataset]:
    """Return the datasets of the splits that are named; None: of those that exist."""
    named = [split] if isinstance(split, str) else split
    found: dict[str, PairDataset] = {}
    for name in named or SPLITS:
        try:
            data = builder.dataset(name)
        except UserError:
            if named is not None or name != "test":
                raise
            continue
        if not isinstance(data, PairDataset):
            raise UserError(
                f"mode=convert reads files in pairs, and data={builder.options['data']} has a reader of its own."
            )
        found[name] = data
    return found


def _write_split(written: Format, split: str, data: PairDataset, workers: int) -> None:
    writer = written.make_writer(split)
    folder = written.folder / written.images.format(split=split)
    joined = written.shapes.objects == "class"
    samples = load_in_order(data.__getitem__, range(len(data)), workers)
    for pair, sample in zip(data.pairs, Bar(samples, total=len(data), desc=split, unit="image"), strict=True):
        image, mask = sample["image"].permute(1, 2, 0).numpy(), sample["mask"].numpy()
        path = place_image(pair.image, image, folder, pair.name)
        found = collect_objects(mask, _objects_of(sample), written.classes, joined=joined)
        if not written.overlap:
            found = remove_overlaps(found, mask)
        writer.write(ImagePrediction(pair.name, path, image, mask, objects=found))
    written.finish_split(split, writer)


def place_image(source: Any, image: np.ndarray, folder: Path, name: str) -> Path:
    """Copy an image file, or write other sources of RGB pixels as PNG; return the path."""
    if isinstance(source, Path) and source.suffix.lower() in IMAGE_SUFFIXES:
        path = folder / f"{name}{source.suffix}"
        with atomic_file(path) as part:
            # no hard link: tools that repair images in place would change the original
            shutil.copyfile(source, part)
        return path
    if image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(
            f"{source}: mode=convert writes RGB images of 8 bits, and this one has {image.shape[2]} channels of "
            f"{image.dtype}. Set data/pixels=one_file data.channels=3."
        )
    path = folder / f"{name}.png"
    write_png(path, image)
    return path


def _compare(data: PairDataset, other: Any, workers: int) -> Difference:
    """Return what differs between a dataset and its conversion, which has the same names."""
    places = {name: place for place, name in enumerate(other.names)}
    order = [places[name] for name in data.names]
    found = Difference()
    pairs = zip(
        load_in_order(data.__getitem__, range(len(data)), workers),
        load_in_order(other.__getitem__, order, workers),
        strict=True,
    )
    for first, second in Bar(pairs, total=len(data), desc="read back", unit="image"):
        found.add(first, second, data.ignore_index)
    return found


def _identify(objects: Objects | None) -> set[tuple[int, bool, bytes]]:
    """Return class, crowd flag and pixels of each object."""
    if objects is None:
        return set()
    rows = zip(objects.classes.tolist(), objects.crowds.tolist(), objects.masks, strict=True)
    return {(label, is_crowd, np.concatenate(runs).tobytes()) for label, is_crowd, runs in rows}


def _objects_of(sample: Sample) -> Objects | None:
    maps = sample.get("maps", {})
    return Objects.of_map(maps[OBJECTS].numpy()) if OBJECTS in maps else None


def _report(out_dir: Path, to: str, words: str, differences: dict[str, Difference]) -> dict[str, Any]:
    """Write the manifest, print the differences, and return their sums."""
    content = {"to": to, "read": words, "splits": {name: asdict(each) for name, each in differences.items()}}
    write_json(out_dir / MANIFEST, content)
    sums = {key: sum(getattr(each, key) for each in differences.values()) for key in asdict(Difference())}
    splits = ", ".join(f"{each.images} {name}" for name, each in differences.items())
    print(f"images:       {count_of(sums['images'], 'image')} ({splits}), {count_of(sums['objects'], 'object')}")
    lost = []
    if sums["changed_pixels"]:
        ignored = f" ({sums['lost_ignored']:,} of them were ignored)" if sums["lost_ignored"] else ""
        lost.append(f"{sums['changed_pixels']:,} of {sums['pixels']:,} pixels{ignored}")
    if sums["changed_objects"] or sums["new_objects"]:
        new = f", and {sums['new_objects']:,} are new" if sums["new_objects"] else ""
        lost.append(f"{sums['changed_objects']:,} of {count_of(sums['objects'], 'object')}{new}")
    print(f"read back:    {'equal to the pixel' if not lost else 'other classes or objects: ' + join_names(lost)}")
    print(f"manifest:     {out_dir / MANIFEST}")
    print(f"read it:      {words}")
    return {**sums, "run": str(out_dir)}
