"""Ensembles on the command line and in Python: averaged predictions, out-of-fold scores, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import yaml
from command_line import SMALL, call, succeed
from mistakes import assert_refused
from omegaconf import OmegaConf

import dinoseg
from dinoseg.api.compose import compose
from dinoseg.cli.shared import compose_shared, describe_job
from dinoseg.config.plain import to_container
from dinoseg.evaluation.image_record import read_record
from dinoseg.extensions.rendering.moving.write import draw_video
from dinoseg.utils.images import read_ids, read_image, write_png

TRAINING = (
    *("mode=train", *SMALL, "adapter=frozen", "trainer.steps=4", "trainer.val_every=2", "mode.metrics_only=true"),
    *("head.lr=0.05", "mode.pictures=0"),
)
FP32 = ("engine=cpu", "engine.workers=0", "engine.precision=fp32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train three folds of one head, and a run with another one; return the folder."""
    where = tmp_path_factory.mktemp("ensembles")
    draw = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3), ("test", 4)):
        for number in range(count):
            image = draw.integers(0, 256, (32, 48 + 4 * (number % 2), 3)).astype(np.uint8)
            name = f"{split}{number}.png"
            write_png(where / f"data/{split}/images/{name}", image)
            write_png(where / f"data/{split}/masks/{name}", (image.mean(axis=-1) > 127).astype(np.uint8))
    folds = ("data.folds=3", "data.fold=0,1,2", "head=linear", "hydra.sweep.dir=folds")
    succeed(where, "-m", *TRAINING, *folds, "hydra.mode=MULTIRUN")
    succeed(where, *TRAINING, "head=mlp", "resolution.scale=0.5", "hydra.run.dir=mlp")
    return where


MEMBERS = ("folds/0", "folds/1", "mlp")
RESUME = f"resume=[{','.join(MEMBERS)}]"


def test_scores_masks_and_probabilities_equal_averages_by_hand(runs, monkeypatch):
    done = succeed(runs, "mode=eval", RESUME, "mode.split=test", *FP32, "hydra.run.dir=scored")
    assert "ensemble of 3: mIoU" in done.err and "over the mean of its members" in done.err
    succeed(runs, "mode=predict", RESUME, "input=test", *FP32, "mode.outputs=[probabilities]", "hydra.run.dir=masks")
    monkeypatch.chdir(runs)
    members = [dinoseg.load(each, device="cpu", precision="fp32") for each in MEMBERS]
    ensemble = dinoseg.load(MEMBERS, device="cpu", precision="fp32")
    offloaded = dinoseg.load([*MEMBERS], device="cpu", precision="fp32", offload=True)
    assert ensemble.classes == ("dark", "bright") and ensemble.facts.scores is None
    matrix, own = np.zeros((2, 2), int), np.zeros((3, 2, 2), int)
    for number in range(4):
        image = read_image(f"data/test/images/test{number}.png")
        each = np.stack([member.predict(image).probabilities for member in members]).astype(np.float64)
        by_hand = each.mean(axis=0)
        found = ensemble.predict(image)
        assert np.abs(found.probabilities - by_hand).max() < 1e-6
        assert np.abs(offloaded.predict(image).probabilities - by_hand).max() < 1e-6
        ids = by_hand.argmax(axis=0)
        assert np.array_equal(found.mask, ids) and np.array_equal(read_ids(f"masks/masks/test{number}.png"), ids)
        reference = read_ids(f"data/test/masks/test{number}.png")
        np.add.at(matrix, (reference, ids), 1)
        for counts, probabilities in zip(own, each, strict=True):
            np.add.at(counts, (reference, probabilities.argmax(axis=0)), 1)
    scores = json.loads((runs / "scored/scores.json").read_text())
    assert scores["matrix"] == matrix.tolist()
    gain = json.loads((runs / "scored/ensemble.json").read_text())

    def miou(counts):
        right = np.diag(counts)
        return (right / (counts.sum(axis=0) + counts.sum(axis=1) - right)).mean()

    assert [each["miou"] for each in gain["members"].values()] == pytest.approx([*map(miou, own)])
    mean = np.mean([*map(miou, own)])
    assert gain["over_mean"]["miou"]["value"] == pytest.approx(miou(matrix) - mean)
    assert gain["over_mean"]["miou"]["ci95"] is not None
    again = dinoseg.evaluate([*MEMBERS], *FP32, split="test", out_dir="python")
    assert again.confusion.tolist() == matrix.tolist()
    assert "ensemble of 3" in (runs / "scored/report.html").read_text()


