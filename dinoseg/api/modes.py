"""The modes as Python functions: they do what `python -m dinoseg mode=...` does, in the caller's process.

All functions take overrides in any of these forms: words of the command line (`"trainer.steps=20"`), keyword arguments
(`head="mlp"`), nested dicts (`trainer={"steps": 20}`) and dotted names (`**{"trainer.steps": 20}`). `out_dir` is the
run folder, by default as on the command line; `config_dir` is a folder of further config groups. Mistakes raise
`UserError` with the messages of the command line, and Ctrl-C raises `KeyboardInterrupt`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from os.path import exists, expanduser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dinoseg.api.jobs import Folder, run_mode
from dinoseg.api.objects import is_dataset
from dinoseg.api.results import Comparison, Results, Scores, read_json
from dinoseg.api.runs import Run
from dinoseg.core.shapes import SegmentationData
from dinoseg.segmenter.inputs import pictures
from dinoseg.segmenter.model import Model
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import check_annotations

Source = Run | Model | str | PathLike[str]


@check_annotations
def train(
    recipe: str | None = None,
    *words: str,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Run:
    """Train a segmenter, evaluate its best checkpoint, and return the run.

    Args:
        recipe: name of a recipe, such as `demo`; None: `base`, or the recipe of the run in `resume`.
        words: overrides as typed on the command line.
        out_dir: the run folder; None: outputs/RECIPE/train_TIME below the current folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as keyword arguments (`head="mlp"`), nested dicts (`trainer={"steps": 20}`)
            or dotted names (`**{"trainer.steps": 20}`). `data={"train": DATASET, "val": DATASET}` and `loss=LOSS` take
            objects, which `Run.resume` needs again.

    Raises:
        UserError: any error that the user can fix.
        KeyboardInterrupt: on Ctrl-C; the last complete step is saved, and the message states how to resume.

    Examples:
        >>> import dinoseg
        >>> data, out = {"root": "outputs/demo/data"}, "outputs/demo/train"
        >>> run = dinoseg.train("demo", data=data, trainer={"steps": 2}, out_dir=out)
        >>> run.step, run.best_checkpoint.name, 0 <= run.scores["miou"] <= 1
        (2, 'best.safetensors', True)
    """
    if recipe is not None:
        words = (recipe if "=" in recipe else f"hparam={recipe}", *words)
    result = run_mode("train", words, overrides, out_dir, exist_ok, config_dir)
    return Run(result["run"])


def evaluate(
    model: Source | None,
    *words: str,
    data: str | Mapping[str, Any] | SegmentationData | None = None,
    split: str | None = None,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Scores:
    """Score a trained model on a split of a dataset.

    Args:
        model: a run, a run folder, a checkpoint, an exported model file, or a model that was loaded from one; None: the
            backbone tracks the objects of videos.
        words: overrides as typed on the command line.
        data: option of the group `data`, or keys of the dataset that the model was trained on; None: that dataset. Or a
            dataset object, as of `train`.
        split: train, val or test; None: val.
        out_dir: the run folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as of `train`.

    Raises:
        UserError: any error that the user can fix.

    Examples:
        >>> import dinoseg
        >>> run = dinoseg.Run("outputs/demo/train")
        >>> scores = dinoseg.evaluate(run, resolution={"scale": 0.5}, out_dir="outputs/demo/half")
        >>> scores["present_classes"], scores.confusion.shape
        (10, (10, 10))
    """
    if is_dataset(data):
        data = {split or "val": data}
    keys = {"data": data, "mode.split": split}
    chosen = {key: value for key, value in keys.items() if value is not None}
    with _model_override(model) as override:
        given = override | chosen
        return Scores.read(run_mode("eval", words, overrides, out_dir, exist_ok, config_dir, given=given)["run"])


@check_annotations
def score(
    reference: Folder,
    prediction: Folder,
    *words: str,
    protocol: str | Mapping[str, Any] | None = None,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Scores:
    """Score a folder of predicted masks with the official protocol of a benchmark.

    Args:
        reference: folder of reference masks, in the layout of the protocol's official tool.
        prediction: folder of predictions, such as that of `predict`.
        words: overrides as typed on the command line.
        protocol: option of the group `protocol`, or keys of `semantic`; None: `semantic`.
        out_dir: the run folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as of `train`.

    Raises:
        UserError: any error that the user can fix.

    Examples:
        >>> import dinoseg
        >>> scores = dinoseg.score("outputs/demo/predicted/references", "outputs/demo/predicted", protocol="semantic")
        >>> sorted(scores)
        ['accuracy', 'dice', 'mIoU', 'mean_accuracy']
    """
    given: dict[str, Any] = {"reference": fspath(reference), "prediction": fspath(prediction)}
    given |= {} if protocol is None else {"protocol": protocol}
    return Scores.read(run_mode("score", words, overrides, out_dir, exist_ok, config_dir, given=given)["run"])


def predict(
    model: Source,
    input: Folder,
    *words: str,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Results:
    """Segment images or videos, and write masks and overlays to a folder; return counts and rates.

    Args:
        model: as in `evaluate`.
        input: image, folder, glob pattern, video, or a split such as `val`.
        words: overrides as typed on the command line.
        out_dir: the run folder, in which an interrupted prediction resumes.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as of `train`.

    Raises:
        UserError: any error that the user can fix.

    Examples:
        >>> import dinoseg
        >>> found = dinoseg.predict("outputs/demo/train", "val", out_dir="outputs/demo/predicted")
        >>> found["images"] == len([*(found.folder / "masks").rglob("*.png")])
        True
    """
    with _model_override(model) as override:
        given = {**override, "input": input}
        return Results.of(run_mode("predict", words, overrides, out_dir, exist_ok, config_dir, given=given))


def track(
    model: Source,
    input: Folder,
    *words: str,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Results:
    """Track objects through a video; return counts and rates.

    Args:
        model: as in `evaluate`; or the option of a backbone, such as `dinov3_vits16`, which propagates `labels`.
        input: a video, or a folder of frames.
        words: overrides as typed on the command line.
        out_dir: the run folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as of `train`, such as `labels`, the mask of the first frame.

    Raises:
        UserError: any error that the user can fix.

    Examples:
        >>> import dinoseg, pathlib
        >>> video = pathlib.Path("outputs/demo/data/train1/video_01")
        >>> found = dinoseg.track("rgb", video / "rgb", labels=video / "segmentation/000000000.png")
        >>> found["frames"], found.folder.is_dir()
        (4, True)
    """
    is_backbone = isinstance(model, str) and not exists(expanduser(model))
    with _model_override(None if is_backbone else model) as override:
        given = {**override, **({"backbone": model} if is_backbone else {}), "input": input}
        return Results.of(run_mode("track", words, overrides, out_dir, exist_ok, config_dir, given=given))


def compare(
    runs: Sequence[Run | Results | Folder | Sequence[Run | Results | Folder]],
    *words: str,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Comparison:
    """Compare evaluations of the same images with the first of them.

    Args:
        runs: runs, results of `evaluate`, or their folders; a list of several seeds or folds counts as one.
        words: overrides as typed on the command line.
        out_dir: the run folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as of `train`.

    Raises:
        UserError: any error that the user can fix.

    Examples:
        >>> import dinoseg
        >>> compared = dinoseg.compare(["outputs/demo/train", "outputs/demo/half"])
        >>> sorted(compared["half"]["miou"])
        ['ci95', 'p', 'value', 'verdict']
    """
    sides = [[*map(_folder_of, run)] if isinstance(run, list | tuple) else _folder_of(run) for run in runs]
    result = run_mode("compare", words, overrides, out_dir, exist_ok, config_dir, given={"runs": sides})
    return Comparison(read_json(Path(result["run"]) / "compare.json"), result["run"])


def export_onnx(
    model: Source,
    images: Any,
    *words: str,
    out_dir: Folder | None = None,
    exist_ok: bool = False,
    config_dir: Folder | None = None,
    **overrides: Any,
) -> Results:
    """Write a model to `out_dir`/model.onnx once the file agrees with it on images; return path and agreement.

    Args:
        model: as in `evaluate`; of a loop of your own, with its weights in memory.
        images: to compare both on, such as a few of those to predict: anything that `Model.predict` takes.
        words: overrides as typed on the command line, such as `export.precision=int8`.
        out_dir: the run folder.
        exist_ok: where `out_dir` holds a run, write to a new folder next to it, such as RUN_2.
        config_dir: folder of further config groups.
        overrides: config groups and keys, as of `train`.

    Raises:
        UserError: any error that the user can fix, or the file disagrees with the model.

    Examples:
        >>> import dinoseg, numpy
        >>> images, out = [numpy.zeros((64, 64, 3), numpy.uint8)], "outputs/demo/onnx"
        >>> found = dinoseg.export_onnx("outputs/demo/train", images, out_dir=out)
        >>> found["agreement"] > 0.99
        True
    """
    if isinstance(model, Model) and not model.facts.format.is_rgb:
        raise UserError(
            "export_onnx compares on RGB images of 8 bits, and this model reads others. Save it, and run python -m "
            "dinoseg mode=export export=onnx resume=FILE export.images=FOLDER."
        )
    with TemporaryDirectory() as folder, _model_override(model) as override:
        count = 0
        for count, (_, pixels) in enumerate(pictures(images), start=1):
            write_png(Path(folder) / f"{count}.png", pixels)
        if not count:
            raise UserError("images holds no image. Give at least one, such as one of those to predict.")
        given = {**override, "export": "onnx", "export.images": folder, "export.count": count}
        return Results.of(run_mode("export", words, overrides, out_dir, exist_ok, config_dir, given=given))


@contextmanager
def _model_override(model: Source | None) -> Iterator[dict[str, Any]]:
    """Yield the override that names a trained model to a mode.

    Raises:
        UserError: it is not a model, or has no file.
    """
    if model is None:
        yield {}
    elif isinstance(model, Model):
        with model.as_file() as path, _model_override(path) as override:
            yield override
    elif isinstance(model, list | tuple):
        yield {"resume": [str(Path(each).expanduser()) for each in model]}
    elif str(model).endswith(".onnx"):
        raise UserError(f"{model} is an ONNX file, which modes do not run. Give the run or the model.safetensors.")
    else:
        yield {"resume": str(Path(model).expanduser())}


def _folder_of(run: Any) -> str:
    return str(run.folder) if isinstance(run, Run | Results) else fspath(run)
