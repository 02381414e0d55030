"""Odd command lines, drawn from a seed: each is either right, or refused with one message in this project's words.

python tests/fuzz_command_lines.py --count 900 --seed 0
"""

import argparse
import contextlib
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from command_line import SLOTS, SMALL, call, in_this_process, succeed, write_data
from config_files import FOLDER, GROUPS, options
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dinoseg.config.plain import keys_of
from dinoseg.config.resolvers import register_resolvers
from dinoseg.extensions.rendering.moving.write import render_moving_objects
from dinoseg.utils.errors import UserError

SECONDS = 60  # a command line that takes longer hangs
MEMORY = 8 << 30
TINY = tuple(word for word in SMALL if word.startswith(("backbone", "engine")))
QUIET = ("mode.metrics_only=true", "mode.report=false")
TRAIN = (*(word for word in SMALL if word not in ("adapter=full", "trainer.steps=2")), "trainer.steps=1", *QUIET)
CHOSEN = ("resolution.crop", "data.batch_size", "trainer.steps", "adapter")  # by hparam=auto
RENDER = tuple(f"render.{word}" for word in ("seconds=1", "size=[32,48]", "workers=1", "train_videos=1"))
RENDER += ("render.val_videos=0", "render.test_videos=0")
BASES = {  # a command line that works, of each mode and of what trains otherwise: mode, a name beside it
    "train": (*TRAIN, "adapter=full"),
    "train kept": (*TRAIN, "head=detail", "head.layers=[-1]", "data.views=2", "adapter=frozen", "engine.cache=disk"),
    "train hard": (*TRAIN, "head=linear", "head.layers=[-1]", "adapter=frozen", "loss.weights=median",
                    "loss.criterion.hard_fraction=0.5"),
    "train distil": (*TRAIN, "trainer=distil", "teacher=run", "adapter=full"),
    "train auto": (*(word for word in TRAIN if word.split("=")[0] not in CHOSEN), "hparam=auto", "trainer.steps=1"),
    "train slots": (*(word for word in SLOTS if not word.startswith("mode")), "trainer.steps=1", "engine.workers=0"),
    "train sweep": ("-m", *TRAIN, "adapter=full", "seed=0,1"),
    "summary sweep": ("-m", *SMALL, "head=linear,mlp"),
    "eval": ("resume=run", "engine=cpu", "engine.workers=0", "mode.metrics_only=true"),
    "predict": ("resume=run", "engine=cpu", "input=data/val/images"),
    "track": (*TINY, "tracker.short_side=32", "input=data/val/images", "labels=data/val/masks/0.png"),
    "export": ("resume=run", "engine=cpu"),
    "export safetensors": ("resume=run", "engine=cpu", "export=safetensors"),
    "export onnx": ("resume=run", "engine=cpu", "export=onnx"),
    "score": ("reference=data/val/masks", "prediction=data/val/masks", "protocol.num_classes=2", "mode.workers=1"),
    "summary": SMALL,
    "doctor": (*SMALL, "mode.workers=1"),
    "prepare": ("data=sarrarp", "data.root=data"),
    "render": ("data=movi", "data.root=drawn", *RENDER),
    "help": (),
    "plan": (*SMALL, "mode.memory=1GiB"),
    "bench": (*SMALL, "mode.steps=1", "mode.images=1", "mode.warmup=0"),
    "probe": (*TINY, *SMALL[:4]),
    "compare": ("runs=[run,other]",),
    "serve": ("resume=run", "engine=cpu", "mode.port=0"),
    "app": ("resume=run", "engine=cpu", "mode.port=0"),
}  # fmt: skip
SEVERAL = ("train sweep", "summary sweep")  # of these, each job may end in a message
TEXTS = (
    *("text", "a b (1).png", "x=y", "a,b", "é ü 漢字", "..", "-", "--", "~", "~nobody/x", "'", '"', "[", "{", "a\x00b"),
    *("'a b'", "\x1b[31mred\x1b[0m", "\u202etxt.exe", "\udce9", "n" * 5000, "9" * 400, "9" * 5000),
)
VALUES = (
    *("null", "true", "", "-1", "0", "1", "2", "3", "0.5", "-0.5", "nan", "inf", "-inf", "1e400", "1e-300", "???"),
    *("1e18", "-1e18", "9223372036854775808", "65536", "0x10", "1_000", "-0.0", "1e-3", "on", "2026-01-01"),
    *("[]", "[0]", "[1,2]", "[-1,2]", "[1,1,1]", "[a,b]", "[null]", "[nan,1]", "[[1]]", "{}", "{a: 1}", "{0: 1}"),
    *("[{},[]]", "{a: [1,{b: null}]}", "{_target_: os.getcwd}", "[[1,2],[3,4]]", "[true]", "{a: nan}", "[1e400]"),
    *(
        "${nothing}",
        "${seed}",
        "${.x}",
        "${oc.env:NOTHING}",
        "${now:x}",
        "None",
        "${hydra:runtime.cwd}",
        "${dinoseg.len:3}",
    ),
    *("choice(1,2)", "range(0,3)", "interval(0,1)", "glob(*)", "0,1", "1,nan", "${data.root}", "${oc.env:HOME}"),
    *("run", "other", "data", "data/val/images", "data/val/masks/0.png", "run/config", "pipe", "/dev/null"),
    "/dev/zero",
    *("nothing/here", "odd.json", "deep.yaml", "auto", "disk", "memory", "all", *TEXTS),
)
TYPED = (  # keys that are typed most, or are young
    *("data.labelled", "data.views", "data.cache", "data.group", "data.folds"),
    *("loss.criterion.hard_fraction", "loss.weights"),
    *("trainer.unlabelled", "trainer.unlabelled_every", "trainer.unlabelled_batch_size"),
    *("trainer.temperature", "trainer.ema", "trainer.score", "trainer.epochs", "trainer.steps"),
    *("labels", "input", "runs", "resume"),
    *("engine.cache", "engine.compile", "engine.sharding", "engine.precision", "engine.workers", "engine.device"),
    *("features.dtype", "features.gib", "cache_dir", "head.init", "head.layers", "head.blocks"),
    *("inference.scales", "inference.window", "seed", "trust", "resolution.crop", "resolution.scale", "adapter.rank"),
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name"),
)
SWEPT = ("0,1", "1,2", "nan,1", "a,b", "[1],[2]", "null,1", "choice(0,x)", "range(0,2)", "range(2)", "glob(*)", "1,1")
FOREIGN = re.compile(
    r"Traceback|hydra\.(core|errors|utils|cc)|Hydra[A-Z]|omegaconf|HYDRA|in struct|Config(Attribute|Key)|"
    r"Interpolation|Instantiation|NoneType' object|full_key|object_type|unhashable|"
    r"unexpected keyword|positional argument|site-packages|lib/python|\w\.py\b"
)