def test_a_resumed_prediction_needs_the_same_members(runs):
    words = ("mode=predict", "input=data/test/images", *FP32, "hydra.run.dir=resumed")
    succeed(runs, *words, "resume=[folds/0,folds/1]")
    assert "4 images of an earlier run" in succeed(runs, *words, "resume=[folds/0,folds/1]").err
    done = call(runs, *words, "resume=[folds/0,mlp]")
    assert done.status and "members" in done.err


def test_each_image_is_scored_by_the_run_of_its_fold(runs):
    done = succeed(runs, "mode=eval", "resume=folds", *FP32, "hydra.run.dir=pooled")
    assert "out of fold: mIoU" in done.err and "over 8 images" in done.err and "fewer than 10" in done.err
    assert "3 models, each image by those of its fold" in (runs / "pooled/report.html").read_text()
    refused = call(runs, "mode=eval", "resume=folds/0", "mode.ensemble.out_of_fold=true", *FP32)
    assert refused.status and "resume=folds/0" in refused.err and "is one run" in refused.err
    pooled = read_record(runs / "pooled")
    counts = dict(zip(pooled.images, pooled.counts, strict=True))
    assert len(counts) == 8
    for fold in range(3):
        name = f"fold{fold}"
        succeed(runs, "mode=eval", f"resume=folds/{fold}", *FP32, f"hydra.run.dir={name}")
        record = read_record(runs / name)
        for image, own in zip(record.images, record.counts, strict=True):
            assert np.array_equal(counts.pop(image), own)
    assert not counts
    done = succeed(runs, "mode=eval", "resume=[folds/2,folds/0,folds/1]", "mode.ensemble.out_of_fold=true", *FP32)
    assert "out of fold: mIoU" in done.err and "over 8 images" in done.err


def test_out_of_fold_scores_of_two_heads_are_compared(runs):
    succeed(runs, "mode=eval", "resume=folds", *FP32, "hydra.run.dir=a")
    succeed(runs, "mode=eval", "resume=folds", "resolution.scale=0.5", *FP32, "hydra.run.dir=b")
    done = succeed(runs, "mode=compare", "runs=[a,b]", "mode.names=[whole,half]", "hydra.run.dir=compared")
    assert "over 8 images" in done.out and "split.json" not in done.err and "no images" not in done.err
    models = "3 models, each image by those of its fold"
    assert f"seeds:        whole: {models}; half: {models}: verdicts hold" in done.out
    page = (runs / "compared/report.html").read_text()
    assert page.count('<div class="shot">') > 3 and "| whole" in (runs / "compared/table.md").read_text()
    refused = call(runs, "mode=compare", "runs=[a,b]", "mode.names=[whole]")
    assert "error: mode.names=[whole]: give a different name for each side, in this order: a, b." in refused.err


def test_a_sweep_is_averaged_on_new_images(runs, monkeypatch):
    monkeypatch.setenv("FIRST", "folds/2")
    resumes = {"folds": 3, "[${oc.env:FIRST},folds/0]": 2, "${oc.create:[folds/0,folds/1]}": 2}
    for number, (resume, count) in enumerate(resumes.items()):
        out = f"sweep_test{number}"
        succeed(runs, "mode=eval", f"resume={resume}", "mode.split=test", *FP32, f"hydra.run.dir={out}")
        gain = json.loads((runs / out / "ensemble.json").read_text())
        assert len(gain["members"]) == count


