"""One-file models: written, loaded in a program of its own, and predicting what mode=predict does."""

import gc
import json
import shutil
import struct
from functools import partial

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from command_line import call
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from mistakes import assert_refused
from omegaconf import OmegaConf
from portable_parts import TINY, export_file, write_untrained
from safetensors.torch import load_file
from test_evidence import write_evaluation
from test_hostile_checkpoints import CASES, write_tampered

import dinoseg
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.models import ModelBuilder
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids
from dinoseg.utils.tensor_files import write_tensors

draw = np.random.default_rng(0)


def picture(height=30, width=41):
    return draw.integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    """The one-file model of a training, written by mode=export in another folder than it is used from."""
    words = ("export=safetensors", "resume=segmenter", "engine=cpu", "hydra.run.dir=exported")
    done = call(trained, "mode=export", *words)
    assert done.status == 0, done.err
    path = tmp_path_factory.mktemp("elsewhere") / "model.safetensors"
    return shutil.copyfile(trained / "exported/model.safetensors", path)


@pytest.fixture(scope="module")
def sound(file):
    return checkpoint.read(file)


def test_file_predicts_the_same_as_mode_predict(trained, file, tmp_path, monkeypatch):
    words = ("engine=cpu", "input=clip", "hydra.run.dir=predicted")
    assert call(trained, "mode=predict", "resume=segmenter", *words).status == 0
    monkeypatch.chdir(tmp_path)
    model = dinoseg.load(file, device="cpu")
    results = list(model.predict(trained / "clip"))
    assert len(results) == 7
    for out in results:
        assert (out.mask == read_ids(trained / "predicted/masks" / out.source.name)).all()
        assert (out.probabilities.argmax(axis=0) == out.mask).all()
    again = dinoseg.load(trained / "segmenter", device="cpu").predict(trained / "clip/00000.png")
    assert (again.probabilities == results[0].probabilities).all()


@pytest.mark.heavy
def test_a_file_is_evaluated_as_a_checkpoint(trained, file):
    words = ("engine=cpu", "data.root=data", f"resume={file.parent}", "mode.metrics_only=true")
    done = call(trained, "mode=eval", *words, "hydra.run.dir=scored")
    assert done.status == 0, done.err
    ours, theirs = (trained / name / "scores.json" for name in ("scored", "segmenter/evaluation"))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_export_folder_loads_the_file_of_the_requested_runtime(file, tmp_path):
    folder = shutil.copyfile(file, tmp_path / "model.safetensors").parent
    (folder / "model.onnx").touch()
    for load in (dinoseg.load, dinoseg.Model.from_pretrained):
        assert load(folder, device="cpu").file == folder / file.name
        assert_refused(lambda load=load: load(folder, runtime="onnx"), "model.onnx: onnxruntime ")


def test_file_describes_its_classes_scores_data_and_versions(trained, file, tmp_path):
    facts = dinoseg.load(file, device="cpu").facts
    scores = json.loads((trained / "segmenter/evaluation/scores.json").read_text())
    assert facts.classes == ("dark", "bright") and facts.scores["values"]["miou"] == scores["miou"]
    assert facts.backbone["licence"] == "its trainer's own" and facts.data["train"]["count"] == 4
    assert facts.sizes["crop"] == [32, 48] and facts.sizes["typical"] == 48
    assert facts.versions["torch"] == torch.__version__.partition("+")[0] and not facts.delta
    assert facts.normalisation["mean"] != facts.normalisation["std"] and "_target_" not in facts.sizes["inference"]
    assert str(trained).encode() not in file.read_bytes()[: 2**20]
    again = dinoseg.load(export_file(file, tmp_path / "again"), device="cpu").facts
    assert again.scores == facts.scores and again.data == facts.data
    scored = export_file(file, tmp_path / "with", scores=write_evaluation(tmp_path / "scored", file))
    assert dinoseg.load(scored, device="cpu").facts.scores["split"] == "test"
    assert checkpoint.describe(scored)["config"]["data"]["root"] == "???"
    assert_refused(lambda: export_file(trained / "slots/checkpoints/best.safetensors", tmp_path), "predicts slots")


