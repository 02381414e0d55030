"""The overview names every group, every option and the commands to start with."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dinoseg.__main__ import CONFIGS
from dinoseg.modes import help as mode

FILES = [path for path in Path(CONFIGS).glob("*/*.yaml") if path.parent.name not in ("hydra", "local")]


def listed():
    """Return group to options, as the overview prints them."""
    groups, group = {}, None
    for line in mode.overview().partition("Groups and their options")[2].splitlines()[1:]:
        found = re.fullmatch(r"  (\w+:)? +(.*)", line)
        group = found[1].rstrip(":") if found[1] else group
        groups.setdefault(group, []).extend(found[2].split())
    return groups


def test_every_group_and_option_is_listed_and_no_hidden_one():
    expected = {}
    for path in sorted(FILES):
        if not path.stem.startswith("_"):
            expected.setdefault(path.parent.name, []).append(path.stem)
    for family in sorted(path for path in (Path(CONFIGS) / "hparam").iterdir() if path.is_dir()):
        expected["hparam"] += [f"{family.name}/", *sorted(path.stem for path in family.glob("*.yaml"))]
    assert listed() == expected and len(expected) >= 10 and "sarrarp/" in expected["hparam"]
    hidden = [path.stem for path in FILES if path.stem.startswith("_")]
    assert hidden and not any(name in mode.overview().split() for name in hidden)


def test_it_fits_a_terminal():
    assert max(map(len, mode.overview().splitlines())) <= 120


@pytest.mark.heavy
def test_the_commands_it_shows_compose(compose):
    lines = re.findall(r"^ +python -m dinoseg (.*?)(?:   .*)?$", mode.overview(), re.MULTILINE)
    assert len(lines) >= 7 and "--version" in lines
    for line in [line for line in lines if line != "--version"]:
        words = [word for word in line.split() if "=" in word]
        cfg = compose(*[word if "[" in word else word.partition(",")[0] for word in words])
        assert cfg.choices.mode in listed()["mode"] and f"mode={cfg.choices.mode}" in words


def test_help_of_training_lists_keys_of_other_groups_and_describes_commands(compose):
    lines = mode.of_mode("train").splitlines()
    assert max(map(len, lines[: lines.index("") - 1])) <= 120
    below = lines[lines.index("Keys of other groups that are set most often (a recipe may set others):") + 1 :]
    listed_keys = [line.split("=")[0].strip() for line in below[: below.index("")]]
    assert {"trainer.steps", "data.batch_size", "resolution.crop", "optim.optimizer.lr"} <= {*listed_keys}
    cfg = compose("data.root=DIR", "data.classes=[a,b]")
    for line in below[: below.index("")]:
        key, _, value = line.partition("#")[0].strip().partition("=")
        assert yaml.safe_load(value) == OmegaConf.select(cfg, key), line
    assert any("choose a recipe for it, and train that" in line for line in lines)
    assert "Keys of other groups" not in mode.of_mode("eval")


def test_a_new_option_appears_by_itself(monkeypatch, tmp_path):
    for name in ("head/linear.yaml", "head/new.yaml", "head/_base.yaml", "local/default.yaml", "hydra/run.yaml"):
        (tmp_path / "cfg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cfg" / name).touch()
    monkeypatch.setattr(mode, "CONFIGS", tmp_path / "cfg")
    assert listed() == {"head": ["linear", "new"]}


def test_the_mode_prints_it(capsys):
    mode.show(None, out_dir=None)
    assert capsys.readouterr().out == mode.overview() + "\n"


@pytest.mark.parametrize("options", [[], ["one"], ["a" * 60, "b" * 60, "c" * 60]])
def test_wrapping_keeps_every_option(options):
    assert mode._wrapped([options, options]).split() == 2 * options
