"""Each key of a training changes the run, its files, its log, or is refused by name."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from command_line import SMALL, call, write_data
from safetensors import safe_open

from dinoseg.utils.images import write_png

BASE = (
    "mode=train",
    *(word for word in SMALL if not word.startswith(("adapter=", "data.root="))),
    *("adapter=lora", "head=linear", "trainer.val_every=2", "trainer.log_every=1", "logger=[]"),
    *("mode.metrics_only=true", "mode.report=false", "mode.pictures=0", "hydra.run.dir=run"),
)
ALONE = """
    seed=1 resume=nowhere init=nowhere cache_dir=elsewhere
    resolution.crop=[24,32] resolution.scale=0.5 resolution.longest=24
    head.lr=0.1 head.layers=[0] head.dropout=0.5 head.init=normal
    adapter.lr=0.1 adapter.rank=4 adapter.dropout=0.5 adapter.targets=all_linear adapter.rslora=true
    adapter.blocks=1 adapter.bits=4
    backbone.family=nowhere backbone.weights=nowhere.safetensors backbone.patch_size=16 backbone.weights_patch_size=16
    backbone.mean=[0.1,0.1,0.1] backbone.std=[0.1,0.1,0.1] backbone.channel_weights=[1,1,0.5] backbone.dtype=bfloat16
    backbone.final_norm=false backbone.arch.num_register_tokens=0 backbone.arch.layerscale_value=0.5
    backbone.arch.pos_embed_rescale=2.0 backbone.arch.hidden_size=48 backbone.arch.num_hidden_layers=3
    backbone.arch.num_attention_heads=2 backbone.arch.intermediate_size=24
    data.channels=4 data.ignore_index=1 data.root=nowhere data.views=1 data.labelled=0.5 data.batch_size=4 data.fold=1
    data.folds=2 data.cache=packed data.group='^(.)' data.classes=[a,b]
    data.augment.color.brightness=0.4 data.augment.color.contrast=0.4 data.augment.color.saturation=0.4
    data.augment.color.hue=0.4 data.augment.scale=[1,1] data.augment.relative_to=fit data.augment.distribution=uniform
    data.augment.resample=bilinear data.augment.cat_max_ratio=0.5 data.augment.affine.degrees=20
    data.augment.affine.translate=0.2 data.augment.affine.shear=10 data.augment.flip=0 data.augment.padding=end
    data.augment.fill=[0,0,0]
    data.reader.layout.images=nowhere data.reader.layout.masks=nowhere data.reader.layout.image_suffix=x
    data.reader.layout.mask_suffix=x data.reader.layout.exclude=['0'] data.reader.masks.reduce_zero_label=true
    data.reader.partition.by=fraction data.reader.partition.lists={train:nowhere}
    inference.flips=horizontal inference.scales=[0.5,1.0] inference.min_region=400
    inference.largest_component=[bright]
    engine.device=mps engine.precision=bf16 engine.devices=0 engine.sharding=fsdp
    loss.weights={bright:3} loss.criterion.label_smoothing=0.1 loss.criterion.hard_fraction=0.5
    optim.optimizer.lr=0.1 optim.optimizer.weight_decay=0.5 optim.optimizer.weight_decay_on=all
    optim.optimizer.betas=[0.5,0.9] optim.schedule.warmup=0.5
    trainer.steps=3 trainer.epochs=1 trainer.val_every=1 trainer.save_every=1 trainer.max_minutes=1e-6
    trainer.val_images=1 trainer.log_every=2 trainer.accumulate=2 trainer.clip=1e-6 trainer.ema=0.5
    mode.metrics_only=false mode.pictures=1 mode.report=true mode.resume_from=best
