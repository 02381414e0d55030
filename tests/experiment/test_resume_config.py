"""What a checkpoint's config, the command line and the recipe each decide when a run goes on."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from command_line import SMALL, call, write_data
from omegaconf import OmegaConf

from dinoseg import __main__
from dinoseg.cli.words import parsed
from dinoseg.experiment import lookup
from dinoseg.experiment.folder import drop_parts, is_locked, lock, release
from dinoseg.experiment.recipe import config_description, data_root, recipe_of
from dinoseg.experiment.resume import _one_place, merge
from dinoseg.training import checkpoint, loading
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import write_tensors


@pytest.fixture
def where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    return tmp_path


def train(where, *arguments):
    return call(where, "mode=train", *SMALL, *arguments)


def runs(where):
    return sorted((where / "outputs/base").glob("train_*"))


def last(where, number=0):
    return checkpoint.describe(runs(where)[number] / "checkpoints/last.safetensors")


def test_a_run_goes_on_without_its_groups_and_keeps_them(where):
    assert train(where, "trainer.steps=1", "head=mlp").status == 0
    first = last(where)
    assert call(where, "mode=train", f"resume={runs(where)[0]}", "trainer.steps=2", "engine=cpu").status == 0
    second = last(where)
    assert second["progress"]["step"] == 2 and second["choices"] == first["choices"]
    assert train(where, "trainer.steps=3", "head=mlp", f"resume={runs(where)[0]}").status == 0
    assert last(where)["progress"]["step"] == 3 and len(runs(where)) == 1


@pytest.mark.parametrize(
    ("words", "limit"),
    [([], 9.5), (["steps=2"], None), (["epochs=2"], None), (["patience=3"], 9.5), (["steps=2", "max_minutes=3"], 3)],
)
def test_a_typed_length_lifts_the_time_limit_of_a_run(compose, tmp_path, capsys, words, limit):
    words = tuple(f"trainer.{word}" for word in words)
    saved = compose(*SMALL, "trainer.max_minutes=9.5", f"data.root={tmp_path}")
    info = config_description(saved)
    merged = merge(
        compose(*words, "mode=train"), [parsed(word) for word in words], tmp_path / "last.safetensors", info, tell=True
    )
    assert merged.trainer.max_minutes == limit
    assert ("trainer.max_minutes=null in place of 9.5" in capsys.readouterr().err) == (limit is None)


def test_a_head_of_the_user_s_own_file_goes_on_as_it_was_made(where):
    """A file that leaves a key to its default has no such key in its runs' checkpoints."""
    whole = OmegaConf.load(Path(__main__.CONFIGS) / "head/detail.yaml")
    del whole["direct"]
    (where / "own/head").mkdir(parents=True)
    OmegaConf.save(whole, where / "own/head/mine.yaml")
    words = ("head=mine", "head.fine=4", "head.width=8", "head.layers=[-1]", "trainer.steps=1")
    done = call(where, "--config-dir", "own", "mode=train", *SMALL, *words, "hydra.run.dir=run")
    assert done.status == 0, done.err
    assert "direct" not in checkpoint.describe(where / "run/checkpoints/best.safetensors")["config"]["head"]
    done = call(where, "--config-dir", "own", "mode=eval", "resume=run", "engine=cpu", "engine.workers=0")
    assert done.status == 0, done.err


def test_what_validates_with_windows_is_evaluated_with_them_unless_told_otherwise(where):
    windows = ("inference=windows", "inference.size=16", "trainer.steps=1", "mode.metrics_only=true")
    assert train(where, *windows, "hydra.run.dir=run").status == 0
    scored = {}
    for name, words in {"own": [], "wider": ["inference.size=[16,48]"], "whole": ["inference=whole"]}.items():
        run = ("mode.metrics_only=true", f"hydra.run.dir={name}", *words)
        done = call(where, "mode=eval", "resume=run", "engine=cpu", "engine.workers=0", *run)
        assert done.status == 0, done.err
        scored[name] = json.loads((where / name / "scores.json").read_text())
    assert scored["own"] == json.loads((where / "run/evaluation/scores.json").read_text())
    assert len({json.dumps(scores["matrix"]) for scores in scored.values()}) == 3


