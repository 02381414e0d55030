"""Keys that only the checkpoint's config has, set on the command line without its groups."""

import csv
import shutil
import subprocess
import sys

import hydra
import pytest
from command_line import SMALL, call, link_all
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from dinoseg.checkpoints.resume import compose_resumed
from dinoseg.cli.checkpoint_keys import checkpoint_keys, root_config
from dinoseg.config.composition import SHIPPED
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import run_description
from dinoseg.training import checkpoint
from dinoseg.training.description import SAVED


@pytest.fixture
def here(trained_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return link_all(trained_once, tmp_path)


def run(where, *arguments):
    done = call(where, *arguments, "engine=cpu", "engine.workers=0")
    assert done.status == 0, done.err
    return done


def config(where, folder):
    return OmegaConf.load(where / folder / "config/config.yaml")


def test_slots_take_another_number_and_source(here):
    words = ("head.num_slots=2", "head.mask_source=alpha", "data.view.scale.1=1.5", "resolution.scale=0.5")
    run(here, "mode=eval", "mode.metrics_only=true", "resume=slots", *words, "hydra.run.dir=out")
    made = config(here, "out")
    assert (made.head.num_slots, made.head.mask_source, made.head.slot_dim) == (2, "alpha", 16)
    assert made.data.view.scale == [1.0, 1.5] and made.backbone == config(here, "slots").backbone
    assert made.head.positions_grid == [4, 4]  # what its positions were learnt for, at whatever scale it sees now


def test_prediction_takes_keys_of_its_checkpoint(here):
    words = ("head.dropout=0.5", "data.augment.scale.0=0.8")
    run(here, "mode=predict", "input=data/val/images/0.png", "resume=segmenter", *words, "hydra.run.dir=out")
    made = config(here, "out")
    assert made.head.dropout == 0.5 and made.data.augment.scale == [0.8, 1.5]


def test_training_resumes_with_changed_values(here):
    shutil.copytree(here / "slots", here / "own")
    words = ("trainer.steps=5", "head.iterations=2", "data.clips.cut.length=3")
    run(here, "mode=train", "resume=own", *words, "mode.metrics_only=true", "engine.precision=fp32")
    made = checkpoint.describe(here / "own/checkpoints/last.safetensors")
    assert made["progress"]["step"] == 5 and made["choices"]["head"] == "slots"
    assert made["config"]["head"]["iterations"] == 2 and made["config"]["data"]["clips"]["cut"]["length"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resume=slots head.num_slot=4", "head.num_slot is not a key of the config. Did you mean head.num_slots?"),
        ("resume=slots head.num_slots=four", "num_slots=four is of type str"),
        (
            "resume=segmenter head.num_slots=3",
            "head.num_slots=3: head=cnn lacks this key. Options that",
        ),
        (
            "resume=slots data.reader.masks.format=ids",
            "data.reader.masks.format=ids: data=movi lacks this key. Options that",
        ),
        ("resume=nowhere head.num_slots=3", "resume=nowhere: file or folder not found."),
        (
            "resume=slots data=folder data.splits.val=val",
            "data=folder lacks this key. Options that",
        ),
    ],
)
def test_key_unknown_to_config_and_checkpoint_is_a_typo(here, line, message):
    done = call(here, "mode=eval", "engine=cpu", *line.split())
    assert done.status == 1 and message in done.err and done.err.count("error: ") == 1, done.err
    assert "Traceback" not in done.err and not list(here.glob("outputs/**/scores.json"))


@pytest.mark.heavy
def test_a_sweep_goes_over_keys_of_the_checkpoint(here):
    words = ("mode=eval", "resume=slots", "head.num_slots=2,3", "mode.metrics_only=true", "hydra.sweep.dir=sweep")
    run(here, "-m", *words)
    with open(here / "sweep/sweep.csv", encoding="utf-8") as file:
        assert sorted((row["head.num_slots"], row["note"]) for row in csv.DictReader(file)) == [("2", ""), ("3", "")]
    assert [config(here, f"sweep/{job}").head.num_slots for job in range(2)] == [2, 3]


@pytest.mark.heavy
def test_a_sweep_goes_over_lists_of_options(here):
    words = ("mode=eval", "resume=segmenter", "metric=[],[nsd]", "mode.metrics_only=true", "hydra.sweep.dir=sweep")
    run(here, "-m", *words)
    assert [[*(config(here, f"sweep/{job}").get("metric") or ())] for job in range(2)] == [[], ["nsd"]]


