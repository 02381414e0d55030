"""A new run that begins with the weights of another."""

import shutil

import pytest
import torch
from checkpoint_files import INFO
from command_line import SMALL, call, write_data
from finished_runs import rows, trained
from omegaconf import OmegaConf

from dinoseg.experiment import build
from dinoseg.experiment.initial import begin_with, check_initial, has_initial
from dinoseg.models.adapters import Frozen
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import Segmenter, trained_names
from dinoseg.modes import train
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError

QUIET = ("mode.report=false", "mode.pictures=0", "mode.floor=0")
SHORT = ("mode=train", *SMALL, *QUIET)
_OTHERS = (word for word in SMALL if not word.startswith(("backbone", "adapter")))
KNOWN = ("mode=train", *_OTHERS, *QUIET, "backbone=tiny_surgical", "backbone.layers=[0]", "adapter=frozen")
KEEP = ("trainer.steps=1", "optim.optimizer.lr=1e-30")  # a step that changes no weight, but one that is 0 by so much


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("runs")
    write_data(where / "data", val=2)
    trained(where, "first", *SHORT, "seed=5")
    trained(where, "tuned", *KNOWN, "adapter=full")
    trained(where, "frozen", *KNOWN)
    trained(where, "lora", *KNOWN, "adapter=lora")
    for run in ("frozen", "lora"):
        done = call(where, "mode=export", "export=safetensors", f"resume={run}", f"hydra.run.dir=exported_{run}")
        assert done.status == 0, done.err
    return where


def test_tensors_of_another_type_are_refused_by_name(tmp_path, tiny_backbone):
    model = Segmenter(Frozen()(tiny_backbone()), LinearHead(24, 1, 3))
    file, trainable = tmp_path / "w.safetensors", trained_names(model)
    tensors = {f"model/{name}": value.char() for name, value in model.state_dict().items() if name in trainable}
    checkpoint.write(file, tensors, INFO)
    with pytest.raises(UserError, match=rf"^init={file}: \S+ is int8, and weights are floating-point"):
        check_initial(OmegaConf.create({"init": str(file), "resume": None}), model)


def weights(path):
    return checkpoint.read(path / "checkpoints/last.safetensors").part("model")


def test_a_run_begins_with_the_best_weights_of_another(folder):
    ours, done = trained(folder, "next", *SHORT, "init=first", "seed=5", *KEEP)
    best = checkpoint.read(folder / "first/checkpoints/best.safetensors")
    theirs = best.part("model")
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # which a step changes at any rate
    for name, value in theirs.items():
        if not name.endswith(buffers):
            torch.testing.assert_close(ours[f"model/{name}"], value, rtol=0, atol=2e-30)
    assert f"init=first: {len(theirs)} tensors taken from step {best.info['progress']['step']}." in done.err
    assert "init: its classes" not in done.err
    assert rows(folder, "next")[0]["step"] == 1  # its own steps, rates and optimizer


def test_what_does_not_fit_begins_anew_and_is_named(folder):
    more = ("data.classes=[dark,bright,other]", "data.palette=[[0,0,0],[255,255,255],[9,9,9]]")
    words = (*SHORT, "seed=5", *more, *KEEP)
    ours, done = trained(folder, "more", *words, "init=first/checkpoints/last.safetensors")
    fresh, _ = trained(folder, "fresh", *words)
    theirs = weights(folder / "first")
    anew = [name for name, value in theirs.items() if value.shape != ours[f"model/{name}"].shape]
    assert anew and all(name.startswith("head.") for name in anew)
    assert "; begins anew: " + ", ".join(sorted(anew)) in done.err and "init: its classes" not in done.err
    for name in anew:
        torch.testing.assert_close(ours[f"model/{name}"], fresh[f"model/{name}"], rtol=0, atol=0)


def test_other_classes_of_the_same_number_are_told(folder):
    _, done = trained(folder, "renamed", *SHORT, "init=first", "data.classes=[a,b]", *KEEP)
    assert "init: its classes are dark, bright, and those of the data begin as these." in done.err


