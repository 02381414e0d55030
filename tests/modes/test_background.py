"""A data set says which class is its background, and without one nothing is scored without it."""

import json

import pytest
from command_line import SMALL, call, write_data
from omegaconf import OmegaConf

from dinoseg.experiment.builder import Builder
from dinoseg.report.log import read_rows
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError

WITH = ("sarrarp", "person", "binary", "pascal_voc", "davis2016", "davis2017", "movi", "youtube_vos", "videos")
WITHOUT = ("camvid", "camvid_segnet", "cityscapes", "idd", "idd_lite", "idd_level1", "idd_cityscapes", "ade20k")


@pytest.mark.parametrize(("names", "expected"), [(WITH, 0), (WITHOUT, None)])
def test_shipped_data_sets(compose, names, expected):
    for name in names:
        assert Builder(compose(f"data={name}", "data.root=X")).background == expected, name


def test_background_of_own_data_is_a_name_an_id_or_none(compose, tmp_path):
    folder = ("data=folder", f"data.root='{tmp_path}'")
    assert Builder(compose(*folder, "data.classes=[background,leaf]")).background is None
    assert Builder(compose(*folder, "data.classes=[leaf,soil]", "data.background=soil")).background == 1
    (tmp_path / "classes.yaml").write_text("classes: [leaf, soil]\nbackground: soil\n")
    assert Builder(compose(*folder)).background == 1
    (tmp_path / "classes.yaml").write_text("classes: [leaf, soil]\nbackground: sol\n")
    with pytest.raises(UserError, match="classes.yaml: background: sol is not a class: name one of leaf, soil"):
        _ = Builder(compose(*folder)).background


@pytest.mark.parametrize("value", [2, -1, True, "sky"])
def test_background_that_is_no_class_is_refused(value):
    with pytest.raises(UserError, match=rf"data.background={value} is not a class.*0 to 1: dark, bright"):
        _ = Builder(
            OmegaConf.create({"data": {"background": value, "classes": ["dark", "bright"]}, "choices": {}})
        ).background


@pytest.fixture
def where(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path


def train(where, *arguments):
    return call(where, "mode=train", *SMALL, "mode.metrics_only=true", f"hydra.run.dir={where}/run", *arguments)


def test_without_background_no_score_leaves_a_class_out(where):
    done = train(where)
    assert done.status == 0 and "mIoU without" not in done.out, done.err
    assert "miou_no_background" not in json.loads((where / "run/evaluation/scores.json").read_text())
    assert not any("val/miou_no_background" in row for row in read_rows(where / "run/metrics.jsonl"))


def test_the_best_can_be_chosen_without_background(where):
    done = train(where, "data.background=bright", "trainer.score=miou_no_background")
    assert done.status == 0 and "without class 1, bright" in done.out, done.err
    scores = json.loads((where / "run/evaluation/scores.json").read_text())
    assert scores["miou_no_background"] == scores["classes"][0]["iou"]
    assert checkpoint.describe(where / "run/checkpoints/best.safetensors")["progress"]["best"] == pytest.approx(
        scores["miou_no_background"]
    )


def test_score_without_background_needs_a_background(where):
    done = train(where, "trainer.score=miou_no_background")
    assert done.status == 1 and "data=folder has no background. Set its class (data.background=NAME)" in done.err


def test_surgical_recipes_follow_the_original(compose):
    for name in ("sarrarp_lora", "sarrarp_frozen", "sarrarp_full", "sarrarp_lora_lowres", "dpt_sarrarp"):
        trainer = compose(f"hparam={name}", "data.root=X").trainer
        assert trainer.score == "miou_no_background" and trainer.clip is None, name