def test_a_video_is_smoothed_over_the_mean_of_all_members(runs):
    for number in range(4):  # frames of one size
        image = np.random.default_rng(number).integers(0, 256, (32, 48, 3)).astype(np.uint8)
        write_png(runs / f"clip/{number}.png", image)
    words = ("mode=track", "input=clip", *FP32, "mode.smoothing=0", "hydra.run.dir=tracked")
    succeed(runs, *words, RESUME)
    succeed(runs, "mode=predict", "input=clip", RESUME, *FP32, "hydra.run.dir=clip_masks")
    for number in range(4):
        tracked, predicted = (read_ids(runs / folder / f"masks/{number}.png") for folder in ("tracked", "clip_masks"))
        assert np.array_equal(tracked, predicted)
    done = call(runs, *words[:-1], RESUME, "mode.ensemble.offload=true")
    assert done.status and "offload" in done.err


def test_wrong_members_and_modes_are_refused(runs):
    shutil.copytree(runs / "folds", runs / "two", dirs_exist_ok=True)
    shutil.copytree(runs / "mlp", runs / "two/3", dirs_exist_ok=True)
    shutil.copytree(runs / "folds", runs / "unfinished", dirs_exist_ok=True)
    (runs / "unfinished/1/training.json").unlink()
    shutil.rmtree(runs / "unfinished/2/checkpoints", ignore_errors=True)
    refused = {
        ("mode=export", RESUME): ("mode=export takes no ensemble",),
        ("mode=train", RESUME): ("mode=train takes no ensemble",),
        ("mode=eval", "resume=[mlp,mlp]", "mode.split=test"): ("each named once",),
        ("mode=eval", "resume=[mlp]", "mode.split=test"): ("two or more",),
        ("mode=eval", "resume=[folds/0,folds/1]"): ("was trained or selected on", "mode.split=test", "out_of_fold"),
        ("mode=eval", "resume=[mlp,folds/0]"): ("mlp/checkpoints/best", "was trained or selected on 3 images"),
        ("mode=eval", "resume=[folds/0,folds/1]", "mode.ensemble.out_of_fold=true"): ("never", "every fold"),
        ("mode=eval", "resume=folds", "mode.split=test", "mode.ensemble.out_of_fold=true"): ("mode.split=val",),
        ("mode=eval", "resume=two"): ("2 recipes", "head=linear", "in 0, 1, 2", "head=mlp", "in 3", "resume=[two/0"),
        ("mode=predict", "resume=two", "input=test"): ("two is a sweep of 4 runs of different folds or scores",),
        ("mode=export", "resume=folds"): ("folds is a sweep of 3 runs of different folds", "resume=folds/JOB"),
        ("mode=eval", "resume=unfinished"): ("no finished training in 1, 2",),
        ("mode=eval", "resume=[folds/0,nowhere]", "mode.split=test"): ("nowhere", "not found"),
        ("mode=eval", "resume=[folds/0,mlp]", "head=linear", "mode.split=test"): ("head=linear", "head=mlp"),
    }
    for words, expected in refused.items():
        done = call(runs, *words, *FP32)
        assert done.status and "Traceback" not in done.err
        assert [each for each in expected if each not in done.err] == [], done.err


def test_models_of_other_classes_or_thresholds_are_refused(tmp_path):
    for name, more in {
        "a": {},
        "order": {"classes": ["leaf", "ground"]},
        "low": {"task": {"threshold": 0.3}},
        "four": {"data": {"channels": 4}},
    }.items():
        given = {"classes": ["ground", "leaf"], "task": "multilabel" if name in ("a", "low") else "semantic", **more}
        if name == "low":
            given["task"] = {"name": "multilabel", "threshold": 0.3}
        dinoseg.create_model("rgb", **given).save(tmp_path / f"{name}.safetensors")
    a, order, low, four = (tmp_path / f"{name}.safetensors" for name in ("a", "order", "low", "four"))
    assert_refused(lambda: dinoseg.load([order, four]), "classes", "leaf", str(order), str(four))
    assert_refused(lambda: dinoseg.load([a, low]), "task.threshold", "0.3", "Export each")
    assert_refused(lambda: dinoseg.load([a]), "two or more")
    link = tmp_path / "link.safetensors"
    link.symlink_to(a)
    for same in (a, link):
        assert_refused(lambda same=same: dinoseg.load([a, same]), "each named once")
    assert_refused(lambda: dinoseg.load(a, offload=True), "offload")