def test_how_a_model_is_asked_makes_no_other_run(where):
    assert train(where, "trainer.steps=1", "inference=windows").status == 0
    assert train(where, "trainer.steps=2", "inference.overlap=0.5", "resume=auto").status == 0
    assert len(runs(where)) == 1 and last(where)["choices"]["inference"] == "windows"
    assert last(where)["config"]["inference"]["overlap"] == 0.5
    done = call(where, "mode=eval", *SMALL, "resume=auto", "mode.metrics_only=true", "mode.report=false")
    assert f"checkpoint:   {runs(where)[0]}/checkpoints/best.safetensors" in done.out, done.err


def test_a_run_of_images_does_not_say_how_slots_are_followed(where):
    assert train(where, "trainer.steps=1", "mode.metrics_only=true").status == 0
    assert "slots" not in last(where)["config"].keys() | last(where)["choices"].keys()


@pytest.mark.heavy
def test_a_run_whose_rate_and_warmup_were_numbers_goes_on_as_it_would_have(where):
    rates = ("optim.optimizer.lr=1e-2", "optim.schedule.warmup=2", "optim.schedule.kind=constant")
    assert train(where, "trainer.steps=4", *rates).status == 0
    at_once = checkpoint.read(runs(where)[0] / "checkpoints/last.safetensors")
    assert train(where, "trainer.steps=1", *rates, "hydra.run.dir=outputs/base/train_z").status == 0
    path = where / "outputs/base/train_z/checkpoints/last.safetensors"
    found = checkpoint.read(path)
    config = found.info["config"]
    del config["head"]["lr"], config["adapter"]["lr"], config["trainer"]["epochs"]
    del config["optim"]["optimizer"]["head_lr"], config["optim"]["optimizer"]["backbone_lr"]
    config["trainer"]["steps"] = 4
    checkpoint.write(path, found.tensors, {key: value for key, value in found.info.items() if key != "format"})
    assert call(where, "mode=train", f"resume={path}", "engine=cpu", "engine.workers=0").status == 0
    went_on = checkpoint.read(path)
    assert went_on.tensors.keys() == at_once.tensors.keys() and went_on.info["progress"]["step"] == 4
    assert all(torch.equal(went_on.tensors[name], value) for name, value in at_once.tensors.items())


@pytest.mark.parametrize(
    ("override", "same"),
    [("trainer.steps=2", True), ("trainer.val_every=1", True), ("trainer.clip=7", False), ("seed=5", False)],
)
def test_auto_goes_on_only_with_the_same_recipe(where, override, same):
    assert train(where, "trainer.steps=1").status == 0
    assert train(where, "trainer.steps=2", override, "resume=auto").status == 0
    assert len(runs(where)) == (1 if same else 2)


def test_a_recipe_is_what_is_trained_and_nothing_beside(compose):
    def recipe(*words):
        return recipe_of(config_description(compose("data.root=.", "data.classes=[a,b]", *words)))

    lengths = ("trainer.patience=3", "trainer.save_every=7", "trainer.log_every=3", "trainer.epochs=2")
    assert recipe() == recipe(*lengths, "data.background=b", "head.least_maps=2")
    masks, alone = ("head=mask2former",), "head.deep_supervision=false"
    assert recipe(*masks) == recipe(*masks, alone)  # which losses of pixels do not read
    of_masks = (*masks, "loss=mask_classification")
    others = ("data.ignore_index=7", "data.views=3", "data.feature_noise=0.1", "data.class_uniform=0.5")
    cases = [(), masks, of_masks, (*of_masks, alone), ("head=detail",), ("head=detail", "head.direct=false")]
    found = [repr(recipe(*words)) for words in (*cases, *((other,) for other in others))]
    assert len({*found}) == len(found)


def test_auto_in_a_sweep_looks_through_the_whole_folder_of_its_recipe(tmp_path, monkeypatch):
    for name in ("config_description", "recipe_of"):
        monkeypatch.setattr(lookup, name, lambda _: None)
    monkeypatch.setattr(checkpoint, "describe", lambda _: None)
    path = tmp_path / "outputs/base/train_1/checkpoints/last.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    cfg = OmegaConf.create({"resume": "auto", "choices": {"hparam": "base"}})
    assert lookup.resumed_checkpoint(cfg, tmp_path / "outputs/base/train_2/0", "last") == path


