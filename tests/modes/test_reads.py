"""Every mode composes the groups and keys that its code reads, and no others."""

import re

import pytest
from code_reads import code
from config_files import FOLDER, GROUPS, groups_of, main_choices, options, read_node, read_whole
from omegaconf import OmegaConf

from dinoseg.config.plain import texts_of

FOR_ALL = {"mode", "hparam", *OmegaConf.load(FOLDER / "main.yaml")}  # settings of every mode
WHOLE = ("bench", "doctor", "plan", "probe", "summary", "train")  # whole recipes, also of groups that they do not read
# with trainer=distil, hparam=auto and metric=[NAME]; a mode without the group task reads class ids
BY_OPTION = {"teacher", "budget", "metric", "task"}
ELSEWHERE = {  # of another config, or in a function that the mode calls for something else
    "app": {"loss"},  # loss: in saving a model, which the app does not do
    "bench": {"slots", "tracker"},
    "compare": {"data"},  # of the runs
    "export": {"loss"},  # of the checkpoint
    "eval": {"trainer"},  # of the checkpoint
    "plan": {"slots"},
    "serve": {"loss"},  # in saving a model, too
    "train": {"slots", "tracker"},  # slots: with trainer=slots; tracker: of mode=eval and mode=track
}


def pointers(node):
    """Return the root keys that interpolations at and below a node of a config file name."""
    return {name for text in map(str, texts_of(node)) for name in re.findall(r"\$\{(\w+)[.}]", text)}


def read_by_code(mode):
    """Return the root keys that a mode's code can read, with those that the nodes it reads point to."""
    starts = [read_node("mode", mode)["_target_"]]
    starts += [read_node("export", option)["_target_"] for option in options("export") if mode == "export"]
    if mode == "eval":  # datasets and heads name what scores them in another way
        nodes = [read_whole(group, option).get("scoring") for group in ("data", "head") for option in options(group)]
        starts += [node["_target_"] for node in nodes if node]
    keys = set().union(*(code().reads(start) for start in starts))
    if "trainer.method*" in keys:
        tasks = {read_whole("trainer", option)["method"]["_target_"] for option in options("trainer")}
        keys |= code().reads(*starts, *tasks)
    found = {key.partition(".")[0].rstrip("*") for key in keys} | pointers(read_node("mode", mode))
    for group, _, key in (key.partition(".") for key in keys):
        for option in options(group.rstrip("*")) if group.rstrip("*") in GROUPS else []:
            node = read_whole(group.rstrip("*"), option)
            value = node if group.endswith("*") else node.get(key.rstrip("*"))
            found |= pointers(value) if f"{group}{key}".endswith("*") or isinstance(value, str) else set()
    return found


@pytest.fixture(scope="module")
def keys(compose):
    """Return mode to the root keys that it composes."""
    found = {mode: {*compose(f"mode={mode}")} - {"choices", "config_dirs"} for mode in options("mode")}
    return {**found, "prepare": found["prepare"] | {"prepare"}, "render": found["render"] | {"render"}}  # by dataset


@pytest.mark.parametrize("mode", sorted(set(options("mode")) - {"help"}))
def test_mode_composes_exactly_the_keys_its_code_reads(mode, keys):
    found = read_by_code(mode) & (set().union(*keys.values()) | {*GROUPS})
    assert found - FOR_ALL - BY_OPTION - ELSEWHERE.get(mode, set()) <= keys[mode]
    assert ELSEWHERE.get(mode, set()) <= found - keys[mode]
    assert mode in WHOLE or keys[mode] - FOR_ALL <= found


def test_groups_are_those_of_some_mode():
    assert {group for mode in options("mode") for group in groups_of(mode)} | {"mode", "hparam"} >= {*GROUPS} - {
        *("prepare", "render")  # chosen by the dataset
    }
    assert not {"tracker", "slots", "protocol", "export", "prepare", "render"} & {*main_choices("train")}
