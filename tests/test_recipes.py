"""Recipes that re-make a published project carry its numbers."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import SMALL, succeed, write_data
from config_files import options, read, required_overrides, written_choices
from finished_runs import rows
from omegaconf import OmegaConf
from tiny_parts import tiny_vit
from torch import nn

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.query_heads.eomt import EomtHead, annealing_windows
from dinoseg.methods.images import ImageTraining
from dinoseg.training.trainer import Settings

ADAM = {"optim.optimizer.lr": 1e-4, "optim.optimizer.weight_decay": 0.0, "optim.schedule.kind": "constant"}
SLOTS = {  # martius-lab/slotcontrast and martius-lab/videosaur, configs of these names
    **{"backbone.final_norm": False, "head.first_iterations": 3, "head.iterations": 2, "head.token_mlp": True},
    **{"head.norm_state": True, "head.weight_floor": 1e-8, "head.reference_init": True, "head.output_norm": False},
    **{"head.predictor": "transformer", "head.positions": "added", "head.mask_source": "alpha"},
    **{"head.decoder_dim": 1024, "data.clips.cut.length": 4, "data.clips.cut.sample": True, "trainer.clip": 0.05},
    **{"data.clips.eval_cut.length": None, "data.view.resample": "bicubic", "optim.schedule.kind": "exponential"},
    **{"optim.schedule.min_lr_ratio": 0.5, "optim.schedule.warmup_start": 0.0, "optim.optimizer.weight_decay": 0.0},
    **{"optim.optimizer.betas": [0.9, 0.999], "engine.precision": "fp32"},
    "trainer.evaluate": "last",
}
SLOT_CONTRAST = SLOTS | {
    **{"head.slot_init": "learned", "head.decoder": "mlp", "head.decoder_depth": 4, "data.batch_size": 64},
    **{"loss.criterion.factors": {"reconstruction": 1.0, "contrast": 0.5}, "data.view.flip": 0.5},
    **{"loss.criterion.terms.contrast.softmax_over": "previous", "loss.criterion.terms.contrast.temperature": 0.1},
    **{"resolution.crop": [336, 336], "data.clips.eval_square": 336, "optim.optimizer.lr": 4e-4},
    **{"head.slot_dim": 64, "head.hidden_dim": 256, "head.positions_grid": [24, 24], "trainer.steps": 100000},
    **{"optim.schedule.warmup": 2500 / 100000, "trainer.val_every": 2500},
}
VIDEOSAUR = SLOTS | {
    **{"head.hidden_dim": None, "head.slot_init": "gaussian", "head.variance_as_std": True, "head.similarity": True},
    **{"head.decoder": "slot_mixer", "head.similarity_of": "keys", "loss.criterion.terms.similarity.threshold": 0.0},
    **{"loss.criterion.terms.similarity.unmatched": "uniform", "data.batch_size": 128, "resolution.crop": [224, 224]},
    **{"optim.optimizer.lr": 1e-4 * 128 / 32, "optim.schedule.warmup": 2500 / 100000, "trainer.steps": 100000},
    **{"data.view.flip": 0.5, "trainer.val_every": 1000, "data.clips.eval_square": 224},
}
VIDEOSAUR_MOVI = VIDEOSAUR | {
    **{"head.slot_dim": 128, "head.initial_std": 128**-0.5, "head.mixer_blocks": 2, "head.decoder_depth": 5},
    **{"head.reconstruct": False, "head.positions_grid": [28, 28], "backbone.patch_size": 8},
    **{"loss.criterion.factors": {"similarity": 0.1}, "loss.criterion.terms.similarity.temperature": 0.075},
}
# `trainer.patience`: validations without a better score after which the originals stop: more than 5 (run_training.py of
# SAR-RARP), a fifth of 10 epochs (SCHISM's code/classes/Training.py with early_stopping_pytorch), 10
# (train_dinov3_idd_proper.py)
ORIGINALS = {
    "person_multiscale": ADAM
    | {"optim.optimizer.weight_decay": 1e-4, "data.batch_size": 8, "resolution.crop": [640, 640]}
    | {"data.augment.affine.degrees": 25, "data.augment.flip": 0.5, "data.augment.scale": [1, 1]}
    | {"data.augment.color.brightness": 0.2, "data.augment.color.saturation": 0, "optim.schedule.warmup": 0},
    "schism_linear": ADAM
    | {"resolution.crop": [224, 224], "resolution.scale": 560 / 224, "data.batch_size": 8, "trainer.epochs": 10}
    | {"adapter.rank": 32, "adapter.rslora": True, "adapter.bits": 4, "optim.schedule.warmup": 0}
    | {"data.augment.scale": [1, 1], "trainer.patience": 2, "trainer.val_every": None},
    "idd_m2f": {"optim.optimizer.lr": 1e-4, "optim.optimizer.weight_decay": 1e-4, "optim.schedule.kind": "cosine"}
    | {"optim.schedule.warmup": 0, "trainer.epochs": 20, "trainer.val_every": None, "trainer.patience": 10}
    | {"data.batch_size": 2, "trainer.clip": 1.0, "data.augment.scale": [1, 1]}
    | {f"data.augment.color.{part}": 0.3 for part in ("brightness", "contrast", "saturation")}
    | {"data.augment.color.hue": 0.1},
    "idd_m2f_no_object": {"trainer.patience": 10},
    "schism_cnn": {"trainer.patience": 2},
    "sarrarp_lora": ADAM
    | {"data.batch_size": 6, "trainer.epochs": 20, "trainer.val_every": 500, "trainer.patience": 6}
    | {"adapter.rank": 16, "adapter.targets": "all_linear", "adapter.dropout": 0.1, "optim.schedule.warmup": 0},
    "dinosavi_control": {"optim.optimizer.lr": 1e-4, "optim.schedule.warmup": 0.1, "data.batch_size": 16},
    "dinosavi_final": {"optim.optimizer.lr": 2e-4, "optim.schedule.warmup": 0.1, "trainer.clip": 0.05},
    "slotcontrast_movi_c": SLOT_CONTRAST | {"head.num_slots": 11, "backbone.arch.hidden_size": 384},
    "slotcontrast_movi_e": SLOT_CONTRAST
    | {"head.num_slots": 15, "head.slot_dim": 128, "head.hidden_dim": 512, "backbone.arch.hidden_size": 768}
    | {"trainer.steps": 300000, "optim.schedule.warmup": pytest.approx(2500 / 300000)},
    "slotcontrast_ytvis2021": SLOT_CONTRAST
    | {"head.num_slots": 7, "backbone.arch.hidden_size": 768, "data.view.flip": 0.0, "optim.optimizer.lr": 8e-4}
    | {"resolution.crop": [518, 518], "data.clips.eval_square": 518, "head.positions_grid": [37, 37]}
    | {"data.held_out": 300},
    "videosaur_movi_c": VIDEOSAUR_MOVI | {"head.num_slots": 11, "backbone.weights": "facebook/dino-vitb8"},
    "videosaur_movi_e": VIDEOSAUR_MOVI | {"head.num_slots": 15, "backbone.weights": "facebook/dino-vitb8"},
    "videosaur_ytvis2021": VIDEOSAUR
    | {"head.num_slots": 7, "head.slot_dim": 64, "head.initial_std": 64**-0.5, "head.mixer_blocks": 3}
    | {"head.decoder_depth": 4, "head.reconstruct": True, "head.positions_grid": [14, 14]}
    | {"backbone.weights": "facebook/dino-vitb16", "data.held_out": 300, "data.clips.eval_cut.length": 6}
    | {"loss.criterion.factors": {"reconstruction": 1.0, "similarity": 0.1}, "data.clips.cut.short": "skip"}
    | {"loss.criterion.terms.similarity.temperature": 0.25, "data.clips.eval_cut.step": None}
    | {"data.clips.eval_cut.short": "skip"},
}
COLOR = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5}  # in all of these codes
PROBE = {  # facebookresearch/dinov2 and dinov3, dinov3/eval/segmentation
    **{"resolution.crop": [512, 512], "data.batch_size": 16, "trainer.steps": 40000, "trainer.clip": None},
    **{"head.init": "normal", "head.layers": [-1], "loss.criterion.average": "all", "engine.precision": "fp32"},
    **{"data.augment.relative_to": "short", "data.augment.scale": [0.5, 2.0]},
    **{"data.augment.distribution": "uniform", "data.augment.cat_max_ratio": 0.75, "data.augment.flip": 0.5},
    **{"data.augment.padding": "end", "data.augment.fill": [124, 116, 104], "data.augment.color.additive": True},
    **{f"data.augment.color.{part}": value for part, value in COLOR.items()},
    **{"optim.optimizer.lr": 1e-3, "optim.optimizer.weight_decay_on": "all", "optim.optimizer.betas": [0.9, 0.999]},
    **{"inference.size": 512, "inference.stride": 341, "inference.shortest": 512, "inference.scales": [1.0]},
    **{"inference.weights": "uniform", "inference.average": "scores", "inference.flips": "none"},
}
DINOV3_PROBE = PROBE | {
    **{"head.dropout": 0.1, "optim.optimizer.weight_decay": 1e-3, "trainer.val_every": 5000},
    "trainer.evaluate": "best",
    **{"optim.schedule.kind": "one_cycle", "data.augment.color.hue": 0.5, "data.augment.color.space": "rgb"},
    **{"data.augment.resample": "antialias", "inference.resample": "antialias"},
}
DINOV2_PROBE = PROBE | {
    **{"head.dropout": 0.0, "optim.optimizer.weight_decay": 1e-4, "optim.schedule.warmup_decays": True},
    **{"optim.schedule.kind": "poly", "optim.schedule.power": 1.0},
    **{"data.augment.color.hue": 0.1, "data.augment.color.space": "hsv", "data.augment.resample": "bilinear"},
    "inference.resample": "bilinear",
    **{"trainer.val_every": 10000, "trainer.evaluate": "last"},
}
EOMT = {  # tue-mps/eomt: configs, training/mask_classification_*.py, datasets/transforms.py
    **{"data.batch_size": 16, "trainer.clip": 0.01, "trainer.ema": None, "trainer.evaluate": "last"},
    "adapter._target_": "dinoseg.models.adapters.Full",
    **{"head.blocks": 4, "head.no_object": True, "backbone.patch_size": 16},
    **{"loss.criterion.ignored": "background", "loss.criterion.no_object": 0.1, "loss.criterion.num_points": 12544},
    **{"loss.criterion.factors": {"class": 2.0, "mask": 5.0, "dice": 5.0}, "loss.criterion.interpolation": "bilinear"},
    **{"loss.criterion.oversample": 3.0, "loss.criterion.importance": 0.75},
    **{"data.augment.relative_to": "fit", "data.augment.distribution": "uniform", "data.augment.flip": 0.5},
    **{"data.augment.padding": "end", "data.augment.fill": [0, 0, 0], "data.augment.cat_max_ratio": None},
    "data.augment.resample": "antialias",
    **{"optim.optimizer.weight_decay": 0.05, "optim.optimizer.weight_decay_on": "all"},
    "optim.schedule.warmup_start": 0.0,
}
SEMANTIC = {
    **{"head.num_queries": 100, "data.augment.scale": [0.5, 2.0]},
    **{f"data.augment.color.{part}": value for part, value in COLOR.items()},
    **{"data.augment.color.additive": False, "data.augment.color.before_scaling": True, "data.augment.color.hue": 0.05},
    **{"inference.placement": "even", "inference.weights": "uniform", "inference.average": "scores"},
}
POLY = {"optim.schedule.kind": "poly", "optim.schedule.power": 0.9, "optim.optimizer.layer_decay_rule": "eomt"}
DINOV2 = POLY | {
    **{"backbone.weights_patch_size": 14, "backbone.arch.num_register_tokens": 4, "backbone.arch.hidden_size": 1024},
    **{"optim.optimizer.lr": 1e-4, "optim.optimizer.layer_decay": 0.8, "head.anneal": "even"},
}
DINOV3 = POLY | {
    **{"backbone.arch.pos_embed_rescale": 2.0, "backbone.arch.hidden_size": 1024},
    **{"optim.optimizer.lr": 2e-4, "optim.optimizer.layer_decay": None},
}
EOMT_DINOV2, EOMT_DINOV3 = EOMT | SEMANTIC | DINOV2, EOMT | SEMANTIC | DINOV3
COCO = EOMT | {
    **{"head.num_queries": 200, "data.augment.scale": [0.1, 2.0], "resolution.crop": [640, 640]},
    **{f"data.augment.color.{part}": 0 for part in ("brightness", "contrast", "saturation", "hue")},
    "data.unlabelled": "ignore",
}
PANOPTIC = COCO | {
    "task._target_": "dinoseg.extensions.objects.tasks.PanopticTask",
    **{"data.kind": "coco_panoptic", "trainer.steps": 12 * 7391, "trainer.val_every": 7391},
}
INSTANCE = COCO | {
    "task._target_": "dinoseg.extensions.objects.tasks.InstanceTask",
    **{"data.kind": "coco", "trainer.steps": 12 * 7329, "trainer.val_every": 2 * 7329},
    "head.anneal": [[14782, 29564], [29564, 44346], [44346, 59128], [59128, 73910]],
}
COCO_DINOV2 = DINOV2 | {"backbone.arch.num_hidden_layers": 24}
COCO_DINOV3 = DINOV3 | {"optim.optimizer.layer_decay": 0.8, "optim.optimizer.layer_decay_rule": "eomt_joint"}
STARTS_EARLY = {"head.anneal": [[0, 3000], [29564, 44346], [44346, 59128], [59128, 73910]]}
LONGER = COCO_DINOV3 | {  # DINOv3-S and B
    **{"head.blocks": 3, "head.anneal": [[0, 3000], [73910, 103474], [118256, 147820]]},
    **{"trainer.steps": 24 * 7391, "backbone.arch.num_hidden_layers": 12},
}
LARGER = {"resolution.crop": [1280, 1280]}
PMT = {  # tue-mps/pmt: image/configs, image/training/warmup_cosine_schedule.py
    **{"adapter._target_": "dinoseg.models.adapters.Frozen", "backbone.arch.pos_embed_rescale": None},
    **{"head.blocks": 6, "head.layers": [5, 11, 17, 23], "optim.schedule.kind": "cosine"},
    **{"optim.optimizer.lr": 2e-4, "optim.schedule.min_lr_ratio": 1e-9 / 2e-4, "backbone.arch.hidden_size": 1024},
}
PMT_COCO = PMT | {
    "head.anneal": [[0, 3000], [23651, 38433], [32520, 47302], [41389, 56171], [50258, 65040], [59128, 73910]]
}
OFFICIAL = {  # recipe: its numbers, and its warm-ups in steps
    **{f"linear_{data}": (DINOV3_PROBE, (1500, None)) for data in ("ade20k", "cityscapes", "voc")},
    **{f"linear_{data}_dinov2": (DINOV2_PROBE, (1500, None)) for data in ("ade20k", "cityscapes", "voc")},
    "eomt_ade20k": (
        EOMT_DINOV2 | {"trainer.steps": 31 * 1262, "resolution.crop": [512, 512], "inference.shortest": 512},
        (500, 1000),
    ),
    "eomt_cityscapes": (
        EOMT_DINOV2 | {"trainer.steps": 107 * 186, "resolution.crop": [1024, 1024], "inference.shortest": 1024},
        (500, 1000),
    ),
    "eomt_ade20k_dinov3": (
        EOMT_DINOV3
        | {"trainer.steps": 16 * 1262, "resolution.crop": [512, 512], "inference.size": 512}
        | {"head.anneal": [[0, 3000], [6520, 9780], [9780, 13040], [13040, 16300]]},
        (2000, 3000),
    ),
    "eomt_cityscapes_dinov3": (
        EOMT_DINOV3 | {"trainer.steps": 107 * 186, "resolution.crop": [1024, 1024], "inference.size": 1024},
        (round(19902 * 2000 / 20192), round(19902 * 3000 / 20192)),
    ),
    "pmt_ade20k_dinov3": (
        EOMT
        | SEMANTIC
        | PMT
        | {"optim.optimizer.layer_decay": None}
        | {"trainer.steps": 16 * 1262, "resolution.crop": [512, 512], "inference.size": 512}
        | {"head.anneal": [[0, 3000], [5384, 8749], [7403, 10769], [9422, 12788], [11442, 14807], [13461, 16826]]},
        (6000, None),
    ),
    "eomt_coco_panoptic": (PANOPTIC | COCO_DINOV2, (500, 1000)),
    "eomt_coco_panoptic_1280": (PANOPTIC | COCO_DINOV2 | LARGER, (500, 1000)),
    "eomt_coco_panoptic_dinov3": (PANOPTIC | COCO_DINOV3 | STARTS_EARLY, (2000, 3000)),
    "eomt_coco_panoptic_dinov3_1280": (PANOPTIC | COCO_DINOV3 | STARTS_EARLY | LARGER, (2000, 3000)),
    "eomt_coco_panoptic_dinov3_vits": (PANOPTIC | LONGER | {"backbone.arch.hidden_size": 384}, (2000, 3000)),
    "eomt_coco_panoptic_dinov3_vitb": (PANOPTIC | LONGER | {"backbone.arch.hidden_size": 768}, (2000, 3000)),
    "eomt_coco_instance": (COCO_DINOV2 | INSTANCE, (500, 1000)),
    "eomt_coco_instance_1280": (COCO_DINOV2 | INSTANCE | LARGER, (500, 1000)),
    "eomt_coco_instance_dinov3": (COCO_DINOV3 | INSTANCE, (2000, 3000)),
    "eomt_coco_instance_dinov3_1280": (COCO_DINOV3 | INSTANCE | LARGER, (2000, 3000)),
    "pmt_coco_panoptic": (PANOPTIC | PMT_COCO, (6000, None)),
    "pmt_coco_panoptic_1280": (PANOPTIC | PMT_COCO | LARGER, (6000, None)),
    **{
        f"pmt_coco_panoptic_{size}": (
            PANOPTIC | PMT_COCO | {"head.layers": [2, 5, 8, 11], "backbone.arch.hidden_size": width},
            (6000, None),
        )
        for size, width in (("vits", 384), ("vitb", 768))
    },
    "pmt_coco_instance": (INSTANCE | PMT_COCO | {"trainer.val_every": 7329}, (6000, None)),
    "pmt_coco_instance_1280": (INSTANCE | PMT_COCO | {"trainer.val_every": 7329} | LARGER, (6000, None)),
}

# the recipes of a family have most of their numbers in common
FAMILY = (
    *("slotcontrast_movi_c", "slotcontrast_ytvis2021", "videosaur_movi_c", "videosaur_movi_e", "idd_m2f_no_object"),
    *("linear_cityscapes", "linear_voc", "linear_cityscapes_dinov2", "linear_voc_dinov2"),
    *("eomt_cityscapes", "eomt_cityscapes_dinov3"),
    *(name for name in OFFICIAL if "_coco_" in name and name not in ("eomt_coco_panoptic_dinov3", "pmt_coco_instance")),
)


def mark_families(recipes):
    """Return the names of recipes, all but one of each family marked as heavy."""
    return [pytest.param(name, marks=pytest.mark.heavy if name in FAMILY else ()) for name in recipes]


@pytest.mark.parametrize("hparam", mark_families(ORIGINALS))
def test_a_recipe_carries_the_numbers_of_its_original(compose, hparam):
    cfg = compose(f"hparam={hparam}", *required_overrides(written_choices(hparam)))
    wanted = ORIGINALS[hparam]
    assert {key: OmegaConf.select(cfg, key) for key in wanted} == wanted


@pytest.mark.parametrize("hparam", mark_families(OFFICIAL))
def test_a_recipe_has_the_numbers_of_an_official_one(compose, hparam):
    cfg = compose(f"hparam={hparam}", *required_overrides(written_choices(hparam)))
    wanted, warmups = OFFICIAL[hparam]
    found = {key: OmegaConf.select(cfg, key) for key in wanted}
    assert {key: to_plain(value) for key, value in found.items()} == wanted
    shares = cfg.optim.schedule.warmup, cfg.optim.schedule.backbone_warmup
    assert tuple(share and round(share * cfg.trainer.steps) for share in shares) == warmups


def to_plain(value):
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def test_annealing_of_eomt_is_even_as_in_its_configurations():
    """`even` gives the published steps, all of them multiples of a sixth of the training, to a step."""
    published = {
        "eomt_ade20k": [[6520, 13040], [13040, 19560], [19560, 26080], [26080, 32600]],
        "eomt_cityscapes": [[3317, 6634], [6634, 9951], [9951, 13268], [13268, 16585]],
    }
    for hparam, windows in published.items():
        steps = OFFICIAL[hparam][0]["trainer.steps"]
        for ours, theirs in zip(annealing_windows("even", 4), windows, strict=True):
            assert all(abs(share * steps - step) <= 2 for share, step in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "hparam",
    [
        "linear_ade20k",
        pytest.param("linear_voc_dinov2", marks=pytest.mark.heavy),
        pytest.param("eomt_cityscapes", marks=pytest.mark.heavy),
        "eomt_ade20k_dinov3",
        "pmt_ade20k_dinov3",
    ],
)
def test_official_recipes_train_and_validate(tmp_path, hparam):
    """Two steps and two validations on small images, with a small backbone: one recipe of each kind."""
    write_data(tmp_path / "data")
    own = ["adapter=frozen", "inference.stride=32"] if "linear" in hparam else ["loss.criterion.num_points=40"]
    own += ["head.layers=quarters"] if "pmt" in hparam else []
    words = [*SMALL, "backbone.arch.num_hidden_layers=4", "resolution.crop=[48,48]", "inference.size=48", *own]
    words += ["inference.shortest=48", "trainer.val_every=1", "trainer.save_every=null", "engine.precision=fp32"]
    succeed(tmp_path, "mode=train", f"hparam={hparam}", *words, "mode.metrics_only=true", "hydra.run.dir=run")
    assert sum("val/miou" in row for row in rows(tmp_path, "run")) >= 2


@pytest.mark.parametrize(("option", "side"), [("dino", 480), ("dinov2", 60 * 14), ("dinov3", 60 * 16)])
def test_label_propagation_runs_as_published(compose, option, side):
    cfg = compose("mode=eval", f"hparam=davis2017_{option}", "data.root=.")
    assert (cfg.tracker.short_side, cfg.data.year, cfg.engine.precision) == (side, 2017, "fp32")
    assert OmegaConf.select(cfg, "backbone.std") == ([0.228, 0.224, 0.225] if option == "dino" else None)
    assert (cfg.tracker.temperature, cfg.tracker.top_k) == (0.1 if option == "dino" else 0.2, 5)


def test_precision_of_official_evaluations_is_float32(compose):
    """But for the backbone and the sums over queries of Meta's segmentor, which are bfloat16."""
    cfg = compose("mode=eval", "hparam=ade20k_m2f", "data.root=.", "head.weights=FILE")
    assert cfg.engine.precision == "fp32" and cfg.head.backbone_in_bfloat16 and cfg.head.scores_in_bfloat16
    assert not compose("hparam=idd_m2f", "head.weights=FILE").head.backbone_in_bfloat16


