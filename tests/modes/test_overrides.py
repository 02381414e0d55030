"""Each key of `resolution` and `inference` has an effect in a mode, or the mode says that it has none."""

import copy
import io
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import SimpleNamespace
from unittest.mock import DEFAULT, patch

import pytest
import torch
from command_line import in_this_process, write_data
from config_files import options, read
from omegaconf import OmegaConf
from portable_parts import TINY, write_untrained

import dinoseg
from dinoseg.checkpoints.resume import compose_resumed
from dinoseg.checkpoints.source import ModelSource
from dinoseg.cli.job_checks import LAUNCH_KEYS
from dinoseg.config.nodes import instantiate
from dinoseg.extensions.export import onnx_export, onnx_file, program
from dinoseg.extensions.serving.source import load_served
from dinoseg.inference.auto import Auto
from dinoseg.inference.windows import Whole, Windows
from dinoseg.models.model import SegmentationModel
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image

OTHER = {  # key to another value than the one below
    **{"resolution.crop": [24, 32], "resolution.scale": 0.5, "resolution.longest": 40},
    **{"inference.size": [16, 24], "inference.overlap": 0.6, "inference.weights": "uniform"},
    **{"inference.stride": [16, 20], "inference.placement": "even", "inference.multiple": 32},
    "inference.resample": "bilinear",
    **{"inference.average": "scores", "inference.batch_size": 1, "inference.flips": "horizontal"},
    **{"inference.scales": [0.5, 1.0], "inference.shortest": 64, "inference.memory": 1e-9},
}
WORDS = (
    *(*TINY, "head=linear", "data=folder", "data.classes=[dark,bright]", "data.batch_size=2"),
    *("resolution.crop=[32,48]", "engine=cpu", "engine.workers=0", "engine.precision=fp32"),
)
OF_MODE = {  # what else a mode is given, so that it takes little time
    "bench": ("mode.steps=1", "mode.images=1", "mode.warmup=0"),
    "eval": ("mode.metrics_only=true", "mode.report=false"),
    "plan": ("mode.memory=8GiB", "adapter=full"),
    "predict": ("mode.masks=false",),
    "probe": ("head.layers=[1]", "mode.strengths=[0.1]", "mode.balances=[0.0]"),
    "train": ("trainer.steps=1", "mode.metrics_only=true", "mode.report=false", "mode.pictures=0"),
}
SIZES = {"typical": 48, "largest": 60}  # of the training's images: those here are larger
INFERRING = ("app", "bench", "eval", "export", "predict", "serve", "train")
HEAVY = ("app", "bench", "eval", "serve", "train", "plan", "probe", "track")
OF_MODEL = ("crop", "scale", "longest")
SIZES_OF = {"probe": ("scale", "longest"), "summary": ("crop", "scale")}  # modes of whole recipes that do not read all
IDLE = {  # keys that are read, and change nothing here, to modes
    "resolution.crop": ("summary",),  # a crop of less than a patch is refused
    "resolution.scale": ("summary",),
    "inference.multiple": ("track", "export backbone", "export onnx", "export program"),  # needs inference.shortest
    # nothing is resized without inference.shortest or inference.scales
    "inference.resample": ("app", "bench", "eval", "export safetensors", "predict", "serve", "train"),
}


def keys_of(mode):
    """Return the keys of `resolution` and `inference` that a mode reads, each with the option that has it."""
    found = {f"resolution.{key}": "windows" for key in SIZES_OF.get(mode, OF_MODEL)}
    for option in options("inference") if mode.partition(" ")[0] in INFERRING else ():
        keys = [key for key in read("inference", option) if not key.startswith("_") and key != "defaults"]
        found |= {f"inference.{key}": option for key in keys}
    return [(mode, key, option) for key, option in found.items()]


def cells():
    """Yield modes and keys; of heavy modes that infer each has half of the keys, two neighbours together all.

    An export has a share of its keys quick, its others heavy; all exports together have all keys quick.
    """
    yield from (*keys_of("predict"), *keys_of("summary"))
    exports = options("export")
    for number, option in enumerate(exports):
        for place, cell in enumerate(keys_of(f"export {option}")):
            yield cell if place % len(exports) == number else pytest.param(*cell, marks=pytest.mark.heavy)
    for number, mode in enumerate(HEAVY):
        chosen = keys_of(mode)[number % 2 :: 2] if mode in INFERRING else keys_of(mode)
        yield from (pytest.param(*cell, marks=pytest.mark.heavy) for cell in chosen)


@pytest.fixture(scope="module")
def where(compose, tmp_path_factory):
    """Return a folder with images, and a checkpoint of a model that was trained on smaller ones."""
    folder = tmp_path_factory.mktemp("overrides")
    write_data(folder / "data", size=(40, 130))
    path = write_untrained(compose, folder, *WORDS[:-2], "adapter=full", sizes=SIZES)
    return SimpleNamespace(folder=folder, checkpoint=path, bases={}, number=iter(range(10**6)))


