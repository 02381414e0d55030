"""What a checkpoint's config, the command line and the recipe each decide when a run goes on."""

import fcntl
import json
import logging
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoint_files import INFO
from command_line import SMALL, call, write_data
from finished_runs import train_run
from omegaconf import OmegaConf

from dinoseg import __main__
from dinoseg.checkpoints.past_runs import find_runs, plan_of
from dinoseg.checkpoints.resume import _keep_precision, _same_path, compose_resumed
from dinoseg.cli.checkpoint_keys import checkpoint_keys
from dinoseg.cli.shared import compose_shared, describe_job
from dinoseg.config.composition import SHIPPED
from dinoseg.data.classes.masks import Masks
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description, data_root, recipe_of
from dinoseg.runs.folder import RunFolder
from dinoseg.training import checkpoint, loading
from dinoseg.utils import locks
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import write_tensors

QUIET = ("mode.metrics_only=true", "mode.report=false", "mode.pictures=0")
MLP = (*SMALL, "head=mlp", *QUIET)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Train a run of one step with head=mlp, to be copied."""
    where = tmp_path_factory.mktemp("place")
    write_data(where / "data")
    train_run(where, "kept/mlp", "mode=train", *MLP, "trainer.steps=1")
    return where


@pytest.fixture
def where(place, monkeypatch):
    """Return the folder of the kept run, with nothing beside them but their data."""
    monkeypatch.chdir(place)
    for path in place.iterdir():
        if path.name not in ("data", "kept"):
            shutil.rmtree(path)
    if not (place / "data").exists():
        write_data(place / "data")
    return place


@pytest.fixture
def run(where):
    """Copy the run with head=mlp to where a run of this recipe lies, and return its folder."""
    return Path(shutil.copytree(where / "kept/mlp", where / "outputs/base/train_0"))


def train(where, *arguments):
    return call(where, "mode=train", *MLP, *arguments)


def runs(where):
    return sorted((where / "outputs/base").glob("train_*"))


def last(run):
    return checkpoint.describe(run / "checkpoints/last.safetensors")


@pytest.fixture
def find_run(where, compose):
    """Return a function that looks for the newest run of the recipe that some words compose, of any length."""

    def look(*words, prefer="last"):
        cfg = compose("mode=train", *MLP, "resume=auto", *words)
        plan = plan_of(config_description(Builder(cfg)))
        runs = [run for run in find_runs(Path("outputs/base").absolute(), 1) if run.plan.settings == plan.settings]
        return checkpoint.find(runs[0].folder, prefer) if runs else None

    return look


@pytest.mark.parametrize(
    ("words", "limit"),
    [([], 9.5), (["steps=2"], None), (["epochs=2"], None), (["patience=3"], 9.5), (["steps=2", "max_minutes=3"], 3)],
)
def test_a_typed_length_lifts_the_time_limit_of_a_run(compose, tmp_path, caplog, words, limit):
    caplog.set_level(logging.INFO)
    words = ["mode=train", *(f"trainer.{word}" for word in words)]
    info = config_description(
        Builder(compose(*SMALL, "mode=train", "trainer.max_minutes=9.5", f"data.root={tmp_path}"))
    )
    merged = compose_resumed(compose(*words), words, tmp_path / "last.safetensors", info, tell=True)
    assert merged.trainer.max_minutes == limit
    assert ("trainer.max_minutes=null instead of 9.5" in caplog.text) == (limit is None)


@pytest.mark.heavy
def test_run_with_a_head_from_an_own_file_can_be_evaluated(where):
    """A file that leaves a key to its default has no such key in its runs' checkpoints."""
    whole = OmegaConf.load(Path(__main__.CONFIGS) / "head/detail.yaml")
    del whole["linear_skip"]
    (where / "own/head").mkdir(parents=True)
    OmegaConf.save(whole, where / "own/head/mine.yaml")
    words = ("head=mine", "head.fine=4", "head.width=8", "head.layers=[-1]", "trainer.steps=1")
    done = call(where, "--config-dir", "own", "mode=train", *SMALL, *QUIET, *words, "hydra.run.dir=run")
    assert done.status == 0, done.err
    assert "linear_skip" not in checkpoint.describe(where / "run/checkpoints/best.safetensors")["config"]["head"]
    done = call(where, "--config-dir", "own", "mode=eval", "resume=run", "engine=cpu", QUIET[0])
    assert done.status == 0, done.err


