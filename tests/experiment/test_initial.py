"""A new run that begins with the weights of another."""

import logging
import shutil
from functools import partial

import pytest
import torch
from command_line import SMALL, call, write_data
from finished_runs import rows, train_run
from mistakes import assert_refused
from portable_parts import PROGRESS, export_file, write_untrained
from safetensors.torch import save_file

from dinoseg.checkpoints.resume import compose_resumed
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.initial import check_initial, has_initial, load_initial_weights
from dinoseg.experiment.recipe import config_description, recipe_of
from dinoseg.modes import train
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError

QUIET = ("mode.report=false", "mode.pictures=0")
SHORT = ("mode=train", *SMALL, *QUIET)
_OTHERS = (word for word in SMALL if not word.startswith(("backbone", "adapter")))
SURGICAL = ("backbone=tiny_surgical", "backbone.layers=[0]", "resolution.crop=[32,48]")
KNOWN = ("mode=train", *_OTHERS, *QUIET, *SURGICAL, "adapter=frozen")
CLASSES = ["dark", "bright"]
METRICS = ("mode.metrics_only=true",)
OTHER_BACKBONE = {"backbone": "0" * 16}
KEEP = ("trainer.steps=1", "optim.optimizer.lr=1e-30")  # a step that changes no weight, but one that is 0 by so much


@pytest.fixture(scope="module")
def folder(compose, tmp_path_factory):
    """Train `first`, and write models with random weights beside it, two of them in one file, too."""
    where = tmp_path_factory.mktemp("runs")
    write_data(where / "data", val=2)
    train_run(where, "first", *SHORT, "seed=5", *METRICS)
    for run, adapter in (("tuned", "full"), ("frozen", "frozen"), ("lora", "lora")):
        path = write_untrained(compose, where, *SURGICAL, f"adapter={adapter}", progress={**PROGRESS, "step": 2})
        path = path.parents[1].rename(where / run) / "checkpoints/best.safetensors"
        if adapter != "full":
            export_file(path, where / f"exported_{run}")
    return where


@pytest.fixture(scope="module")
def initialised_run(folder):
    """Train a run that begins with a copy of `first`, which is removed then; return its folder and what it said."""
    shutil.copytree(folder / "first", folder / "gone")
    words = (*KEEP, "trainer.save_every=1", "optim.schedule.kind=constant", *METRICS)
    _, done = train_run(folder, "begun", *SHORT, "init=gone", *words)
    shutil.rmtree(folder / "gone")
    return folder / "begun", done.err


@pytest.fixture
def begin(folder, compose, monkeypatch, caplog):
    """Return a function that begins a model as mode=train does, and returns its tensors and the messages."""

    def run(*words, classes=CLASSES):
        monkeypatch.chdir(folder)
        caplog.clear()
        build = Builder(compose(*words))
        model = build.model()
        if has_initial(build):
            check_initial(build, build.outline())
            with caplog.at_level(logging.INFO):
                load_initial_weights(build, model, classes)
        return model.state_dict(), caplog.text

    return run


def write_changed(source, path, tensors=None, **info):
    """Write a copy of a checkpoint with further tensors or other entries of its description."""
    file = checkpoint.read(source)
    kept = {key: value for key, value in file.info.items() if key != "format"}
    checkpoint.write(path, file.tensors | (tensors or {}), kept | info)


def test_a_run_begins_with_the_best_weights_of_another(folder, initialised_run):
    run, said = initialised_run
    ours = checkpoint.read(run / "checkpoints/last.safetensors").part("model")
    best = checkpoint.read(folder / "first/checkpoints/best.safetensors")
    theirs = best.part("model")
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # which a step changes at any rate
    for name, value in theirs.items():
        if not name.endswith(buffers):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-30)
    assert "init=gone: reading gone/checkpoints/best.safetensors." in said
    assert f"init=gone: {len(theirs)} tensors loaded from step {best.info['progress']['step']}." in said
    assert "init: its classes" not in said
    assert rows(folder, "begun")[0]["step"] == 1  # its own steps, rates and optimizer


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


