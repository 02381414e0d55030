"""Trainings of objects: views, resuming, ranks, cached features, and what is refused."""

from functools import partial

import pytest
import torch
from command_line import TINY, call, succeed, write_data
from drawn_objects import write_object_data
from finished_runs import rows, train_run
from mistakes import assert_refused

from dinoseg.api.compose import compose
from dinoseg.core.contracts import Loss
from dinoseg.core.object_ids import OBJECTS, encode_object
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction
from dinoseg.data.loader import VIEW, TrainViews, make_rng, train_batches
from dinoseg.data.transforms import Augment
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.objects.tasks import InstanceTask, PanopticTask
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.losses.overlap import Dice
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.training.image_data_module import ImageDataModule

SHORT = (
    *(*TINY, "mode=train", "adapter=full", "engine=cpu", "engine.workers=0", "engine.precision=fp32"),
    *("data.batch_size=2", "resolution.crop=[32,48]", "mode.metrics_only=true", "mode.report=false"),
    *("loss=mask_classification", "loss.criterion.num_points=64", "trainer.log_every=1", "trainer.val_every=3"),
)
EOMT = (*SHORT, "head=eomt", "head.num_queries=6", "head.blocks=1")
MASK2FORMER = (
    *(*SHORT, "head=mask2former", "head.num_queries=6", "head.hidden_dim=64", "head.feedforward_dim=32"),
    *("head.num_heads=4", "backbone.arch.num_hidden_layers=4"),
)
CONSTANT = ("optim.schedule.kind=constant", "optim.schedule.warmup=0")  # rates do not depend on the length


def losses(folder, run="run"):
    return [row["train/loss"] for row in rows(folder, run) if "train/loss" in row]


def test_masks_of_queries_become_the_objects():
    """Overlapping objects and one of another class, learned by free masks; what is left predicts no object."""
    objects = torch.zeros(1, 2, 24, 24, dtype=torch.int32)
    objects[0, 0, 2:12, 2:12] = encode_object(1, 1)
    objects[0, 1, 8:20, 8:20] = encode_object(2, 1)
    objects[0, 0, 2:10, 14:22] = encode_object(3, 2)
    mask = torch.zeros(1, 24, 24, dtype=torch.uint8)
    mask[(objects[:, 1] > 0)] = 1
    mask[0][objects[0, 0] > 0] = (objects[0, 0][objects[0, 0] > 0] >> 20).to(torch.uint8)
    torch.manual_seed(0)
    classes = torch.randn(1, 5, 4).requires_grad_()
    masks = torch.randn(1, 5, 24, 24).requires_grad_()
    criterion = MaskClassification(torch.ones(3), num_points=400)
    criterion.task = InstanceTask(["ground", "leaf", "fruit"], background="ground")
    batch = Batch(mask, mask, ["drawn"], {OBJECTS: objects})
    optimizer = torch.optim.Adam([classes, masks], lr=0.2)
    for _ in range(80):
        prediction = Prediction(MaskOutputs(classes, masks), (24, 24), (1.0, 1.0), None, mixture=True)
        optimizer.zero_grad()
        criterion(prediction, batch)[0].backward()
        optimizer.step()
    chosen = classes[0].argmax(-1)
    assert sorted(chosen.tolist()) == [1, 1, 2, 3, 3]
    found = {tuple((masks[0, query] > 0).flatten().tolist()) for query in (chosen < 3).nonzero()[:, 0]}
    assert found == {tuple((objects[0] == value).any(0).flatten().tolist()) for value in objects.unique()[1:]}


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_recipe_of_a_task_chooses_head_and_loss(task):
    words = ("mode=train", f"hparam={task}", f"data={'folder_instances' if task == 'instance' else 'coco_panoptic'}")
    groups = ("task", "head", "loss", "adapter", "backbone", "optim")
    given = compose([*words, "data.root=."]).choices
    assert [given[group] for group in groups[:4]] == [task, "eomt", "mask_classification", "full"]
    usual = compose(["mode=train", "data.root=."]).choices
    assert [given[group] for group in groups[4:]] == [usual[group] for group in groups[4:]]
    for head in ("pmt", "mask2former"):
        typed = compose([*words, "data.root=.", f"head={head}", "adapter=frozen"]).choices
        assert [typed[group] for group in groups[:4]] == [task, head, "mask_classification", "frozen"]