def test_a_run_that_goes_on_has_its_own_weights(folder):
    words = (*SHORT, "init=gone", "trainer.save_every=1")
    shutil.copytree(folder / "first", folder / "gone")
    trained(folder, "part", *words, "trainer.steps=2", "optim.schedule.kind=constant")
    shutil.rmtree(folder / "gone")
    done = call(folder, "mode=train", "resume=part", "trainer.steps=3", "hydra.run.dir=part")
    assert done.status == 0 and "init=" not in done.err, done.err
    info = checkpoint.describe(folder / "part/checkpoints/last.safetensors")
    assert info["config"]["init"] == str(folder / "gone") and info["progress"]["step"] == 3
    assert call(folder, "mode=eval", "resume=part").status == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "init=nowhere: neither a checkpoint file nor a run folder"),
        (("init=[a]",), r"init=['a'] names no run. Give a run folder or a checkpoint"),
        (("init=tuned", *KNOWN), "that this model does not train, or has otherwise"),
        (("init=first", "head=mlp"), "none is of this model's head"),
        (("init=first", "trainer=many_heads", "heads=[linear]"), "init=first is for one head at a time"),
        (("init=data",), "init=data: neither a checkpoint file nor a run folder"),
        (("init=frozen", *KNOWN, "head.init=probe"), "init=frozen and head.init=probe both say what the head"),
    ],
)
def test_a_run_that_cannot_be_begun_with_is_refused_before_anything_is_trained(folder, words, said):
    done = call(folder, *SHORT, *(words or ("init=nowhere",)), "hydra.run.dir=refused")
    assert done.status == 1 and said in done.err and "Traceback" not in done.err, done.err
    assert not (folder / "refused/checkpoints").exists()
    many = call(folder, *SHORT, *(words or ("init=nowhere",)), "-m", "seed=0,1", "hydra.sweep.dir=many")
    assert many.status == 1 and said in many.err, many.err


def test_a_file_that_holds_the_frozen_part_too_is_as_good(folder):
    ours, done = trained(folder, "from_file", *KNOWN, "init=exported_frozen", *KEEP)
    theirs = checkpoint.read(folder / "frozen/checkpoints/best.safetensors").part("model")
    torch.testing.assert_close(ours["model/head.classify.weight"], theirs["head.classify.weight"], rtol=0, atol=0)
    assert f"init=exported_frozen: {len(theirs)} tensors taken from step 2." in done.err  # and nothing is left


@pytest.mark.parametrize(
    ("of", "adapter", "said"),
    [
        ("frozen", "lora", "7 tensors taken from step 2; begins anew: backbone.model"),
        ("frozen", "full", "7 tensors taken from step 2; 23 tensors of the backbone as backbone.weights has them."),
        ("lora", "lora", "15 tensors taken from step 2."),
        ("lora", "qlora", "15 tensors taken from step 2."),
    ],
)
def test_an_adapter_may_come_later_on_the_same_weights_alone(folder, of, adapter, said):
    words = (*KNOWN, f"adapter={adapter}", *KEEP)
    for run in (of, f"exported_{of}"):
        _, done = trained(folder, f"{adapter}_on_{run}", *words, f"init={run}")
        whole = adapter == "full" and run != of  # a file of the whole model gives these, too
        assert f"init={run}: {'30 tensors taken from step 2.' if whole else said}" in done.err, done.err
    if adapter == "qlora":
        return  # what is rounded cannot be compared
    other = call(folder, *words, f"init={of}", "backbone.weights=random", "hydra.run.dir=refused")
    assert other.status == 1 and "trained on other frozen weights than this model's" in other.err, other.err


def test_another_run_to_begin_with_is_refused_where_one_goes_on(folder):
    trained(folder, "begun", *SHORT, "init=first")
    trained(folder, "alone", *SHORT)
    for run, words in (("begun", f"with init={folder / 'first'}"), ("alone", "without")):
        done = call(folder, *SHORT, f"resume={run}", "init=tuned", "trainer.steps=3")
        assert done.status == 1 and f"and began {words}. Leave init out, or, for a new run, resume." in done.err, (
            done.err
        )
    done = call(folder, *SHORT, "resume=begun", "init=./first", "trainer.steps=3")
    assert done.status == 0, done.err
    assert call(folder, "mode=eval", "resume=begun", "init=tuned").status == 0


def test_what_has_no_place_in_the_model_is_not_even_read(folder):
    file = checkpoint.read(folder / "first/checkpoints/best.safetensors")
    more = {"model/else": torch.full((3,), torch.nan), "ema/else": torch.full((3,), torch.nan)}
    kept = {key: value for key, value in file.info.items() if key != "format"}
    checkpoint.write(folder / "more.safetensors", {**file.tensors, **more}, kept)
    _, done = trained(folder, "of_more", *SHORT, "init=more.safetensors", *KEEP)
    assert "; left there: else." in done.err


