"""Mistakes in the command lines of modes: each is one message with key, value and remedy, and leaves no run folder."""

from functools import partial
from pathlib import Path

import pytest
from command_line import SLOTS, SMALL, call, write_data
from mistakes import refusals
from overlapping_shapes import write_overlaps

from dinoseg.utils.errors import UserError

LAYERS = (*SMALL, "data.classes=[disc,square]", "task=multilabel", "loss=bce_dice", "backbone.patch_size=4")
DOCTOR = ("mode=doctor", "data=folder", "data.classes=[dark,bright]", "data.root=data", "mode.workers=1")
MOVI = "mode=render data=movi data.root=new"


def run(write, *words):
    """Run a command beside a data set, and raise what it prints as its error."""
    write(Path("data"))
    done = call(Path.cwd(), *words, "hydra.run.dir=run")
    assert done.status == 1 and "Traceback" not in done.err, done.err
    assert not Path("run").exists() and not Path("new").exists()
    raise UserError(done.err.replace("\n", " "))


def refused(start, lines, write=write_data):
    """Return a test of a table: what a command line has after its start, to what its message holds, parted by `...`."""
    rows = {line: (partial(run, write, *start, *line.split()), *words.split("...")) for line, words in lines.items()}
    return refusals(rows)


TRAIN = {
    "mode=train head.init=zeros": "head.init=zeros is unknown. Choose one of probe, normal or null",
    "mode=train trainer.evaluate=newest": "trainer.evaluate=newest is unknown. Choose one of best, last",
    "mode=train mode.pictures=-1": "mode.pictures=-1 is out of range. Give a whole number of at least 0.",
    "mode=train logger=[tensorboard,board]": "logger=board is unknown. Choose from mlflow, tensorboard, wandb.",
    "mode=train trainer.score=miou_no_background": "is not a score. Choose one of accuracy, dice",
    "mode=train trainer.score=nsd": "Add metric=[nsd]",
    "mode=train metric=cldice metric.cldice.classes=[5]": "metric.cldice.classes=[5]: give ids...from 0 to 1",
    "mode=train metric=[../loss/bce]": "is not a metric. Choose options of the group metric",
    "mode=train teacher=run": "Options that have it: trainer=distil.",
}
PROBE_AND_PLAN = {
    "mode=probe mode.layers=[5]": "this backbone has 2 blocks",
    "mode=probe mode.strengths=[]": "the list is empty",
    "mode=probe mode.held_out=1": "mode.held_out=1 is out of range",
    "mode=plan mode.memory=24": "mode.memory=24: give an amount with its unit, such as 24GiB",
    "mode=plan mode.device=tpu": "mode.device=tpu is unknown. Choose cpu or cuda",
    "mode=plan mode.device=cuda": "mode.device=cuda is not the device here. Set its memory, such as mode.memory",
    "mode=plan data.batch_size=0": "data.batch_size=0",
    "mode=plan data.batch_size=3 engine.devices=2": "data.batch_size=3 cannot be shared by 2 devices",
    "mode=plan engine.sharding=fsdp engine.devices=2": "engine.sharding=fsdp: mode=plan counts all weights",
    "mode=plan resolution.crop=[0,8]": "resolution.crop",
    "mode=plan loss.weights={nobody:3}": "loss.weights: nobody is not a class. The classes are dark, bright",
}
OF_LAYERS = {
    "mode=train loss=cross_entropy": "loss=cross_entropy does not fit task=multilabel. Choose loss=bce",
    "mode=train head=eomt head.blocks=1": "task=multilabel: a head of masks",
    "mode=train data.ignore_index=1": "layers hold 0 and 1",
    "mode=train data.cache=packed": "task=multilabel: data.cache=packed",
    "mode=train task.threshold=[0.5]": "one for each of the 2 classes",
    "mode=train metric=cldice metric.cldice.classes=[1]": "metric.cldice.classes=[1]: each class has its own mask",
}
SCORE = {
    "reference=nowhere prediction=data/val/masks": "reference=nowhere is not a folder",
    "reference=data/val/masks prediction=nowhere": "prediction=nowhere is not a folder",
    "reference=data prediction=[a,b,c]": "set reference=DIR and prediction=DIR, or prediction=[DIR,DIR]",
    "reference=data prediction=null": "mode=score needs two folders of masks: set reference=DIR",
    "reference=data prediction=data": "protocol.num_classes=null: protocol=semantic needs the number of classes",
}
EXAMINED = {
    "mode.near_distance=65": "mode.near_distance=65 is out of range. Give a whole number from 0 to 64",
    "data.classes=???": "data.classes is not set",
}
RENDERED = {
    "mode=render data=idd_lite data.root=new": "data=idd_lite cannot be rendered. Choose data=sarrarp",
    "mode=render data=movi": "data.root is not set",
    "mode=render data=movi data.root=null": "mode=render needs a folder to write to: give data.root",
    f"{MOVI} render.size=[48]": "render.size=[48] must be two numbers",
    f"{MOVI} render.size=[16,48]": "size=[16, 48] cannot be a frame's [height, width]: both must be at least 32",
    f"{MOVI} render.train_videos=half": "train_videos=half is of type str",
    "mode=render data=sarrarp data.root=new render.size=[47,80]": "both must be even",
    "mode=render data=sarrarp data.root=new render.val_videos=3": "lacks this key...have it: render=movi.",
    " ".join((*SLOTS, "data.root=.", "metric=[nsd]")): "metric=[nsd] scores images with masks",
}
FURTHER = {  # of keys and messages like those above
    "mode=train head=mlp +head.init=probe": "does not take init",
    "mode=train metric=nsd trainer.score=nds": "mean_accuracy...adds average_precision, boundary_iou, cldice, ece",
    "mode=plan mode.memory=-1GiB": "mode.memory=-1GiB: give an amount",
    "mode=plan loss.weights=invers": "loss.weights=invers is unknown. Choose one of none",
}
FURTHER_OF_LAYERS = {
    "mode=train task=semantic": "loss=bce_dice does not fit task=semantic",
    "mode=train trainer=distil teacher=run": "task=multilabel: trainer=distil",
    "mode=train data.augment.cat_max_ratio=0.75": "task=multilabel: data.augment.cat_max_ratio=0.75",
    "mode=probe": "task=multilabel: mode=probe",
}
test_training_that_cannot_work = refused(SMALL, TRAIN)
test_probe_and_plan_out_of_range = refused(SMALL, PROBE_AND_PLAN)
test_parts_of_one_class_per_pixel = refused(LAYERS, OF_LAYERS, partial(write_overlaps, train=4, val=2))
test_further_training_and_plan = pytest.mark.heavy(refused(SMALL, FURTHER))
test_further_parts = pytest.mark.heavy(refused(LAYERS, FURTHER_OF_LAYERS, partial(write_overlaps, train=4, val=2)))
test_scores_of_no_folders = refused(("mode=score",), SCORE)
test_doctor_out_of_range = refused(DOCTOR, EXAMINED)
test_rendering_and_clips_that_cannot_be = refused((), RENDERED)