def test_loading_leaves_hydra_and_random_state_unchanged(file):
    OmegaConf.register_new_resolver("len", lambda value: "mine", replace=True)
    state = torch.random.get_rng_state()
    dinoseg.load(file, device="cpu")
    assert OmegaConf.create({"x": "${len:1}"}).x == "mine"
    assert not GlobalHydra.instance().is_initialized() and (torch.random.get_rng_state() == state).all()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_file_is_built_once_with_garbage_collection_paused(file, tmp_path, monkeypatch, enabled):
    paused = []
    build = ModelBuilder.model
    record = lambda *given, **named: paused.append(not gc.isenabled()) or build(*given, **named)  # noqa: E731
    monkeypatch.setattr(ModelBuilder, "model", record)
    try:
        (gc.enable if enabled else gc.disable)()
        model = dinoseg.load(file, device="cpu")
        assert paused == [True] and gc.isenabled() == enabled
        assert_refused(lambda: dinoseg.load(tmp_path / "missing", device="cpu"), "missing")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert model.predict(picture()).mask.shape == (30, 41)


def test_a_program_of_hydras_own_is_neither_changed_nor_read(file, sound, tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "mine.yaml").write_text("_target_: os.system\n")
    (tmp_path / "main.yaml").write_text("x: 1\n")
    evil = write_tampered(tmp_path, sound, {"choices/head": "mine"})
    try:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            HydraConfig.instance().set_config(hydra_compose("main", return_hydra_config=True))
            before = HydraConfig.get()
            dinoseg.load(file, device="cpu")
            assert HydraConfig.get() is before and GlobalHydra.instance().is_initialized()
            assert_refused(lambda: dinoseg.load(evil), "head=mine is not an option on this machine")
    finally:
        HydraConfig.instance().cfg = None


FAMILIES = {
    "packaged": ("backbone=tiny_surgical", "adapter=frozen", "head=mlp"),
    "random": (*TINY, "adapter=frozen", "head=linear"),
    "timm": ("backbone=timm", "backbone.name=resnet10t", "backbone.weights=random", "adapter=frozen", "head=linear"),
    "no network": ("backbone=rgb", "adapter=frozen", "head=linear"),
    "masks": (*TINY, "adapter=last_blocks", "adapter.blocks=1", "head=eomt", "head.blocks=1", "head.num_queries=5"),
}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=() if name == "packaged" else pytest.mark.heavy)
        for name, words in FAMILIES.items()
    ],
)
def test_each_kind_of_model_is_the_same_from_its_file(compose, tmp_path, words):
    path = write_untrained(compose, tmp_path, *words)
    image = picture()
    theirs = dinoseg.load(path, device="cpu").predict(image)
    assert len(theirs.probabilities.std(axis=(1, 2)).nonzero()[0])
    for delta in (False, True):
        if delta and words[0] != "backbone=tiny_surgical":
            refused = "export.delta=true: this backbone cannot be downloaded"
            assert_refused(lambda: export_file(path, tmp_path / "delta", delta=True), refused)
            continue
        file = export_file(path, tmp_path / f"out_{delta}", delta=delta)
        ours = dinoseg.load(file, device="cpu").predict(image)
        assert (ours.probabilities == theirs.probabilities).all() and (ours.mask == theirs.mask).all()


def test_file_uses_the_inference_of_its_training_by_default(compose, tmp_path, caplog):
    words = (*TINY, "adapter=frozen", "head=linear", "inference=windows", "inference.size=16")
    path = write_untrained(compose, tmp_path, *words)
    file = export_file(path, tmp_path / "out")
    image = picture(40, 56)
    assert "does not apply" not in caplog.text  # as it does of files that lack the strategy
    model, run, whole = (dinoseg.load(file), dinoseg.load(path), dinoseg.load(file, inference="whole"))
    assert model.facts.sizes["inference"]["option"] == "windows" and model.facts.sizes["inference"]["size"] == 16
    ours, theirs, other = (each.predict(image).probabilities for each in (model, run, whole))
    assert (ours == theirs).all() and np.abs(ours - other).max() > 1e-3
    words = ("inference=half is not an option on this machine",)
    assert_refused(lambda: dinoseg.load(file, inference="half"), *words)