def test_ranks_that_have_read_different_checkpoints_are_told(folder, compose, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = compose(*KNOWN, "adapter=frozen", "init=frozen")
    model = build.model(cfg)
    with pytest.raises(UserError, match="init=frozen: that run has saved anew while the ranks of this one read it"):
        begin_with(cfg, model, ["dark", "bright"], lambda progress: {**progress, "step": 1})
    assert begin_with(cfg, model, ["dark", "bright"]) is model


def test_a_file_that_is_passed_on_says_nothing_of_the_run_that_it_began_with(folder):
    trained(folder, "heir", *SHORT, "init=first")
    assert call(folder, "mode=export", "export=safetensors", "resume=heir", "hydra.run.dir=passed_on").status == 0
    assert "init" not in checkpoint.describe(folder / "passed_on/model.safetensors")["config"]


def test_frozen_weights_of_another_backbone_are_refused(folder):
    info = checkpoint.read(folder / "frozen/checkpoints/best.safetensors")
    changed = {**info.info, "frozen": {**info.info["frozen"], "backbone": "0" * 16}}
    checkpoint.write(folder / "other.safetensors", info.tensors, {k: v for k, v in changed.items() if k != "format"})
    done = call(folder, *KNOWN, "init=other.safetensors", "hydra.run.dir=refused")
    assert done.status == 1 and "trained on other frozen weights" in done.err, done.err


def test_rounded_weights_of_one_kind_are_begun_with_and_their_frozen_rest_is_held(folder):
    """A hash is of what is not rounded, on both sides."""
    words = (*KNOWN, "adapter=lora_8bit", *KEEP)
    trained(folder, "rounded", *words)
    _, done = trained(folder, "on_rounded", *words, "init=rounded")
    assert "init=rounded: 15 tensors taken from step 1." in done.err, done.err
    other = call(folder, *words, "init=rounded", "backbone.weights=random", "hydra.run.dir=refused")
    assert other.status == 1 and "trained on other frozen weights" in other.err, other.err


def test_a_damaged_file_is_refused_by_its_key(folder):
    (folder / "cut.safetensors").write_bytes((folder / "first/checkpoints/best.safetensors").read_bytes()[:2000])
    done = call(folder, *SHORT, "init=cut.safetensors", "hydra.run.dir=refused")
    assert done.status == 1 and "init=cut.safetensors: not a readable checkpoint" in done.err, done.err


def test_the_run_that_it_begins_with_is_part_of_a_recipe(folder):
    words = (*SHORT, "seed=9", "trainer.steps=1")
    trained(folder, "outputs/r/a", *words)
    done = call(folder, *words, "init=first", "resume=auto", "hydra.run.dir=outputs/r/b")
    assert done.status == 0 and "init=first: " in done.err, done.err


@pytest.mark.parametrize(
    ("recipe", "first"), [("slots_clips", "slots_rendered"), ("detail/camvid_full", "detail/camvid")]
)
def test_a_recipe_that_goes_on_from_another_asks_for_its_run(compose, recipe, first):
    words = (f"hparam={recipe}", "mode=train", "data.root=movi")
    cfg = compose(*words)
    with pytest.raises(UserError, match=f"begins with the weights of a run by hparam={first}: .*init=null"):
        train.check(cfg)
    assert compose("mode=train", f"hparam={first}", "data.root=movi").init is None
    train.check(compose(*words, "init=null"))
    assert not has_initial(compose(*words, "resume=run"))
    assert has_initial(compose(*words, "init=needed_by_all"))  # a run's own name


def test_the_best_finite_weights_are_taken_whatever_type_the_frozen_ones_are_held_in(folder, compose, monkeypatch):
    monkeypatch.chdir(folder)
    words = (*KNOWN, "init=odd")
    shutil.copytree("frozen/checkpoints", "odd/checkpoints")
    (folder / "odd/checkpoints/last.safetensors").write_bytes(b"cut")
    cfg = compose(*words, "backbone.dtype=bfloat16")
    assert begin_with(cfg, build.model(cfg), ["dark", "bright"])
    whole = compose(*KNOWN, "init=exported_frozen", "backbone.dtype=bfloat16")  # its frozen part is what this rounds
    assert begin_with(whole, build.model(whole), ["dark", "bright"])
    best = checkpoint.read(folder / "odd/checkpoints/best.safetensors")
    best.tensors["model/head.classify.bias"][0] = torch.nan
    kept = {key: value for key, value in best.info.items() if key != "format"}
    checkpoint.write(best.path, best.tensors, kept)
    with pytest.raises(UserError, match="^init=odd.*hold NaN or infinity"):
        begin_with(cfg, build.model(cfg), ["dark", "bright"])
    cfg = compose(*words, "finite_weights=false")
    assert begin_with(cfg, build.model(cfg), ["dark", "bright"]).head.classify.bias.isnan().any()
