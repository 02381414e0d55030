"""Every mode says which keys it reads; what is typed for another is said to have no effect."""

import importlib.util
import re
from pathlib import Path

import pytest
from command_line import SMALL, call, write_data
from config_files import main_choices, options, read

from dinoseg.runs.unread import warn_not_read


def test_a_mode_reads_groups_and_keys_that_there_are(compose):
    cfg = compose("data.root=x", "data.classes=[a,b]")
    for mode in set(options("mode")) - {"help"}:
        names = read("mode", mode)["reads"]
        assert len(set(names)) == len(names)
        for name in names:
            assert name.split(".")[0] in {*cfg, *main_choices()}, name
            assert "." not in name or name.split(".")[1] in cfg[name.split(".")[0]]


def roots_of(module, seen):
    """Return the root keys that a mode's module reads, with those of the modes it imports and of what resumes."""
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    seen.add(module)
    called = set(re.findall(r"from (dinoseg\.modes\.\w+) import", text)) - seen
    called |= {"dinoseg.runs.trained"} - seen if "load_trained" in text else set()
    found = set(re.findall(r"\bcfg\.(\w+)", text))
    return found.union(*(roots_of(each, seen) for each in called))


@pytest.mark.parametrize("mode", sorted(set(options("mode")) - {"help"}))
def test_a_mode_lists_each_key_that_its_code_reads(mode, compose):
    target, reads = read("mode", mode)["_target_"], read("mode", mode)["reads"]
    found = roots_of(target.rpartition(".")[0], set()) & set(compose()) - {"choices", "mode", "trust", "engine"}
    # where functions are shared
    idle = {"score": set(), "train": {"protocol", "tracker"}, "track": {"protocol", "inference"}}
    idle["export"] = idle["track"]
    idle = idle.get(mode, {"protocol"})
    assert found - idle <= {name.split(".")[0] for name in reads}
    assert ("resume" in reads) == ("finite_weights" in reads)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["mode=score", "protocol=ade20k", "reference=a", "data.classes=[a,b]", "data=idd", "hparam=demo"], None),
        (["data.batch_size=3", "hydra.run.dir=x", "mode.seed=1"], "data.batch_size=3"),
        (["++trainer.steps=3", "head=mlp", "data.reader.masks.format=ids"], "++trainer.steps=3, head=mlp"),
    ],
)
def test_what_a_mode_does_not_read_is_named(tmp_path, capsys, words, named):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/overrides.txt").write_text("\n".join(words) + "\n")
    warn_not_read(tmp_path, "mode=score", read("mode", "score")["reads"])
    said = capsys.readouterr().err
    assert said.count("\n") == bool(named) and (
        not named or said.startswith(f"warning: No effect here: {named}. Beside")
    )


def test_each_command_says_what_it_does_not_read(tmp_path):
    write_data(tmp_path / "data")
    folders = ("reference=data/val/masks", "prediction=data/val/masks", "num_classes=2", "mode.workers=1")
    done = call(tmp_path, "mode=score", *folders, "trainer.steps=3")
    assert done.status == 0 and "No effect here: trainer.steps=3. Beside its own keys mode=score reads" in done.err
    assert "No effect" not in call(tmp_path, "mode=score", *folders).err
    assert "No effect here: loss=dice." in call(tmp_path, "mode=summary", *SMALL[:-2], "loss=dice").err