@pytest.mark.heavy
def test_jobs_in_other_processes_compose_the_run_that_they_name(here):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["mode=eval", "resume=segmenter,slots", "head.num_slots=2", "data.batch_size=2", "mode.metrics_only=true"]
    words += ["engine=cpu", "engine.workers=0", "hydra.sweep.dir=sweep", "hydra/launcher=joblib"]
    done = subprocess.run(
        [sys.executable, "-m", "dinoseg", "-m", *words], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    with open(here / "sweep/sweep.csv", encoding="utf-8") as file:
        notes = {row["resume"]: row["note"] for row in csv.DictReader(file)}
    assert notes["slots"] == "" and "head.num_slots=2: head=cnn lacks this key" in notes["segmenter"]
    made = config(here, "sweep/1")
    assert (made.choices.head, made.head.num_slots, made.data.batch_size) == ("slots", 2, 2)
    assert "head.num_slots=2" in (here / "sweep/1/config/overrides.txt").read_text().split()


@pytest.mark.heavy
def test_a_sweep_over_runs_uses_the_head_of_each(here):
    words = ("mode=eval", "resume=segmenter,slots", "data.batch_size=2", "mode.metrics_only=true")
    run(here, "-m", *words, "hydra.sweep.dir=sweep")
    made = [config(here, f"sweep/{job}") for job in range(2)]
    assert [each.choices.head for each in made] == ["cnn", "slots"] and {each.data.batch_size for each in made} == {2}


OF_EVAL = {"data", "task", "backbone", "adapter", "head", "inference", "slots", "metric"}


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("mode=eval resume=RUN", OF_EVAL),
        ("-m mode=eval resume='A','B'", OF_EVAL),
        ("mode=predict resume=RUN", OF_EVAL - {"slots", "metric"}),
        ("-m mode=predict,eval resume=RUN", OF_EVAL),
        ("mode=train resume=RUN", {*SAVED}),
        ("mode=serve mode.model=model.safetensors", {"backbone.weights", "head.weights"}),
        ("-m mode=train resume=auto,RUN", set()),
        ("mode=train resume=null", set()),
        ("mode=train", set()),
        ("mode=summary resume=RUN", set()),  # which uses no checkpoint
        ("resume=RUN", {*SAVED}),  # a config file may choose the mode
    ],
)
def test_only_jobs_with_a_checkpoint_leave_keys_to_it(line, keys):
    assert {*checkpoint_keys(line.split(), [SHIPPED])} == keys


def test_hydra_accepts_typed_keys_of_the_checkpoint_alone():
    words = "mode=train resume=RUN teacher=x head=slots head.num_slots=2 data.view.scale.1=2 backbone={a:1}"
    node = ConfigStore.instance().load(f"{root_config(words.split(), [SHIPPED])}.yaml").node
    assert {*node} == {"defaults", "teacher", "head", "data", "backbone"}
    assert root_config(["mode=train", "trainer.steps=2"], [SHIPPED]) == "main"


@pytest.mark.parametrize(
    ("swept", "jobs", "key"),
    [
        ("hparam=instance,panoptic", ("hparam=instance", "hparam=panoptic"), "loss.criterion.num_points=9"),
        ("head=eomt,mask2former adapter=glob(l*)", ("head=mask2former adapter=lora",), "head.num_queries=9"),
    ],
)
def test_sweep_accepts_the_keys_of_its_first_options(swept, jobs, key):
    root = root_config(["-m", "mode=train", *swept.split(), key], [SHIPPED])
    with initialize_config_dir(str(SHIPPED), version_base="1.3"):
        hydra.compose(root, ["mode=train", key])  # as Hydra does before it composes the jobs
        with pytest.raises(ConfigCompositionException):
            hydra.compose("main", ["mode=train", key])
        assert root_config(["-m", "+experiment=a,b"], [SHIPPED]) == "main"
        for job in jobs:
            words = ["mode=train", *job.split(), key]
            assert hydra.compose(root, words) == hydra.compose("main", words)


def test_words_stay_as_typed(here):
    words = ("mode=eval", "resume=slots", "head.num_slots=2", "mode.metrics_only=true", "hydra.run.dir=out")
    run(here, *words)
    assert (here / "out/config/overrides.txt").read_text().split()[:4] == [*words[:4]]


def test_root_keys_of_a_trainer_are_those_of_its_checkpoint(here, compose):
    build = Builder(compose("mode=train", *SMALL, "trainer=distil", "teacher=segmenter"))
    progress = {"step": 1, "best": 0.5, "best_step": 1, "stale": 0, "validation_pending": False}
    description = run_description(build, build.labels) | {"progress": progress, "frozen": {}}
    checkpoint.write(here / "student.safetensors", {}, description)
    words = ["mode=train", "resume=student.safetensors", "teacher=other"]
    path = here / "student.safetensors"
    assert compose_resumed(compose("mode=train"), words, path, checkpoint.describe(path)).teacher == "other"
    done = call(here, "mode=eval", "resume=student.safetensors", "teacher=other", "engine=cpu")
    assert done.status == 1 and "Options that have it: trainer=distil." in done.err, done.err
