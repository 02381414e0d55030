"""A new run that begins with the weights of another."""

import logging
import os
import shutil

import pytest
import torch
from checkpoint_files import INFO
from command_line import SMALL, call, write_data
from finished_runs import rows, train_run
from omegaconf import OmegaConf
from safetensors.torch import save_file

from dinoseg.cli.words import parse_word
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.initial import check_initial, has_initial, load_initial_weights
from dinoseg.experiment.recipe import config_description, recipe_of
from dinoseg.experiment.resume import merge
from dinoseg.models.adapters import Frozen
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.modes import train
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError

QUIET = ("mode.report=false", "mode.pictures=0")
SHORT = ("mode=train", *SMALL, *QUIET)
_OTHERS = (word for word in SMALL if not word.startswith(("backbone", "adapter")))
KNOWN = ("mode=train", *_OTHERS, *QUIET, "backbone=tiny_surgical", "backbone.layers=[0]", "adapter=frozen")
CLASSES = ["dark", "bright"]
METRICS = ("mode.metrics_only=true",)
KEEP = ("trainer.steps=1", "optim.optimizer.lr=1e-30")  # a step that changes no weight, but one that is 0 by so much


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("runs")
    write_data(where / "data", val=2)
    train_run(where, "first", *SHORT, "seed=5")
    train_run(where, "tuned", *KNOWN, "adapter=full", *METRICS)
    train_run(where, "frozen", *KNOWN, *METRICS)
    train_run(where, "lora", *KNOWN, "adapter=lora", *METRICS)
    for run in ("frozen", "lora"):
        done = call(where, "mode=export", "export=safetensors", f"resume={run}", f"hydra.run.dir=exported_{run}")
        assert done.status == 0, done.err
    return where


@pytest.fixture(scope="module")
def initialised_run(folder):
    """Train a run that begins with a copy of `first`, which is removed then."""
    shutil.copytree(folder / "first", folder / "gone")
    train_run(folder, "begun", *SHORT, "init=gone", "trainer.save_every=1", "optim.schedule.kind=constant")
    shutil.rmtree(folder / "gone")
    return folder / "begun"


@pytest.fixture
def begin(folder, compose, monkeypatch, caplog):
    """Return a function that begins a model as mode=train does, and returns its tensors and the messages."""

    def run(*words, classes=CLASSES):
        monkeypatch.chdir(folder)
        caplog.clear()
        cfg = compose(*words)
        model = Builder(cfg).model()
        if has_initial(Builder(cfg)):
            check_initial(Builder(cfg), Builder(cfg).outline())
            with caplog.at_level(logging.INFO):
                load_initial_weights(Builder(cfg), model, classes)
        return model.state_dict(), caplog.text

    return run


def test_tensors_of_another_type_are_refused_by_name(tmp_path, tiny_backbone):
    model = SegmentationModel(Frozen()(tiny_backbone()), LinearHead(24, 1, 3))
    file, trainable = tmp_path / "w.safetensors", trained_names(model)
    tensors = {f"model/{name}": value.char() for name, value in model.state_dict().items() if name in trainable}
    checkpoint.write(file, tensors, INFO)
    with pytest.raises(UserError, match=rf"^init={file}: \S+ is int8; weights must be floating-point"):
        check_initial(Builder(OmegaConf.create({"init": str(file), "resume": None, "choices": {}})), model)


def test_a_run_begins_with_the_best_weights_of_another(folder):
    ours, done = train_run(folder, "next", *SHORT, "init=first", "seed=5", *KEEP)
    best = checkpoint.read(folder / "first/checkpoints/best.safetensors")
    theirs = best.part("model")
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # which a step changes at any rate
    for name, value in theirs.items():
        if not name.endswith(buffers):
            torch.testing.assert_close(ours[f"model/{name}"], value, rtol=0, atol=2e-30)
    assert "init=first: reading first/checkpoints/best.safetensors." in done.err
    assert f"init=first: {len(theirs)} tensors loaded from step {best.info['progress']['step']}." in done.err
    assert "init: its classes" not in done.err
    assert rows(folder, "next")[0]["step"] == 1  # its own steps, rates and optimizer