def lines(count, seed, modes=None):
    """Yield command lines as tuples of words, of every mode in turn; of some modes, those that all would have."""
    keys = {name: _keys(name, base) for name, base in BASES.items() if modes is None or name.split()[0] in modes}
    for number in range(count):
        name = list(BASES)[number % len(BASES)]
        if name not in keys:
            continue
        draw = random.Random(f"{seed} {number}")
        odd = [_odd_word(draw, keys[name], sweeps=name in SEVERAL) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        yield (f"mode={name.split()[0]}", *BASES[name], *odd)


def _keys(name, base):
    register_resolvers()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        words = [word if "[" in word else word.split(",")[0] for word in base if word != "-m"]
        cfg = OmegaConf.to_container(compose("main", [f"mode={name.split()[0]}", *words]))
    GlobalHydra.instance().clear()
    return list(keys_of(cfg))


def _odd_word(draw, keys, sweeps=False):
    kind = draw.random()
    key = draw.choice(keys)
    value = draw.choice(VALUES)
    often = draw.random()
    if often < 0.25:
        key = draw.choice([each for each in keys if "." not in each or each.startswith("mode.")])
    elif often < 0.5:
        key = draw.choice(TYPED)
    if sweeps and draw.random() < 0.4:
        value = draw.choice(SWEPT)
    if kind < 0.70:
        return f"{key}={value}"
    if kind < 0.75:
        return f"~{key}"
    if kind < 0.80:
        return f"{draw.choice(('+', '++'))}{key}{draw.choice(('', '.extra'))}={value}"
    if kind < 0.86:
        return f"{draw.choice(GROUPS)}={value}"
    if kind < 0.94:
        group = draw.choice([group for group in GROUPS if group not in ("mode", "backbone", "hparam")])
        return f"{group}={draw.choice(options(group))}"
    if kind < 0.97:
        return f"{key}.{draw.choice(('extra', '0', '_target_', '_partial_'))}={value}"
    return draw.choice((value, f"={value}", f"{key}", f"--{key}", f"{key}=", f"{key}@x={value}", f"{key}:{value}"))


def prepare(root):
    """Write what the command lines are about: data, clips, two trained runs, and files that are no use."""
    here = root / "here"
    write_data(here / "data")
    render_moving_objects(here / "movi", train_videos=2, val_videos=1, seconds=1, size=(32, 32), workers=1)
    for seed, name in enumerate(("run", "other")):
        words = ("mode=train", *SMALL, "trainer.steps=1", f"seed={seed}", f"hydra.run.dir={name}")
        succeed(here, *words)
    os.mkfifo(here / "pipe")
    (here / "odd.json").write_text("[" * 2000)
    (here / "deep.yaml").write_text("a: &a [1]\nb: [*a, *a, {c: !!python/object:os.system x}]\n")


@contextlib.contextmanager
def _temporary_copy(root):
    """Give a copy of what was prepared: what one command line leaves is not there for the next."""
    with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
        shutil.copytree(root / "here", f"{folder}/here", ignore=lambda *_: ["pipe"])
        os.mkfifo(f"{folder}/here/pipe")
        yield Path(folder)


def warm_up(root):
    """Run what works once in this process: its children import and read nothing anew."""
    for name, base in BASES.items():
        with _temporary_copy(root) as kept, _short(f"mode={name.split()[0]}"):
            done = call(kept / "here", f"mode={name.split()[0]}", *base)
        assert done.status == (name in ("prepare", "export onnx")), f"{name}: {done.err}"  # nothing there; see `_short`


def fault(root, words):
    """Return what is wrong with the way a command line ends; "" where it is right."""
    before = {path.name for path in root.iterdir()}
    try:
        with _short(words[0]):
            done = call(root / "here", *words)
    except BaseException as error:  # the fault is what is looked for
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(each.filename).name}:{each.lineno}" for each in where if "dinoseg/" in each.filename]
        return f"{type(error).__name__}: {str(error).strip()[:200]} at {' '.join(ours[-3:])}"
    messages = [line for line in done.err.splitlines() if line.startswith("error")]
    if done.status not in (0, 1):
        return f"exit status {done.status}: {done.err[-300:]}"
    if done.status == 1 and (len(messages) != 1 if "-m" not in words else not messages):
        return f"{len(messages)} messages: {done.err[-300:]}"
    if found := FOREIGN.search("\n".join(messages) if "Traceback" not in done.err else done.err):
        return f"says {found[0]!r}: {messages or done.err[-300:]}"
    if control := re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b\u202a-\u202e]", "\n".join(messages)):
        return f"prints {control[0]!r}: {messages}"
    if outside := {path.name for path in root.iterdir()} - before:
        return f"wrote outside: {outside}"
    return ""


