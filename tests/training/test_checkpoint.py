import json
import os
import re

import pytest
import torch
from checkpoint_files import INFO
from safetensors.torch import save_file
from torch import nn

from dinoseg.models.adapters import Frozen, Full, Lora
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer, comparable, find, load_weights, read, write
from dinoseg.training.optim import MovingAverage, adamw
from dinoseg.training.progress import Progress
from dinoseg.utils.errors import UserError

ADAPTERS = {"frozen": Frozen(), "full": Full(), "lora": Lora(rank=2, alpha=2)}


@pytest.fixture
def model(tiny_backbone):
    def build(adapter="lora", classes=3, seed=0):
        backbone = ADAPTERS[adapter](tiny_backbone())
        backbone.weights = "some/hub-id"
        torch.manual_seed(seed)
        return SegmentationModel(backbone, LinearHead(24, 1, classes))

    return build


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model(torch.rand(2, 3, 16, 16)).logits().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_save_and_restore_is_exact(model, tmp_path, adapter):
    source = model(adapter).train()
    optimizer, average = adamw(source, lr=0.01), None
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    run = checkpoints.restore(source, optimizer, average)
    train(source, optimizer)
    run.step, run.stale = 2, 1
    checkpoints.save(source, optimizer, average)
    other = model(adapter, seed=1)
    other_optimizer = adamw(other, lr=0.01)
    again = Checkpointer(tmp_path, dict(INFO), start=read(tmp_path / "last.safetensors"))
    assert again.restore(other, other_optimizer, None) == run
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), other.state_dict().values(), strict=True)
    )
    torch.manual_seed(5)
    train(source, optimizer, 1)
    torch.manual_seed(5)
    train(other, other_optimizer, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_parameter_without_gradients_is_restored(model, tmp_path):
    source = model("full").train()
    source.head.spare = nn.Linear(2, 2)  # no gradient reaches it, so that the optimizer has no state of it
    optimizer = adamw(source, lr=0.01)
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, optimizer, None)
    train(source, optimizer)
    checkpoints.save(source, optimizer, None)
    again = Checkpointer(tmp_path, dict(INFO), start=read(tmp_path / "last.safetensors"))
    restored = adamw(source, lr=0.01)
    again.restore(source, restored, None)
    assert len(restored.state) and not restored.state[source.head.spare.weight]


def test_only_trained_parameters_are_saved(model, tmp_path):
    source = model("lora")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, adamw(source, lr=1.0), None)
    checkpoints.save_if_best(source, {"miou": 0.5})
    tensors = read(tmp_path / "best.safetensors").tensors
    assert {name.split("/")[0] for name in tensors} == {"model"}
    assert all(name.startswith("model/head.") or ".lora_" in name for name in tensors)


def test_best_moves_only_when_beaten(model, tmp_path):
    source = model("frozen")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    run = checkpoints.restore(source, adamw(source, lr=1.0), None)
    for step, score in enumerate([0.3, 0.5, 0.5, 0.4, 0.6], start=1):
        run.step, run.validation_pending = step, True
        checkpoints.commit(checkpoints.save_if_best(source, {"miou": score}))
        assert not run.validation_pending
        assert (run.best, run.best_step, run.stale) == {
            1: (0.3, 1, 0),
            2: (0.5, 2, 0),
            3: (0.5, 2, 1),
            4: (0.5, 2, 2),
            5: (0.6, 5, 0),
        }[step]
    assert read(tmp_path / "best.safetensors").info["progress"]["best_step"] == 5


def test_evaluate_last_saves_weights_of_each_validation(model, tmp_path):
    source = model("frozen")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    run = checkpoints.progress
    for step, score in enumerate([0.5, 0.3, 0.4], start=1):
        run.step = step
        nn.init.constant_(source.head.classify.weight, step)
        checkpoints.commit(checkpoints.save_if_best(source, {"miou": score}, evaluate="last"))
        saved = read(tmp_path / "best.safetensors")
        assert saved.info["progress"]["step"] == step and (run.best, run.best_step) == (0.5, 1)
        assert (saved.tensors["model/head.classify.weight"] == step).all()
    assert run.stale == 2