def test_init_leaves_mismatched_weights_random_and_names_them(folder, begin):
    more = ("data.classes=[dark,bright,other]", "data.palette=[[0,0,0],[255,255,255],[9,9,9]]")
    words = (*SHORT, "seed=5", *more)
    ours, said = begin(*words, "init=first/checkpoints/last.safetensors", classes=[*CLASSES, "other"])
    fresh, _ = begin(*words)
    theirs = checkpoint.read(folder / "first/checkpoints/last.safetensors").part("model")
    anew = [name for name, value in theirs.items() if value.shape != ours[name].shape]
    assert anew and all(name.startswith("head.") for name in anew)
    assert "; randomly initialised: " + ", ".join(sorted(anew)) in said and "init: its classes" not in said
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], fresh[name] if name in anew else value, rtol=0, atol=0)


def test_init_reports_other_names_of_equally_many_classes(folder):
    """Of the data, as mode=train knows them."""
    _, done = train_run(folder, "renamed", *SHORT, "init=first", "data.classes=[a,b]", "trainer.steps=1", *METRICS)
    assert "init: its classes are dark, bright; those of the data start from them." in done.err


def test_resumed_run_ignores_its_init_and_refuses_another(folder, initialised_run, compose, monkeypatch):
    done = call(folder, *SHORT, "resume=begun", "init=tuned", "trainer.steps=3")
    told = f"and started with init={folder / 'gone'}. Leave init out, or, for a new run, resume."
    assert done.status == 1 and told in done.err, done.err
    done = call(folder, "mode=train", "resume=begun", "trainer.steps=3", *METRICS)
    assert done.status == 0 and "init=" not in done.err, done.err
    path = initialised_run / "checkpoints/last.safetensors"
    info = checkpoint.describe(path)
    assert info["config"]["init"] == str(folder / "gone") and info["progress"]["step"] == 3
    monkeypatch.chdir(folder)
    for words in (("mode=train", "init=./gone"), ("mode=eval",)):  # of the other modes none begins with anything
        merged = merge(compose(*words), [parse_word(word) for word in words[1:]], path, info)
        assert merged.init == str(folder / "gone") and not has_initial(Builder(merged))
    path = folder / "first/checkpoints/last.safetensors"
    with pytest.raises(UserError, match="and started without. Leave init out, or, for a new run, resume"):
        merge(compose("mode=train", "init=tuned"), [parse_word("init=tuned")], path, checkpoint.describe(path))