def test_init_reports_other_names_of_equally_many_classes(folder, experiments):
    done = call(folder, *SHORT, "init=first", "data.classes=[a,b]", "hydra.run.dir=renamed")
    assert len(experiments) == 1
    assert "init: its classes are dark, bright; those of the data start from them." in done.err


def test_resumed_run_ignores_its_init_and_refuses_another(folder, initialised_run, compose, monkeypatch):
    done = call(folder, *SHORT, "resume=begun", "init=tuned", "trainer.steps=3")
    told = f"and started with init={folder / 'gone'}. Leave init out, or, for a new run, resume."
    assert done.status == 1 and told in done.err, done.err
    path = initialised_run[0] / "checkpoints/last.safetensors"
    info = checkpoint.describe(path)
    assert info["config"]["init"] == str(folder / "gone")
    monkeypatch.chdir(folder)
    for words in (("mode=train", "init=./gone"), ("mode=eval",)):  # of the other modes none begins with anything
        merged = compose_resumed(compose(*words), words, path, info)
        assert merged.init == str(folder / "gone") and not has_initial(Builder(merged))
    path = folder / "first/checkpoints/last.safetensors"
    tuned = compose("mode=train", "init=tuned")
    assert_refused(
        lambda: compose_resumed(tuned, ["mode=train", "init=tuned"], path, checkpoint.describe(path)),
        "and started without. Leave init out, or, for a new run, resume",
    )