def foreign_file(compose, folder):
    """Write a DINOv3 file whose rotation frequencies are not those of its config, as Meta's are."""
    backbone = Builder(compose("backbone=tiny_surgical", "data.classes=[a]")).backbone()
    backbone.model.rope_embeddings.inv_freq.mul_(1.01)
    backbone.norm.weight.mul_(1.01)
    path = folder / "dinov3_file.safetensors"
    write_tensors(path, backbone.export_state(), {})
    return path


@pytest.mark.heavy
def test_gated_weights_are_not_exported_by_default(compose, tmp_path, capsys):
    weights = foreign_file(compose, tmp_path)
    words = ("backbone=tiny_surgical", f"backbone.weights={weights}", "adapter=lora", "head=linear")
    path = write_untrained(compose, tmp_path, *words)
    gated = ("DINOv3 License", "export.delta=true", "export.gated=true")
    assert_refused(lambda: export_file(path, tmp_path / "out"), *gated)
    assert not (tmp_path / "out/model.safetensors").exists()
    image = picture()
    theirs = dinoseg.load(path, device="cpu").predict(image).probabilities
    whole = export_file(path, tmp_path / "out", gated=True)
    assert dinoseg.load(whole.parent, device="cpu").file == whole
    assert_refused(lambda: dinoseg.load(whole, backbone=weights), "backbone=", " holds its own backbone. Leave it out")
    assert_refused(lambda: export_file(whole, tmp_path / "again"), "DINOv3 License")
    again = export_file(whole, tmp_path / "again", gated=True)
    moved = weights.rename(tmp_path / "moved.safetensors")
    model = dinoseg.load(again, device="cpu")
    assert (model.predict(image).probabilities == theirs).all() and model.facts.backbone["weights"] == weights.name
    moved.rename(weights)
    delta = export_file(path, tmp_path / "delta", delta=True)
    printed = capsys.readouterr().out
    assert 'backbone="FILE"' in printed and "it holds no scores" in printed
    assert delta.stat().st_size < whole.stat().st_size / 4
    assert not any("lora" not in name for name in load_file(delta) if "model/backbone" in name)
    weights.rename(moved)
    remedy = "Set its current path: backbone=PATH"
    assert_refused(lambda: dinoseg.load(delta), "backbone=../dinov3_file.safetensors, which is neither a file", remedy)
    model = dinoseg.load(delta, device="cpu", backbone=moved)
    assert (model.predict(image).probabilities == theirs).all() and not model.facts.backbone["in_file"]
    other = lambda: dinoseg.load(delta, device="cpu", backbone="dinoseg:tiny_surgical")  # noqa: E731
    assert_refused(other, "other frozen backbone weights")


def test_non_finite_weights_are_not_exported(compose, tmp_path):
    weights = foreign_file(compose, tmp_path)
    words = ("backbone=tiny_surgical", f"backbone.weights={weights}", "adapter=frozen", "head=linear")
    path = write_untrained(compose, tmp_path, *words)  # the checkpoint itself is sound: it holds the head alone
    sound = load_file(weights)
    write_tensors(weights, sound | {"norm.weight": sound["norm.weight"] / 0}, {})
    assert_refused(lambda: export_file(path, tmp_path / "out", gated=True), "norm.weight holds NaN or infinity")
    assert not list((tmp_path / "out").iterdir())
    write_tensors(weights, sound, {})
    held = checkpoint.read(path)
    held.tensors["model/head.classify.weight"][0] = float("nan")
    checkpoint.write(path, held.tensors, {key: value for key, value in held.info.items() if key != "format"})
    for delta in (True, False):
        with pytest.raises(UserError, match="best.safetensors: 1 of its tensors hold NaN"):
            export_file(path, tmp_path / "out", gated=True, delta=delta)