def test_unusable_init_is_refused_before_training(folder):
    sweep = ("-m", "seed=0,1", "hydra.sweep.dir=refused")
    for words, said in (
        ((*SHORT, "init=nowhere", *sweep), "init=nowhere: file or folder not found"),
        ((*SHORT, "init=first", "trainer=multi_head", "heads=[linear]"), "init=first is for one head at a time"),
        (
            (*KNOWN, "init=frozen", "head.init=probe"),
            "init=frozen and head.init=probe both set the initial weights of the head",
        ),
    ):
        done = call(folder, *words, "hydra.run.dir=refused")
        assert done.status == 1 and said in done.err and "Traceback" not in done.err, done.err
        assert not list(folder.glob("refused/**/checkpoints"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SHORT, "init=[a]"), r"^init=\['a'\] names no run. Give a run folder or a checkpoint"),
        ((*SHORT, "init=tuned"), "that this model does not train or has in another shape, but"),
        ((*SHORT, "init=first", "head=mlp"), "do not match this model's head"),
        ((*SHORT, "init=pipe"), "^init=pipe is a pipe or a device. Give a run folder or a checkpoint in it"),
        (
            (*SHORT, "init=weights.safetensors"),
            "^init=weights.safetensors: .* For backbone weights, set backbone.weights",
        ),
        ((*SHORT, f"init={'a' * 300}"), "^init=a+...: File name too long. Give a run folder"),
        ((*SHORT, "init=data"), "^init=data: it holds neither checkpoints/best.safetensors"),
        ((*SHORT, "init=cut.safetensors"), "^init=cut.safetensors: not a readable checkpoint"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_by_either_check(folder, compose, monkeypatch, words, said):
    """By that of a sweep's cells, which reads no weights, and by that of ranks, which have read them."""
    monkeypatch.chdir(folder)
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
        save_file({"norm.weight": torch.ones(3)}, folder / "weights.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "first/checkpoints/best.safetensors").read_bytes()[:2000])
    cfg = compose(*words)
    with pytest.raises(UserError, match=said):
        train.check(cfg)
    with pytest.raises(UserError, match=said):
        load_initial_weights(Builder(cfg), Builder(cfg).model(), CLASSES)


def test_init_refuses_to_drop_trained_backbone_weights(begin):
    """The check without weights cannot tell numbers of the same shapes apart."""
    with pytest.raises(UserError, match="that this model does not train or has in another shape, but"):
        begin(*KNOWN, "init=tuned")


def test_a_file_that_holds_the_frozen_part_too_is_as_good(folder, begin):
    ours, said = begin(*KNOWN, "init=exported_frozen")
    theirs = checkpoint.read(folder / "frozen/checkpoints/best.safetensors").part("model")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    assert f"init=exported_frozen: {len(theirs)} tensors loaded from step 2." in said  # and nothing is left


@pytest.mark.parametrize(
    ("of", "adapter", "said"),
    [
        ("frozen", "lora", "7 tensors loaded from step 2; randomly initialised: backbone.model"),
        ("frozen", "full", "7 tensors loaded from step 2; 23 tensors of the backbone from backbone.weights."),
        ("lora", "lora", "15 tensors loaded from step 2."),
        ("lora", "qlora", "15 tensors loaded from step 2."),
    ],
)
def test_an_adapter_may_come_later_on_the_same_weights_alone(begin, of, adapter, said):
    words = (*KNOWN, f"adapter={adapter}")
    for run in (of, f"exported_{of}"):
        _, told = begin(*words, f"init={run}")
        whole = adapter == "full" and run != of  # a file of the whole model gives these, too
        assert f"init={run}: {'30 tensors loaded from step 2.' if whole else said}" in told
    if adapter != "qlora":  # what is rounded cannot be compared
        with pytest.raises(UserError, match="its frozen backbone weights differ from those of this model"):
            begin(*words, f"init={of}", "backbone.weights=random")


def test_init_does_not_load_unknown_tensors(folder, begin):
    file = checkpoint.read(folder / "first/checkpoints/best.safetensors")
    more = {"model/else": torch.full((3,), torch.nan), "ema/else": torch.full((3,), torch.nan)}
    kept = {key: value for key, value in file.info.items() if key != "format"}
    checkpoint.write(folder / "more.safetensors", {**file.tensors, **more}, kept)
    assert "; not loaded: else." in begin(*SHORT, "init=more.safetensors")[1]


def test_init_from_different_checkpoints_on_ranks_is_refused(folder, compose, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = compose(*KNOWN, "adapter=frozen", "init=frozen")
    model = Builder(cfg).model()
    with pytest.raises(
        UserError, match="init=frozen: that run wrote a new checkpoint while the ranks of this one were reading it"
    ):
        load_initial_weights(Builder(cfg), model, CLASSES, lambda progress: {**progress, "step": 1})
    load_initial_weights(Builder(cfg), model, CLASSES)


def test_exported_file_omits_the_init_of_its_run(folder, initialised_run):
    done = call(folder, "mode=export", "export=safetensors", f"resume={initialised_run}", "hydra.run.dir=passed_on")
    assert done.status == 0, done.err
    assert "init" not in checkpoint.describe(folder / "passed_on/model.safetensors")["config"]


def test_frozen_weights_of_another_backbone_are_refused(folder, begin):
    info = checkpoint.read(folder / "frozen/checkpoints/best.safetensors")
    changed = {**info.info, "frozen": {**info.info["frozen"], "backbone": "0" * 16}}
    checkpoint.write(folder / "other.safetensors", info.tensors, {k: v for k, v in changed.items() if k != "format"})
    with pytest.raises(UserError, match="frozen backbone weights differ from"):
        begin(*KNOWN, "init=other.safetensors")
    done = call(folder, *KNOWN, "init=other.safetensors", "hydra.run.dir=refused")
    assert done.status == 1 and "frozen backbone weights differ from" in done.err, done.err


def test_init_accepts_equally_rounded_weights_only(folder, begin):
    """A hash is of what is not rounded, on both sides."""
    words = (*KNOWN, "adapter=lora_8bit")
    train_run(folder, "rounded", *words, "trainer.steps=1", *METRICS)
    assert "init=rounded: 15 tensors loaded from step 1." in begin(*words, "init=rounded")[1]
    with pytest.raises(UserError, match="frozen backbone weights differ from"):
        begin(*words, "init=rounded", "backbone.weights=random")


def test_the_run_that_it_begins_with_is_part_of_a_recipe(folder, initialised_run, compose, monkeypatch):
    """Compare recipes as resume=auto does: that of a command line and that of a checkpoint."""
    monkeypatch.chdir(folder)
    without, others, same = (
        recipe_of(config_description(Builder(compose(*SHORT, "optim.schedule.kind=constant", *words))))
        for words in ((), ("init=tuned",), ("init=./gone",))
    )
    assert recipe_of(checkpoint.describe(initialised_run / "checkpoints/last.safetensors")) == same
    assert without != others != same != without


@pytest.mark.parametrize(
    ("recipe", "first"), [("slots_clips", "slots_rendered"), ("detail_camvid_full", "detail_camvid")]
)
def test_recipe_that_continues_another_needs_its_run(compose, recipe, first):
    words = (f"hparam={recipe}", "mode=train", "data.root=movi")
    cfg = compose(*words)
    with pytest.raises(UserError, match=f"starts from the weights of a run with hparam={first}: .*init=null"):
        train.check(cfg)
    assert compose("mode=train", f"hparam={first}", "data.root=movi").init is None
    train.check(compose(*words, "init=null"))
    assert not has_initial(Builder(compose(*words, "resume=run")))
    assert has_initial(Builder(compose(*words, "init=needed_by_all")))  # a run's own name


def test_init_takes_the_best_finite_weights_in_any_dtype(folder, compose, monkeypatch):
    monkeypatch.chdir(folder)
    words = (*KNOWN, "init=odd")
    shutil.copytree("frozen/checkpoints", "odd/checkpoints")
    (folder / "odd/checkpoints/last.safetensors").write_bytes(b"cut")
    cfg = compose(*words, "backbone.dtype=bfloat16")
    load_initial_weights(Builder(cfg), Builder(cfg).model(), CLASSES)
    whole = compose(*KNOWN, "init=exported_frozen", "backbone.dtype=bfloat16")  # its frozen part is what this rounds
    load_initial_weights(Builder(whole), Builder(whole).model(), CLASSES)
    best = checkpoint.read(folder / "odd/checkpoints/best.safetensors")
    best.tensors["model/head.classify.bias"][0] = torch.nan
    kept = {key: value for key, value in best.info.items() if key != "format"}
    checkpoint.write(best.path, best.tensors, kept)
    with pytest.raises(UserError, match="^init=odd.*hold NaN or infinity"):
        load_initial_weights(Builder(cfg), Builder(cfg).model(), CLASSES)
