"""Every mode says which keys it reads; what is typed for another is said to have no effect."""

import re

import pytest
from code_reads import code
from command_line import SMALL, call, write_data
from config_files import GROUPS, main_choices, options, read, read_whole

from dinoseg.config.plain import texts_of
from dinoseg.experiment.unread import warn_not_read


def test_a_mode_reads_groups_and_keys_that_there_are(compose):
    cfg = compose("data.root=x", "data.classes=[a,b]")
    for mode in set(options("mode")) - {"help"}:
        names = read("mode", mode)["reads"]
        assert len(set(names)) == len(names)
        for name in names:
            assert name.split(".")[0] in {*cfg, *main_choices()}, name
            assert "." not in name or name.split(".")[1] in cfg[name.split(".")[0]]


FOR_ALL = {"mode", "hparam", "hydra", "local", "trust", "engine", "choices", "config_dirs"}
LAUNCH = {"heads", "lrs", "budget"}  # read before the mode's function is called
ELSEWHERE = {  # of another config, or in a function that the mode calls for something else
    "app": {"loss"},  # in saving a model, which the app does not do
    "bench": {"features", "finite_weights", "slots", "resume", "tracker"},
    "plan": {"features", "finite_weights", "slots", "inference", "resume", "tracker"},
    "compare": {"data", "seed", "resolution"},  # of the runs
    "export": {"loss"},  # of the checkpoint
    "probe": {"adapter", "num_classes"},  # num_classes: of the data set, not of mode=score
    "serve": {"loss"},  # in saving a model, too
    "track": {"inference"},  # made with the model, and not used
    "train": {"num_classes", "tracker"},  # tracker: of models without slots, which track in mode=eval and track
}


def pointers(node):
    """Return the root keys that interpolations at and below a node of a config file name."""
    return {name for text in map(str, texts_of(node)) for name in re.findall(r"\$\{(\w+)[.}]", text)}


def read_by_code(mode):
    """Return the root keys that a mode's code can read, with those that the nodes it reads point to."""
    starts = [read("mode", mode)["_target_"]]
    starts += [read("export", option)["_target_"] for option in options("export") if mode == "export"]
    keys = set().union(*(code().reads(start) for start in starts))
    if "trainer.task*" in keys:
        tasks = {read_whole("trainer", option)["task"]["_target_"] for option in options("trainer")}
        keys |= code().reads(*starts, *tasks)
    found = {key.partition(".")[0].rstrip("*") for key in keys} | pointers(read("mode", mode))
    for group, _, key in (key.partition(".") for key in keys):
        for option in options(group.rstrip("*")) if group.rstrip("*") in GROUPS else []:
            node = read_whole(group.rstrip("*"), option)
            value = node if group.endswith("*") else node.get(key.rstrip("*"))
            found |= pointers(value) if f"{group}{key}".endswith("*") or isinstance(value, str) else set()
    return found


@pytest.mark.parametrize("mode", sorted(set(options("mode")) - {"help"}))
def test_a_mode_lists_the_keys_that_its_code_reads_and_no_other(mode, compose):
    listed = {name.partition(".")[0] for name in read("mode", mode)["reads"]}
    found = read_by_code(mode) & ({*compose(), *main_choices()} - FOR_ALL)
    assert found - ELSEWHERE.get(mode, set()) <= listed
    assert listed - FOR_ALL <= found | (LAUNCH if "budget" in listed else set())
    assert ("resume" in listed) == ("finite_weights" in listed)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["mode=score", "protocol=ade20k", "reference=a", "data.classes=[a,b]", "data=idd", "hparam=demo"], None),
        (["data.batch_size=3", "hydra.run.dir=x", "mode.seed=1"], "data.batch_size=3"),
        (["++trainer.steps=3", "head=mlp", "data.reader.masks.format=ids"], "trainer.steps=3, head=mlp"),
    ],
)
def test_what_a_mode_does_not_read_is_named(tmp_path, capsys, words, named):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/overrides.txt").write_text("\n".join(words) + "\n")
    warn_not_read(tmp_path, "mode=score", read("mode", "score")["reads"])
    said = capsys.readouterr().err
    assert said.count("\n") == bool(named) and (
        not named or said.startswith(f"warning: No effect here: {named}. In addition")
    )


def test_each_command_says_what_it_does_not_read(tmp_path):
    write_data(tmp_path / "data")
    folders = ("reference=data/val/masks", "prediction=data/val/masks", "num_classes=2", "mode.workers=1")
    done = call(tmp_path, "mode=score", *folders, "trainer.steps=3")
    assert (
        done.status == 0
        and ("No effect here: trainer.steps=3. In addition to its own keys, mode=score reads") in done.err
    )
    assert "No effect" not in call(tmp_path, "mode=score", *folders).err
    assert "No effect here: loss=dice." in call(tmp_path, "mode=summary", *SMALL[:-2], "loss=dice").err
