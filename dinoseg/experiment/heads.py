"""Runs of several heads: parsing of `heads` and `lrs`, and the config of each head's own run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.grammar import write_value
from dinoseg.config.job import job_config
from dinoseg.config.plain import to_container
from dinoseg.experiment import resume
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import HEADS, RATES
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import LEARNING_RATES
from dinoseg.utils.wording import join_names, nearest

SOLO = "solo"  # key of a job's config: the config of each head's own run, by name
_CACHE = "engine.cache"  # off for several heads: their features are not cached, and cached ones are rounded
_ENTRY_KEYS = ("head", "name", "lr")  # keys of an entry of `heads` that are not passed to the head
_NAME = re.compile(r"\w[\w.+-]*")
_LONGEST_NAME = 100


class SoloRun(NamedTuple):
    """Config and command line of the run that a head would be by itself."""

    cfg: DictConfig
    words: list[str]  # words of its command line


class HeadRun(NamedTuple):
    """One head to train, with its settings and learning rate."""

    name: str
    option: str  # option of the group `head`
    keys: Mapping[str, Any]  # settings of the head
    rate: float | None  # None: the learning rate of its recipe


def named_heads(heads: Any, rates: Any) -> list[HeadRun]:
    """Return the heads of a config: each at every learning rate, except those with a rate of their own.

    Args:
        heads: options of `head`, or mappings `{head: OPTION, KEY: VALUE}` with keys of the head, `name` and `lr`.
        rates: learning rates; None: each head has that of its recipe.

    Raises:
        UserError: an entry or a rate is invalid, or two heads have the same name.
    """
    if not isinstance(heads, list) or not heads:
        raise UserError(f"heads={heads}: give a list of at least one head, such as heads=[linear,mlp,cnn].")
    if rates is not None and (not isinstance(rates, list) or not rates or not all(map(_is_rate, rates))):
        raise UserError(
            f"lrs={rates}: give a list of learning rates above 0 and at most {LEARNING_RATES.most}, such as "
            "lrs=[1e-3,1e-2], or null."
        )
    runs = []
    for entry in heads:
        option, settings = _parts(entry)
        keys = {key: value for key, value in settings.items() if key not in _ENTRY_KEYS}
        grid = [settings["lr"]] if "lr" in settings else rates or [None]
        for rate in grid:
            base = settings.get("name", option)
            name = f"{base}_{rate:g}" if len(grid) > 1 else base
            runs.append(HeadRun(name, option, keys, rate))
    names = [run.name for run in runs]
    if twice := [run for run in runs if names.count(run.name) > 1]:
        raise UserError(
            f"heads: {join_names(sorted({run.name for run in twice}))} occurs more than once. Give each a name, and "
            "list each of several lrs, which are part of the names, once: "
            f"'heads=[{{head:{twice[0].option},name:first}},{{head:{twice[1].option},name:second}}]'."
        )
    return runs


def _parts(entry: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the option of an entry of `heads`, and the entry as a mapping."""
    settings = {"head": entry} if isinstance(entry, str) else entry
    if not isinstance(settings, Mapping) or not isinstance(settings.get("head"), str):
        raise UserError(
            f"heads: {entry} is neither a head nor a head with settings. Write linear, or {{head: linear, lr: 1e-3}}."
        )
    name, rate = settings.get("name", settings["head"]), settings.get("lr", 1.0)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise UserError(f"heads: the name {name} is not a valid folder name. Use letters, digits and _ - + .")
    if not _is_rate(rate):
        raise UserError(
            f"heads: lr={rate} of {settings['head']} is not a learning rate. Give {LEARNING_RATES.rule}, such as 1e-3."
        )
    return settings["head"], settings


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value in LEARNING_RATES


def solo_builders(build: Builder) -> dict[str, Builder]:
    """Return the builder of each head's own run from that of a job, by name; empty for a job with one head."""
    return {name: Builder.of(config) for name, config in build.config.get(SOLO, {}).items()}