WINDOWS = ("inference=windows", "inference.size=16")


@pytest.mark.heavy
def test_evaluation_equals_validation_with_windows(where):
    train_run(where, "run", "mode=train", *MLP, *WINDOWS, "trainer.steps=1")
    run = where / "run"
    done = call(where, "mode=eval", f"resume={run}", "engine=cpu", *QUIET[:2], "hydra.run.dir=evaluated")
    assert done.status == 0, done.err
    assert (where / "evaluated/scores.json").read_bytes() == (run / "evaluation/scores.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "size"),
    [((), 16), (("inference=windows", "inference.size=[16,48]"), [16, 48]), (("inference=whole",), None)],
)
def test_evaluation_uses_the_windows_of_validation_by_default(compose, tmp_path, words, size):
    info = json.loads(json.dumps(config_description(Builder(compose("mode=train", *MLP, *WINDOWS)))))
    words = ["mode=eval", *words]
    merged = compose_resumed(compose(*words), words, tmp_path / "best.safetensors", info)
    assert merged.inference.get("size") == size and merged.choices.inference == ("windows" if size else "whole")


@pytest.mark.heavy
def test_resuming_old_rates_and_warmup_equals_one_whole_run(where):
    rates = ("optim.optimizer.lr=1e-2", "optim.schedule.warmup=2", "optim.schedule.kind=constant")
    assert train(where, "trainer.steps=4", *rates, "hydra.run.dir=whole").status == 0
    at_once = checkpoint.read(where / "whole/checkpoints/last.safetensors")
    assert train(where, "trainer.steps=1", *rates, "hydra.run.dir=cut").status == 0
    path = where / "cut/checkpoints/last.safetensors"
    found = checkpoint.read(path)
    config = found.info["config"]
    del config["head"]["lr"], config["adapter"]["lr"], config["trainer"]["epochs"]
    config["trainer"]["steps"] = 4
    checkpoint.write(path, found.tensors, {key: value for key, value in found.info.items() if key != "format"})
    assert call(where, "mode=train", f"resume={path}", "engine=cpu", "engine.workers=0", *QUIET).status == 0
    went_on = checkpoint.read(path)
    assert went_on.tensors.keys() == at_once.tensors.keys() and went_on.info["progress"]["step"] == 4
    assert all(torch.equal(went_on.tensors[name], value) for name, value in at_once.tensors.items())


SAME = ("trainer.steps=2", "trainer.val_every=1", "inference=whole")


@pytest.mark.parametrize("override", [*SAME, "trainer.clip=7", "seed=5", "data.root=kept"])
def test_auto_resumes_only_the_same_recipe(run, find_run, override):
    assert find_run(override) == (run / "checkpoints/last.safetensors" if override in SAME else None)


def test_recipe_holds_only_what_affects_training(compose):
    @cache
    def recipe(*words):
        return recipe_of(config_description(Builder(compose("data.root=.", "data.classes=[a,b]", *words))))

    lengths = ("trainer.patience=3", "trainer.save_every=7", "trainer.log_every=3", "trainer.epochs=2")
    assert recipe() == recipe(*lengths, "data.background=b")
    masks = ("head=mask2former",)
    alone = "head.deep_supervision=false"
    assert recipe(*masks) == recipe(*masks, alone)  # which losses of pixels do not read
    of_masks = (*masks, "loss=mask_classification")
    others = ("data.ignore_index=7", "data.views=3")
    cases = [(), masks, of_masks, (*of_masks, alone), ("head=detail",), ("head=detail", "head.linear_skip=false")]
    found = [repr(recipe(*words)) for words in (*cases, *((other,) for other in others))]
    assert len({*found}) == len(found)