def test_moving_average_is_saved_and_restored(model, tmp_path):
    source = model("frozen")
    optimizer = adamw(source, lr=0.1)
    average = MovingAverage([("w", source.head.classify.weight)], 0.9)
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, optimizer, average)
    train(source.train(), optimizer)
    average.update(step=1)
    checkpoints.save(source, optimizer, average)
    other = model("frozen")
    fresh = MovingAverage([("w", other.head.classify.weight)], 0.9)
    again = Checkpointer(tmp_path, dict(INFO), start=read(tmp_path / "last.safetensors"))
    again.restore(other, adamw(other, lr=0.1), fresh)
    assert torch.equal(fresh.average["w"], average.average["w"])


def test_another_architecture_is_refused_by_tensor(model, tmp_path):
    source = model("lora")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, adamw(source, lr=1.0), None)
    checkpoints.save_if_best(source, {"miou": 0.5})
    best = read(tmp_path / "best.safetensors")
    with pytest.raises(UserError, match="2 tensors of another shape .such as head.classify.bias"):
        load_weights(model("lora", classes=4), best)
    with pytest.raises(UserError, match="unexpected .such as backbone.*lora_"):
        load_weights(model("frozen"), best)


def test_best_of_a_run_is_loaded_if_it_is_whole(model, tmp_path):
    source = model("lora")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, adamw(source, lr=1.0), None)
    with pytest.raises(UserError, match=r"best.safetensors is missing, .* mode=eval resume=.*last.safetensors"):
        checkpoints.load_best(source)
    checkpoints.save_if_best(source, {"miou": 0.5})
    weight = source.head.classify.weight.detach().clone()
    with torch.no_grad():
        source.head.classify.weight += 1
    checkpoints.load_best(source)
    assert torch.equal(source.head.classify.weight, weight)
    with pytest.raises(UserError, match="belongs to another model: .*unexpected .such as backbone.*lora_"):
        checkpoints.load_best(model("frozen"))
    with torch.no_grad():
        source.head.classify.weight.fill_(torch.nan)
    Checkpointer(tmp_path, dict(INFO)).save_if_best(source, {"miou": 0.5})
    with pytest.raises(UserError, match="1 of its tensors hold NaN or infinity"):
        checkpoints.load_best(source)
    checkpoints.best.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        checkpoints.load_best(source)


def test_last_is_evaluated_if_the_best_is_in_another_folder(model, tmp_path):
    source = model("frozen")
    checkpoints = Checkpointer(tmp_path / "old", dict(INFO))
    optimizer = adamw(source, lr=1.0)
    checkpoints.restore(source, optimizer, None)
    train(source, optimizer)
    checkpoints.commit(checkpoints.save_if_best(source, {"miou": 0.9}))
    checkpoints.save(source, optimizer, None)
    moved = Checkpointer(tmp_path / "new", dict(INFO), start=read(tmp_path / "old/last.safetensors"))
    moved.restore(source, optimizer, None)
    train(source, optimizer)
    moved.progress.step = 4
    moved.commit(moved.save_if_best(source, {"miou": 0.1}))
    moved.save(source, optimizer, None)
    weight = source.head.classify.weight.detach().clone()
    train(source, optimizer)
    moved.load_best(source)
    assert moved.best == tmp_path / "new/last.safetensors" and torch.equal(source.head.classify.weight, weight)
    moved.commit(moved.save_if_best(source, {"miou": 0.95}))
    assert moved.best == tmp_path / "new/best.safetensors"


def test_other_frozen_weights_are_refused(model, tmp_path):
    source = model("lora")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, adamw(source, lr=1.0), None)
    checkpoints.save_if_best(source, {"miou": 0.5})
    other = model("lora")
    with torch.no_grad():
        other.backbone.model.embeddings.cls_token += 1
    with pytest.raises(UserError, match="trained on other frozen backbone weights"):
        load_weights(other, read(tmp_path / "best.safetensors"))


def test_training_cannot_resume_from_best(model, tmp_path):
    source = model("frozen")
    checkpoints = Checkpointer(tmp_path, dict(INFO))
    checkpoints.restore(source, adamw(source, lr=1.0), None)
    checkpoints.save_if_best(source, {"miou": 0.5})
    start = read(tmp_path / "best.safetensors")
    with pytest.raises(UserError, match="holds no optimizer state.*Resume from last.safetensors"):
        Checkpointer(tmp_path, dict(INFO), start=start).restore(source, adamw(source, lr=1.0), None)