def test_auto_does_not_go_on_with_other_data(where):
    write_data(where / "other")
    assert train(where, "trainer.steps=1").status == 0
    assert train(where, "trainer.steps=1", "data.root=other", "resume=auto").status == 0
    assert len(runs(where)) == 2


def elsewhere(where, *arguments):
    """Evaluate the run of `where` from another folder, which has a folder named data too."""
    (where / "elsewhere").mkdir(exist_ok=True)
    write_data(where / "elsewhere/data", val=1)
    done = call(where / "elsewhere", "mode=eval", f"resume={runs(where)[0]}", "engine=cpu", *arguments)
    assert done.status == 0, done.err
    (run,) = (where / "elsewhere/outputs").glob("*/eval_*")
    config = OmegaConf.load(run / "config/config.yaml")
    shutil.rmtree(run)
    return config.data.root, done.err


@pytest.mark.heavy
def test_a_relative_root_is_that_of_the_run(where):
    assert train(where, "trainer.steps=1").status == 0
    here, there = where / "elsewhere/data", where / "data"
    root, said = elsewhere(where)
    assert root == str(there) and f"warning: data.root=data means {there}, where the run has its data, and" in said
    assert f"not {here}. For that one, give data.root={here}." in said
    for given in ("data.root=data", f"data.root={here}"):
        root, said = elsewhere(where, given)
        assert (where / "elsewhere" / root) == here and "where the run ha" not in said
    there.rename(where / "moved")
    root, said = elsewhere(where)
    assert root == str(here) and f"{there}, where the run had its data, is not there: taking data.root=data" in said
    shutil.rmtree(where / "elsewhere")
    (where / "moved").rename(there)
    done = call(where, "mode=eval", f"resume={runs(where)[0]}", "engine=cpu")
    assert done.status == 0 and "where the run ha" not in done.err


def test_a_root_that_is_with_the_run_alone_needs_no_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/data").mkdir(parents=True)
    assert data_root({"data": {"root": "data"}}, tmp_path / "run") == (str(tmp_path / "run/data"), "")


def test_a_key_that_a_checkpoint_lacks_is_added_where_that_is_said(compose, tmp_path):
    cfg = compose("mode=eval", "resume=x", "data.root=.", "data.classes=[a,b]")
    info = json.loads(json.dumps(config_description(cfg)))
    assert merge(cfg, [parsed("++head.more=1")], tmp_path / "x", info).head.more == 1
    with pytest.raises(
        UserError, match=r"head\.more is no key of .* To add it all the same, give \+\+head\.more=VALUE"
    ):
        merge(cfg, [parsed("head.more=1")], tmp_path / "x", info)


def test_auto_finds_a_run_that_was_moved_with_its_data(where, monkeypatch):
    assert train(where, "trainer.steps=1").status == 0
    moved = where / "moved"
    moved.mkdir()
    for name in ("data", "outputs"):
        (where / name).rename(moved / name)
    monkeypatch.chdir(moved)
    done = call(moved, "mode=train", *SMALL, "trainer.steps=2", "resume=auto")
    assert done.status == 0 and "no earlier run" not in done.err and len(runs(moved)) == 1


def test_auto_passes_over_a_run_that_is_still_going(where, monkeypatch):
    monkeypatch.setattr(lookup, "PATIENCE", 0.1)
    assert train(where, "trainer.steps=1").status == 0
    with open(runs(where)[0] / "run.log", "a", encoding="utf-8") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_locked(runs(where)[0])
        busy = train(where, "trainer.steps=2", f"resume={runs(where)[0]}")
        assert busy.status == 1 and "Another process is writing to" in busy.err
        done = train(where, "trainer.steps=1", "resume=auto")
        assert done.status == 0
        assert f"another process is writing to {runs(where)[0]}: waiting up to 0.1 seconds for its end" in done.err
        assert f"resume=auto: passed over: {runs(where)[0]} is still written to." in done.err
    assert len(runs(where)) == 2