def config(compose, where, mode, option):
    mode, _, export = mode.partition(" ")
    words = [f"mode={mode}", *WORDS, f"inference={option}", f"data.root={where.folder / 'data'}"]
    words += [*OF_MODE.get(mode, ()), f"cache_dir={where.folder / 'cache'}", *([f"export={export}"] if export else [])]
    words += [f"input={where.folder / 'data/val/images'}"] if mode in ("predict", "track") else []
    cfg = compose(*words)
    if cfg.mode.get("resume_from") != "best":
        return cfg
    typed = [word for word in words if word.partition("=")[0] not in ("backbone", "head") and "backbone." not in word]
    return compose_resumed(cfg, typed, where.checkpoint, checkpoint.describe(where.checkpoint))


def mean_of(tensor):
    """Return a tensor's mean size; None of one without numbers, which stands for one in a plan."""
    has_numbers = type(tensor) is torch.Tensor and not tensor.is_meta
    return float(tensor.double().abs().mean()) if has_numbers else None


@contextmanager
def watch_models():
    """Give a list of what models see and what comes of it, while it is made."""
    seen = []
    pixels = SegmentationModel.pixels

    def watch_pixels(self, *words, **keys):
        found = pixels(self, *words, **keys)
        seen.append((tuple(found.shape), mean_of(found)))
        return found

    def watch(bands):
        def watched_bands(self, *words, **keys):
            for band in bands(self, *words, **keys):
                seen.append(mean_of(band.scores()))
                yield band

        return watched_bands

    with ExitStack() as stack:
        stack.enter_context(patch.object(SegmentationModel, "pixels", watch_pixels))
        for kind in (Auto, Whole, Windows):
            stack.enter_context(patch.object(kind, "bands", watch(kind.bands)))
        yield seen


def serve(cfg, out_dir):
    return {"mean": float(load_served(ModelSource(cfg), out_dir, None).predict(image_of(cfg)).mask.mean())}


def image_of(cfg):
    return read_image(f"{cfg.data.root}/val/images/0.png").copy()


def export(cfg, out_dir):
    """Export a model and let the file answer, of a graph the model that it is compared with."""
    found = []

    def keep(ready, *_):
        found.append(ready.record)
        ready.reference.predict_ids(image_of(cfg))
        return {"agreement": 1.0}

    with (
        patch.object(onnx_export, "trace"),
        patch.object(program, "trace"),
        patch.object(torch.export, "save"),
        patch.object(program, "open_program"),
        patch.multiple(onnx_file, to_onnx=DEFAULT, finish=DEFAULT),
        patch.object(onnx_export, "load_onnx"),
        patch.object(onnx_file, "write", lambda *_: [out_dir / "model.onnx"]),
        patch.object(onnx_export, "store_if_verified", keep),
        patch.object(program, "store_if_verified", keep),
    ):
        instantiate(cfg.export)(ModelSource(cfg), out_dir=out_dir)
    if cfg.choices.export == "safetensors":
        dinoseg.load(out_dir / "model.safetensors", device="cpu", precision="fp32").predict(image_of(cfg))
    return {"record": str(found)}


def run(mode, cfg, out_dir):
    if mode in ("app", "serve"):
        return serve(cfg, out_dir)
    if mode.startswith("export"):
        return export(cfg, out_dir)
    return instantiate(cfg.mode, exclude=LAUNCH_KEYS)(cfg, out_dir=out_dir)


def observe_mode(where, mode, cfg, word):
    """Return what a mode does by a config, beside what it says."""
    out = where.folder / f"out_{next(where.number)}"
    (out / "config").mkdir(parents=True)
    (out / "config/overrides.txt").write_text(f"{word}\n", encoding="utf-8")
    with (
        watch_models() as seen,
        redirect_stdout(io.StringIO()) as said,
        patch("dinoseg.extensions.auto.bench_mode.run_in_process", in_this_process),
        patch("dinoseg.extensions.auto.bench_mode.matrix_peak", lambda *_, **__: 1.0),
    ):
        result = run(mode, cfg, out)
    told = f"{said.getvalue()}{result}" if mode == "summary" else ""  # of others, times or memory are in it
    return seen, told.replace(str(out), "").replace(word, "")


@pytest.mark.parametrize(("mode", "key", "option"), list(cells()))
def test_every_key_has_an_effect_or_is_reported_as_unused(compose, where, capsys, caplog, mode, key, option):
    if (mode, option) not in where.bases:
        cfg = config(compose, where, mode, option)
        where.bases[mode, option] = cfg, observe_mode(where, mode, copy.deepcopy(cfg), "")
    cfg, base = where.bases[mode, option]
    capsys.readouterr()
    caplog.clear()
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, key, OTHER[key])
    changed = None
    try:
        changed = observe_mode(where, mode, cfg, f"{key}={OTHER[key]}")
    except UserError as error:
        assert key in str(error)
    said = f"No effect here: {key}=" in capsys.readouterr().err + caplog.text
    assert said == (changed == base) or mode in IDLE.get(key, ())