""".split()
WINDOWS = "inference.memory=1e-9 resolution.crop=[24,24]"
FRACTION = " ".join(
    f"data.reader.{word}"
    for word in ("partition.by=fraction", "layout.images=train/images", "layout.masks=train/masks")
)
CACHED = "adapter=frozen data.views=1 engine.cache=disk"
LONGER = "trainer.steps=4 trainer.val_every=1"
BESIDE = (  # the last word has an effect beside the others
    "data.root=BROKEN data.on_error=skip",
    "data.root=SIZES data.reader.masks.on_size_mismatch=resize_mask",
    f"{FRACTION} data.reader.partition.val_fraction=0.5",
    f"{FRACTION} data.reader.partition.val_fraction=0.5 data.reader.partition.seed=1",
    "resolution.crop=[24,24] inference.memory=1e-9",
    f"{WINDOWS} inference.overlap=0.6",
    f"{WINDOWS} inference.stride=[8,8]",
    f"{WINDOWS} inference.placement=even",
    f"{WINDOWS} inference.weights=uniform",
    f"{CACHED} engine.cache=off",
    f"{CACHED} features.dtype=int8",
    f"{CACHED} features.gib=1e-9",
    "data.augment.scale=[0.6,0.6] loss.criterion.average=all",
    "adapter=full optim.optimizer.backbone_lr_scale=0.1",
    "adapter=full optim.optimizer.freeze_backbone_until=0.5",
    "adapter=full optim.optimizer.layer_decay=0.5",
    "adapter=full optim.optimizer.layer_decay=0.5 optim.optimizer.layer_decay_rule=dinov2",
    "adapter=full optim.schedule.backbone_warmup=2",
    f"{LONGER} optim.schedule.kind=constant",
    f"{LONGER} optim.schedule.min_lr_ratio=0.5",
    f"{LONGER} optim.schedule.kind=poly optim.schedule.power=0.1",
    f"{LONGER} optim.schedule.warmup=2 optim.schedule.warmup_decays=true",
    "optim.schedule.warmup=2 optim.schedule.warmup_start=0.5",
    "trainer.steps=8 trainer.val_every=1 head.lr=1e-12 adapter.lr=1e-12 trainer.patience=1",
    f"{LONGER} trainer.evaluate=last",
)
ELSEWHERE = {  # keys whose effect other tests see
    "trust": "weights of checkpoints",
    "backbone.checkpointing": "memory",
    "data.workers": "number of threads",
    "engine.eval_batch_size": "number of images in a pass",
    "engine.workers": "number of loading processes",
    "engine.rendezvous_timeout": "several ranks",
    "engine.rank_timeout": "several ranks",
    "engine.tf32": "GPUs",
    "engine.compile": "compiled blocks",
    "inference.batch_size": "number of windows in a pass",
    "mode.paths": "paths that do not exist",
}


def leaves(node, path=""):
    """Yield the full name of each key that a user may set; interpolations repeat another one."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        elif not key.startswith("_") and not re.fullmatch(r"\$\{.*\}", str(value)):
            yield f"{path}{key}"


def key_of(line):
    return line.split()[-1].partition("=")[0]


def test_every_key_of_a_training_is_tried(tmp_path):
    done = call(tmp_path, *BASE, "data.root=data", "--cfg", "job")
    keys, tried = {*leaves(yaml.safe_load(done.out))}, {*map(key_of, (*ALONE, *BESIDE))}
    keys.add("trainer.evaluate")  # an interpolation, since its default depends on data.fold
    assert keys == tried | ELSEWHERE.keys() and not tried & ELSEWHERE.keys()
    assert len(keys) <= 134


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Return a folder with images: whole ones, some of which one is broken, and some with masks of another size."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("data", "BROKEN", "SIZES"):
        write_data(folder / name)
    (folder / "BROKEN/train/images/0.png").write_bytes(b"no image")
    write_png(folder / "SIZES/train/masks/0.png", np.zeros((16, 24), np.uint8))
    return folder


OBSERVED = {}


def observe(where, words):
    """Return what a training with these words leaves: weights, numbers, names of files, and log without times."""
    if words not in OBSERVED:
        folder = where / f"run_{len(OBSERVED)}"
        folder.mkdir()
        root = next((word for word in words if word.startswith("data.root=")), "data.root=data")
        moved = f"data.root={where}/{root.partition('=')[2]}"
        done = call(folder, *BASE, *(word for word in words if word != root), moved)
        OBSERVED[words] = done, results_of(folder)
        shutil.rmtree(folder)
    return OBSERVED[words]


def results_of(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "config" not in path.parts)
    files = {re.sub(r"[0-9a-f]{12,}", "HASH", name) for name in files}
    rows = [json.loads(line) for path in folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
    numbers = [
        {key: value for key, value in row.items() if not re.search("time|_s$|/s|seconds|speed|memory|gib", key)}
        for row in rows
    ]
    weights = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {f"{path.name} {key}": file.get_tensor(key).float().sum().item() for key in file.keys()}
    logs = "".join(path.read_text() for path in folder.rglob("run.log"))
    return files, numbers, weights, re.sub(r"[0-9:.,]+( ?(s|ms|MiB|GiB|images/s|h|min)\b)?", "", logs)


@pytest.mark.heavy
@pytest.mark.parametrize("line", [*ALONE, *BESIDE], ids=key_of)
def test_a_key_of_a_training_has_an_effect(where, line):
    *beside, word = line.split()
    base, left = observe(where, tuple(beside))
    assert base.status == 0 or "data.on_error" in word or "size_mismatch" in word, base.err
    done, changed = observe(where, (*beside, word))
    group, _, name = key_of(line).rpartition(".")
    assert changed != left if done.status == 0 else name in done.err or group in done.err, done.err
    assert "Traceback" not in done.err