def test_find_takes_run_folders_checkpoint_folders_and_files(tmp_path):
    folder = tmp_path / "run" / checkpoint.FOLDER
    for name in ("last", "best"):
        write(folder / f"{name}.safetensors", {"x": torch.zeros(1)}, INFO)
    assert find(tmp_path / "run", "best") == folder / "best.safetensors"
    assert find(folder, "last") == folder / "last.safetensors"
    assert find(folder / "last.safetensors", "best") == folder / "last.safetensors"
    (folder / "best.safetensors").unlink()
    assert find(tmp_path / "run", "best") == folder / "last.safetensors"
    with pytest.raises(
        UserError, match="it holds neither checkpoints/best.safetensors nor checkpoints/last.safetensors"
    ):
        find(tmp_path, "last")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("auto", r"^resume=auto: file or folder not found\. Give a run folder or"),
        ("run", r"^resume=run: file or folder not found\. Did you mean resume=runs\? Give a run folder or"),
        ("runs/first", r": file or folder not found\."),
        ("facebook/dinov2-small", r": file or folder not found\."),
        ("broken", r": file or folder not found\."),
        ("loop", r": file or folder not found\."),
        ("pipe", r"^resume=pipe is a pipe or a device\. Give a run folder or a checkpoint in it\.$"),
        ("runs", r"^resume=runs: it holds neither .* nor model\.safetensors\. Give a run folder"),
        ("a" * 300, r"^resume=a{77}\.\.\.: File name too long\. Give a run folder or a checkpoint in it\.$"),
        ("~nobody_of_this_name/run", r"^resume=~nobody_of_this_name/run: Could not determine home directory\. Give"),
        ("", "it holds neither checkpoints/best.safetensors"),
    ],
)
def test_path_without_a_checkpoint_is_one_error(tmp_path, monkeypatch, target, said):
    monkeypatch.chdir(tmp_path)
    for name in ("run10", "run2"):
        (tmp_path / "runs" / name / checkpoint.FOLDER).mkdir(parents=True)
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for prefer in ("best", "last"):
        with pytest.raises(UserError, match=said):
            find(target, prefer)


def test_links_are_followed(tmp_path):
    path = tmp_path / "run" / checkpoint.FOLDER / "best.safetensors"
    write(path, {"x": torch.zeros(1)}, INFO)
    (tmp_path / "run_2").symlink_to("run")
    (tmp_path / "file").symlink_to(path)
    assert find(tmp_path / "run_2", "last").samefile(path) and find(tmp_path / "file", "last").samefile(path)


def test_invalid_checkpoint_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", {"dinoseg": json.dumps({**INFO, "format": 99})})
    write(tmp_path / "whole", {"x": torch.zeros(1000)}, INFO)
    write(tmp_path / "bare", {"x": torch.zeros(1)}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    size = int.from_bytes((tmp_path / "whole").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "whole").read_bytes()[8 : 8 + size])
    del header["x"]
    header["model/x"] = {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (tmp_path / "long").write_bytes(len(text).to_bytes(8, "little") + text)
    torch.save(nn.Linear(1, 1), tmp_path / "pickle")
    for name, message in (
        ("text", "not a readable checkpoint"),
        ("pickle", "not a readable checkpoint"),
        ("cut", "not a readable checkpoint"),
        ("foreign", "not a checkpoint of dinoseg"),
        ("newer", "format 99.*Update dinoseg"),
        ("bare", "its description lacks progress, frozen, config"),
        ("absent", "file not found"),
        ("long", "not a readable checkpoint"),
    ):
        for reader in (read, checkpoint.outline):
            with pytest.raises(UserError, match=message):
                reader(tmp_path / name)


def test_a_pipe_in_a_checkpoint_s_place_is_named_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "last.safetensors")
    with pytest.raises(UserError, match="last.safetensors is a named pipe"):
        checkpoint.describe(tmp_path / "last.safetensors")