@pytest.mark.heavy
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_tiny_training_overfits(tmp_path, task):
    words = write_object_data(tmp_path / "data", train=3, val=1)
    lengths = ("trainer.steps=40", "trainer.val_every=40", "optim.optimizer.lr=3e-3", "data.augment.scale=[1,1]")
    train_run(tmp_path, "run", *EOMT, *words, f"task={task}", *lengths)
    found = losses(tmp_path)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert [row["train/miou"] for row in rows(tmp_path, "run") if "train/miou" in row][-1] > 0.75


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("instance", (*EOMT, "head.anneal=[[1,3]]")),
        pytest.param("panoptic", (*MASK2FORMER, "trainer.ema=0.9"), marks=pytest.mark.heavy),
    ],
)
def test_resumed_training_of_objects_is_equal(tmp_path, task, words):
    words = (*words, *write_object_data(tmp_path / "data", empty=(1,)), f"task={task}", *CONSTANT)
    words = (*words, "trainer.accumulate=2")
    whole, _ = train_run(tmp_path, "whole", *words, "trainer.steps=4", "trainer.val_every=2", "engine.workers=1")
    train_run(tmp_path, "run", *words, "trainer.steps=2", "trainer.val_every=2")
    resumed, _ = train_run(tmp_path, "run", "mode=train", "resume=run", "trainer.steps=4")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and len(whole) == len(resumed)


@pytest.mark.heavy
def test_cached_features_show_the_same_views(tmp_path):
    words = (*MASK2FORMER, *write_object_data(tmp_path / "data", empty=(1,)), "task=instance", "adapter=frozen")
    words = (*words, "data.views=2", "trainer.steps=8", "data.augment.scale=[3,4]", "features.dtype=float32")
    plain, _ = train_run(tmp_path, "plain", *words, "engine.cache=off")
    words = (*words, "engine.cache=disk", f"cache_dir={tmp_path}/cache")
    train_run(tmp_path, "panoptic", *words, "task=panoptic")  # its views are not drawn again
    cached, _ = train_run(tmp_path, "cached", *words)
    assert losses(tmp_path, "cached") == pytest.approx(losses(tmp_path, "plain"), rel=1e-5)
    assert plain.keys() == cached.keys()


@pytest.mark.heavy
def test_ranks_have_the_loss_of_one_process(tmp_path):
    words = (*EOMT, *write_object_data(tmp_path / "data", empty=(1,)), "task=panoptic", "trainer.steps=3")
    words = (*words, "loss.criterion.num_points=4000", "trainer.val_every=3")  # so many that chance matters little
    for run, more in (("one", ()), ("two", ("engine.devices=2",))):
        succeed(tmp_path, *words, *more, f"hydra.run.dir={run}")
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=0.01)


class OneObject:
    """Images of 64 x 64 pixels; the first has an object of a few pixels, the second a crowd, the third nothing."""

    classes = ("ground", "thing")
    palette = [(0, 0, 0), (255, 0, 0)]
    ignore_index = 255
    names = ("object", "crowd", "nothing")
    skipped = {}
    maps = {OBJECTS: ObjectMap(things=(1,))}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        objects = torch.zeros(1, 64, 64, dtype=torch.int32)
        objects[0, 30:40, 20:32] = (encode_object(1, 1), encode_object(1, 1, crowd=True), 0)[index]
        image = torch.arange(64 * 64).view(1, 64, 64).expand(3, -1, -1).remainder(251).to(torch.uint8)
        mask = (objects[0] > 0).to(torch.uint8)
        return {"image": image, "mask": mask, "name": self.names[index], "maps": {OBJECTS: objects}}