def test_a_relative_root_is_that_of_the_run(where, run, compose, monkeypatch, capsys):
    """Also in a folder that has one of the same name."""
    here, there, path = where / "elsewhere/data", where / "data", run / "checkpoints/last.safetensors"

    def merge_root(*words):
        words = ["mode=eval", *words]
        cfg = compose_resumed(compose(*words), words, path, last(run))
        return cfg.data.root, capsys.readouterr().err

    assert "the run," not in merge_root()[1]
    write_data(here, val=1)
    monkeypatch.chdir(here.parent)
    root, said = merge_root()
    warning = f"warning: data.root=data means {there}, as in the run, not {here}. To use that one, set "
    assert root == str(there) and f"{warning}data.root={here}." in said
    for given in ("data.root=data", f"data.root={here}"):
        root, said = merge_root(given)
        assert (here.parent / root) == here and "the run," not in said
    there.rename(where / "moved")
    root, said = merge_root()
    assert root == str(here) and f"{there}, the data of the run, does not exist: using data.root=data" in said


def test_a_root_that_is_with_the_run_alone_needs_no_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/data").mkdir(parents=True)
    assert data_root({"data": {"root": "data"}}, tmp_path / "run") == (str(tmp_path / "run/data"), "")


@pytest.mark.parametrize("root", ["~nobody-here/x", "a\0b", "\ud800", "a" * 4000, None, 3, "???"], ids=ascii)
def test_a_root_that_can_be_none_is_none_given(root):
    assert data_root({"data": {"root": root}}, Path("/")) == ("???", "")
    assert data_root({"data": {}}, Path("~nobody-here/\ud800")) == ("???", "")


@pytest.fixture
def base(compose):
    """Return the config of a command line that resumes, and the description of a run of the same recipe."""
    cfg = compose("mode=train", "resume=x", "data.root=.", "data.classes=[a,b]")
    return cfg, json.loads(json.dumps(config_description(Builder(cfg))))


def test_key_missing_in_the_checkpoint_is_added_only_with_plus(base, tmp_path):
    cfg, info = base
    assert compose_resumed(cfg, ["mode=train", "++head.more=1"], tmp_path / "x", info).head.more == 1
    with pytest.raises(UserError, match=r"head.more is not a key of the config"):
        compose_resumed(cfg, ["mode=train", "head.more=1"], tmp_path / "x", info)


def test_auto_finds_a_run_that_was_moved_with_its_data(where, run, find_run, compose, monkeypatch):
    moved = where / "moved"
    moved.mkdir()
    for name in ("data", "outputs"):
        (where / name).rename(moved / name)
    monkeypatch.chdir(moved)
    path = moved / run.relative_to(where) / "checkpoints/last.safetensors"
    assert find_run("trainer.steps=2") == path
    assert compose_resumed(compose("mode=train"), ["mode=train"], path, checkpoint.describe(path)).data.root == str(
        moved / "data"
    )


