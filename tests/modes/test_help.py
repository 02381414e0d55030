"""The overview names every group, every option and the commands to start with."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dinoseg.__main__ import CONFIGS
from dinoseg.config.options import existing_choices, has_options, options_of
from dinoseg.modes import help as mode

FILES = [path for path in Path(CONFIGS).glob("*/*.yaml") if path.parent.name not in ("hydra", "local", "runtime")]


def listed_options():
    """Return group to options, as the overview prints them."""
    groups = {}
    group = None
    for line in mode.overview().partition("Groups and their options")[2].splitlines()[1:]:
        found = re.fullmatch(r"  ([\w/]+:)? +(.*)", line)
        group = found[1].rstrip(":") if found[1] else group
        groups.setdefault(group, []).extend(found[2].split())
    return groups


def test_every_group_and_option_is_listed_and_no_hidden_one():
    expected = {}
    for path in sorted(Path(CONFIGS).glob("*/**/*.yaml")):
        group = path.parent.relative_to(CONFIGS).as_posix()
        if not path.stem.startswith("_") and group.partition("/")[0] not in ("hydra", "local", "runtime"):
            expected.setdefault(group, set()).add(path.stem)
    assert listed_options().keys() == expected.keys() and len(expected) >= 10
    for group, names in listed_options().items():
        assert len(names) == len({*names}) and {*names} == expected[group]
    assert max(map(len, mode.overview().splitlines())) <= 120  # it fits a terminal
    hidden = [path.stem for path in FILES if path.stem.startswith("_")]
    assert hidden and not any(name in mode.overview().split() for name in hidden)


@pytest.mark.heavy
def test_the_commands_it_shows_compose(compose):
    lines = re.findall(r"^ +python -m dinoseg (.*?)(?:   .*)?$", mode.overview(), re.MULTILINE)
    assert len(lines) >= 7 and "--version" in lines
    for line in [line for line in lines if line.startswith(("mode=", "-m mode="))]:
        words = [word for word in shlex.split(line) if "=" in word]
        cfg = compose(*[word if "[" in word else word.partition(",")[0] for word in words])
        assert cfg.choices.mode in listed_options()["mode"] and f"mode={cfg.choices.mode}" in words


def test_training_help_lists_keys_of_groups_and_commands(compose):
    lines = mode.of_mode("train").splitlines()
    assert max(map(len, lines[: lines.index("") - 1])) <= 120
    heading = "Keys of other groups that are set most often (options and recipes may set others):"
    below = lines[lines.index(heading) + 1 :]
    listed_keys = [line.split("=")[0].strip() for line in below[: below.index("")]]
    rates = {"optim.optimizer.lr", "head.lr", "adapter.lr"}
    assert {"trainer.steps", "data.batch_size", "resolution.crop", *rates} <= {*listed_keys}
    groups = next(line for line in lines if line.startswith("Its groups: ")).partition(": ")[2].split(", ")
    assert {"backbone", "head", "trainer"} <= {*groups} and len(groups) == len({*groups})
    cfg = compose("data.root=DIR", "data.classes=[a,b]", "adapter=full")
    for line in below[: below.index("")]:
        key, _, value = line.partition("#")[0].strip().partition("=")
        assert yaml.safe_load(value) == OmegaConf.select(cfg, key), line
    assert any("choose a recipe for it, and train that" in line for line in lines)
    assert "Keys of other groups" not in mode.of_mode("eval")


def test_commands_of_modes_that_were_deleted_are_not_shown(tmp_path, monkeypatch):
    for name in ("train", "eval"):
        (tmp_path / "mode").mkdir(exist_ok=True)
        (tmp_path / f"mode/{name}.yaml").write_text("")
    assert has_options([tmp_path], "mode=eval resume=a=b") and not has_options([tmp_path], "mode=export resume=RUN")
    choices = {"mode": "eval", "protocol@mode.scorer": "_scorer", "local": "default", "metric": ["nsd"], "data": None}
    assert existing_choices(choices, [tmp_path]) == {"mode": "eval", "metric": ["nsd"], "data": None}
    monkeypatch.setattr(mode, "CONFIGS", tmp_path)
    assert "mode=eval" in mode.overview() and "mode=export" not in mode.overview()


def keys_of(text):
    return [line.partition("=")[0].strip() for line in text.splitlines() if line.startswith("  ") and "=" in line]


def test_help_of_an_option_lists_its_keys():
    text = mode.help_for(["head=mlp", "--help"])
    assert text.startswith("Keys of head=mlp and their defaults:\n") and "# learning rate" in text
    assert keys_of(text) == ["head.layers", "head.lr"]
    text = mode.help_for(["head=mask2former", "loss=ce_dice", "--help"])
    assert text.startswith("Mask2Former for plain vision transformers")
    assert {"head.num_queries", "head.weights", "loss.criterion.terms.ce.hard_fraction"} <= {*keys_of(text)}


def test_help_of_a_recipe_shows_its_settings():
    text = mode.help_for(["hparam=camvid", "--help"])
    assert text.startswith("CamVid: street scenes, 11 classes.\n") and "  trainer={steps: " in text


def test_own_options_have_help(tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/mine.yaml").write_text("# Mine.\ndefaults: [mlp, _self_]\nwidth: 3  # channels\n")
    text = mode.help_for(["--config-dir", str(tmp_path), "head=mine", "--help"])
    assert text.startswith("Mine.\n") and keys_of(text) == ["head.layers", "head.lr", "head.width"]


@pytest.mark.parametrize(
    "words",
    ["head=nothing", "head=_mask2former", "nothing=mlp", "/=x", "head=../main", "seed=1", "--config-dir nowhere"],
)
def test_help_of_an_unknown_option_is_the_overview(words):
    assert mode.help_for([*words.split(), "--help"]) == mode.overview()


def test_each_shipped_option_has_help():
    groups = [
        path
        for path in Path(CONFIGS).iterdir()
        if path.is_dir() and path.name not in ("hydra", "local", "mode", "runtime")
    ]
    options = [f"{group.name}={option}" for group in groups for option in options_of(group)]
    assert len(options) > 150
    for option in options:
        assert "Keys of" in mode.help_for([option, "--help"]), option
