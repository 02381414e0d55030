"""Slots are trained, validated, resumed and evaluated through the command line as everything else is."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from command_line import SLOTS, call
from mistakes import assert_refused
from omegaconf import OmegaConf
from refused_trainings import refusal
from small_trainings import values_of, without_timings

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.protocols.clustering import contingency, segment_scores
from dinoseg.extensions.protocols.video_clustering import VideoClustering
from dinoseg.extensions.rendering.moving.write import render_moving_objects
from dinoseg.training.checkpoint import read, write
from dinoseg.training.engine import Engine
from dinoseg.utils.images import write_png

BARE = ("trainer=slots", "loss=feature_reconstruction")  # of the recipe


@pytest.fixture(scope="module")
def movi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    render_moving_objects(folder / "movi", train_videos=4, val_videos=2, seconds=1, size=(32, 32), workers=1)
    return folder


@pytest.fixture
def here(movi, tmp_path):
    (tmp_path / "movi").symlink_to(movi / "movi")
    return tmp_path


def run(where, *arguments):
    done = call(where, *arguments)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def plain(movi):
    """Train for one step, and return the run folder."""
    lengths = ("trainer.steps=1", "trainer.val_every=1", "mode.metrics_only=true")
    run(movi, *SLOTS, *lengths, "hydra.run.dir=plain")
    return movi / "plain"


def rows(folder):
    return without_timings(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def scores(path):
    return json.loads(path.read_text())["scores"]


MEMBERS = {
    "attention": ("head.steps=[0,2]", "head.time_decoder=attention"),
    "videosaur": ("loss=video_similarity", "head.similarity=true"),
    "contrast": ("loss=slot_contrast", "head.standardise=true", "head.independent_until=0.5"),
    "groups": ("head.num_slots=[2,2]", "head.groups=always", "head.steps=[1]", "head.time_decoder=linear"),
    "dinosaur": ("head.predictor=none", "data.clips.cut.length=1", "head.iterations=2"),
    "rgb": ("backbone=rgb", "head.steps=[0,1]"),
}


@pytest.mark.parametrize(
    "name", [name if name == "attention" else pytest.param(name, marks=pytest.mark.heavy) for name in MEMBERS]
)
def test_each_member_of_the_family_learns(here, name):
    more = MEMBERS[name]
    tiny = [each for each in SLOTS if not ("backbone=rgb" in more and each.startswith("backbone"))]
    lengths = ("trainer.steps=16", "trainer.val_every=16", "trainer.log_every=1", "trainer.score=fg_ari")
    run(here, *tiny, *more, *lengths, "optim.optimizer.lr=1e-2", "hydra.run.dir=run", "mode.metrics_only=true")
    losses = values_of(rows(here / "run"), "train/loss")
    assert len(losses) == 16 and np.mean(losses[-4:]) < 0.97 * np.mean(losses[:4])
    names = read(here / "run/checkpoints/best.safetensors").part("model")
    assert any(name.startswith("head.slot_attention") for name in names)
    result = json.loads((here / "run/evaluation/scores.json").read_text())
    assert result["protocol"] == "video_clustering" and result["n"] == 2
    validated = [row for row in rows(here / "run") if "val/fg_ari" in row]
    assert len(validated) == 1 and {"val/loss", "val/ari", "val/mbo"} <= set(validated[0])


@pytest.mark.heavy
@pytest.mark.parametrize("following", [(), ("slots.match=appearance", "slots.passes=2", "slots.appearance=3")])
def test_validation_has_the_score_of_the_protocol(here, following):
    lengths = ("trainer.steps=4", "trainer.val_every=2", "trainer.score=mbo")
    light = ("mode.metrics_only=true",) * bool(following)  # what is drawn is looked at once
    done = run(here, *SLOTS, *lengths, *following, *light, "hydra.run.dir=run")
    best = scores(here / "run/evaluation/scores.json")
    step = read(here / "run/checkpoints/best.safetensors").info["progress"]["best_step"]
    (row,) = [row for row in rows(here / "run") if "val/mbo" in row and row["step"] == step]
    assert [row["val/ari"], row["val/fg_ari"], row["val/mbo"]] == pytest.approx(
        [best["ARI"], best["FG-ARI"], best["mBO"]], abs=1e-6
    )
    run(here, "mode=eval", "resume=run", "engine=cpu", "engine.precision=fp32", *light, "hydra.run.dir=again")
    assert scores(here / "again/scores.json") == best
    split = json.loads((here / "run/split.json").read_text())
    assert len(split["train"]) == 4 and len(split["val"]) == 2 and not set(split["train"]) & set(split["val"])
    if not light:
        assert "FG-ARI" in done.out and (here / "run/curves.png").is_file()


@pytest.mark.heavy
def test_a_run_keeps_how_its_slots_are_followed(here):
    words = (*SLOTS, "trainer.steps=2", "trainer.val_every=2", "mode.metrics_only=true", "hydra.run.dir=run")
    run(here, *words, "slots.match=similarity", "slots.temperature=0.5")
    best = here / "run/checkpoints/best.safetensors"
    assert read(best).info["choices"]["slots"] == "free"
    ask = ("mode=eval", "engine=cpu", "engine.precision=fp32", "mode.metrics_only=true")

    def slots_of_run(name, *more):
        run(here, *ask, f"hydra.run.dir={name}", *more)
        config = OmegaConf.load(here / name / "config/config.yaml")
        return config.slots.match, config.slots.temperature, config.slots.lock_on

    assert slots_of_run("own", "resume=run") == ("similarity", 0.5, False)
    assert (here / "own/scores.json").read_text() == (here / "run/evaluation/scores.json").read_text()
    assert slots_of_run("other", "resume=run", "slots.match=appearance") == ("appearance", 0.5, False)
    words = ("slots=lock_on", "slots.temperature=0.2", "mode.supervision=first_frame")
    assert slots_of_run("group", "resume=run", *words) == ("auto", 0.2, True)


@pytest.mark.heavy
def test_how_slots_are_followed_makes_no_other_run(here):
    words = (*SLOTS, "mode.metrics_only=true", "resume=auto", "hydra.run.dir=followed")
    run(here, *words, "trainer.steps=1", "slots.match=overlap")
    done = run(here, *words, "trainer.steps=2", "slots.match=similarity")
    info = read(here / "followed/checkpoints/last.safetensors").info
    assert info["progress"]["step"] == 2 and info["config"]["slots"]["match"] == "similarity", done.err


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "os.system", "command": "true"}, "slots._target_=os.system is refused"),
        pytest.param({"match": "nearest"}, "slots.match=nearest is unk", marks=pytest.mark.heavy),
        ("appearance", "slots"),
    ],
)
def test_checkpoint_with_invalid_slots_is_refused(here, plain, node, message):
    shutil.copytree(plain, here / "run")
    best = here / "run/checkpoints/best.safetensors"
    found = read(best)
    found.info["config"]["slots"] = node
    write(best, found.tensors, {key: value for key, value in found.info.items() if key != "format"})
    done = call(here, "mode=eval", "resume=run", "engine=cpu", "mode.metrics_only=true")
    assert done.status == 1 and "Traceback" not in done.err and re.search(f"error: .*{message}", done.err), done.err


def test_videos_with_empty_masks_are_scored_with_a_note(here):
    shutil.copytree(here / "movi", here / "bare", symlinks=False)
    for path in (here / "bare/validation").rglob("segmentations/*.png"):
        write_png(path, np.zeros((32, 32), np.uint8))
    lengths = ("data.root=bare", "trainer.steps=2", "trainer.val_every=1", "trainer.score=fg_ari")
    more = ("data.augment.flip=0", "data.view.flip=0")
    done = run(here, *SLOTS, *lengths, *more, "hydra.run.dir=run", "mode.metrics_only=true")
    assert done.err.count("No effect here: data.augment.flip=0. Clips are cropped and flipped by data.view.") == 1
    assert done.err.count("No effect here") == 1 and done.err.count("No validation clip has an object: fg_ari") == 1
    result = json.loads((here / "run/evaluation/scores.json").read_text())
    assert result["scores"]["FG-ARI"] == 1 and result["scores"]["mBO"] is None
    (note,) = result["notes"]
    said = "2 of 2 references without any object: validation_0001, validation_0002"
    assert note in done.err and note.startswith(said)


def test_training_reads_no_mask(here, plain):
    shutil.copytree(here / "movi", here / "own", symlinks=False)
    for path in (here / "own/train").rglob("segmentations/*.png"):
        path.write_bytes(b"no picture")
    lengths = ("trainer.steps=1", "trainer.val_every=1", "mode.metrics_only=true")
    run(here, *SLOTS, *lengths, "data.root=own", "hydra.run.dir=two")
    one, two = (read(folder / "checkpoints/last.safetensors").tensors for folder in (plain, here / "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.heavy
def test_a_resumed_run_is_the_same_run(here):
    # of 4 steps as of 8 the decoder alone learns
    late = ("head.standardise=true", "head.slot_init=clusters", "head.decoder_first=0.9", "loss=slot_contrast")
    lengths = ("trainer.val_every=4", "trainer.log_every=1", "head.steps=[0,1]", "mode.metrics_only=true", *late)
    whole = ("trainer.accumulate=2", "trainer.ema=0.9", *lengths)
    steps = ("trainer.steps=8", "optim.schedule.kind=constant")
    run(here, *SLOTS, *whole, *steps, "hydra.run.dir=straight")
    run(here, *SLOTS, *whole, "trainer.steps=4", "optim.schedule.kind=constant", "hydra.run.dir=part")
    early = read(here / "part/checkpoints/last.safetensors").part("model")
    run(here, "mode=train", "resume=part", "trainer.steps=8", "engine=cpu", "engine.precision=fp32", "engine.workers=2")
    straight, part = (read(here / name / "checkpoints/last.safetensors").tensors for name in ("straight", "part"))
    assert straight.keys() == part.keys() and all(torch.equal(straight[name], part[name]) for name in straight)
    late = read(here / "part/checkpoints/last.safetensors").part("model")
    learnt = {
        name.split(".")[1] for name, value in late.items() if value.is_floating_point() and not value.equal(early[name])
    }
    assert "decoder" in learnt and not learnt & {"slot_attention", "predictor"}
    ends = [[row for row in rows(here / name) if row["step"] > 4] for name in ("part", "straight")]
    assert ends[0] == ends[1]


def test_videos_without_masks_have_a_loss_alone(here):
    (here / "films").mkdir()
    for number, video in enumerate(sorted((here / "movi/train").iterdir())[:2]):
        shutil.copytree(video / "frames", here / "films" / f"{number}")
    lengths = ("trainer.steps=2", "trainer.val_every=1")
    plain = [each for each in SLOTS if each != "data=movi"]
    done = run(here, *plain, "data=videos", "data.root=films", *lengths, "hydra.run.dir=run")
    assert "Videos are in train and in val: 0, 1" in done.err
    assert "no other score: data=videos has no masks" in done.out
    assert (here / "run/evaluation/segments.png").is_file() and (here / "run/curves.png").is_file()
    shown = sorted(path.relative_to(here / "run/validation").as_posix() for path in here.rglob("run/validation/*/*"))
    assert [name.split("_000")[1] for name in shown] == ["01/0", "01/0", "01/1", "01/1", "02/0", "02/0", "02/1", "02/1"]
    progress = read(here / "run/checkpoints/last.safetensors").info["progress"]
    values = values_of(rows(here / "run"), "val/loss")
    assert progress["best"] == min(values) and len(values) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("head=linear", *BARE), "trainer=slots trains slots, and head=linear has none. Choose head=slots"),
        (("loss=cross_entropy",), "loss=cross_entropy is not a slot loss. Choose loss=feature_reconstruction"),
        (("loss.weights=median",), "loss.weights=median: loss=feature_reconstruction uses no classes"),
        (
            ("trainer=supervised",),
            "head=slots predicts slots, which have no classes: trainer=slots loss=feature_reconstruction trains them",
        ),
        (
            ("head=linear", *BARE, "trainer=supervised"),
            "loss=feature_reconstruction needs reconstruction, slots, and head=linear with task=semantic provides "
            "class scores alone. Choose trainer=slots with head=slots",
        ),
        (("trainer=supervised", "loss=cross_entropy"), "head=slots predicts slots, which have no"),
        (("trainer.score=miou",), "trainer.score=miou is not a score. Choose one of loss, ari, fg_ari, mbo"),
        (("head.num_slots=17",), "num_slots=17 of the slot head exceeds the 4 x 4 = 16 cells"),
        (("head.steps=[4]",), r"clips of 5 frames or more, or lower steps"),
        (("data=folder", "data.classes=[a,b]", "head=slots", *BARE), "data=folder has no clips"),
        (("data.clips.cut.length=2", "head.steps=[1]"), "clips of 2 frames have none (steps=[1])"),
        (("data.clips.cut.length=1",), "Give clips of 2 frames or more; or, for single frames, set predictor=none"),
        (("head.independent_until=1",), "head.independent_until=1"),
        (("loss=slot_contrast", "head.predictor=none"), "loss=slot_contrast compares slots across frames"),
        (("loss=video_similarity",), "head.similarity=false does not fit loss=video_similarity"),
        (("slots=lock_on",), "slots.lock_on=true needs the first frame's masks, and data=movi is evaluated without"),
        (("data.cache=packed",), "data.cache=packed stores images with masks, not clips"),
        (("data.batch_size=99",), "data.batch_size=99 with 8 training clips"),
        (("backbone=rgb", "head.num_slots=[2,2]", "head.groups=always"), "needs a backbone with a class token"),
    ],
)
def test_incompatible_slot_options_are_refused(movi, compose, more, message):
    gone = {"head=linear": ("head.", "hparam"), "backbone=rgb": "backbone.", "data=folder": ("data.clips", "hparam")}
    words = tuple(each for each in SLOTS if not each.startswith(gone.get(more[0], "none")))
    said = refusal(compose, movi, (*words, "trainer.steps=1", "trainer.val_every=1"), more)
    assert message in said.replace("\n", " ")


@pytest.fixture
def parts(movi, compose):
    """Return what builds the model, engine, feed and loss of a config."""

    def build(*more, root=movi / "movi"):
        builder = Builder(compose(*SLOTS, f"data.root={root}", *more))
        engine = Engine("cpu", "fp32", workers=0, eval_batch_size=5)
        training = builder.make_training()
        training.open_data(engine)
        return builder.model().eval(), engine, training.data_module, builder.loss(None)

    return build


def test_validation_loss_uses_the_frame_distance_of_training(parts):
    words = ("data.clips.cut.stride=3", "data.clips.cut.length=3", "head.steps=[0,1]")
    model, engine, data_module, loss = parts(*words)
    expected = []
    for clip in data_module.val:
        frames = data_module.view(clip["frames"][[0, 3, 6]].permute(0, 2, 3, 1).contiguous().numpy())
        with torch.no_grad():
            prediction = model(torch.from_numpy(frames).permute(0, 3, 1, 2)[None])
        expected.append(loss(prediction, None)[0].item())
    assert data_module.validate(model, loss, engine).scores["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_clips_too_short_for_the_loss_are_left_out_of_it(parts):
    words = ("data.clips.cut.length=10", "head.steps=[0,9]", "head.predictor=carry")
    model, engine, data_module, loss = parts(*words)
    assert data_module.validate(model, loss, engine).scores["loss"] > 0
    data_module.val.spans = [span._replace(length=9) for span in data_module.val.spans]
    found = data_module.validate(model, loss, engine).scores
    assert found["loss"] is None and found["fg_ari"] is not None


def test_clips_of_unequal_length_are_refused(movi, parts, tmp_path):
    shutil.copytree(movi / "movi", tmp_path / "movi")
    for kind in ("frames", "segmentations"):
        (tmp_path / f"movi/train/train_0001/{kind}/00011.png").unlink()
    build = partial(parts, "data.clips.cut.length=null", root=tmp_path / "movi")
    assert_refused(build, "length=None gives training clips of 11 to 12 frames", "length=11 or less")


@pytest.mark.heavy
def test_two_ranks_train_and_score_as_one(here):
    lengths = ("trainer.steps=2", "trainer.val_every=2", "data.batch_size=4", "mode.metrics_only=true")
    groups = ("head.num_slots=[2,2]", "head.groups=initial", "head.steps=[0,1]", "head.time_decoder=linear")
    late = ("head.standardise=true", "head.independent_until=0.5", "head.decoder_first=0.5", "loss=slot_contrast")
    run(here, *SLOTS, *lengths, *groups, *late, "engine.devices=2", "hydra.run.dir=run")
    run(here, "mode=eval", "resume=run", "engine=cpu", "engine.precision=fp32", "hydra.run.dir=again")
    one = scores(here / "again/scores.json")
    two = scores(here / "run/evaluation/scores.json")
    assert one == pytest.approx(two)
    (row,) = [row for row in rows(here / "run") if "val/mbo" in row]
    assert row["val/mbo"] == pytest.approx(one["mBO"], abs=1e-6)


def test_scores_in_validation_are_those_of_a_loop(parts):
    model, engine, data_module, loss = parts()

    def validate():
        return data_module.validate(model, loss, engine).scores

    expected = []
    for clip in data_module.val:
        segments = np.stack(data_module.segments_of(model, clip, engine))
        expected.append(segment_scores(contingency(clip["masks"].numpy(), segments)))
        assert segments.min() >= 1 and segments.max() <= 3
    found = [validate()[name] for name in ("ari", "fg_ari", "mbo")]
    assert found == pytest.approx(np.mean(expected, axis=0), abs=1e-6)
    # without a labelled background, clips without an object have no FG-ARI
    data_module.protocol = VideoClustering(labelled_background=False)
    empty = [{**clip, "masks": torch.zeros_like(clip["masks"])} for clip in data_module.val]
    data_module.val = Listed(data_module.val, [data_module.val[0], *empty[1:]])
    assert validate()["fg_ari"] == pytest.approx(expected[0][1])
    data_module.val = Listed(data_module.val, empty)
    assert validate()["fg_ari"] is None


class Listed(list):
    """Clips in memory, cut like those of a dataset."""

    def __init__(self, clips, held):
        super().__init__(held)
        self.videos, self.spans = clips.videos, clips.spans


TINY = (  # of every official recipe: a random backbone, few slots, small frames
    *("backbone.weights=random", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2"),
    *("backbone.arch.num_attention_heads=3", "engine=cpu", "engine.workers=0", "data.root=movi", "data.batch_size=4"),
    *("trainer.steps=2", "trainer.val_every=2", "head.decoder_dim=16", "head.num_slots=3", "mode.metrics_only=true"),
)
OFFICIAL = {  # those of MOVi-E differ in their sizes alone
    "slotcontrast_movi_c": ("resolution.crop=[56,56]", "data.clips.eval_square=56", "backbone.arch.mlp_ratio=2"),
    "slotcontrast_ytvis2021": ("data=movi", "resolution.crop=[28,28]", "data.clips.eval_square=28"),
    "videosaur_movi_c": ("resolution.crop=[40,40]", "data.clips.eval_square=40", "backbone.arch.intermediate_size=48"),
    "videosaur_ytvis2021": (
        *("data=movi", "resolution.crop=[32,32]", "data.clips.eval_square=32", "backbone.arch.intermediate_size=48"),
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", OFFICIAL)
def test_official_recipes_train_and_are_evaluated(here, recipe):
    run(here, "mode=train", f"hparam={recipe}", *TINY, *OFFICIAL[recipe], "hydra.run.dir=run")
    losses = values_of(rows(here / "run"), "train/loss")
    assert losses and all(np.isfinite(loss) for loss in losses)
    found = scores(here / "run/evaluation/scores.json")
    assert 0 <= found["mBO"] <= 1 and found["FG-ARI"] <= 1
