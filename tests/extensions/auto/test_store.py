"""Choices as files: kept, and as a recipe."""

import json

import pytest
import yaml
from omegaconf import OmegaConf

from dinoseg.config.job import search_path_override
from dinoseg.extensions.auto.recipe import (
    choice_lines,
    compose_recipe,
    read_choices,
    recipe_text,
    typed_keys,
    write_choices,
)
from dinoseg.extensions.auto.rules import RecipeChoice
from dinoseg.utils.forms import SchemaError

CHOICES = [
    RecipeChoice({"head": "detail"}, "poles are thin"),
    RecipeChoice({"adapter": "full"}, "small"),
    RecipeChoice({"loss": "ce_dice", "loss.weights": {"pole": 3.0, "thin sign": 2.0}}, "overlap"),
    RecipeChoice({"resolution.crop": [352, 480], "data.labelled": 1e-05}, "whole images"),
    RecipeChoice({"data.batch_size": 2}, "few steps"),
]


def test_stored_choices_are_read_back_equal(tmp_path):
    path = tmp_path / "cache" / "choices.json"
    assert read_choices(path) is None
    write_choices(path, "few images", CHOICES)
    assert read_choices(path) == ("few images", CHOICES)


def test_unreadable_choices_are_not_written(tmp_path):
    with pytest.raises(SchemaError, match="data.root"):
        write_choices(tmp_path / "choices.json", "x", [RecipeChoice({"data.root": "elsewhere"}, "")])


@pytest.mark.parametrize(
    "words",
    [
        {"head._target_": "os.system"},
        {"head": "${oc.env:HOME}"},
        {"head": {"_target_": "os.system"}},
        *({"loss.weights": {name: 3.0}} for name in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")),
        {"head": "../x"},
        {"data.batch_size": "2\nhead: x"},
        {"data.root": "elsewhere"},
        *({"data.batch_size": value} for value in (-2, True, None, "1; rm", 2.0**41)),
        *({"resolution.crop": value} for value in ([[480], 1], ["480"])),
        *({"loss.weights": value} for value in ({"pole": -3.0}, {"pole": True}, {"pole": "3"})),
        ["head"],
    ],
)
def test_damaged_choices_file_is_ignored_with_a_warning(tmp_path, caplog, words):
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"about": "x", "choices": [{"words": words, "reason": "y"}]}))
    assert read_choices(path) is None and "choosing again" in caplog.text
    path.write_text("{")
    assert read_choices(path) is None


def test_each_choice_is_a_line_with_its_reason():
    assert choice_lines(CHOICES[2:4]) == [
        "  loss=ce_dice loss.weights={pole: 3, thin sign: 2}: overlap.",
        "  resolution.crop=[352,480] data.labelled=1e-05: whole images.",
    ]


def test_recipe_has_lower_priority_than_typed_values():
    text = recipe_text("few images", CHOICES)
    assert text.startswith("# @package _global_\n") and "# head: poles are thin\n" in text
    words = ["mode=train", "hparam=auto", "head=mlp", "data.batch_size=3", "data.classes=[a,b]"]
    cfg = compose_recipe(words, [], text)
    choices = (cfg.choices.head, cfg.choices.adapter, cfg.choices.loss, cfg.choices.hparam)
    assert choices == ("mlp", "full", "ce_dice", "auto")
    assert cfg.data.batch_size == 3 and cfg.resolution.crop == [352, 480] and cfg.data.labelled == 1e-5
    assert typed_keys(words) == {"mode", "hparam", "head", "data.batch_size", "data.classes"}


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0b", "\x00", "\ud800", "\ufffe"])
def test_line_break_in_a_class_name_adds_no_key_to_the_recipe(end):
    name = f"pole{end}engine: {{_target_: os.system}}{end}"
    text = recipe_text(f"without a pixel: {name}", [RecipeChoice({"head": "detail"}, f"{name} is thin")])
    assert yaml.safe_load(text) == {"defaults": [{"override /head": "detail"}]}
    assert len(choice_lines([RecipeChoice({"head": "detail"}, f"{name} is thin")])[0].split("\n")) == 1


@pytest.mark.parametrize("name", ["more", "more of them", "a,b", "it's", "a=b", "[x]"])
def test_config_folder_with_any_name_is_searched(tmp_path, name):
    part = tmp_path / name / "head" / "mine.yaml"
    part.parent.mkdir(parents=True)
    part.write_text("defaults: [linear]\nlr: 0.5\n")
    words = [search_path_override([f"file://{tmp_path / name}"]), "head=mine"]
    assert compose_recipe(words, [], recipe_text("x", CHOICES[4:5])).head.lr == 0.5


def test_classes_have_their_names_in_a_recipe(tmp_path):
    names = ["höhe", "\U0001f6b2", 'a"b: {', "no", "1e3", "null", "~", "_background_", "it's, a.b", "lead "]
    names += ["2024-01-01"]
    words = {"loss": "ce_dice", "loss.weights": dict.fromkeys(names, 3.0), "loss.criterion.factors.dice": 2.0}
    choices = [RecipeChoice(words, "")]
    write_choices(tmp_path / "choices.json", "x", choices)
    assert read_choices(tmp_path / "choices.json") == ("x", choices)
    cfg = compose_recipe([], [], recipe_text("x", choices))
    saved = OmegaConf.create(OmegaConf.to_yaml(cfg.loss))
    assert cfg.loss.weights == saved.weights == dict.fromkeys(names, 3.0)
    assert cfg.loss.criterion.factors.dice == 2.0
