"""Two ranks on a CPU train, score and keep what one process would; BatchNorm's statistics are the first rank's."""

import os
from functools import partial

import pytest
import test_training_maps as with_maps
import torch
from omegaconf import OmegaConf
from small_trainings import Stripes, segmenter, train_model

from dinoseg.cli import ranks
from dinoseg.data.transforms import Augment
from dinoseg.extensions.feature_cache.choice import CacheOptions, feature_cache
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.lovasz import Lovasz
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.metrics import BoundaryIoU, SurfaceDice
from dinoseg.models.adapters import Frozen, Full, Lora
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.training.checkpoint import read
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.loading import load_weights
from dinoseg.training.optim import parameter_groups, schedule
from dinoseg.training.sharding import gather_tensors
from dinoseg.training.validation import evaluate

pytestmark = pytest.mark.heavy

WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
TERMS = {"ce": CrossEntropy, "focal": partial(Focal, gamma=1.0), "lovasz": partial(Lovasz, per_image=True)}
MIXTURE = WeightedSum(TERMS, {"ce": 1.0, "focal": 2.0, "lovasz": 0.5}, WEIGHTS)
MLP = partial(MlpHead, 24, 1, 3, 8)
CASES = {  # without a head: a linear one, with BatchNorm
    "weighted": {"head": MLP},
    "normalised": {"accumulate": 2},
    "averaged": {"ema": 0.5},
    "shared": {"head": MLP, "sharding": "fsdp", "accumulate": 2, "clip": 0.1, "ema": 0.5},
    "shared_lora": {
        **{"head": MLP, "sharding": "fsdp", "dtype": "bfloat16"},
        "adapter": partial(Lora, rank=2, alpha=2, targets="attention"),
    },
    "detailed": {"head": partial(DetailHead, 24, 1, 3, 8, 4, 8, 1, jitter=0, linear_skip=True), "steps": 1},
    "kept": {"head": MLP, "adapter": Frozen, "cache": "disk"},
    "rested": {"head": MLP, "begin": 0.5, "accumulate": 2},
    "shared_rested": {"head": MLP, "begin": 0.5, "sharding": "fsdp", "ema": 0.5},
    # one image to validate: the second rank has none
    "stopped": {"head": MLP, "sharding": "fsdp", "adamw": True, "ema": 0.5, "val": 1},
}
CASES["mixed"] = CASES["weighted"] | {"accumulate": 2, "loss": lambda: MIXTURE}
ALONE = {"sharding": "none"}
OUTLINES = ("val/boundary_iou", "val/nsd")