def test_views_without_objects_are_sampled_again():
    augment = Augment((16, 16))
    views, plain = (TrainViews(OneObject(), augment, 3, needs_objects=needs) for needs in (True, False))
    shown, redraws = [], []
    for epoch in range(60):
        view, count = views.draw(epoch, 0)
        shown.append(bool(view["maps"][OBJECTS].any()))
        redraws.append(count)
        assert torch.equal(view["maps"][OBJECTS].sum(0) > 0, view["mask"] == 1)
        if count == 0:
            assert torch.equal(view["image"], plain.read(epoch, 0)["image"])
        again = views.read(epoch, 0)
        assert torch.equal(view["image"], again["image"]) and torch.equal(view["mask"], again["mask"])
        for sample in (1, 2):  # neither a crowd nor nothing is looked for
            view, count = views.draw(epoch, sample)
            assert count == 0 and torch.equal(view["image"], plain.read(epoch, sample)["image"])
    assert max(redraws) <= 10 and all(count == 10 for count, found in zip(redraws, shown, strict=True) if not found)
    before = sum(bool(plain.read(epoch, 0)["maps"][OBJECTS].any()) for epoch in range(60))
    assert sum(shown) > 55 > before


def test_redrawn_views_have_random_numbers_of_their_own():
    drawn = [set(make_rng(3, 1, 2, VIEW, redraws).random(50).tolist()) for redraws in range(3)]
    assert len(set.union(*drawn)) == 150


@pytest.mark.parametrize(("task", "redraws"), [(InstanceTask, True), (PanopticTask, False), (None, False)])
def test_only_views_of_instances_need_objects(task, redraws):
    """A panoptic view without objects still trains on stuff."""
    given = {} if task is None else {"task": task(OneObject.classes, background="ground")}
    module = ImageDataModule(OneObject(), OneObject(), Augment((16, 16)), 1, 0, 0, **given)
    assert module.train_views.needs_objects == redraws


def test_redrawn_views_do_not_depend_on_workers():
    views = TrainViews(OneObject(), Augment((16, 16)), 0, needs_objects=True)
    alone, several = (train_batches(views, batch_size=2, start=1, workers=workers) for workers in (0, 2))
    for _ in range(4):
        first, second = next(alone), next(several)
        assert torch.equal(first.image, second.image) and torch.equal(first.maps[OBJECTS], second.maps[OBJECTS])
    several.close()


def test_class_of_a_pixel_is_the_likeliest_thing_or_background():
    task = InstanceTask(["ground", "leaf", "fruit", "sky"], ["leaf", "fruit"], "ground")
    shares = torch.tensor([[[0.0, 0.9, 0.0, 0.0, 0.1], [0.0, 0.0, 0.8, 0.0, 0.2], [0.1, 0.0, 0.0, 0.9, 0.0]]])
    masks = torch.tensor([[[9.0, 9, -9, -9], [-9, 9, 9, -9], [9, -9, -9, 9]]]).view(1, 3, 2, 2)

    def to_pixels(outputs, size, _):
        return torch.einsum("bqk,bqhw->bkhw", shares[..., :4], outputs.mask_logits.sigmoid())

    outputs = MaskOutputs(shares.clamp(min=1e-9).log(), masks)
    prediction = Prediction(outputs, (2, 2), (1.0, 1.0), to_pixels, mixture=True, task=task)
    assert prediction.class_ids().tolist() == [[[1, 1], [2, 0]]]
    ids, logits = prediction.class_ids_and_logits((slice(0, 1), slice(None)))
    assert ids.tolist() == [[[1, 1], [2, 0]]] and logits.shape == (1, 4, 1, 2)
    found = prediction.probabilities()
    torch.testing.assert_close(found.sum(1), torch.ones(1, 2, 2))
    torch.testing.assert_close(found[0, :, 0, 1], torch.tensor([0.1, 0.9, 0.8, 0]) / 1.8, atol=1e-3, rtol=0)
    assert task.pixel_scores(torch.full((1, 4, 1, 1), 1.5)).flatten().tolist() == [0, 1.5, 1.5, 0]
    averaged = Prediction(found, (2, 2), (1.0, 1.0), lambda scores, *_: scores, mixture=True, task=task)
    assert averaged.class_ids().tolist() == [[[1, 1], [2, 0]]]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("head=eomt", "head.blocks=1", "loss=cross_entropy"), ["does not fit task=instance", "hparam=instance"]),
        (("loss=mask_classification",), ["LinearHead predicts no masks", "hparam=instance", "head=eomt"]),
    ],
)
def test_losses_and_heads_without_masks_are_refused(data, words, parts):
    folder, given = data
    done = call(folder, *TINY, *given, "mode=train", "engine=cpu", "data.batch_size=2", "task=instance", *words)
    assert done.status == 1 and all(part in done.err for part in parts), done.err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with data of objects, and the words that name these."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "plain")
    return folder, write_object_data(folder / "objects", train=2, val=1)


