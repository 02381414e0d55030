"""Odd command lines, drawn from a seed: each is either right, or refused with one message in this project's words.

python tests/fuzz_command_lines.py --count 900 --seed 0 --workers 2
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from command_line import SMALL, call, write_data
from config_files import FOLDER, GROUPS, options
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dinoseg.config.resolvers import register_resolvers

SECONDS = 60  # a command line that takes longer hangs
MEMORY = 6 << 30
TINY = tuple(word for word in SMALL if word.startswith(("backbone", "engine")))
BASES = {  # of each mode, a command line that works
    "train": (*SMALL, "trainer.steps=1", "mode.metrics_only=true"),
    "eval": ("resume=run", "engine=cpu", "engine.workers=0", "mode.metrics_only=true"),
    "predict": ("resume=run", "engine=cpu", "input=data/val/images"),
    "track": (*TINY, "input=data/val/images", "labels=data/val/masks/0.png"),
    "export": ("resume=run", "engine=cpu"),
    "score": ("reference=data/val/masks", "prediction=data/val/masks", "num_classes=2", "mode.workers=1"),
    "summary": SMALL,
    "doctor": (*SMALL, "mode.workers=1"),
    "prepare": ("data=sarrarp", "data.root=data"),
    "render": ("data=movi", "data.root=movi", "mode.train_videos=1", "mode.val_videos=0", "mode.test_videos=0",
               "mode.seconds=1", "mode.size=[32,48]", "mode.workers=1"),
    "help": (),
}  # fmt: skip
TEXTS = (
    "text",
    "a b (1).png",
    "x=y",
    "a,b",
    "é ü 漢字",
    "..",
    "-",
    "~",
    "'",
    '"',
    "[",
    "{",
    "a\x00b",
    "'a b'",
    "n" * 5000,
)
VALUES = (
    *("null", "true", "", "-1", "0", "1", "2", "3", "0.5", "-0.5", "nan", "inf", "-inf", "1e400", "1e-300", "???"),
    *("[]", "[0]", "[1,2]", "[-1,2]", "[1,1,1]", "[a,b]", "[null]", "[nan,1]", "[[1]]", "{}", "{a: 1}", "{0: 1}"),
    *("${nothing}", "${seed}", "${.x}", "${oc.env:NOTHING}", "${now:x}", "None", *TEXTS),
)
FOREIGN = re.compile(
    r"Traceback|hydra|omegaconf|HYDRA|in struct|Config(Attribute|Key)|Interpolation|Instantiation|NoneType' object|"
    r"full_key|object_type|unhashable|unexpected keyword|positional argument"
)


def lines(count, seed):
    """Yield command lines as tuples of words, of every mode in turn."""
    draw = random.Random(seed)
    keys = {mode: _keys(mode, base) for mode, base in BASES.items()}
    for number in range(count):
        mode = list(BASES)[number % len(BASES)]
        odd = [_odd_word(draw, keys[mode]) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        yield (f"mode={mode}", *BASES[mode], *odd)


def _keys(mode, base):
    register_resolvers()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("main", [f"mode={mode}", *base]))
    GlobalHydra.instance().clear()
    return list(_paths(cfg))


def _paths(node, above=""):
    for key, value in node.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{above}{key}.")


def _odd_word(draw, keys):
    kind, key, value = draw.random(), draw.choice(keys), draw.choice(VALUES)
    if draw.random() < 0.25:  # those typed most
        key = draw.choice([each for each in keys if "." not in each or each.startswith("mode.")])
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
    """Write what the command lines are about: data, and a trained run."""
    write_data(root / "here/data")
    done = call(root / "here", "mode=train", *SMALL, "trainer.steps=1", "hydra.run.dir=run")
    assert done.status == 0, done.err


def fault(root, words):
    """Return what is wrong with the way a command line ends; "" where it is right."""
    before = {path.name for path in root.iterdir()}
    try:
        done = call(root / "here", *words)
    except BaseException as error:  # the fault is what is looked for
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(each.filename).name}:{each.lineno}" for each in where if "dinoseg/" in each.filename]
        return f"{type(error).__name__}: {str(error).strip()[:200]} at {' '.join(ours[-3:])}"
    messages = [line for line in done.err.splitlines() if line.startswith("error")]
    if done.status not in (0, 1):
        return f"exit status {done.status}: {done.err[-300:]}"
    if done.status == 1 and len(messages) != 1:
        return f"{len(messages)} messages: {done.err[-300:]}"
    if found := FOREIGN.search("\n".join(messages) if "Traceback" not in done.err else done.err):
        return f"says {found[0]!r}: {messages or done.err[-300:]}"
    if outside := {path.name for path in root.iterdir()} - before:
        return f"wrote outside: {outside}"
    return ""


def tried(root, words):
    """Return `fault` of a command line in a process of its own, which is ended when it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(writer, b"." + fault(root, words).encode(errors="replace")[:2000])
        os._exit(0)
    os.close(writer)
    said, _, _ = select.select([reader], [], [], SECONDS)
    found = os.read(reader, 4000).decode(errors="replace") if said else f"hangs for {SECONDS} seconds"
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found.removeprefix(".") if found else "ended without a word"


def _shard(tasks, results):
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number, words in tasks:
            results.put((number, words, tried(Path(folder), words)))


def main():
    """Try many command lines, print those that end wrongly, and count them."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("count", 900), ("seed", 0), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tasks = list(enumerate(lines(given.count, given.seed)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    shards = [context.Process(target=_shard, args=(tasks[n :: given.workers], results)) for n in range(given.workers)]
    for shard in shards:
        shard.start()
    wrong = 0
    for _ in tasks:
        number, words, what = results.get()
        if what:
            wrong += 1
            print(
                f"{number}: {shlex.join([words[0], *words[1 + len(BASES[words[0][5:]]) :]])[:300]}\n    {what}",
                flush=True,
            )
    print(f"{wrong} of {given.count} command lines end wrongly (seed {given.seed})")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
