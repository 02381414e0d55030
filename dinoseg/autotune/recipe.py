"""`hparam=auto`: choices for a command line, made once and stored, so that the same command gets the same choices."""

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from dinoseg import __version__
from dinoseg.autotune.choice import Chooser
from dinoseg.autotune.given import left_of
from dinoseg.autotune.kept import NAME, read_choices, recipe_text, told, write_choices
from dinoseg.autotune.rules import CHOOSING, Choice
from dinoseg.config.checks import check_given
from dinoseg.config.plain import plain
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.experiment import build
from dinoseg.experiment.composed import composed_with, own_folders, searching, typed_keys
from dinoseg.experiment.recipe import LENGTHS, config_description, recipe_of
from dinoseg.utils.atomic import write_text
from dinoseg.utils.cores import count_cores, ranks_here
from dinoseg.utils.errors import UserError
from dinoseg.utils.locks import locked
from dinoseg.utils.wording import printable

AUTO = "auto"  # name of the recipe that is chosen automatically
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # environment variables that make a process a rank
_OF_A_RUN = ("seed", "resume", "budget", "hydra", "mode", "hparam")  # overrides that do not affect the choices


@dataclass(frozen=True)
class Recipe:
    """The recipe chosen for a command line.

    Attributes:
        cfg: the whole config with the choices.
        text: content of the recipe's file.
        words: overrides of a command line that trains with that file.
    """

    cfg: DictConfig
    text: str
    words: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write the recipe where `--config-dir FOLDER hparam=chosen` finds it, and print the command that uses it."""
        path = folder / "hparam" / f"{NAME}.yaml"
        if not path.exists():
            write_text(path, self.text)
        own = [searching([f"file://{Path(each).absolute()}" for each in own_folders()])] if own_folders() else []
        words = [*self.words, *own, f"hparam={NAME}", "--config-dir", str(folder)]  # Hydra reads the last --config-dir
        command = shlex.join(["python", "-m", "dinoseg", *words])
        print(printable(f"\nrecipe:       {path}\n              {command}\n"))


def chosen(cfg: DictConfig, words: Sequence[str], *, first: bool) -> Recipe:
    """Return the recipe for a command line: from stored choices, or from new ones that the first rank makes.

    Args:
        cfg: composed from the command line, without choices.
        words: of the command line.
        first: whether this rank makes the choices; other ranks wait.

    Raises:
        UserError: nothing fits, or the first rank does not write its choices.
    """
    minutes = cfg.budget.minutes
    check_given("dinoseg.autotune.choice.Chooser", {"minutes": minutes}, {"minutes": "budget.minutes"})
    given = typed_keys(words)
    path = _path(cfg, given)
    source = f"as they were chosen before, since {path} holds them (remove it to choose anew)"
    if first:
        # concurrent commands, such as the jobs of a sweep over seeds, wait and reuse the choices
        with _one_at_a_time(path):
            kept = read_choices(path)
            if kept is None:
                most = f"timing candidates ends {60 * CHOOSING * minutes:.0f} s from now at the latest"
                _tell(f"looks at data and machine: budget.minutes={minutes:g} count from now, {most}")
                trying = [*words, *_shared()]
                joined = ranks_here() if _shared() else 0
                with _alone():
                    compose = partial(_composed, trying, "trying")
                    chooser = Chooser(compose, given, minutes, _tell, joined=joined)
                    choices = chooser.choose()
                kept, source = (chooser.about, choices), "chosen now"
                _keep(path, *kept)
    else:
        kept = read_choices(path) or _awaited(path, cfg.engine.rank_timeout)
    about, choices = kept
    choices, taken = left_of(choices, given)  # the file stores all: other keys may be typed next
    about += f"; as given: {', '.join(taken)}" if taken else ""
    if first:
        print(printable(f"hparam=auto: {about}; {source}:\n\n" + "\n".join(told(choices))))
    typed = [word for word in words if _root(word.lstrip("+~").partition("=")[0]) not in ("budget", "hparam", "resume")]
    return Recipe(_composed(words, about, choices), recipe_text(about, choices), typed)


def _tell(doing: str) -> None:
    print(printable(f"hparam=auto {doing}"), file=sys.stderr)


def _composed(words: Sequence[str], about: str, choices: Sequence[Choice]) -> DictConfig:
    return composed_with(words, NAME, recipe_text(about, choices), known_as=AUTO)


def _path(cfg: DictConfig, given: frozenset[str]) -> Path:
    """Return the file that stores the choices, named by a hash of their inputs.

    The machine's current speed is not part of the hash.
    """
    data = [build.dataset(cfg, split, reduced=split == "train") for split in ("train", "val")]
    depends = {
        "version": __version__,
        "recipe": {key: value for key, value in recipe_of(config_description(cfg)).items() if key != "seed"},
        "given": sorted(key for key in given if _root(key) not in _OF_A_RUN and key.rpartition(".")[2] not in LENGTHS),
        "minutes": float(cfg.budget.minutes),
        "data": [each.fingerprint() if isinstance(each, PairDataset) else list(each.names) for each in data],
        "engine": {key: plain(cfg.engine)[key] for key in ("device", "precision", "cache", "devices", "sharding")},
        # ranks on several machines need the same file
        "machine": _shared() if _others_wait() else (platform.node(), count_cores()),
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    return Path(cfg.cache_dir).expanduser() / f"choices_{key[:16]}.json"


def _awaited(path: Path, seconds: float) -> tuple[str, list[Choice]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and (kept := read_choices(path)) is not None:
            return kept
        time.sleep(0.2)
    raise UserError(
        f"hparam=auto: the first rank has not written {path} within {seconds:g} s. See what it says; cache_dir "
        "and data have to be the same files for all ranks."
    )


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lock out processes that make the same choices; a no-op if the lock file cannot be written."""
    with ExitStack() as stack:
        with suppress(OSError):  # `_keep` reports it when it writes to the same folder
            stack.enter_context(locked(path.with_suffix(".lock")))
        yield


def _keep(path: Path, about: str, choices: Sequence[Choice]) -> None:
    try:
        write_choices(path, about, choices)
    except OSError as error:
        if _others_wait():
            raise UserError(
                f"hparam=auto: the choices cannot be kept in {path} ({error}), where the other ranks look for them. "
                "Make room there, or give a cache_dir that all ranks can write to."
            ) from error
        said = f"warning: the choices cannot be kept in {path} ({error}): the next run chooses anew."
        print(printable(said), file=sys.stderr)  # no log is open yet


def _shared() -> list[str]:
    """Return the override for the number of ranks that share a batch, if torchrun or Slurm started them."""
    return [f"engine.devices={os.environ['WORLD_SIZE']}"] if "WORLD_SIZE" in os.environ else []


def _others_wait() -> bool:
    """Return whether other ranks, started by torchrun or Slurm, wait for the choices of the first one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def _alone() -> Iterator[None]:
    """Remove the rank variables from the environment for the block, since a single process is timed."""
    before = {name: os.environ.pop(name) for name in _RANKS if name in os.environ}
    try:
        yield
    finally:
        os.environ |= before


def _root(key: str) -> str:
    return key.partition(".")[0]
