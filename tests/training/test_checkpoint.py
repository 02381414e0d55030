import errno
import json
import re
from functools import partial

import pytest
import torch
from checkpoint_files import INFO
from mistakes import assert_refused
from torch import nn

from dinoseg.models.adapters import Frozen, Full, Lora
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import Checkpointer, Progress, drop_incomparable_score, find, load_weights, read, write
from dinoseg.training.loading import check_resumable
from dinoseg.training.optim import MovingAverage, adamw
from dinoseg.utils.errors import UserError

ADAPTERS = {"frozen": Frozen(), "full": Full(), "lora": Lora(rank=2, alpha=2)}
LAST, BEST = "last.safetensors", "best.safetensors"
NAMED = f"checkpoints/{BEST} nor checkpoints/{LAST}"


@pytest.fixture
def model(tiny_backbone):
    def build(adapter="lora", classes=3, seed=0):
        backbone = ADAPTERS[adapter](tiny_backbone())
        backbone.weights = "some/hub-id"
        torch.manual_seed(seed)
        return SegmentationModel(backbone, LinearHead(24, 1, classes))

    return build


def begin(folder, source, *, start=None, average=None):
    """Return the checkpoints and the optimizer of a run of a model, new or from a file."""
    optimizer = adamw(source, lr=0.01)
    checkpoints = Checkpointer(folder, dict(INFO), start=start)
    checkpoints.restore(source, optimizer, average)
    return checkpoints, optimizer


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model(torch.rand(2, 3, 16, 16)).logits().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(one, two):
    return all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_save_and_restore_is_exact(model, tmp_path, adapter):
    source = model(adapter).train()
    other = model(adapter, seed=1)
    if adapter == "full":  # no gradient reaches it, so that the optimizer has no state of it
        source.head.spare, other.head.spare = nn.Linear(2, 2), nn.Linear(2, 2)
    checkpoints, optimizer = begin(tmp_path, source)
    train(source, optimizer)
    average = MovingAverage([("w", source.head.classify.weight)], 0.9)
    train(source, optimizer)
    average.update(step=1)
    checkpoints.progress.step, checkpoints.progress.stale = 2, 1
    checkpoints.save(source, optimizer, average)
    fresh = MovingAverage([("w", other.head.classify.weight)], 0.9)
    again, other_optimizer = begin(tmp_path, other, start=read(tmp_path / LAST), average=fresh)
    assert again.progress == checkpoints.progress and equal(source, other)
    assert torch.equal(fresh.average["w"], average.average["w"])
    assert len(other_optimizer.state)
    assert adapter != "full" or not other_optimizer.state[other.head.spare.weight]
    for each, own in ((source, optimizer), (other, other_optimizer)):
        torch.manual_seed(5)
        train(each, own, 1)
    assert equal(source, other)


def test_best_moves_only_when_beaten(model, tmp_path):
    source = model("lora")
    checkpoints, _ = begin(tmp_path, source)
    run = checkpoints.progress
    found = []
    for step, score in enumerate([0.3, 0.5, 0.5, 0.4, 0.6], start=1):
        run.step, run.validation_pending = step, True
        checkpoints.commit(checkpoints.save_if_best(source, {"miou": score}))
        assert not run.validation_pending
        found.append((run.best, run.best_step, run.stale))
    assert found == [(0.3, 1, 0), (0.5, 2, 0), (0.5, 2, 1), (0.5, 2, 2), (0.6, 5, 0)]
    best = read(tmp_path / BEST)
    assert best.info["progress"]["best_step"] == 5
    # only trained parameters are saved
    assert all(name.startswith("model/head.") or ".lora_" in name for name in best.tensors)
    assert {name.split("/")[0] for name in best.tensors} == {"model"}


def test_checkpoint_of_another_model_is_refused(model, tmp_path):
    source = model("lora")
    checkpoints, _ = begin(tmp_path, source)
    checkpoints.save_if_best(source, {"miou": 0.5})
    best = read(tmp_path / BEST)
    other = model("lora")
    with torch.no_grad():
        other.backbone.model.embeddings.cls_token += 1
    wider, frozen = model("lora", classes=4), model("frozen")
    assert_refused(lambda: load_weights(wider, best), "2 tensors of another shape (such as head.classify.bias")
    assert_refused(lambda: load_weights(frozen, best), "unexpected (such as backbone", "lora_")
    assert_refused(lambda: load_weights(other, best), "trained on other frozen backbone weights")
    assert_refused(lambda: begin(tmp_path, source, start=best), "its optimizer state lacks parameters")
    assert_refused(
        lambda: check_resumable(best), "holds no optimizer state", "Resume from last.safetensors", "init=FILE"
    )


def test_best_of_a_run_is_loaded_if_it_is_whole(model, tmp_path):
    source = model("lora")
    checkpoints, _ = begin(tmp_path, source)
    load = partial(checkpoints.load_best, source)
    assert_refused(load, "best.safetensors: file not found")
    checkpoints.save_if_best(source, {"miou": 0.5})
    weight = source.head.classify.weight.detach().clone()
    with torch.no_grad():
        source.head.classify.weight += 1
    load()
    assert torch.equal(source.head.classify.weight, weight)
    words = ("belongs to another model: ", "unexpected (such as backbone", "lora_")
    assert_refused(lambda: checkpoints.load_best(model("frozen")), *words)
    checkpoints.best.write_bytes(b"no tensors")
    assert_refused(load, "not a readable safetensors file")