def test_auto_waits_for_a_run_that_is_about_to_end(where, monkeypatch):
    assert train(where, "trainer.steps=1").status == 0
    path, asked = runs(where)[0], []
    monkeypatch.setattr(lookup, "is_locked", lambda run: asked.append(run) or len(asked) < 3)
    done = train(where, "trainer.steps=2", "resume=auto")
    assert done.status == 0 and len(runs(where)) == 1 and last(where)["progress"]["step"] == 2
    assert f"resume=auto: another process is writing to {path}: waiting" in done.err and "passed over" not in done.err


def test_ranks_but_the_first_take_the_run_that_the_first_holds(where, monkeypatch):
    monkeypatch.setattr(lookup, "is_locked", lambda run: True)
    monkeypatch.setattr(lookup, "PATIENCE", 0)
    assert not lookup._is_free(where)
    monkeypatch.setenv("RANK", "1")
    assert lookup._is_free(where)


def test_auto_passes_over_files_that_cannot_be_read_and_says_so(where):
    assert train(where, "trainer.steps=1").status == 0
    path = runs(where)[0] / "checkpoints/last.safetensors"
    found = checkpoint.read(path)
    beside = {
        name: where / f"outputs/base/train_{name}/checkpoints/last.safetensors" for name in ("cut", "new", "other")
    }
    checkpoint.write(beside["new"], found.tensors, {**found.info, "format": 99})
    write_tensors(beside["other"], found.tensors, {})
    beside["cut"].parent.mkdir(parents=True)
    beside["cut"].write_bytes(path.read_bytes()[:1000])
    done = train(where, "trainer.steps=2", "resume=auto")
    assert done.status == 0 and last(where)["progress"]["step"] == 2, done.err
    for name, reason in (("cut", "not a readable"), ("new", "written in format 99"), ("other", "not a checkpoint of")):
        (line,) = [line for line in done.err.splitlines() if str(beside[name]) in line]
        assert line.startswith("resume=auto: passed over: ") and reason in line


def test_what_a_kill_left_half_written_goes_when_the_run_goes_on(where):
    assert train(where, "trainer.steps=1").status == 0
    folder = runs(where)[0]
    half = folder / "checkpoints/.last.safetensors.part/.tmpa1b2c3"
    older, rows, mine = (folder / name for name in ("checkpoints/.tmpa1b2c3", ".metrics.jsonl.12.part", "my.part"))
    half.parent.mkdir()
    for path in (half, older, rows, mine):
        path.write_text("half")
    assert train(where, "trainer.steps=2", "resume=auto").status == 0
    assert not half.parent.exists() and not older.exists() and not rows.exists() and mine.exists()


def test_a_kill_in_the_middle_of_a_save_leaves_a_name_of_ours(where, monkeypatch):
    path = where / "checkpoints/last.safetensors"
    checkpoint.write(path, {"model/a": torch.zeros(4)}, {})
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.write(path, {"model/a": torch.ones(4)}, {})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [found.name.split(".")[1:3] for found in path.parent.glob(".*.part")] == [["last", "safetensors"]]
    drop_parts(where)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


def test_a_folder_locked_here_is_locked_once(tmp_path):
    lock(tmp_path)
    lock(tmp_path)
    assert not is_locked(tmp_path)
    release(tmp_path)
    release(tmp_path)


def test_a_checkpoint_from_elsewhere_is_not_written_beside(where):
    assert train(where, "trainer.steps=1").status == 0
    moved = where / "downloads/sub/last.safetensors"
    moved.parent.mkdir(parents=True)
    (runs(where)[0] / "checkpoints/last.safetensors").rename(moved)
    assert train(where, "trainer.steps=2", f"resume={moved}").status == 0
    assert [path.name for path in (where / "downloads").iterdir()] == ["sub"]
    assert len(runs(where)) == 2


def test_classes_in_another_order_are_refused(where):
    assert train(where, "trainer.steps=1").status == 0
    run = runs(where)[0]
    classes = list(reversed(last(where)["classes"]))
    for mode in ("mode=eval", "mode=train"):
        swapped = call(where, mode, f"resume={run}", f"data.classes=[{','.join(classes)}]", "engine=cpu")
        assert swapped.status == 1 and "in the same order" in swapped.err


