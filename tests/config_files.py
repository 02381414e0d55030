"""What the config files on disk say, read without hydra."""

import re
from functools import cache
from pathlib import Path

import yaml

from dinoseg.__main__ import CONFIGS

FOLDER = Path(CONFIGS)
GROUPS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name not in ("hydra", "local"))


def options(group):
    paths = [path.relative_to(FOLDER / group) for path in (FOLDER / group).glob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in paths if not path.stem.startswith("_"))


@cache
def read(group, option):
    return yaml.safe_load((FOLDER / group / f"{option}.yaml").read_text()) or {}


def read_whole(group, option):
    """Return what an option's file says, over what those say that it starts from."""
    entries = [entry for entry in read(group, option).get("defaults", []) if entry != "_self_"]
    bases = [read_whole(*base) for entry in entries for base in _bases(group, entry)]
    return {key: value for whole in (*bases, read(group, option)) for key, value in whole.items()}


@cache
def written_targets(group, option):
    """Count the `_target_` lines of an option's file and of those it starts from; its own first replaces theirs."""
    bases = [
        base for entry in read(group, option).get("defaults", []) if entry != "_self_" for base in _bases(group, entry)
    ]
    own = len(re.findall(r"^\s*_target_:", (FOLDER / group / f"{option}.yaml").read_text(), re.MULTILINE))
    places = {path for path, _ in nodes(read(group, option))}
    replaced = sum(path in places for base in bases for path, _ in nodes(read(*base)))
    return own + sum(written_targets(*base) for base in bases) - replaced


def _bases(group, entry):
    """Yield group and option of what an entry of a defaults list starts from; an override only chooses."""
    if isinstance(entry, str):
        yield group, entry
        return
    for key, option in entry.items():
        if not key.startswith("override "):
            path = key.split("@")[0]
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


@cache
def main_choices():
    entries = yaml.safe_load((FOLDER / "main.yaml").read_text())["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    # of a group that takes several options, the only default
    return {group: option[0] if isinstance(option, list) else option for group, option in pairs if group in GROUPS}


def needed(choice):
    """Return what only the user can know: here stands a value for it."""
    own_classes = choice.get("data", main_choices()["data"]) in ("folder", "coco", "labelme")
    return [
        "data.root=.",
        *(["data.classes=[dark,bright]"] if own_classes else []),
        *(["backbone.name=test_vit"] if choice.get("backbone") == "timm" else []),
        *(["backbone.weights=random"] if choice.get("backbone", "").startswith("surgenet") else []),
        *(["head.weights=FILE"] if choice.get("head") == "mask2former_meta" else []),
    ]


def nodes(node, path=""):
    """Yield path and content of every `_target_` node."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from nodes(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from nodes(value, f"{path}.{number}")