def test_resume_refuses_a_run_in_use(where, run):
    with open(run / "run.log", "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = train(where, "trainer.steps=2", f"resume={run}")
    assert busy.status == 1 and "Another process is writing to" in busy.err and runs(where) == [run]


def test_auto_waits_for_a_lock(where, run, monkeypatch):
    other = open(run / "run.log", "a", encoding="utf-8")
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    slept = []

    def release_second(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            other.close()

    monkeypatch.setattr(locks.time, "sleep", release_second)
    done = train(where, "trainer.steps=2", "inference.overlap=0.5", "resume=auto", f"hydra.run.dir={run}")
    assert done.status == 0 and runs(where) == [run] and last(run)["progress"]["step"] == 2, done.err
    assert len(slept) == 2
    assert last(run)["config"]["inference"]["overlap"] == 0.5  # keys of inference do not make another run


def test_auto_skips_unreadable_checkpoints_with_a_reason(where, run, find_run, capsys):
    path = run / "checkpoints/last.safetensors"
    saved = checkpoint.read(path)
    reasons = {"cut": "not a readable", "new": "it has format 99", "other": "not a checkpoint of"}
    beside = {name: where / f"outputs/base/train_{name}/checkpoints/last.safetensors" for name in reasons}
    checkpoint.write(beside["new"], saved.tensors, {**saved.info, "format": 99})
    write_tensors(beside["other"], saved.tensors, {})
    beside["cut"].parent.mkdir(parents=True)
    beside["cut"].write_bytes(path.read_bytes()[:1000])
    assert find_run("trainer.steps=2") == path
    told = capsys.readouterr().err.splitlines()
    for name, reason in reasons.items():
        (line,) = [line for line in told if str(beside[name]) in line]
        assert line.startswith("resume=auto: skipped: ") and reason in line


def test_a_job_enters_its_folder_once_and_no_other_job_does(tmp_path):
    with RunFolder(tmp_path) as run, RunFolder(tmp_path) as other:
        run.enter(tmp_path)
        assert run.try_to_enter(tmp_path) and not other.try_to_enter(tmp_path)
        run.release()
        run.release()
        assert other.try_to_enter(tmp_path)


def test_resuming_a_foreign_checkpoint_writes_to_a_new_folder(where, run, experiments):
    moved = where / "downloads/sub/last.safetensors"
    moved.parent.mkdir(parents=True)
    (run / "checkpoints/last.safetensors").rename(moved)
    train(where, "trainer.steps=2", f"resume={moved}")
    assert len(experiments) == 1
    assert [path.name for path in (where / "downloads").iterdir()] == ["sub"]
    assert len(runs(where)) == 2


@pytest.mark.parametrize(
    ("mode", "classes", "said"),
    [
        ("eval", "bright,dark", ["in the same order"]),
        ("train", "a,b,c", ["the data has the classes a, b, c", "trained on dark, bright"]),
    ],
)
def test_other_classes_or_another_order_are_refused(where, run, mode, classes, said):
    done = call(where, f"mode={mode}", f"resume={run}", f"data.classes=[{classes}]", "engine=cpu")
    assert done.status == 1 and all(words in done.err for words in said), done.err


def test_checkpoint_provides_only_model_data_and_training(base, tmp_path):
    cfg, sound = base
    kept = sound["config"]
    words = ["mode=train"]
    merged = compose_resumed(
        cfg, words, tmp_path / "x", {**sound, "config": {**kept, "mode": {"a": 1}, "engine": {"device": "x"}}}
    )
    assert merged.mode == cfg.mode and merged.engine == cfg.engine
    evil = {"_target_": "dinoseg.extensions.prepare.sarrarp.prepare", "root": str(tmp_path), "keep_archives": False}
    for group in ("adapter", "data", "backbone", "head"):
        info = {**sound, "config": {**kept, group: {**kept[group], "more": evil}}}
        with pytest.raises(UserError, match=rf"{group}\.more\._target_=.* is refused"):
            compose_resumed(cfg, words, tmp_path / "x", info)


@pytest.mark.parametrize(
    "mode", ["predict", "export", *(pytest.param(mode, marks=pytest.mark.heavy) for mode in ("track", "app"))]
)
def test_modes_that_predict_need_no_loss_and_metric(mode, compose, tmp_path):
    info = description_with_own_parts(compose)
    words = [f"mode={mode}", "resume=x"]
    merged = compose_resumed(compose(*words), [*words, "head.channels=8"], tmp_path / "x", info)
    assert merged.head.channels == 8
    assert merged.loss == info["config"]["loss"] and merged.choices.loss == "mine"
    described = config_description(Builder(merged), info)
    assert described["config"]["loss"] == info["config"]["loss"] and described["targets"] == info["targets"]
    assert "head" in checkpoint_keys(words, [SHIPPED]) and "loss" not in checkpoint_keys(words, [SHIPPED])
    with pytest.raises(UserError, match=f"mode={mode} does not read the group loss"):
        compose_resumed(compose(*words), [*words, "loss.weights=none"], tmp_path / "x", info)


@pytest.mark.parametrize(("mode", "part"), [("eval", "metric"), ("train", "loss")])
def test_modes_that_score_or_train_name_a_missing_part(mode, part, compose, tmp_path):
    info = description_with_own_parts(compose)
    with pytest.raises(UserError, match=f"{part}=mine is not an option on this machine.*--config-dir"):
        compose_resumed(compose(f"mode={mode}", "resume=x"), [f"mode={mode}"], tmp_path / "x", info)
    if mode == "eval":
        words = ["mode=eval", "resume=x", "metric=[nsd]"]
        typed = compose(*words)
        merged = compose_resumed(typed, words, tmp_path / "x", info)
        shared = compose_shared(json.loads(json.dumps(describe_job(merged))), OmegaConf.to_container(typed))
        assert [*shared.metric] == ["nsd"] and shared.loss == merged.loss == info["config"]["loss"]


def test_groups_that_a_mode_of_an_own_folder_reads_are_built(compose, tmp_path):
    (tmp_path / "mode").mkdir()
    (tmp_path / "mode/mine.yaml").write_text("defaults: [_model, {/loss@_global_.loss: ce}, _self_]")
    own = {"config_dirs": [str(tmp_path)], "choices": {"mode": "mine"}}
    cfg = OmegaConf.merge(compose("mode=predict", "resume=x"), own)
    with pytest.raises(UserError, match="loss=mine is not an option on this machine"):
        compose_resumed(cfg, ["mode=mine"], tmp_path / "x", description_with_own_parts(compose))


def test_a_resumed_training_of_slots_builds_them(compose, tmp_path):
    cfg = compose("mode=train", "hparam=slots_clips", "data.root=.", "resume=x")
    info = json.loads(json.dumps(config_description(Builder(cfg))))
    merged = compose_resumed(cfg, ["mode=train"], tmp_path / "x", info)
    assert "values_only" not in merged and merged.slots == cfg.slots


def description_with_own_parts(compose):
    """Return the description of a training whose loss and metric are options of another machine."""
    cfg = compose("mode=train", "head=cnn", "metric=[nsd]", "data.root=.", "data.classes=[a,b]")
    info = json.loads(json.dumps(config_description(Builder(cfg))))
    info["choices"] |= {"loss": "mine", "metric": ["mine"]}
    info["targets"]["loss.criterion"] = "mine.Loss"
    info["config"]["metric"] = {"mine": info["config"]["metric"]["nsd"]}
    return info


def test_a_fused_optimizer_counts_its_steps_on_its_device(tmp_path):
    model = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW([{"params": [model.weight], "names": ["weight"]}], lr=1.0)
    optimizer.param_groups[0]["fused"] = True
    moments = {f"optimizer/weight/{key}": torch.ones(2, 2) for key in ("exp_avg", "exp_avg_sq")}
    tensors = {"optimizer/weight/step": torch.ones(()), **moments}
    loading.load_optimizer(optimizer, checkpoint.Checkpoint(tmp_path, tensors, {}))
    assert {value.device.type for value in optimizer.state[model.weight].values()} == {"meta"}


def test_a_table_of_ids_survives_the_checkpoint(compose, tmp_path):
    words = ("data.root=.", "data.classes=[a,b]", "data.reader.masks.ids={1: 0, 0: 1}")
    info = config_description(Builder(compose("mode=train", *words)))
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"model/a": torch.zeros(1)}, INFO | info)
    stored = checkpoint.describe(path)
    merged = compose_resumed(compose("mode=eval", "resume=x"), ["mode=eval"], path, stored)
    assert Masks(ids=merged.data.reader.masks.ids) == Masks(ids={1: 0, 0: 1})
    assert recipe_of(stored) == recipe_of(info)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("/a/data", "/a/./data/", True),
        ("~/data", str(Path.home() / "data"), True),
        *((old, "a", False) for old in ("a\0b", "~nobody-at-all/x", "a" * 5000, None, ["a"])),
    ],
)
def test_one_place_may_be_written_in_several_ways(old, new, same):
    assert _same_path(old, new) == same == _same_path(new, old)


def test_auto_is_for_trainings_alone(where):
    done = call(where, "mode=eval", "resume=auto")
    assert "resume=auto resumes trainings. For mode=eval, name the run: resume=RUN." in done.err


def test_length_in_epochs_replaces_the_steps_of_a_recipe():
    info = {**INFO, "config": {**INFO["config"], "trainer": {**INFO["config"]["trainer"], "steps": 5, "epochs": 2}}}
    assert plan_of(info).length == {"epochs": 2}


@pytest.mark.parametrize(("set_to", "kept"), [("auto", "fp32"), ("bf16", "bf16")])
def test_resume_restores_precision_unless_another_is_set(set_to, kept):
    cfg = OmegaConf.create({"engine": {"precision": set_to}})
    _keep_precision(cfg, {"precision": "fp32"}, [])
    assert cfg.engine.precision == kept
