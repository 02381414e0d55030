"""Recipes in families: found by their old names too, by patterns of a sweep, and from config files of the user's."""

from pathlib import Path

import pytest
from command_line import SMALL, call, write_data
from config_files import FOLDER

from dinoseg.cli.recipes import recipe_files, with_recipe_files
from dinoseg.cli.resuming import find_model
from dinoseg.config.options import config_folders
from dinoseg.experiment.folder import RunLocation
from dinoseg.training import checkpoint

OWN = "# @package _global_\ndefaults: [{}]\nseed: 3\n"


@pytest.fixture
def own(tmp_path):
    """A folder of config groups with recipes of the user's own."""
    for name, base in (("mine", "/hparam/idd/lite"), ("team/first", "/hparam/base"), ("old", "idd_lite")):
        path = tmp_path / f"own/hparam/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OWN.format(base))
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ("hparam=sarrarp_lora", "hparam=sarrarp/lora"),
        ("hparam=sarrarp/lora", "hparam=sarrarp/lora"),
        ("hparam=person_multiscale", "hparam=person_multiscale"),
        ("hparam=nonsense", "hparam=nonsense"),
        ("hparam=idd_lite,camvid", "hparam=idd/lite,camvid"),
        ('hparam="idd_lite"', 'hparam="idd/lite"'),
        ("hparam=choice(idd_m2f,schism_cnn)", "hparam=choice(idd/m2f,schism/cnn)"),
        ("+hparam=[idd_m2f,base]", "+hparam=[idd/m2f,base]"),
        ("hparam=glob(schism/*)", "hparam=schism/cnn,schism/linear"),
        ("hparam=glob(sarrarp_*,exclude=*lora*)", "hparam=sarrarp/frozen,sarrarp/full"),
        ("hparam=glob([dpt/*,person*])", "hparam=dpt/camvid,dpt/sarrarp,person,person_multiscale"),
        ("hparam=glob(nothing*)", "hparam=glob(nothing*)"),
        ("data=idd_lite", "data=idd_lite"),
        ("hparam", "hparam"),
    ],
)
def test_a_recipe_is_found_in_its_family(typed, word):
    assert with_recipe_files(["-m", typed], [FOLDER]) == ["-m", word]


def test_a_pattern_that_is_no_sweep_s_is_left_to_hydra():
    assert with_recipe_files(["hparam=glob(idd_*)"], [FOLDER]) == ["hparam=glob(idd_*)"]


def test_recipes_of_the_user_s_own_are_found_too(own):
    arguments = ["--config-dir", str(own), "-m", "hparam=glob(*),team_first"]
    assert config_folders(arguments, FOLDER) == config_folders([f"-cd={own}"], FOLDER) == [FOLDER, own]
    files = recipe_files([FOLDER, own])
    assert len(files) == len(list(FOLDER.glob("hparam/**/[!_]*.yaml"))) + 3
    assert files["team_first"] == "team/first" and files["dinosavi_s256d_t01"] == "dinosavi/s256d_t01"
    assert with_recipe_files(["-m", "hparam=glob(m*)"], [FOLDER, own]) == ["-m", "hparam=mine"]


def test_a_file_of_the_very_name_goes_first(own):
    (own / "hparam/team_first.yaml").write_text(OWN.format("base"))
    assert recipe_files([FOLDER, own])["team_first"] == "team_first"


def test_runs_and_checkpoints_know_a_recipe_by_one_name(tmp_path, compose, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    done = call(tmp_path, "mode=train", "hparam=idd_lite", *SMALL, "mode.metrics_only=true")
    assert done.status == 0, done.err
    (run,) = (tmp_path / "outputs/idd_lite").iterdir()
    last = run / "checkpoints/last.safetensors"
    assert checkpoint.describe(last)["choices"]["hparam"] == "idd_lite"
    again = compose("mode=train", "hparam=idd/lite", *SMALL, "mode.metrics_only=true", "resume=auto")
    assert find_model(again, RunLocation(run.with_name("train_again"), tmp_path / "outputs"), "last") == last
    for typed, message in (
        ("idd_lite", "split=nonsense is unknown"),
        ("idd/lite", "split=nonsense is unknown"),
        ("idd/lora", "was trained with hparam=idd_lite"),
    ):
        assert message in call(tmp_path, "mode=eval", f"hparam={typed}", f"resume={run}", "mode.split=nonsense").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hparam=old"], "Could not load 'hparam/idd_lite'. It belongs to a family of recipes: write /hparam/idd/lite"),
        (["hparam=mine", "trainer.stpes=3"], "trainer.stpes is not a key of the config. Did you mean trainer.steps"),
        (["hparam=team_fist"], "Did you mean hparam=team/first? Choose from ade20k_m2f, auto, base,"),
        (
            ["hparam=schism/cn"],
            "hparam=schism/cn is unknown. Did you mean hparam=schism/cnn? Choose from schism/cnn, schism",
        ),
    ],
)
def test_a_mistake_beside_recipes_of_one_s_own_is_told(own, tmp_path, words, message):
    done = call(tmp_path, "--config-dir", own, "mode=summary", *words)
    assert done.status == 1 and message in done.err, done.err


def test_every_recipe_is_in_the_help(tmp_path):
    shown = call(tmp_path, "--help").out.partition("\n  hparam:")[2].partition("\n  loss:")[0].split()
    assert {word.rstrip("/") for word in shown} >= {
        part for path in Path(FOLDER, "hparam").rglob("[!_]*.yaml") for part in path.relative_to(FOLDER).parts[1:-1]
    }
    assert [word for word in shown if "." in word and word != "..."] == [] and "schism/ cnn linear" in " ".join(shown)


def test_what_a_job_of_one_s_own_recipe_fails_with_is_told(own, tmp_path):
    done = call(tmp_path, "--config-dir", own, "mode=summary", "hparam=mine", "resolution=3")
    assert done.status == 1 and "error: resolution=3: resolution is a group of keys." in done.err, done.err


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        (
            "mode.shapes=[1]",
            "mode.shapes=[1]: mode.shapes is a group of keys. Set one of them: mode.shapes.format|",
        ),
        ("mode.outputs={a:1}", "mode.outputs is a list. Write it in brackets: mode.outputs=[...]."),
        ("mode.outputs=[coko]", "mode.outputs names coko: choose some of coco, "),
    ],
)
def test_what_is_of_another_shape_is_told_before_anything_is_looked_for(tmp_path, word, wrong):
    assert wrong in call(tmp_path, "mode=predict", "input=nothing", word).err


def test_docs_and_help_name_both_spellings(tmp_path):
    folder = Path(__file__).parents[2]
    for page in ("docs/index.md", "docs/models.md"):
        text = (folder / page).read_text(encoding="utf-8")
        assert "sarrarp_lora`" in text and "sarrarp/lora`" in text, page
    assert "FAMILY/NAME or FAMILY_NAME" in call(tmp_path, "--help").out
