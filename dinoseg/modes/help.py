"""mode=help and --help: every group, every option, and the commands to start with."""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from dinoseg.config.options import config_folders, groups_of, has_options, option_files, options_in

CONFIGS = Path(str(files("dinoseg"))) / "cfg"
USAGE = """\
dinoseg turns DINO backbones into segmenters. Docs: docs/index.md; first steps: docs/first_training.md.

usage: python -m dinoseg mode=MODE [hparam=RECIPE] [GROUP=OPTION ...] [KEY=VALUE ...]
"""
COMMANDS = """\
  python -m dinoseg mode=doctor data=folder data.root=DIR 'data.classes=[background,leaf]'
                                                                     validate your own dataset
  python -m dinoseg mode=train hparam=auto budget.minutes=30 data=folder data.root=DIR 'data.classes=[background,leaf]'
                                                                     choose a recipe for it, and train that
  python -m dinoseg mode=train data=folder data.root=DIR 'data.classes=[background,leaf]' adapter=lora
                                                                     train by your own settings
  python -m dinoseg mode=prepare data=sarrarp data.root=DIR          unpack a dataset as downloaded
  python -m dinoseg mode=plan hparam=sarrarp_lora data.root=DIR      estimate memory, and what makes it fit
  python -m dinoseg mode=bench hparam=sarrarp_lora data.root=DIR     measure training speed
  python -m dinoseg mode=probe hparam=camvid data.root=DIR           linear probe of each block, in minutes
  python -m dinoseg mode=train hparam=sarrarp_lora data.root=DIR     train a recipe
  python -m dinoseg mode=train hparam=sarrarp_lora data.root=DIR resume=auto
                                                                     resume the unfinished run of this recipe
  python -m dinoseg -m mode=train hparam=sarrarp_lora head=linear,mlp adapter.rank=8,16
                                                                     a sweep, with a table at the end
  python -m dinoseg mode=eval resume=RUN                             score a run folder or checkpoint
  python -m dinoseg mode=score protocol=sar_rarp50 reference=DIR prediction=DIR
                                                                     official scores of folders, without a model
  python -m dinoseg mode=predict resume=RUN input=PATH               image, folder, glob or video
  python -m dinoseg mode=compare 'runs=[EVALUATION,EVALUATION]'      compare evaluations, with confidence intervals
  python -m dinoseg mode=export export=safetensors resume=RUN        one file, for dinoseg.load(FILE) in Python
  python -m dinoseg mode=export export=onnx resume=RUN               an ONNX graph (keys: export=onnx --help)
  python -m dinoseg mode=app resume=RUN                              try it in the browser
  python -m dinoseg mode=serve resume=RUN                            an HTTP endpoint
  python -m dinoseg mode=track input=VIDEO labels=MASK               track objects from the first frame's mask
  python -m dinoseg mode=render data=sarrarp data.root=DIR           render a synthetic dataset
  python -m dinoseg mode=summary hparam=sarrarp_lora                 parameters by part, no weights needed
  python -m dinoseg mode=train --help                                the keys of a mode, with their defaults
  python -m dinoseg head=mlp --help                                  keys of an option
  python -m dinoseg mode=train hparam=sarrarp_lora --cfg job         print the composed config
  python -m dinoseg --version                                        versions of dinoseg, torch, CUDA and Python
"""
_TRAINING_KEYS = {  # config files, and their keys that `mode=train --help` lists too
    "trainer/supervised": (
        *("trainer.steps", "trainer.epochs", "trainer.val_every", "trainer.save_every", "trainer.max_minutes"),
        *("trainer.accumulate", "trainer.ema"),
    ),
    "data/_common": ("data.batch_size",),
    "main": ("resolution.crop", "resolution.scale", "seed"),
    "head/linear": ("head.lr",),
    "adapter/full": ("adapter.lr",),
    "optim/adamw": (
        *("optim.optimizer.lr", "optim.optimizer.weight_decay", "optim.schedule.kind", "optim.schedule.warmup"),
    ),
}
_COLUMN = 11  # width of a group's name with colon and space
# keys in config files that users do not set
_NO_KEYS = ("defaults", "resume_from", "keeps_folder", "resumes_with", "paths", "check", "sweep_end")
_FURTHER = "`--help` alone shows all modes, groups and options; `--cfg job` prints all keys of this command line."