def test_the_best_of_another_score_is_no_best_any_more(model, tmp_path):
    source = model("frozen")
    optimizer = adamw(source, lr=0.01)

    def chosen_by(score, start=None):
        info = {**INFO, "config": {**INFO["config"], "trainer": {"score": score}}}
        checkpoints = Checkpointer(tmp_path, info, start=start)
        checkpoints.restore(source, optimizer, None)
        return checkpoints

    first = chosen_by("miou")
    train(source, optimizer, 1)
    first.progress.step = 1
    first.commit(first.save_if_best(source, {"miou": 0.5}))
    first.save(source, optimizer, None)
    start = read(tmp_path / "last.safetensors")
    assert chosen_by("miou", start).progress.best == 0.5
    again = chosen_by("loss", start)
    assert (again.progress.step, again.progress.best) == (1, None)
    assert (
        again.save_if_best(source, {"miou": 0.9}, lowest=True).best == 0.9
    )  # a loss of 0.9 is not worse than a mIoU of 0.5


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ({"val_images": 5}, {}, "to miou of all images from miou of 5 images"),
        ({"evaluate": "last"}, {}, "to miou of all images from the last validation"),
        ({}, {"evaluate": "last"}, "to the last validation"),
        ({"evaluate": "last"}, {"evaluate": "last", "score": "loss"}, "loss of all images.* from .*miou of all images"),
    ],
)
def test_a_best_score_of_another_selection_is_discarded(model, tmp_path, caplog, before, after, change):
    def info(trainer):
        return {**INFO, "config": {**INFO.get("config", {}), "trainer": {"score": "miou", **trainer}}}

    source = model("frozen")
    optimizer = adamw(source, lr=1.0)
    checkpoints = Checkpointer(tmp_path, info(before))
    checkpoints.restore(source, optimizer, None)
    checkpoints.commit(checkpoints.save_if_best(source, {"miou": 0.91}))
    for parameter in source.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    checkpoints.save(source, optimizer, None)
    start = read(tmp_path / "last.safetensors")
    assert Checkpointer(tmp_path, info(before), start=start).restore(source, optimizer, None).best == 0.91
    assert Checkpointer(tmp_path, info(after), start=start).restore(source, optimizer, None).best is None
    assert re.search(change, caplog.text)


def test_changed_selection_restarts_patience_and_discards_best(caplog):
    before, now = ({"config": {"trainer": {"score": score}}} for score in ("miou", "loss"))
    progress = Progress(9, best=0.5, best_infinite=1, best_step=3, stale=2)
    assert comparable(progress, before, now) == Progress(9)
    assert "the previous best score is discarded" in caplog.text
    caplog.clear()
    assert comparable(Progress(9), before, now) == Progress(9) and not caplog.messages


@pytest.mark.parametrize(
    ("score", "metric", "changed", "is_same"),
    [
        ("skeleton_recall", "cldice", {"metric": {"cldice": {"classes": [1]}}}, False),
        ("skeleton_recall", "cldice", {"metric": {"cldice": {"classes": None}, "nsd": {"tolerance": 3}}}, True),
        ("miou", None, {"task": {"threshold": 0.3}}, False),
        ("share", "share", {"task": {"threshold": 0.3}}, False),  # this metric has a threshold of its own
        ("loss", None, {"task": {"threshold": 0.3}}, True),
        ("miou", None, {"metric": {"cldice": {"classes": [1]}}}, True),
        ("miou", None, {"inference": {"flips": "all", "batch_size": 4}}, False),
        ("loss", None, {"inference": {"flips": "all", "batch_size": 4}}, False),
        ("miou", None, {"inference": {"flips": "none", "batch_size": 1}}, True),
        ("fg_ari", None, {"slots": {"match": "overlap"}}, False),
        ("loss", None, {"slots": {"match": "overlap"}}, True),
        ("miou_no_background", None, {"data": {"background": "b"}}, False),
        ("miou", None, {"data": {"background": "b"}}, True),
    ],
)
def test_settings_of_a_score_decide_whether_its_best_stays(score, metric, changed, is_same):
    config = {
        "trainer": {"score": score},
        "task": {"threshold": 0.5},
        "data": {"background": "a"},
        "inference": {"flips": "none", "batch_size": 4},
        "slots": {"match": "auto"},
        "metric": {"cldice": {"classes": None}, "nsd": {"tolerance": 2}, "share": {"threshold": 0.9}},
    }
    before, progress = {"config": config}, Progress(9, best=0.5, best_step=3)
    found = comparable(progress, before, {"config": config | changed}, metric)
    assert found == (progress if is_same else Progress(9))


def test_another_inference_option_discards_the_best(caplog):
    config, progress = {"trainer": {"score": "miou"}}, Progress(9, best=0.5, best_step=3)
    before, now = ({"config": config, "choices": {"inference": option}} for option in ("whole", "windows"))
    assert comparable(progress, before, now) == Progress(9)
    assert "to miou inference=windows of all images from miou inference=whole of all images" in caplog.text