def _short(mode):
    """Let what takes long stop where words are all understood, and what is timed be timed in this process."""
    if mode == "mode=bench":
        return patch("dinoseg.extensions.auto.bench_mode.run_in_process", in_this_process)
    if mode == "mode=train":
        return patch("dinoseg.extensions.auto.choose.run_in_process", in_this_process)
    if mode == "mode=export":
        return patch(
            "dinoseg.extensions.export.graph.torch.export.export", side_effect=UserError("It would be traced.")
        )
    if mode in ("mode=serve", "mode=app"):
        return patch("uvicorn.Server.run", lambda *_: None)
    return contextlib.nullcontext()


def try_line(root, words, seconds=SECONDS):
    """Return `fault` of a command line in a process of its own, which is ended when it hangs."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as streams:  # what processes of its own print, and what no stream of Python's shows
        child = os.fork()
        if child == 0:
            os.setsid()
            for stream in (1, 2):
                os.dup2(streams.fileno(), stream)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(writer, b"." + fault(root, words).encode(errors="replace")[:2000])
            os._exit(0)
        os.close(writer)
        said, _, _ = select.select([reader], [], [], seconds)
        found = os.read(reader, 4000).decode(errors="replace") if said else f"hangs for {seconds} seconds"
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        streams.seek(0)
        printed = streams.read().decode(errors="replace")
    if "Traceback" in printed and not found[1:]:
        return f"a process of its own ends in a traceback: {printed[-300:]}"
    return found.removeprefix(".") if found else f"ended without a word: {printed[-300:]}"


def main():
    """Try many command lines, print those that end wrongly, and count them."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("count", 900), ("seed", 0), ("seconds", SECONDS)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        warm_up(root)
        for number, words in enumerate(lines(given.count, given.seed)):
            with _temporary_copy(root) as kept:
                what = try_line(kept, words, given.seconds)
            if what:
                wrong += 1
                print(f"{number}: {ascii(shlex.join(words))[-300:]}\n    {what}", flush=True)
    print(f"{wrong} of {given.count} command lines end wrongly (seed {given.seed})")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
