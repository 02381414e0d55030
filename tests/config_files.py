"""What the config files on disk say, read without hydra."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import yaml

from dinoseg.__main__ import CONFIGS
from dinoseg.config.plain import walk

FOLDER = Path(CONFIGS)
GROUPS = sorted(
    path.name for path in FOLDER.iterdir() if path.is_dir() and path.name not in ("hydra", "local", "runtime")
)


def options(group):
    paths = [path.relative_to(FOLDER / group) for path in (FOLDER / group).glob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in paths if not path.stem.startswith("_"))


@cache
def _parse_option(group, option):
    return yaml.safe_load((FOLDER / group / f"{option}.yaml").read_text()) or {}


def read(group, option):
    return deepcopy(_parse_option(group, option))  # tests change what they get


def read_node(group, option):
    """Return what an option's file sets in the node of its group."""
    text = (FOLDER / group / f"{option}.yaml").read_text()
    return read(group, option).get(group, {}) if "@package _global_" in text else read(group, option)


def read_whole(group, option):
    """Return what an option's file says, over what those say that it starts from."""
    entries = [entry for entry in read(group, option).get("defaults", []) if entry != "_self_"]
    bases = [read_whole(*base) for entry in entries for base in _bases(group, entry)]
    return {key: value for whole in (*bases, read_node(group, option)) for key, value in whole.items()}


@cache
def written_targets(group, option):
    """Count the `_target_` lines of an option's file and of those it starts from; its own first replaces theirs."""
    entries = [entry for entry in read(group, option).get("defaults", []) if entry != "_self_"]
    bases = [base for entry in entries for base in _bases(group, entry)]
    here = [entry for entry in entries if isinstance(entry, str) or "@" not in next(iter(entry))]
    same_place = [base for entry in here for base in _bases(group, entry)]
    own = len(re.findall(r"^\s*_target_:", (FOLDER / group / f"{option}.yaml").read_text(), re.MULTILINE))
    places = {path for path, _ in nodes(read_node(group, option))}
    replaced = sum(path in places for base in same_place for path, _ in nodes(read_node(*base)))
    return own + sum(written_targets(*base) for base in bases) - replaced


def _bases(group, entry):
    """Yield group and option of what an entry of a defaults list starts from; an override only chooses."""
    if isinstance(entry, str):
        yield group, entry.partition("@")[0]
        return
    for key, option in entry.items():
        # a mode's further groups: see groups_of
        if not key.startswith("override ") and (group != "mode" or str(option).startswith("_")):
            path = key.removeprefix("optional ").split("@")[0]
            yield path.strip("/") if path.startswith("/") else f"{group}/{path}", option


def written_choices(hparam):
    """Return group to option, as main.yaml and a recipe's files say."""
    chosen = {}
    for base in read("hparam", hparam).get("defaults", []):
        if isinstance(base, str):
            chosen |= {} if base == "_self_" else written_choices(base.removeprefix("/hparam/"))
        else:
            groups = {key.removeprefix("override /"): value for key, value in base.items()}
            chosen |= {group: value for group, value in groups.items() if "/" not in group}
    return chosen


def groups_of(mode):
    """Return group to option, as the files of a mode compose them; None for an empty list."""
    found = {}
    for entry in read("mode", mode).get("defaults", []):
        if isinstance(entry, str):
            found |= {} if entry == "_self_" else groups_of(entry)
            continue
        for key, option in entry.items():
            group = key.removeprefix("optional ").strip("/").partition("@")[0]
            option = found["data"] if option == "${data}" else option
            if not key.startswith("optional ") or option in options(group):
                found[group] = next(iter(option), None) if isinstance(option, list) else option
    return found


@cache
def main_choices(mode="help"):
    """Return group to option, as main.yaml and the files of a mode say."""
    chosen = {group: option for group, option in groups_of(mode).items() if option is not None}
    return {"mode": mode, "hparam": "base", **chosen}


def mode_of(group):
    """Return a mode that composes a group: a training if it can."""
    return next(mode for mode in ("train", *options("mode")) if group in groups_of(mode))


def mode_for(hparam):
    """Return the mode that a recipe is for: a training, or an evaluation if it chooses a tracker."""
    return "train" if groups_of("train").keys() >= written_choices(hparam).keys() - {"hparam"} else "eval"


def required_overrides(choice):
    """Return what only the user can know: here stands a value for it."""
    data = choice.get("data", "folder")
    own_classes = data.partition("_")[0] in ("folder", "coco", "labelme", "yolo")
    own_things = own_classes and "_" in data  # objects
    return [
        "data.root=.",
        *(["data.classes=[dark,bright]"] if own_classes else []),
        *(["data.things=[bright]"] if own_things else []),
        *(["backbone.name=test_vit"] if choice.get("backbone") == "timm" else []),
        *(["backbone.weights=random"] if choice.get("backbone", "").startswith("surgenet") else []),
        *(["head.weights=FILE"] if choice.get("head") == "mask2former_meta" else []),
    ]


def nodes(node, path=""):
    """Yield path and content of every `_target_` node."""
    for steps, value in walk(node, (path,) if path else ()):
        if isinstance(value, dict) and "_target_" in value:
            yield ".".join(map(str, steps)), value
