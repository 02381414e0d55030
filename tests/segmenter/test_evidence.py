"""What a file says of its scores, its data and where its backbone's weights come from."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.segmenter import write
from dinoseg.segmenter.runtime import Options
from dinoseg.segmenter.segmenter import _weights
from dinoseg.segmenter.write import COUNTED, data_of, scores_of, source_of
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError

SCORES = {"miou": 0.5, "dice": None, "pixels": 9, "ci95": {"miou": [0.4, 0.6]}}
SCORES["classes"] = [{"iou": 0.25}, {"iou": None}]
OFFICIAL = {"protocol": "p", "scores": {"s": 1}, "ci95": {"s": [0, 1]}, "n": 3}


@pytest.fixture
def best(tmp_path):
    """A checkpoint, older than the evaluation beside it."""
    path = tmp_path / "run/checkpoints/best.safetensors"
    write_text(tmp_path / "run/evaluation/scores.json", json.dumps(SCORES))
    write_text(path, "")
    os.utime(path, (1, 1))
    return path


def write_evaluation(folder, of):
    write_text(folder / "scores.json", json.dumps(SCORES))
    (folder / "config").mkdir()
    OmegaConf.save({"resume": str(of), "mode": {"split": "test"}}, folder / "config/config.yaml")
    return str(folder)


def test_scores_belong_to_the_training_that_saved_the_checkpoint(best):
    found = scores_of(best, ("dark", "bright"), None)
    assert found["split"] == "val" and found["protocol"] == COUNTED and found["ci95"] == {"miou": [0.4, 0.6]}
    assert found["values"] == {"miou": 0.5, "dice": None, "accuracy": None, "mean_accuracy": None}
    assert found["per_class"] == {"dark": 0.25, "bright": None} and "official" not in found
    assert scores_of(best.with_stem("last"), (), None) is None
    assert scores_of(best.parents[1] / "elsewhere" / best.name, (), None) is None
    os.utime(best.parents[1] / "evaluation/scores.json", (0, 0))
    assert scores_of(best, (), None) is None


def test_scores_of_another_checkpoint_are_refused(best, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_evaluation(tmp_path / "scored", "run/../run/checkpoints/best.safetensors")
    assert scores_of(best, (), folder)["split"] == "test"
    (tmp_path / "scored/official_scores.json").write_text(json.dumps(OFFICIAL))
    official = scores_of(best, (), folder)["official"]
    assert official == {"unit": None, "rules": None, "interval": None} | OFFICIAL
    other = write_evaluation(tmp_path / "other", best.with_stem("last"))
    assert_refused(lambda: scores_of(best, (), other), "belong to ", "last.safetensors, not to ", "best.safetensors")
    OmegaConf.save(
        {"resume": f"elsewhere/{best.name}", "mode": {"split": "test"}}, tmp_path / "other/config/config.yaml"
    )
    assert_refused(lambda: scores_of(best, (), other), "belong to elsewhere/best.safetensors, not to ")
    OmegaConf.save({"resume": None, "mode": {"name": "train"}}, tmp_path / "other/config/config.yaml")
    assert_refused(lambda: scores_of(best, (), other), "other is not a run folder of mode=eval with scores")
    os.utime(tmp_path / "scored/scores.json", (0, 0))
    assert_refused(lambda: scores_of(best, (), folder), "scores are older than ", "best.safetensors")
    (tmp_path / "scored/scores.json").write_text("{}")
    assert_refused(lambda: scores_of(best, (), folder), "export.scores=", "is not a run folder of mode=eval")


def test_data_is_described_by_counts_and_a_hash_of_names(best):
    split = best.parents[1] / "split.json"
    assert data_of(best, "mine") == {"name": "mine"}
    split.write_text('{"train": ["a", "b"]}')
    digest = hashlib.sha256(b'["a", "b"]').hexdigest()
    assert data_of(best, "mine") == {"name": "mine", "train": {"count": 2, "names_sha256": digest}}


@pytest.mark.parametrize(
    ("option", "backbone", "expected"),
    [
        ("dinov3_vits16", {"weights": "ours/Copy@1.0"}, ("ours/Copy", "1.0", "DINOv3 License", True)),
        ("mine", {"weights": "/home/me/DINOv3_vits.pth"}, ("DINOv3_vits.pth", None, "DINOv3 License", True)),
        ("mine", {"weights": "facebook/dinov2-small"}, ("facebook/dinov2-small", None, "Apache-2.0", False)),
        ("tiny_dinov3", {"weights": "dinoseg:tiny"}, ("dinoseg:tiny", None, "Apache-2.0", False)),
        ("dinov3_vits16", {"weights": "random"}, ("random", None, "its trainer's own", False)),
        ("rgb", {}, (None, None, "its trainer's own", False)),
        ("timm", {"weights": "who/knows", "name": "resnet"}, ("who/knows", None, "unknown", False)),
    ],
)
def test_licence_of_weights_follows_from_their_name(option, backbone, expected):
    found = source_of({"backbone": backbone, "choices": {"backbone": option}}, "abc")
    assert tuple(found[key] for key in ("weights", "revision", "licence", "gated")) == expected
    assert found["hash"] == "abc" and found["name"] == ("timm resnet" if option == "timm" else option)


def test_a_folder_of_a_hub_ids_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook/dinov2-small@main").mkdir(parents=True)
    found = source_of({"backbone": {"weights": "facebook/dinov2-small@main"}, "choices": {"backbone": "x"}}, "")
    assert found["weights"] == "dinov2-small@main" and found["revision"] is None


def test_exported_config_holds_no_local_path():
    data = {"classes": ["/road"], "group": "/video"}  # names, though they look like paths
    config = {"a": "~/x/y.pth", "b": ["./z", "../q/r", "plain/z"], "c": "/home/me/w", "data": data}
    assert write._strip_folders(config) == {"a": "y.pth", "b": ["z", "r", "plain/z"], "c": "w", "data": data}


def test_foreign_head_is_not_exported_by_default():
    with pytest.raises(UserError, match="weights of the head head.pth"):
        write._check_licence({"gated": False}, "head.pth", ["model/head.classify.weight"])
    write._check_licence({"gated": False}, "head.pth", ["model/backbone.norm.weight"])


def test_weights_that_are_given_are_those_of_their_part():
    said = {"config": {"backbone": {"weights": "a"}, "head": {"weights": "b"}}}
    assert _weights(Path("f"), said, Options(head="h")) == {"head.weights": "h"}
    assert _weights(Path("f"), said, Options(backbone="b", head="h")) == {"backbone.weights": "b", "head.weights": "h"}