PLAIN = ("data=folder", "data.classes=[dark,bright]", "data.root=plain")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (PLAIN, ["data=folder (train) has no objects", "data=folder_instances"]),
        (("data.things=[ground]",), ["data.things names ground", "data.background=null"]),
        (("data.things=[tree]",), ["data.things=tree is not a class"]),
        (("data.background=tree",), ["data.background=tree is not a class", "ground, thing"]),
        (("head.no_object=false",), ["no_object=true", "task=semantic"]),
        (
            ("data.classes=[thing]", "data.background=null", "data.reader.masks.others=thing"),
            ["every class", "loss.criterion.ignored=background"],
        ),
        (("trainer=distil", "teacher=run"), ["trainer=distil", "trainer=supervised"]),
    ],
)
def test_what_no_training_of_objects_can_use_is_refused(data, words, parts):
    folder, given = data
    done = call(folder, *EOMT, *given, "task=instance", "trainer.steps=1", *words)
    assert done.status == 1 and all(part in done.err for part in parts), done.err


def test_sums_with_masks_of_labelled_pixels_are_refused():
    """No pixel outside of objects has a label if every class is a thing."""
    masks = partial(MaskClassification, ignored="excluded")
    summed = WeightedSum({"masks": masks, "dice": Dice}, {"masks": 1, "dice": 1}, torch.ones(2))
    kinds = {OBJECTS: ObjectMap(things=(0, 1))}
    check = partial(InstanceTask(["leaf", "fruit"]).check_data, "data=own", kinds, ["leaf", "fruit"], summed)
    assert_refused(check, "data=own", "loss.criterion.ignored=background")


@pytest.mark.parametrize(
    ("task", "metrics"), [("instance", ["instance_ap"]), ("panoptic", ["panoptic_quality"]), ("multilabel", [])]
)
def test_builder_passes_task_to_terms_and_adds_metrics(data, task, metrics):
    """The terms of a sum have the task; only a task of objects adds metrics to validations."""
    folder, given = data
    loss = "bce_dice" if task == "multilabel" else "ce_dice"
    builder = Builder(compose([*TINY, *given, f"data.root={folder}/objects", f"task={task}", f"loss={loss}"]))
    assert [*builder.metric_nodes] == metrics
    parts = [part for part in builder.loss_outline.modules() if isinstance(part, Loss)]
    assert len(parts) == 3 and all(part.task is builder.task for part in parts)


def test_data_with_objects_of_other_classes_are_refused(data):
    folder, given = data
    task = Builder(compose([*EOMT, *given, "task=panoptic", f"data.root={folder}/objects"])).task
    kinds = {OBJECTS: ObjectMap(things=(0, 1))}
    check = partial(task.check_data, "data=own", kinds, ["ground", "thing"], MaskClassification(torch.ones(2)))
    assert_refused(check, "data=own has objects of other classes", "data.things=[ground,thing]")


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_config_of_data_without_things_composes(data, task):
    folder, _ = data
    done = succeed(folder, *EOMT, "data=camvid", "data.root=plain", f"task={task}", "--cfg", "job", "--resolve")
    assert "things: null" in done.out


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_data_without_objects_are_refused(tmp_path, task):
    words = write_object_data(tmp_path / "data", train=2, empty=(0, 1))
    done = call(tmp_path, *EOMT, *words, f"task={task}", "trainer.steps=1")
    assert done.status != 0 and "(train): no image has an object" in done.err and "data.things" in done.err


def test_objects_of_a_single_class_are_trained(tmp_path):
    """Semantic segmentation needs a second class; objects have the pixels outside of them."""
    words = write_object_data(tmp_path / "data", train=2)
    (tmp_path / "data/classes.yaml").write_text("classes: {thing: {ids: []}}\nothers: thing\nignore: {ids: [0]}\n")
    words = (*EOMT, *words, "loss.criterion.ignored=background", "trainer.steps=1", "hydra.run.dir=run")
    assert "AP75" in succeed(tmp_path, *words, "task=instance").out
    done = call(tmp_path, *words[:-1], "task=semantic")
    assert done.status != 0 and "has one class, thing" in done.err