def test_nothing_but_model_data_and_training_comes_from_the_file(compose, tmp_path):
    cfg = compose("mode=eval", "resume=x")
    kept = json.loads(json.dumps(config_description(cfg)["config"]))
    evil = {"_target_": "dinoseg.tasks.preparation.sarrarp.prepare", "root": str(tmp_path), "keep_archives": False}
    info = {"config": {**kept, "mode": evil, "engine": evil}, "choices": {}, "folder": str(tmp_path)}
    merged = merge(cfg, [], tmp_path / "x", info)
    assert merged.mode == cfg.mode and merged.engine == cfg.engine
    info["config"] = {**kept, "trust": ["collections"], "adapter": {"_target_": "collections.OrderedDict"}}
    with pytest.raises(UserError, match="no config file on this machine names it there"):
        merge(cfg, [], tmp_path / "x", {**info, "trust": ["collections"]})
    for group in ("adapter", "data", "backbone", "head"):
        info["config"] = {**kept, group: {**kept[group], "more": evil}}
        with pytest.raises(UserError, match=rf"{group}\.more.* is refused"):
            merge(cfg, [], tmp_path / "x", info)


def test_a_fused_optimizer_counts_its_steps_on_its_device(tmp_path):
    model = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW([{"params": [model.weight], "names": ["weight"]}], lr=1.0)
    optimizer.param_groups[0]["fused"] = True
    moments = {f"optimizer/weight/{key}": torch.ones(2, 2) for key in ("exp_avg", "exp_avg_sq")}
    tensors = {"optimizer/weight/step": torch.ones(()), **moments}
    loading.load_optimizer(optimizer, checkpoint.Checkpoint(tmp_path, tensors, {}))
    assert {value.device.type for value in optimizer.state[model.weight].values()} == {"meta"}


def test_a_table_of_ids_survives_the_checkpoint(tmp_path):
    write_data(tmp_path / "data")
    table = ["data.reader.masks.ids={1: 0, 0: 1}", "mode.metrics_only=true"]
    run = ["mode=train", *SMALL, *table, "trainer.val_every=2"]
    assert call(tmp_path, *run, "hydra.run.dir=outputs/base/one").status == 0
    for again in ("resume=auto", "resume=outputs/base/one"):
        steps = "trainer.steps=4" if again == "resume=auto" else "trainer.steps=6"
        done = call(tmp_path, *run, steps, again)
        assert done.status == 0 and "no earlier run" not in done.err, done.err
    assert json.loads((tmp_path / "outputs/base/one/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    done = call(tmp_path, "mode=eval", "resume=outputs/base/one", "mode.metrics_only=true", "engine=cpu")
    assert done.status == 0, done.err
    done = call(tmp_path, "mode=eval", "resume=outputs/base/one", "data.classes=[a,b,c]", "engine=cpu")
    assert done.status == 1 and "the data has the classes a, b, c" in done.err and "trained on dark, bright" in done.err


@pytest.mark.parametrize("root", ["~nobody-here/x", "a\0b", "\ud800", "a" * 4000, None, 3, "???"], ids=ascii)
def test_a_root_that_can_be_none_is_none_given(root):
    assert data_root({"data": {"root": root}}, Path("/")) == ("???", "")
    assert data_root({"data": {}}, Path("~nobody-here/\ud800")) == ("???", "")


def test_the_newest_run_comes_first_and_one_that_is_gone_not_at_all(tmp_path):
    paths = [tmp_path / name for name in "bca"]
    for time, path in enumerate(paths):
        path.touch()
        os.utime(path, (time, time))
    assert lookup._newest_first([*paths[1:], tmp_path / "gone", paths[0]]) == paths[::-1]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("/a/data", "/a/./data/", True),
        ("~/data", str(Path.home() / "data"), True),
        ("a\0b", "a", False),
        ("~nobody-at-all/x", "x", False),
        ("a" * 5000, "a", False),
        (None, "a", False),
        (["a"], "a", False),
    ],
)
def test_one_place_may_be_written_in_several_ways(old, new, same):
    assert _one_place(old, new) == same == _one_place(new, old)
