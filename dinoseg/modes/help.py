"""mode=help and --help: every group, every option, and the commands to start with."""

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import wrap
from typing import Any

from dinoseg.config.options import config_folders, groups_of, option_files, options_in

CONFIGS = Path(str(files("dinoseg"))) / "cfg"
COMMANDS = """\
dinoseg turns DINO backbones into segmenters. Docs: docs/index.md; first steps: docs/first_training.md.

usage: python -m dinoseg mode=MODE [hparam=RECIPE] [GROUP=OPTION ...] [KEY=VALUE ...]

  python -m dinoseg mode=doctor data=folder data.root=DIR data.classes=[background,leaf]
                                                                     validate your own dataset
  python -m dinoseg mode=train hparam=auto budget.minutes=30 data=folder data.root=DIR data.classes=[background,leaf]
                                                                     choose a recipe for it, and train that
  python -m dinoseg mode=train data=folder data.root=DIR data.classes=[background,leaf] adapter=lora
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
  python -m dinoseg mode=compare runs=[EVALUATION,EVALUATION]        compare evaluations, with confidence intervals
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

Groups and their options (choose with GROUP=OPTION):
"""
_TRAINING_KEYS = {  # config files, and their keys that `mode=train --help` lists too
    "trainer/supervised": ("steps", "epochs", "val_every", "save_every", "max_minutes", "accumulate", "ema"),
    "data/_common": ("batch_size",),
    "main": ("resolution.crop", "resolution.scale", "seed"),
    "head/linear": ("lr",),
    "adapter/full": ("lr",),
    "optim/adamw": ("optimizer.lr", "optimizer.weight_decay", "schedule.kind", "schedule.warmup"),
}
_COLUMN = 11  # width of a group's name with colon and space
# keys in config files that users do not set
_NO_KEYS = ("defaults", "resume_from", "keeps_folder", "resumes_with", "check")
_FURTHER = "`--help` alone shows all modes, groups and options; `--cfg job` prints all keys of this command line."


