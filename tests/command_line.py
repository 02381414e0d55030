"""Run the command line inside the test's own process, on a data set of a few pixels."""

import logging
import pickle
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from unittest.mock import patch

import numpy as np
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from dinoseg import __main__
from dinoseg.extensions.rendering.moving.write import render_moving_objects
from dinoseg.utils.images import read_ids, read_image, write_png

TINY = (  # a transformer of 2 blocks
    *("backbone=tiny", "backbone.patch_size=8", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2"),
    *("backbone.arch.num_attention_heads=3", "backbone.arch.intermediate_size=48"),
)
TINY_KEYS = {  # the same in a call from Python
    "backbone.patch_size": 8,
    "backbone.arch": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48},
}
SMALL = (  # overrides of a run that takes a second
    *("data=folder", "data.classes=[dark,bright]", "data.root=data", "data.batch_size=2", "resolution.crop=[32,48]"),
    *(*TINY, "adapter=full", "engine=cpu", "engine.workers=0", "trainer.steps=2"),
)
SLOTS = (  # the same of slots, on clips of 32 x 32 pixels
    *("mode=train", "hparam=dinosavi_control", "data=movi", "data.root=movi", *TINY, "engine=cpu", "engine.workers=0"),
    *("resolution.crop=[32,32]", "head.slot_dim=16", "head.hidden_dim=16"),
    *("head.decoder_dim=16", "head.num_slots=3", "data.batch_size=3", "data.clips.cut.length=4"),
    *("data.clips.cut.fps=null", "optim.optimizer.lr=3e-3", "optim.schedule.warmup=0", "engine.precision=fp32"),
)
_DRAWN = ("dinoseg.report.curves._picture",)
_GREY = np.full((8, 8, 3), 128, np.uint8)


@dataclass
class Done:
    """What a command left: its exit status and what it wrote to either stream."""

    status: int
    out: str
    err: str


def call(where, *arguments, draws=False):
    """Run `python -m dinoseg ARGUMENTS` in a folder, without a new process.

    Curves and matrices, which tests/report looks at, are grey unless it `draws`; and where no word says `hydra.mode`,
    Hydra does not compose all once more before to look for it. Each takes a fifth of the time of a short run.
    """
    root = logging.getLogger()
    out = StringIO()
    err = StringIO()
    handlers = root.handlers[:]
    level = root.level
    says_mode = any("hydra.mode" in str(word) for word in arguments)
    try:
        with (
            ExitStack() as stack,
            chdir(where),
            patch.object(sys, "argv", ["dinoseg", *map(str, arguments)]),
            patch.object(__main__, "failures", []),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            for target in () if draws else _DRAWN:
                stack.enter_context(patch(target, lambda *_, **__: _GREY))
            if not says_mode:
                stack.enter_context(patch.object(Hydra, "get_mode", lambda *_, **__: None))
            status = exit_status(__main__.main)
    finally:
        GlobalHydra.instance().clear()
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
    return Done(status, out.getvalue(), err.getvalue())


def succeed(where, *arguments):
    """Run a command as `call` does, and check that it ends well."""
    done = call(where, *arguments)
    assert done.status == 0, done.err
    return done


def exit_status(main):
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def in_this_process(work, item, **_):
    """Stand for `run_in_process`, which tests/extensions/auto looks at: what goes in and what comes out is pickled."""
    work, item = pickle.loads(pickle.dumps((work, item)))
    return pickle.loads(pickle.dumps(work(item)))


def write_data(root, train=4, val=2, size=(32, 48)):
    """Write a folder data set: noise, its masks the brighter half of the pixels."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            image = draw.integers(0, 256, (*size, 3)).astype(np.uint8)
            write_png(root / split / "images" / f"{number}.png", image)
            write_png(root / split / "masks" / f"{number}.png", (image.mean(axis=-1) > 127).astype(np.uint8))


def train_both(where):
    """Train a segmenter with head=cnn and a model of slots, and write a clip of 7 frames with its first mask."""
    write_data(where / "data")
    render_moving_objects(where / "movi", train_videos=2, val_videos=1, seconds=1, size=(32, 32), workers=1)
    lengths = ("mode=train", "trainer.steps=4", "trainer.val_every=4", "mode.metrics_only=true")
    segmenter = (*SMALL, "head=cnn", "head.channels=16")
    for name, words in (("segmenter", segmenter), ("slots", SLOTS)):
        succeed(where, *words, *lengths, f"hydra.run.dir={name}")
    video = where / "movi/validation/validation_0001"
    for number in range(7):
        write_png(where / f"clip/{number:05d}.png", read_image(video / f"frames/{number:05d}.png"))
    write_png(where / "first.png", read_ids(video / "segmentations/00000.png"))
    return where


def link_all(source, folder):
    """Link all that lies in a folder into another, and return that."""
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    return folder