def solo_runs(cfg: DictConfig, words: Sequence[str], run: Path | None) -> dict[str, SoloRun]:
    """Return the run that each head of a job would be by itself, by name; empty for a job with one head.

    Args:
        cfg: config of the job, merged with that of the checkpoint that it resumes.
        words: the command line.
        run: the run folder to resume; None: a new run.

    Raises:
        UserError: a head is invalid, or the run to resume is not given by its folder.
    """
    given = to_container(cfg)
    if HEADS not in given["trainer"]:
        return {}
    heads = named_heads(given[HEADS], given.get(RATES))
    overrides = OverridesParser.create().parse_overrides(list(words))
    if run is not None:
        return _restore_runs(cfg, heads, overrides, run)
    if given["resume"] is not None:
        raise UserError(f"resume={given['resume']} holds several heads: give their run folder.")
    return _compose_runs(heads, overrides)


def with_solo_runs(cfg: DictConfig, runs: Mapping[str, SoloRun]) -> DictConfig:
    """Return the config of a job together with that of each head's own run."""
    return OmegaConf.merge(cfg, {SOLO: {name: to_container(run.cfg) for name, run in runs.items()}})  # type: ignore[return-value]


def _solo_words(head: HeadRun, overrides: Sequence[Override]) -> list[str]:
    """Return the command line of a head's own run, without the settings in its entry of `heads`."""
    left_out = (HEADS, RATES, "trainer", "resume", _CACHE)
    remaining = [str(word.input_line) for word in overrides if word.key_or_group not in left_out]
    rate = [] if head.rate is None else [f"optim.optimizer.lr={head.rate!r}"]
    return [*remaining, "trainer=supervised", f"head={head.option}", *rate, f"{_CACHE}=off"]


def _compose_runs(heads: Sequence[HeadRun], overrides: Sequence[Override]) -> dict[str, SoloRun]:
    """Compose the run of each head alone from the command line."""
    if typed := next((word for word in overrides if word.key_or_group == "head"), None):
        raise UserError(f"{typed.input_line} and heads both set the heads to train: give one of them.")
    options = [name for name in GlobalHydra.instance().config_loader().get_group_options("head") if name[0] != "_"]
    found = {}
    for head in heads:
        if head.option not in options:
            raise UserError(
                f"heads: {head.option} is unknown.{nearest(head.option, options)} Choose from {', '.join(options)}."
            )
        words = _solo_words(head, overrides)
        composed = compose("main", words, return_hydra_config=True)
        cfg = job_config(composed, composed.hydra)
        known = [str(key) for key in cfg.head if not str(key).startswith("_") and key != "lr"]
        if unknown := [key for key in head.keys if key not in known]:
            raise UserError(
                f"heads: {unknown[0]} is not a key of head={head.option}. It has {', '.join(known)}; name and lr are "
                "keys of every entry."
            )
        cfg.head = OmegaConf.merge(cfg.head, head.keys)
        found[head.name] = SoloRun(
            cfg, [*words, *(f"head.{key}={write_value(value)}" for key, value in head.keys.items())]
        )
    return found


def _restore_runs(
    cfg: DictConfig, heads: Sequence[HeadRun], overrides: Sequence[Override], run: Path
) -> dict[str, SoloRun]:
    """Return the run of each head in a run's checkpoint, changed by the command line."""
    path = run / checkpoint.FOLDER / "last.safetensors"
    info = checkpoint.describe(path)
    if [info["config"].get(key) for key in (HEADS, RATES)] != [to_container(cfg).get(key) for key in (HEADS, RATES)]:
        raise UserError(
            f"resume={run}: this run has heads={info['config'].get(HEADS)} and lrs={info['config'].get(RATES)}. Leave "
            "both out, or train other heads in a new run."
        )
    remaining = [word for word in overrides if word.key_or_group not in ("trainer", HEADS, RATES)]
    words = [str(word.input_line) for word in remaining if word.key_or_group != "resume"]
    alone: Any = OmegaConf.merge(cfg, {HEADS: None, RATES: None})
    return {
        head.name: SoloRun(
            resume.without_resume(resume.merge(alone, remaining, path, head_description(info, head.name))), words
        )
        for head in heads
    }


def head_description(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the description of a head's own run from that of the checkpoint of all heads.

    Raises:
        UserError: the checkpoint has no such head.
    """
    if name not in info.get("heads", {}):
        raise UserError(f"resume: the checkpoint has no head {name}. Choose the run folder of trainer=multi_head.")
    head = info["heads"][name]
    whole = {key: value for key, value in info["config"].items() if key not in (HEADS, RATES)}
    return {**info, **head, "config": {**whole, **head["config"]}}