@pytest.mark.heavy
def test_a_delta_names_the_commit_of_its_backbone(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ("backbone=dinov2_vits14", "backbone.arch.hidden_size=24", "backbone.arch.num_hidden_layers=2")
    words += ("backbone.arch.num_attention_heads=3", "adapter=frozen", "head=linear")
    fetched = tmp_path / "hub/models--facebook--dinov2-small"
    commit = "0123456789" * 4
    (fetched / "refs").mkdir(parents=True)
    (fetched / "refs/main").write_text(commit)
    some = Builder(compose(*words, "data.classes=[a]", "backbone.weights=random")).backbone()
    write_tensors(fetched / "snapshots" / commit / "model.safetensors", some.export_state(), {})
    path = write_untrained(compose, tmp_path, *words)
    file = export_file(path, tmp_path / "out", delta=True)
    image = picture()
    theirs = dinoseg.load(path, device="cpu").predict(image).probabilities
    (fetched / "refs/main").write_text("f" * 40)  # what main is now is another one, which is not here
    model = dinoseg.load(file, device="cpu")
    assert (model.predict(image).probabilities == theirs).all()
    source = model.facts.backbone
    assert (source["weights"], source["revision"], source["licence"]) == ("facebook/dinov2-small", commit, "Apache-2.0")
    assert checkpoint.describe(file)["config"]["backbone"]["weights"] == f"facebook/dinov2-small@{commit}"
    shutil.rmtree(fetched)
    assert_refused(lambda: dinoseg.load(file), "model.safetensors: ", "the hub is unreachable", "backbone=PATH")


def test_delta_with_trained_gated_weights_is_gated(compose, tmp_path):
    weights = foreign_file(compose, tmp_path)
    image = picture()
    words = ("backbone=tiny_surgical", f"backbone.weights={weights}", "head=linear")
    path = write_untrained(compose, tmp_path, *words, "adapter=last_blocks", "adapter.blocks=1")
    gated = ("DINOv3 License", "export.gated=true")
    assert_refused(lambda: export_file(path, tmp_path / "out", delta=True), *gated)
    assert not (tmp_path / "out/model.safetensors").exists()
    delta = export_file(path, tmp_path / "out", delta=True, gated=True)
    theirs = dinoseg.load(path, device="cpu").predict(image).probabilities
    moved = weights.rename(tmp_path / "moved.safetensors")
    assert (dinoseg.load(delta, device="cpu", backbone=moved).predict(image).probabilities == theirs).all()
    both = partial(dinoseg.load, delta, device="cpu", backbone=moved, head=moved)
    assert_refused(both, f"head={moved}: ", " holds its own head. Leave it out.")


# of those that tests/test_hostile_checkpoints.py gives to all modes, one of each kind
KINDS = ("a hook in the head", "an interpolation", "a list without end", "a huge depth", "remote code", "a null group")
TAMPERED = {kind: CASES[kind] for kind in KINDS} | {  # and of those that a fuzzer of the description has found
    "no classes": {"config/data": {"root": "???"}},
    "a long value": {"config/head/pixel_shuffle": ["a"] * 300},
    "no way of use": {"config/inference": 3},
    "a window without end": {"config/inference/size": 10**30},
    "a shell in its use": {"config/inference/_target_": "os.system"},
}


@pytest.mark.parametrize("case", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_file_is_refused(tmp_path, sound, case):
    path = write_tampered(tmp_path, sound, case)
    with pytest.raises(UserError) as refused:
        dinoseg.load(path, device="cpu")
    assert str(path) in str(refused.value) and len(str(refused.value)) < 1000
    assert list(tmp_path.iterdir()) == [path]


def changed(value, name="model/head.classify.weight"):
    return lambda sound: {name: value(sound.tensors[name])}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(lambda one: one * float("nan")), "hold NaN or infinity"),
        (changed(lambda one: one[:1].clone()), "of another shape"),
        (changed(lambda one: one.to(torch.complex64)), "has the type C64"),
        (lambda sound: {"model/head.more": torch.zeros(1)}, "unexpected"),
        (lambda sound: {"constants/backbone.more": torch.zeros(1)}, "unexpected"),
        (lambda sound: {"constants/backbone.mean": torch.zeros(9, 9)}, "of another shape"),
    ],
)
def test_foreign_tensors_are_refused(tmp_path, sound, tensors, message):
    with pytest.raises(UserError, match=message):
        dinoseg.load(write_tampered(tmp_path, sound, {}, tensors(sound)), device="cpu")