def overview(further: Sequence[Path] = ()) -> str:
    """Return the help text: commands, then every config group with its options.

    Args:
        further: further folders of config groups, in addition to the shipped one.
    """
    folders = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/**/*.yaml")}
    names = sorted(name for name in folders if name.partition("/")[0] not in ("hydra", "local"))
    groups = {name: options_in((CONFIGS, *further), name) for name in names}
    lines = []
    indent = " " * (_COLUMN + 2)
    for name, options in groups.items():
        start = f"  {name + ':':{_COLUMN - 1}} "
        lines += wrap(" ".join(options), 110, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
    return COMMANDS + "\n".join(lines)


def help_for(arguments: Sequence[str]) -> str:
    """Return the help text of the mode that a command line names, else of its options, else the overview."""
    folders = config_folders(arguments, CONFIGS)
    modes = [word.removeprefix("mode=") for word in arguments if word.startswith("mode=") and word != "mode=help"]
    if modes and modes[-1] in options_in(folders, "mode"):
        return of_mode(modes[-1], folders)
    places = [folder for folder in folders if folder.is_dir()]
    groups = {path.name for folder in places for path in folder.iterdir() if path.is_dir()} - {"mode", "local"}
    words = [word.partition("=")[::2] for word in arguments]
    chosen = [(group, option) for group, options in words for option in options.strip("[]").split(",")]
    texts = [text for group, option in chosen if group in groups and (text := of_option(group, option, folders))]
    return "\n\n".join((*texts, _FURTHER)) if texts else overview(folders[1:])


def of_option(group: str, option: str, folders: Sequence[Path]) -> str:
    """Return the description and the keys of a group's option; "" if there is none.

    Args:
        group: of the config.
        option: name of a file.
        folders: of config groups, the shipped one first.
    """
    if option not in options_in(folders, group):
        return ""
    texts = [path.read_text("utf-8") for path in option_files(folders, group, option)]
    comments = [line for line in texts[-1].splitlines() if line.startswith("#") and "@package" not in line]
    lines = _key_lines(option_files(folders, group, option), group) or ["  none"]
    return "\n".join(
        (*(line.removeprefix("# ") for line in comments), f"Keys of {group}={option} and their defaults:", *lines)
    )


def of_mode(mode: str, folders: Sequence[Path] = (CONFIGS,)) -> str:
    """Return the help text of one mode: its commands, and its keys with the comments of its config file.

    Args:
        mode: option of the group mode.
        folders: of config groups.
    """
    lines = COMMANDS.splitlines()
    described = zip(lines, [*lines[1:], ""], strict=True)  # the description of a long command is on the next line
    commands = [
        part
        for line, below in described
        if f"mode={mode} " in line
        for part in ([line, below] if below.startswith(15 * " ") else [line])
    ]
    files = [*option_files(folders, "mode", mode)]
    keys = _key_lines([path for path in files if not path.stem.startswith("_")], "mode") or ["  none"]
    title = f"Keys of mode={mode} and their defaults:"
    groups = ", ".join(groups_of(folders, mode))
    first, also = [*commands, ""] if commands else [], [f"Its groups: {groups}", ""] if groups else []
    # options of a group with the mode's name, such as the formats of mode=export
    formats = [f"\n{of_option(mode, option, folders)}" for option in options_in(folders, mode)]
    return "\n".join((*first, title, *keys, *formats, *_of_training(mode), "", *also, _FURTHER))


def _of_training(mode: str) -> list[str]:
    """Return the most common keys of other groups for mode=train, and nothing for other modes."""
    if mode != "train":
        return []
    lines = ["", "Keys of other groups that are set most often (options and recipes may set others):"]
    for file, keys in _TRAINING_KEYS.items():
        group = f"{file.partition('/')[0]}." if "/" in file else ""
        found = {line.partition(":")[0]: line for line in _settable_keys((CONFIGS / f"{file}.yaml").read_text("utf-8"))}
        for key in keys:
            setting, _, comment = found[key].replace(": ", "=", 1).partition("#")
            line = f"  {group + setting.strip().replace(', ', ','):34}"
            lines.append(f"{line} # {comment.strip()}" if comment else line.rstrip())
    return lines


def _key_lines(files: Iterable[Path], group: str) -> list[str]:
    """Return a line `KEY=DEFAULT  # comment` for each key that an option's files set; later files override a key."""
    lines: dict[str, str] = {}
    for path in files:
        text = path.read_text("utf-8")
        prefix = "" if "@package _global_" in text else f"{group}."
        for line in _settable_keys(text):
            key = f"{prefix}{line.partition(':')[0]}"
            if key.removeprefix("mode.") not in _NO_KEYS:
                lines[key] = f"  {prefix}{line.replace(': ', '=', 1)}"
    return list(lines.values())


def _settable_keys(text: str) -> list[str]:
    """Return a line `key: value  # comment` for each key that users may set, with the names of the tables around it."""
    lines: list[str] = []
    tables: list[tuple[int, str]] = []  # indentation and name of the tables around a line
    for line in text.splitlines():
        found = re.match(r"( *)(\w+):(?: +(.*))?$", line)
        if not found:
            continue
        depth, key, value = len(found[1]), found[2], found[3] or ""
        tables = [(indent, name) for indent, name in tables if indent < depth]
        names = [*(name for _, name in tables), key]
        plain, _, comment = (part.strip() for part in value.partition("#"))
        if not plain:
            tables.append((depth, key))
        elif names[0] not in _NO_KEYS and not key.startswith("_") and (comment or not plain.startswith("${")):
            lines.append(f"{'.'.join(names)}: {value}")
    return lines


def show(cfg: Any, *, out_dir: Path) -> None:
    """Print the overview."""
    print(overview())