def test_no_recipe_warms_up_for_a_number_of_steps():
    seen = 0
    for hparam in options("hparam"):
        schedule = read("hparam", hparam).get("optim", {}).get("schedule", {})
        seen += "warmup" in schedule
        assert schedule.get("warmup", 0) == 0 or isinstance(schedule["warmup"], float), hparam
    assert seen >= 10


def test_rates_come_from_head_and_adapter_unless_one_is_set(compose):
    cfg = compose("head=dpt", "adapter=lora")
    assert (cfg.optim.optimizer.lr, cfg.optim.optimizer.head_lr) == (None, read("head", "dpt")["lr"])
    assert cfg.optim.optimizer.backbone_lr == read("adapter", "lora")["lr"]
    assert compose("head=mlp", "head.lr=7e-4").optim.optimizer.head_lr == 7e-4
    for head in options("head"):
        base = next((entry for entry in read("head", head).get("defaults", []) if entry != "_self_"), head)
        assert read("head", base)["lr"] > 0, head


def test_own_head_or_adapter_needs_no_rate(compose):
    assert compose("~head").optim.optimizer.head_lr == 1e-3
    assert compose("~adapter").optim.optimizer.backbone_lr == 1e-4


@pytest.fixture
def log_start(compose, caplog):
    """Return a function that logs the start of a training of 2 steps with a head of this annealing."""

    def log(*words, anneal="even"):
        caplog.clear()
        model = nn.Module()
        model.backbone = tiny_vit()
        model.head = EomtHead(24, 1, 3, patch_size=8, blocks=1, anneal=anneal)
        training = ImageTraining(Builder(compose("head=eomt", "data=camvid", "data.root=.", *words)))
        training.out_dir, training.model = Path("run"), model
        training.data_module, training.optimizer = SimpleNamespace(train=[], val=[]), SimpleNamespace(param_groups=[])
        training.engine = SimpleNamespace(device="cpu", precision="fp32", world_size=1, is_main=True)
        training.settings = Settings(steps=2, val_every=1)
        with caplog.at_level(logging.WARNING):
            training.log_start()
        return caplog.text

    return log


def test_sizes_that_do_not_suit_are_reported(log_start):
    resized = "data.augment.relative_to=short"
    message = f"{resized} trains on resized images, but validation and inference do not resize. Set inference=windows"
    assert message in log_start(resized)
    assert not log_start(resized, "inference=windows", "inference.size=48", "inference.shortest=48")
    assert not log_start(resized, "inference=letterbox", "inference.size=48")


@pytest.mark.parametrize(("end", "count"), [(30, 1), (2, 0)])
def test_annealing_beyond_the_training_is_reported(log_start, end, count):
    message = "The head's anneal removes attention masks until step 30, but the training has 2 steps"
    assert log_start(anneal=[[0, end]]).count(message) == count