def test_a_file_of_more_tensors_than_any_model_has_is_refused(file, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_TENSORS", 20)
    assert_refused(lambda: dinoseg.load(file), "tensors; the limit is 20")


def test_large_images_are_reduced_to_the_training_scale(tmp_path, sound):
    said = sound.info["sizes"]
    image = picture(200, 300)
    as_trained, as_they_are = (
        dinoseg.load(write_tampered(tmp_path, sound, {"sizes": sizes}), device="cpu").predict(image).probabilities
        for sizes in (said, {**said, "largest": 10**6})
    )
    assert as_trained.shape == as_they_are.shape and np.abs(as_trained - as_they_are).max() > 1e-3


def test_weights_from_a_trusted_source_are_loaded(tmp_path, sound):
    path = write_tampered(tmp_path, sound, {"config/backbone/weights": "evil/weights"})
    assert_refused(lambda: dinoseg.load(path, device="cpu"), "trust=", "evil/weights")
    # it is believed that the backbone comes from there
    assert_refused(lambda: dinoseg.load(path, device="cpu", trust=["evil/weights"]), "belongs to another model")


@pytest.mark.parametrize(
    ("place", "value"),
    [("facts", 3), ("facts/scores", [1]), ("facts/delta", "no"), ("facts/versions", {"torch": 2})],
)
def test_invalid_facts_are_refused(tmp_path, sound, place, value):
    path = write_tampered(tmp_path, sound, {place: value})
    assert_refused(lambda: dinoseg.load(path, device="cpu"), "evil.safetensors: ", "facts")


def test_foreign_damaged_or_newer_file_is_refused(tmp_path, trained, file, sound):
    whole = file.read_bytes()
    newer = {**sound.info, "format": 99}
    checkpoint.write(tmp_path / "newer.safetensors", sound.tensors, newer)
    write_tensors(tmp_path / "foreign.safetensors", {"x": torch.zeros(2)}, {"format": "pt"})
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "head": whole[:200], "text": b"hello" * 99}
    contents["huge header"] = struct.pack("<Q", 2**60) + whole[8:]
    contents["pickle"] = b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    for path in tmp_path.glob("*.safetensors"):
        with pytest.raises(UserError, match=path.name) as refused:
            dinoseg.load(path)
        assert "resume=" not in str(refused.value) and ("reads format 2" in str(refused.value)) == (
            path.stem == "newer"
        )
    for path, options, *words in (
        (tmp_path / "none", {}, "none: file or folder not found"),
        (tmp_path, {}, "it holds neither checkpoints/best.safetensors"),
        (trained / "slots", {}, "slots/checkpoints/", "predicts slots"),
        (file, {"runtime": "tpu"}, "runtime=tpu"),
        (file, {"device": "tpu"}, "device=tpu"),
        (file, {"precision": "8"}, "precision=8"),
    ):
        assert_refused(partial(dinoseg.load, path, **options), *words)


def test_a_model_is_saved_whole_or_not_at_all(file, trained, tmp_path):
    model = dinoseg.load(file, device="cpu")
    model.save(tmp_path / "deeper/copy.safetensors")
    assert (tmp_path / "deeper/copy.safetensors").read_bytes() == file.read_bytes()
    assert_refused(lambda: model.save(file / "x"), "Cannot read or write")
    run = dinoseg.load(trained / "segmenter", device="cpu")
    run.save(tmp_path / "of_a_run.safetensors")
    again = dinoseg.load(tmp_path / "of_a_run.safetensors", device="cpu")
    image = picture()
    assert (again.predict(image).probabilities == run.predict(image).probabilities).all()
    assert again.facts == model.facts and run.facts.scores is None


def test_run_folder_loads_its_best_checkpoint_despite_a_file(compose, tmp_path):
    write_untrained(compose, tmp_path, *TINY)
    (tmp_path / "run/model.safetensors").touch()
    assert dinoseg.load(tmp_path / "run", device="cpu").file is None