class Uneven(Stripes):
    """Stripes that grow darker, with fewer and fewer labels."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["mask"][:, : 5 * index] = 255
        return sample | {"image": sample["image"] // (1 + index)}


def train(
    folder,
    *,
    head=None,
    sharding="none",
    adapter=Full,
    dtype="float32",
    val=5,
    adamw=False,
    start=None,
    cache="off",
    batch_size=4,
    begin=0.0,
    loss=lambda: CrossEntropy(WEIGHTS),
    **options,
):
    """Train with plain SGD, which hides no factor of the gradient, and return what this rank has of it."""
    engine = Engine("cpu", "fp32", workers=0, sharding=sharding, cache=cache)
    model = engine.place(segmenter(head, adapter, dtype=dtype))
    sets = (Uneven([(24, 32)] * 6), Uneven([(24, 32)] * val))
    order = {"batch_size": batch_size, "seed": 0, "workers": 0, "rank": engine.rank, "world_size": engine.world_size}
    order["metrics"] = [BoundaryIoU(), SurfaceDice()]
    data_module = ImageDataModule(*sets, Augment((24, 32)), **order, views=None if cache == "off" else 1)
    plan = CacheOptions(folder / "cache", 3.0, "", {}, dtype="float32")
    data_module.cache = feature_cache(data_module, model, engine, plan)
    groups = parameter_groups(model, lr=0.01 if adamw else 0.05, weight_decay=0.0, freeze_backbone_until=begin)
    parts = {"engine": engine, "loss": loss(), "schedule": schedule("constant"), "writes": engine.is_main}
    parts["optimizer"] = torch.optim.AdamW(groups, fused=True) if adamw else torch.optim.SGD(groups)
    settings = {
        "score": "loss",
        "steps": 3,
        "val_every": 3,
        "clip": None,
        "start": start and read(start),
        **options,
    }
    done = train_model(model, data_module, folder, **parts, **settings)
    names = ("step", "train/loss", "train/gradient_norm", "train/miou", "val/loss", "val/miou", *OUTLINES)
    rows = [{name: row[name] for name in names if name in row} for row in done.rows]
    state = gather_tensors(model.state_dict().items(), keep=True)
    return {"rows": rows, "state": state, "best": done.progress.best}


def in_rank(cfg, *, out_dir):
    """Stand for a mode: train each case, and keep what each rank has of it."""
    done = {name: train(out_dir / name, **options) for name, options in CASES.items()}
    start = out_dir / "stopped/last.safetensors"
    done["gone on"] = train(out_dir / "gone_on", **CASES["stopped"], start=start, steps=5)
    for cache in ("off", "disk"):
        done[f"maps {cache}"] = with_maps.train(out_dir / f"maps_{cache}", cache=cache, accumulate=2)
    torch.save(done, out_dir / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a folder of runs and what either rank has of them."""
    folder = tmp_path_factory.mktemp("ranks")
    mode = {"_target_": "test_two_ranks.in_rank", "_partial_": True, "keeps_folder": False}
    ranks.run_ranks(OmegaConf.create({"mode": mode, "choices": {"mode": "test"}}), folder, 2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def assert_close(one, other, **tolerance):
    """Compare the rows and weights of two trainings."""
    for expected, found in zip(one["rows"], other["rows"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(other["state"], one["state"], **tolerance)


@pytest.mark.parametrize("case", ["weighted", "mixed", "shared", "shared_lora", "kept", "rested", "shared_rested"])
def test_losses_gradients_and_weights_are_those_of_one_process(pair, tmp_path, case):
    """Labels are weighted, and the ranks have an unequal number of them."""
    alone = train(tmp_path, **CASES[case] | ALONE)
    for rank in pair[1]:
        assert len(rank[case]["rows"]) == 4 and all(name in rank[case]["rows"][-1] for name in OUTLINES)
        assert_close(alone, rank[case], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_two_ranks_train_with_maps_as_one_process_does(pair, tmp_path, cache):
    alone = with_maps.train(tmp_path, cache=cache, accumulate=2)
    for rank in pair[1]:
        assert rank[f"maps {cache}"] == pytest.approx(alone, rel=1e-4)


def test_ranks_keep_features_in_one_place(pair):
    files = list((pair[0] / "kept/cache").rglob("*.features"))
    assert len(files) == 6 + 5 and len({path.parent for path in files}) == 1


def test_two_ranks_save_the_weights_of_one_process_and_resume(pair, tmp_path):
    folder = pair[0]
    file = folder / "stopped/last.safetensors"
    train(tmp_path / "stopped", **CASES["stopped"] | ALONE)
    kept = read(file).tensors
    own = read(tmp_path / "stopped/last.safetensors").tensors
    assert kept.keys() == own.keys() and any(name.startswith("ema/") for name in kept)
    torch.testing.assert_close(kept, own, atol=1e-5, rtol=1e-3)
    alone = train(tmp_path / "gone_on", **CASES["stopped"] | ALONE, start=file, steps=5)
    for rank in pair[1]:
        assert len(rank["gone on"]["rows"]) == 3
        assert_close(alone, rank["gone on"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", ["normalised", "averaged"])
def test_batchnorm_model_is_scored_as_saved(pair, case):
    folder, (first, second) = pair[0], (rank[case] for rank in pair[1])
    assert first["best"] == second["best"] and first["rows"] == second["rows"]
    model = segmenter()
    load_weights(model, read(folder / case / "best.safetensors"))
    scores = evaluate(model, Uneven([(24, 32)] * 5), Engine("cpu", "fp32"), loss=CrossEntropy(WEIGHTS))
    assert scores["loss"] == pytest.approx(first["best"], rel=1e-6)


def test_batchnorm_on_cpu_ranks_equals_micro_batches(pair, tmp_path):
    parts = train(tmp_path, **CASES["detailed"], batch_size=2, accumulate=2)
    whole = train(tmp_path / "whole", **CASES["detailed"])
    for rank in pair[1]:
        learnt, scored = rank["detailed"]["rows"]
        assert learnt["train/loss"] == pytest.approx(parts["rows"][0]["train/loss"], rel=1e-6)
        assert learnt["train/gradient_norm"] == pytest.approx(parts["rows"][0]["train/gradient_norm"], rel=1e-5)
        assert learnt["train/loss"] != pytest.approx(whole["rows"][0]["train/loss"], rel=1e-4)
        for name, _ in segmenter(CASES["detailed"]["head"]).named_parameters():
            torch.testing.assert_close(rank["detailed"]["state"][name], parts["state"][name], atol=1e-6, rtol=1e-4)


def test_running_statistics_are_saved_from_the_first_rank(pair):
    folder, (first, second) = pair[0], (rank["normalised"]["state"] for rank in pair[1])
    saved = read(folder / "normalised/last.safetensors").part("model")
    for name in saved:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], saved[name]), name
    assert not torch.equal(first["head.norm.running_mean"], torch.zeros(24)), "they have been learnt"