def overview(further: Sequence[Path] = ()) -> str:
    """Return the help text: commands, then every config group with its options.

    Args:
        further: further folders of config groups, in addition to the shipped one.
    """
    lines = [USAGE, *_commands(), "", "Groups and their options (choose with GROUP=OPTION):"]
    indent = " " * (_COLUMN + 2)
    for name in sorted({path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/**/*.yaml")}):
        if name.partition("/")[0] not in ("hydra", "local", "runtime"):  # no mode composes these
            start = f"  {name + ':':{_COLUMN - 1}} "
            options = " ".join(options_in((CONFIGS, *further), name))
            lines += wrap(options, 110, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def _commands() -> list[str]:
    """Return the commands whose options exist."""
    commands = re.findall(r"^  .*(?:\n {15}.*)?$", COMMANDS, re.MULTILINE)  # some take two lines
    return [command for command in commands if has_options([CONFIGS], command)]


def help_for(arguments: Sequence[str]) -> str:
    """Return the help text of the mode that a command line names, else of its options, else the overview."""
    folders = config_folders(arguments, CONFIGS)
    chosen = [
        (group, option)
        for group, _, options in (word.partition("=") for word in arguments)
        for option in options.strip("[]").split(",")
        if option in options_in(folders, group) and (group, option) != ("mode", "help")
    ]
    mode = dict(chosen).get("mode")
    if mode is not None:
        return of_mode(mode, folders)
    texts = [of_option(group, option, folders) for group, option in chosen]
    return "\n\n".join((*texts, _FURTHER)) if texts else overview(folders[1:])


def of_option(group: str, option: str, folders: Sequence[Path]) -> str:
    """Return the description and the keys of a group's option.

    Args:
        group: of the config.
        option: name of a file.
        folders: of config groups, the shipped one first.
    """
    files = list(option_files(folders, group, option))
    found = re.findall(r"^#(?!.*@package) ?(.*)", files[-1].read_text("utf-8"), re.MULTILINE)
    return "\n".join((*found, f"Keys of {group}={option} and their defaults:", *_key_lines(files, group)))


def of_mode(mode: str, folders: Sequence[Path] = (CONFIGS,)) -> str:
    """Return the help text of one mode: its commands, and its keys with the comments of its config file.

    Args:
        mode: option of the group mode.
        folders: of config groups.
    """
    commands = [command for command in _commands() if f"mode={mode} " in command]
    files = [path for path in option_files(folders, "mode", mode) if not path.stem.startswith("_")]
    lines = ["\n".join(commands), "", f"Keys of mode={mode} and their defaults:", *_key_lines(files, "mode")]
    # options of a group with the mode's name, such as the formats of mode=export
    lines += [f"\n{of_option(mode, option, folders)}" for option in options_in(folders, mode)]
    if mode == "train":
        lines += ["", "Keys of other groups that are set most often (options and recipes may set others):"]
        for file, keys in _TRAINING_KEYS.items():
            group = file.partition("/")[0] if "/" in file else ""
            settable = _key_lines([CONFIGS / f"{file}.yaml"], group)
            lines += [line for line in settable if line.split("=")[0].strip() in keys]
    groups = ", ".join(groups_of(folders, mode))
    lines += ["", f"Its groups: {groups}"] if groups else []
    return "\n".join((*lines, "", _FURTHER)).lstrip("\n")


def _key_lines(files: Iterable[Path], group: str) -> list[str]:
    """Return a line `KEY=DEFAULT  # comment` for each key that an option's files set; later files override a key."""
    lines: dict[str, str] = {}
    for path in files:
        text = path.read_text("utf-8")
        above = [] if "@package _global_" in text or not group else group.split("/")
        lines |= dict(_settable_keys(yaml.compose(text, yaml.SafeLoader), above, text.splitlines()))
    return list(lines.values()) or ["  none"]


def _settable_keys(table: Any, above: Sequence[str], lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and line, as `_key_lines` returns it, of each key below a table of a YAML file that users may set.

    Args:
        table: node of a block of the file.
        above: names of the tables around it.
        lines: of the file.
    """
    for name, value in table.value if isinstance(table, yaml.MappingNode) else ():
        setting = lines[name.start_mark.line].partition(":")[2].strip()
        plain, _, comment = setting.partition("#")
        if name.value.startswith("_") or name.value in _NO_KEYS:
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _settable_keys(value, [*above, name.value], lines)
        elif plain and (comment or not plain.startswith("${")):
            key = ".".join((*above, name.value))
            yield key, f"  {key}={setting}"


def print_help(cfg: Any, *, out_dir: Path) -> None:
    """Print the overview."""
    print(overview())
