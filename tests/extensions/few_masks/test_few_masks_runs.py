"""Trainings with few masks: resumed, scored and exported by the teacher, with any images, and what is refused."""

import json
from copy import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command_line import SMALL, succeed, write_data
from finished_runs import rows, train_run, whole_and_resumed_on_ranks
from mistakes import command, refusals
from refused_trainings import refusal

import dinoseg
from dinoseg.extensions.few_masks import method
from dinoseg.extensions.few_masks.method import FewMasksDataModule
from dinoseg.extensions.few_masks.views import UnlabelledViews
from dinoseg.training import checkpoint
from dinoseg.utils.images import read_image, write_png

WORDS = (
    *("mode=train", *(word for word in SMALL if word != "trainer.steps=2"), "trainer=unimatch_v2"),
    *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "trainer.val_every=9", "trainer.log_every=1"),
    *("optim.schedule.kind=constant", "optim.schedule.warmup=0", "trainer.threshold=0.5"),
)
HALF = (*WORDS, "data.labelled=0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("few_masks")
    write_data(where / "data", train=6, val=1)
    return where


@pytest.fixture(scope="module")
def whole_run(folder):
    return train_run(folder, "whole", *HALF, "trainer.steps=4", "mode.pictures=1")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_run_equals_an_uninterrupted_one(folder, whole_run):
    train_run(folder, "parts", *HALF, "trainer.steps=2", "engine.workers=2")
    parts, _ = train_run(folder, "parts", *HALF, "trainer.steps=4", "resume=parts")
    assert same(whole_run[0], parts) and "with masks: 3, 2 per batch; without: 3, 2 per batch" in whole_run[1].err
    split = json.loads((folder / "parts/split.json").read_text())
    assert sorted(split["train"] + split["unlabelled"]) == [*"012345"] and len(split["unlabelled"]) == 3


def test_log_has_shares_and_accuracy_of_pseudo_labels(folder, whole_run):
    found = [row for row in rows(folder, "whole") if "train/loss" in row]
    assert len(found) == 4
    for row in found:
        assert row["train/loss"] == pytest.approx((row["train/masks"] + row["train/pseudo_labels"]) / 2, rel=1e-5)
        assert row["train/confident"] > 0.99 and 0.2 < row["train/pseudo_accuracy"] < 0.8  # two classes
    assert "reached trainer.threshold" not in whole_run[1].err
    (picture,) = (folder / "whole/validation/step_00004/pseudo_labels").glob("*.png")
    assert read_image(picture).shape[1] > 2 * 48


def test_best_checkpoint_and_export_are_the_teacher(folder, whole_run):
    best = checkpoint.read(folder / "whole/checkpoints/best.safetensors").tensors
    average = {name.removeprefix("ema/"): value for name, value in whole_run[0].items() if name.startswith("ema/")}
    assert all(torch.equal(best[f"model/{name}"], value) for name, value in average.items())
    assert not all(torch.equal(whole_run[0][f"model/{name}"], value) for name, value in average.items())
    succeed(folder, "mode=export", "export=safetensors", "resume=whole", "engine=cpu", "hydra.run.dir=file")
    model = dinoseg.load(folder / "file", device="cpu").model
    assert all(torch.equal(model.state_dict()[name], value) for name, value in average.items())


def test_labelled_images_are_left_out_of_a_folder_without_masks(folder, compose, monkeypatch):
    """Of six images of the data, which the folder has too, with two more, three have masks that are used."""
    for number in range(6):
        write_png(folder / f"photos/{number}.png", read_image(folder / f"data/train/images/{number}.png"))
    seen = []
    read = UnlabelledViews.read_views
    monkeypatch.setattr(
        UnlabelledViews, "read_views", lambda views, *place: seen.append([*views.data.names]) or read(views, *place)
    )
    train_run(folder, "own", *WORDS, "trainer.unlabelled=data/train/images", "trainer.steps=1", "data.labelled=0.5")
    train_run(folder, "more", *WORDS, "trainer=fixmatch", "trainer.unlabelled=photos", "trainer.steps=1")
    assert {len(names) for names in seen} == {3, 6}
    assert all(row["train/pseudo_accuracy"] is None for row in rows(folder, "more") if "train/loss" in row)
    more = json.loads((folder / "more/split.json").read_text())["unlabelled"]
    assert more == [f"unlabelled/{number}" for number in range(6)]
    val = ("trainer.unlabelled=data/val/images", "trainer.unlabelled_batch_size=1", "trainer.threshold=1")
    done = train_run(folder, "val", *WORDS, *val, "trainer.steps=1")[1]
    assert "reached trainer.threshold=1," in done.err
    assert json.loads((folder / "val/split.json").read_text())["unlabelled"] == ["unlabelled/0"]
    assert "1 of the images without masks are validation images" in done.err
    fold = ("trainer.unlabelled=data/train/images", "data.folds=3", "data.fold=0", "trainer.unlabelled_batch_size=1")
    train_run(folder, "fold", *WORDS, *fold, "trainer.steps=1")
    split = json.loads((folder / "fold/split.json").read_text())
    assert split["unlabelled"] and {*split["unlabelled"]} <= {*split["val"]}


VIEWS = (
    *("resolution.crop=[16,24]", "data.augment.scale=[1,1]", "data.augment.cat_max_ratio=0.6", "data.labelled=two.txt"),
    *("data.augment.color.brightness=0", "data.augment.color.contrast=0", "data.augment.color.saturation=0"),
    *("data.augment.color.hue=0", "trainer.unlabelled_batch_size=4", "trainer.ema=0.9", "mode.pictures=1"),
)


def test_options_reach_teacher_batches_views_and_pictures(folder, monkeypatch):
    """Each mask is the brighter half of its image's pixels, also in a crop; two that are left out are unfinished."""
    write_data(folder / "unfinished", train=6, val=1)
    (folder / "unfinished/train/masks/5.png").write_bytes(b"")
    write_png(folder / "unfinished/train/masks/4.png", np.zeros((10, 10), np.uint8))
    (folder / "two.txt").write_bytes("0.png\r\n1\r\n".encode("utf-8-sig"))
    modules, draw = [], FewMasksDataModule.train_batches
    monkeypatch.setattr(
        FewMasksDataModule, "train_batches", lambda module, start: modules.append(module) or draw(module, start)
    )
    colours = "dinoseg.extensions.few_masks.views.draw_strong_view"
    monkeypatch.setattr(colours, lambda image, rng: image ^ rng.integers(1, 256, dtype="uint8"))
    monkeypatch.setattr(method, "blend", pictures := Mock(wraps=method.blend))
    train_run(folder, "options", *WORDS, *VIEWS, "data.root=unfinished", "trainer.steps=1")
    (module,) = modules
    assert [module.teacher.average.decay_at(step) for step in (0, 1, 99)] == [0, 0.5, 0.9]
    assert all((call.args[1] != 255).all() for call in pictures.call_args_list) and pictures.called

    def read_first(**options):
        changed = copy(module)
        vars(changed).update(options)
        return next(draw(changed, 0))

    monkeypatch.chdir(folder)
    whole, *halves = read_first(), *(read_first(rank=rank, world_size=2) for rank in (0, 1))
    assert (len(whole.labelled.names), len(whole.unlabelled.names)) == (2, 4)
    for part in ("labelled", "unlabelled"):
        assert getattr(whole, part).names == [name for half in halves for name in getattr(half, part).names]
    assert len({tuple(read_first(seed=seed).unlabelled.names) for seed in range(4)}) > 1
    views = whole.unlabelled
    for row, name in enumerate(views.names):
        bright = views.weak[row].double().mean(0) > 127
        assert (views.truth[row] == 255).all() if name in "45" else torch.equal(views.truth[row] == 1, bright)
    changes = (views.strong ^ views.weak[:, None]).flatten(2)
    assert (changes == changes[..., :1]).all() and (changes[:, 0] != changes[:, 1]).any()


KINDS = {
    "lora": ("adapter=lora", "backbone.patch_size=16", "trainer.accumulate=2", "loss=ce_dice"),
    "pyramid": (
        "backbone=timm",
        "backbone.name=test_convnext",
        "backbone.weights=random",
        "head=dpt",
        "head.features=8",
    ),
    "detail": ("trainer=fixmatch", "head=detail", "head.fine=4", "head.width=8", "head.layers=[-1]", "adapter=frozen"),
    "one view": ("trainer.views=1", "loss=ohem", "data.augment.cat_max_ratio=0.9", "data.views=2"),
}


@pytest.mark.parametrize("kind", ["one view", *(pytest.param(kind, marks=pytest.mark.heavy) for kind in [*KINDS][:3])])
def test_models_of_other_kinds_are_trained(folder, kind):
    words = (word for word in HALF if kind != "pyramid" or not word.startswith("backbone"))
    tensors, _ = train_run(folder, kind.replace(" ", "_"), *words, *KINDS[kind], "trainer.steps=2")
    assert all(value.isfinite().all() for value in tensors.values())


@pytest.mark.heavy
def test_two_ranks_resume_to_equal_bytes(folder, compose):
    words = (*HALF, "head=linear", "engine.devices=2", "trainer.steps=3")
    assert same(*whole_and_resumed_on_ranks(folder, compose, words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer.ema=null",), "trainer.ema=null leaves no teacher"),
        (("trainer.threshold=2",), "trainer.threshold=2"),
        (("trainer.views=3",), "trainer.views=3 is out of range. Give 1 or 2"),
        (("trainer.unlabelled_batch_size=4",), "_batch_size=4 with 3 images without masks"),
        (("engine.cache=disk",), "engine.cache=disk: features of strong views cannot be cached"),
        (("data.labelled=4",), "data.labelled=4 is out of range. Give a share above 0 and at most 1, a file of names"),
        (("data.labelled=null",), "trainer=unimatch_v2: there are no images without masks. Give"),
        (("data.labelled=null", "trainer.unlabelled=data/train/images"), "all of trainer.unlabelled=data/train/images"),
        (("head=detail", "head.layers=[-1]"), "trainer.dropout=true, and head=detail does not read feature maps alone"),
        (("head=eomt", "head.num_queries=4", "head.blocks=1", "head.layers=[-1]", "loss=mask_classification"), "masks"),
        (("task=multilabel", "loss=bce"), "task=multilabel: trainer=unimatch_v2"),
    ],
)
def test_incompatible_options_are_refused(folder, compose, words, said):
    assert said in refusal(compose, folder, (*HALF, "trainer.steps=1"), words)


test_message_names_value_and_remedy = refusals(
    {
        "plan": (
            command("mode=plan", *(word for word in HALF if not word.startswith(("mode.", "mode=train")))),
            "trainer=unimatch_v2 is not supported:",
        ),
    }
)