def test_members_reach_other_ranks_as_descriptions(runs):
    words = ["mode=eval", RESUME, "mode.split=test", *FP32, "hydra.run.dir=described"]
    succeed(runs, *words)
    cfg = OmegaConf.load(runs / "described/config/config.yaml")
    shared = yaml.safe_load(yaml.safe_dump(describe_job(cfg)))
    own = to_container(compose(words))
    members = to_container(compose_shared(shared, own))["members"]
    assert [member["resume"] for member in members] == [member.resume for member in cfg.members]
    for member, given in zip(members, cfg.members, strict=True):
        assert member["head"]["_target_"] == given.head._target_ and member["data"]["fold"] == given.data.fold


@pytest.mark.heavy
def test_ranks_score_the_images_of_all_members(runs):
    """In processes: each rank builds all members."""
    for words in (("resume=folds", "hydra.run.dir=ranks_pooled"), (RESUME, "mode.split=test", "hydra.run.dir=ranks")):
        succeed(runs, "mode=eval", *words, *FP32, "engine.devices=2")
        alone = succeed(runs, "mode=eval", *words[:-1], *FP32, f"{words[-1]}_alone")
        assert alone.status == 0
    for name in ("ranks", "ranks_pooled"):
        first, second = (json.loads((runs / f"{name}{more}/scores.json").read_text()) for more in ("", "_alone"))
        assert first["matrix"] == second["matrix"]
    first, second = ((runs / f"ranks{more}/ensemble.json").read_text() for more in ("", "_alone"))
    assert first == second


@pytest.mark.heavy
def test_gains_of_objects_are_those_of_the_members_scored_alone(tmp_path):
    """Two runs start from the packaged model, each on images of its own; they are scored on rendered objects."""
    sides = {"a/train": range(4), "b/train": range(4, 8), "a/val": [16], "b/val": [16], "a/test": range(17, 23)}
    for side, numbers in sides.items():
        for number in numbers:
            image, ids = next(iter(draw_video((5, 1, number), 12, (128, 128))))
            write_png(tmp_path / side / f"images/{number}.png", image)
            write_png(tmp_path / side / f"masks/{number}.png", np.where(ids > 0, 1000 + ids.astype(np.uint16), 0))
    data = ("data=folder_instances", "data.classes=[background,object]", "data.background=background")
    cpu = ("engine=cpu", "engine.workers=0", "engine.precision=fp32", "mode.metrics_only=true")
    words = (*data, "hparam=instance", "backbone=tiny_surgical", "adapter=frozen", "head=pmt", "head.blocks=1")
    words += ("head.num_queries=16", "init=dinoseg:objects", "trainer.steps=1", "mode.pictures=0", "logger=[]")
    words += ("data.batch_size=4", "loss.criterion.num_points=500", "optim.schedule.warmup=0", "mode.report=false")
    for run in "ab":
        words += ("optim.optimizer.lr=1e-3",) if run == "b" else ()
        succeed(tmp_path, "mode=train", *words, *cpu, f"data.root={run}", f"hydra.run.dir=run_{run}")
    found = {}
    for name, resume in (("a", "run_a"), ("b", "run_b"), ("both", "[run_a,run_b]")):
        score = ("mode=eval", "mode.split=test", "data.root=a", *cpu, f"resume={resume}", f"hydra.run.dir={name}")
        done = succeed(tmp_path, *score)
        found[name] = json.loads((tmp_path / name / "scores.json").read_text())
    gain = json.loads((tmp_path / "both/ensemble.json").read_text())
    for key in ("AP", "AP50", "miou"):
        own = [found[run][key] for run in "ab"]
        assert [each[key] for each in gain["members"].values()] == pytest.approx(own, abs=1e-9) and own[0] != own[1]
        assert gain["over_mean"][key]["value"] == pytest.approx(found["both"][key] - sum(own) / 2, abs=1e-9)
        low, high = gain["over_mean"][key]["ci95"]
        assert low <= gain["over_mean"][key]["value"] <= high
    assert f"ensemble of 2: AP {100 * found['both']['AP']:.2f} %" in done.err