@pytest.mark.heavy
def test_resumed_run_reads_no_init(folder, initialised_run):
    shutil.copytree(initialised_run[0], folder / "resumed")
    done = call(folder, "mode=train", "resume=resumed", "trainer.steps=3", *METRICS)
    assert done.status == 0 and "init=" not in done.err, done.err
    info = checkpoint.describe(folder / "resumed/checkpoints/last.safetensors")
    assert info["config"]["init"] == str(folder / "gone") and info["progress"]["step"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SHORT, "init=gone", "-m", "seed=0,1", "hydra.sweep.dir=refused"), "init=gone: file or folder not found"),
        ((*KNOWN, "init=frozen", "head.init=probe"), "init=frozen and head.init=probe both set the initial weights"),
        ((*KNOWN, "init=other.safetensors"), "frozen backbone weights differ from"),
    ],
)
def test_unusable_init_is_refused_before_training(folder, words, said):
    write_changed(folder / "frozen/checkpoints/best.safetensors", folder / "other.safetensors", frozen=OTHER_BACKBONE)
    done = call(folder, *words, "hydra.run.dir=refused")
    assert done.status == 1 and said in done.err and "Traceback" not in done.err, done.err
    assert not list(folder.glob("refused/**/checkpoints"))


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("tuned", "that this model does not train or has in another shape, but"),
        ("first head=mlp", "do not match this model's head. Choose backbone=tiny head=linear with"),
        ("weights.safetensors", "^init=weights.safetensors: .* For backbone weights, set backbone.weights"),
        ("data", "^init=data: it holds neither checkpoints/best.safetensors"),
        ("cut.safetensors", "^init=cut.safetensors: not a readable checkpoint"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(folder, compose, monkeypatch, init, said):
    monkeypatch.chdir(folder)
    save_file({"norm.weight": torch.ones(3)}, folder / "weights.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "first/checkpoints/best.safetensors").read_bytes()[:2000])
    cfg = compose(*SHORT, *f"init={init}".split())
    with pytest.raises(UserError, match=said):
        train.check(cfg)


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
        pytest.param("lora", "lora", "15 tensors loaded from step 2.", marks=pytest.mark.heavy),
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
    more = {"model/else": torch.full((3,), torch.nan), "ema/else": torch.full((3,), torch.nan)}
    write_changed(folder / "first/checkpoints/best.safetensors", folder / "more.safetensors", more)
    assert "; not loaded: else." in begin(*SHORT, "init=more.safetensors")[1]


def test_exported_file_omits_the_init_of_its_run(folder, initialised_run):
    done = call(folder, "mode=export", "export=safetensors", f"resume={initialised_run[0]}", "hydra.run.dir=passed_on")
    assert done.status == 0, done.err
    assert "init" not in checkpoint.describe(folder / "passed_on/model.safetensors")["config"]


@pytest.mark.heavy
def test_init_accepts_equally_rounded_weights_only(folder, begin):
    """A hash is of what is not rounded, on both sides."""
    words = (*KNOWN, "adapter=lora_8bit")
    train_run(folder, "rounded", *words, "trainer.steps=1", *METRICS)
    assert "init=rounded: 15 tensors loaded from step 1." in begin(*words, "init=rounded")[1]
    other = (*words, "init=rounded", "backbone.weights=random")
    assert_refused(lambda: begin(*other), "frozen backbone weights differ from")


def test_the_run_that_it_begins_with_is_part_of_a_recipe(folder, initialised_run, compose, monkeypatch):
    """Compare recipes as resume=auto does: that of a command line and that of a checkpoint."""
    monkeypatch.chdir(folder)
    without, others, same = (
        recipe_of(config_description(Builder(compose(*SHORT, *KEEP, "optim.schedule.kind=constant", *words))))
        for words in ((), ("init=tuned",), ("init=./gone",))
    )
    assert recipe_of(checkpoint.describe(initialised_run[0] / "checkpoints/last.safetensors")) == same
    assert without != others != same != without


@pytest.mark.parametrize(
    ("recipe", "first"),
    [
        pytest.param("slots_clips", "slots_rendered", marks=pytest.mark.heavy),
        ("detail_camvid_full", "detail_camvid"),
    ],
)
def test_recipe_that_continues_another_needs_its_run(compose, recipe, first):
    words = (f"hparam={recipe}", "mode=train", "data.root=movi")
    cfg = compose(*words)
    assert_refused(lambda: train.check(cfg), f"starts from the weights of a run with hparam={first}: ", "init=null")
    assert compose("mode=train", f"hparam={first}", "data.root=movi").init is None
    train.check(compose(*words, "init=null"))
    assert not has_initial(Builder(compose(*words, "resume=run")))
    assert has_initial(Builder(compose(*words, "init=needed_by_all")))  # a run's own name


def test_init_takes_the_best_finite_weights_in_any_dtype(folder, begin):
    shutil.copytree(folder / "frozen/checkpoints", folder / "odd/checkpoints")
    (folder / "odd/checkpoints/last.safetensors").write_bytes(b"cut")
    begin(*KNOWN, "init=odd", "backbone.dtype=bfloat16")
    begin(*KNOWN, "init=exported_frozen", "backbone.dtype=bfloat16")  # its frozen part is what this rounds
    best = folder / "odd/checkpoints/best.safetensors"
    bias = checkpoint.read(best).tensors["model/head.classify.bias"]
    write_changed(best, best, {"model/head.classify.bias": torch.full_like(bias, torch.nan)})
    with pytest.raises(UserError, match="^init=odd.*hold NaN or infinity"):
        begin(*KNOWN, "init=odd", "backbone.dtype=bfloat16")


def test_init_from_different_checkpoints_on_ranks_is_refused(folder, compose, monkeypatch):
    monkeypatch.chdir(folder)
    build = Builder(compose(*KNOWN, "init=frozen"))
    load = partial(load_initial_weights, build, build.model(), CLASSES)
    assert_refused(
        lambda: load(lambda progress: {**progress, "step": 1}),
        "init=frozen: that run wrote a new checkpoint while the ranks of this one were reading it",
    )
    load()