def test_last_is_evaluated_if_the_best_is_in_another_folder(model, tmp_path):
    source = model("frozen")
    checkpoints, optimizer = begin(tmp_path / "old", source)
    train(source, optimizer)
    checkpoints.commit(checkpoints.save_if_best(source, {"miou": 0.9}))
    checkpoints.save(source, optimizer, None)
    moved, optimizer = begin(tmp_path / "new", source, start=read(tmp_path / "old" / LAST))
    train(source, optimizer)
    moved.progress.step = 4
    moved.commit(moved.save_if_best(source, {"miou": 0.1}))
    moved.save(source, optimizer, None)
    weight = source.head.classify.weight.detach().clone()
    train(source, optimizer)
    moved.load_best(source)
    assert moved.best == tmp_path / "new" / LAST and torch.equal(source.head.classify.weight, weight)
    moved.commit(moved.save_if_best(source, {"miou": 0.95}))
    assert moved.best == tmp_path / "new" / BEST


def test_find_takes_runs_checkpoint_folders_files_and_links(tmp_path):
    folder = tmp_path / "run" / checkpoint.CHECKPOINT_FOLDER
    for name in (LAST, BEST):
        write(folder / name, {"x": torch.zeros(1)}, INFO)
    (tmp_path / "run_2").symlink_to("run")
    (tmp_path / "file").symlink_to(folder / BEST)
    assert find(tmp_path / "run", "best") == folder / BEST
    assert find(folder, "last") == folder / LAST
    assert find(folder / LAST, "best") == folder / LAST
    assert find(tmp_path / "run_2", "best").samefile(folder / BEST)
    assert find(tmp_path / "file", "last").samefile(folder / BEST)
    (folder / BEST).unlink()
    assert find(tmp_path / "run", "best") == folder / LAST


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("auto", r"^resume=auto: file or folder not found\. Give a run folder or"),
        ("run", r"^resume=run: file or folder not found\. Did you mean resume=runs\? Give a run folder or"),
        ("runs/first", r": file or folder not found\."),
        ("broken", r": file or folder not found\."),
        ("loop", r": file or folder not found\."),
        ("runs", f"^resume=runs: it holds neither {NAMED} nor model.safetensors. Give a run folder"),
        ("", f"it holds neither {NAMED}"),
    ],
)
def test_path_without_a_checkpoint_is_one_error(tmp_path, monkeypatch, target, said):
    monkeypatch.chdir(tmp_path)
    for name in ("run10", "run2"):
        (tmp_path / "runs" / name / checkpoint.CHECKPOINT_FOLDER).mkdir(parents=True)
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for prefer in ("best", "last"):
        with pytest.raises(UserError, match=said):
            find(target, prefer)


def test_checkpoint_of_another_user_is_not_called_missing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(tmp_path / "file", {"x": torch.zeros(1)}, INFO)
    monkeypatch.setattr("dinoseg.utils.tensor_files.open_regular", refuse)
    assert_refused(lambda: read(tmp_path / "file"), "not a readable checkpoint", "Permission denied")


@pytest.mark.parametrize("reader", [read, checkpoint.outline])
def test_invalid_checkpoint_files_are_refused(tmp_path, reader):
    write(tmp_path / "whole", {"x": torch.zeros(1000)}, INFO)
    whole = (tmp_path / "whole").read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    del header["x"]
    header["model/x"] = {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
    too_long = json.dumps(header).encode()
    for content in (b"hello", whole[:-100], len(too_long).to_bytes(8, "little") + too_long):
        (tmp_path / "file").write_bytes(content)
        assert_refused(lambda: reader(tmp_path / "file"), "not a readable checkpoint")
    assert_refused(lambda: reader(tmp_path / "absent"), "No such file")


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ({}, {"score": "loss"}, "to loss of all images from miou of all images"),
        ({"val_images": 5}, {}, "to miou of all images from miou of 5 images"),
        ({"evaluate": "last"}, {}, "to miou of all images from the last validation"),
        ({}, {"evaluate": "last"}, "to the last validation"),
        ({"evaluate": "last"}, {"evaluate": "last", "score": "loss"}, "loss of all images.* from .*miou of all images"),
    ],
)
def test_changed_selection_restarts_patience_and_discards_best(caplog, before, after, change):
    before, after = ({"config": {"trainer": {"score": "miou", **trainer}}} for trainer in (before, after))
    assert drop_incomparable_score(Progress(9), before, after) == Progress(9) and not caplog.messages
    progress = Progress(9, best=0.5, best_infinite=1, best_step=3, stale=2)
    assert drop_incomparable_score(progress, before, before) == progress
    assert drop_incomparable_score(progress, before, after) == Progress(9)
    assert re.search(f"{change}.*; the previous best score is discarded", caplog.text)


@pytest.mark.parametrize(("fold", "typed", "is_same"), [(0, "best", False), (0, "last", True), (None, "best", True)])
def test_typing_other_weights_of_a_fold_discards_best(fold, typed, is_same):
    """The best.safetensors of a fold holds the last weights by default, whatever its best score."""
    default = "${dinoseg.evaluate:${oc.select:data.fold}}"
    before, after = (
        {"config": {"data": {"fold": fold}, "trainer": {"score": "miou", "evaluate": evaluate}}}
        for evaluate in (default, typed)
    )
    progress = Progress(9, best=0.5, best_step=3)
    for first, second in ((before, after), (after, before)):
        assert drop_incomparable_score(progress, first, second) == (progress if is_same else Progress(9))


def test_changed_inference_discards_best(caplog):
    config = {"trainer": {"score": "miou"}}
    before, after = ({"config": config, "choices": {"inference": option}} for option in ("whole", "windows"))
    assert drop_incomparable_score(Progress(9, best=0.5), before, after) == Progress(9)
    assert "to miou inference=windows of all images from miou inference=whole of all images" in caplog.text


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
    before = {"config": config}
    progress = Progress(9, best=0.5, best_step=3)
    found = drop_incomparable_score(progress, before, {"config": config | changed}, metric)
    assert found == (progress if is_same else Progress(9))
