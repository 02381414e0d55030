"""Recipes that re-make a published project carry its numbers."""

import pytest
from config_files import needed, options, read, written_choices
from omegaconf import OmegaConf

ADAM = {"optim.optimizer.lr": 1e-4, "optim.optimizer.weight_decay": 0.0, "optim.schedule.kind": "constant"}
SLOTS = {  # martius-lab/slotcontrast and martius-lab/videosaur, configs of these names
    **{"backbone.final_norm": False, "head.first_iterations": 3, "head.iterations": 2, "head.token_mlp": True},
    **{"head.norm_state": True, "head.weight_floor": 1e-8, "head.reference_init": True, "head.output_norm": False},
    **{"head.predictor": "transformer", "head.positions": "added", "head.mask_source": "alpha"},
    **{"head.decoder_dim": 1024, "data.clips.cut.length": 4, "data.clips.cut.sample": True, "trainer.clip": 0.05},
    **{"data.clips.eval_cut.length": None, "data.view.resample": "bicubic", "optim.schedule.kind": "exponential"},
    **{"optim.schedule.min_lr_ratio": 0.5, "optim.schedule.warmup_start": 0.0, "optim.optimizer.weight_decay": 0.0},
    **{"optim.optimizer.betas": [0.9, 0.999], "engine.precision": "fp32"},
}
SLOT_CONTRAST = SLOTS | {
    **{"head.slot_init": "learned", "head.decoder": "mlp", "head.decoder_depth": 4, "data.batch_size": 64},
    **{"loss.criterion.factors": {"reconstruction": 1.0, "contrast": 0.5}, "data.view.flip": 0.5},
    **{"loss.criterion.terms.contrast.softmax_over": "previous", "loss.criterion.terms.contrast.temperature": 0.1},
    **{"resolution.crop": [336, 336], "data.clips.eval_square": 336, "optim.optimizer.lr": 4e-4},
    **{"head.slot_dim": 64, "head.hidden_dim": 256, "head.positions_grid": [24, 24], "trainer.steps": 100000},
    **{"optim.schedule.warmup": 2500 / 100000, "trainer.val_every": 2500},
}
ORIGINALS = {
    "person_multiscale": ADAM
    | {"optim.optimizer.weight_decay": 1e-4, "data.batch_size": 8, "resolution.crop": [640, 640]}
    | {"data.augment.affine.degrees": 25, "data.augment.flip": 0.5, "data.augment.scale": [1, 1]}
    | {"data.augment.color.brightness": 0.2, "data.augment.color.saturation": 0, "optim.schedule.warmup": 0},
    "schism/linear": ADAM
    | {"resolution.crop": [224, 224], "resolution.scale": 560 / 224, "data.batch_size": 8, "trainer.epochs": 10}
    | {"adapter.rank": 32, "adapter.rslora": True, "adapter.bits": 4, "optim.schedule.warmup": 0}
    | {"data.augment.scale": [1, 1], "trainer.patience": 2, "trainer.val_every": None},
    "idd/m2f": {"optim.optimizer.lr": 1e-4, "optim.optimizer.weight_decay": 1e-4, "optim.schedule.kind": "cosine"}
    | {"optim.schedule.warmup": 0, "trainer.epochs": 20, "trainer.val_every": None, "trainer.patience": 10}
    | {"data.batch_size": 2, "trainer.clip": 1.0, "data.augment.scale": [1, 1]}
    | {f"data.augment.color.{part}": 0.3 for part in ("brightness", "contrast", "saturation")}
    | {"data.augment.color.hue": 0.1},
    "sarrarp/lora": ADAM
    | {"data.batch_size": 6, "trainer.epochs": 20, "trainer.val_every": 500, "trainer.patience": 5}
    | {"adapter.rank": 16, "adapter.targets": "all_linear", "adapter.dropout": 0.1, "optim.schedule.warmup": 0},
    "dinosavi/control": {"optim.optimizer.lr": 1e-4, "optim.schedule.warmup": 0.1, "data.batch_size": 16},
    "dinosavi/final": {"optim.optimizer.lr": 2e-4, "optim.schedule.warmup": 0.1, "trainer.clip": 0.05},
    "slotcontrast/movi_c": SLOT_CONTRAST | {"head.num_slots": 11, "backbone.arch.hidden_size": 384},
    "slotcontrast/movi_e": SLOT_CONTRAST
    | {"head.num_slots": 15, "head.slot_dim": 128, "head.hidden_dim": 512, "backbone.arch.hidden_size": 768}
    | {"trainer.steps": 300000, "optim.schedule.warmup": pytest.approx(2500 / 300000)},
    "slotcontrast/ytvis2021": SLOT_CONTRAST
    | {"head.num_slots": 7, "backbone.arch.hidden_size": 768, "data.view.flip": 0.0, "optim.optimizer.lr": 8e-4}
    | {"resolution.crop": [518, 518], "data.clips.eval_square": 518, "head.positions_grid": [37, 37]}
    | {"data.held_out": 300},
    "videosaur/movi_c": SLOTS
    | {"head.num_slots": 11, "head.slot_dim": 128, "head.hidden_dim": None, "head.slot_init": "gaussian"}
    | {"head.initial_std": 128**-0.5, "head.variance_as_std": True, "head.decoder": "slot_mixer"}
    | {"head.mixer_blocks": 2, "head.decoder_depth": 5, "head.reconstruct": False, "head.similarity": True}
    | {"head.similarity_of": "keys", "head.positions_grid": [28, 28], "backbone.patch_size": 8}
    | {"loss.criterion.factors": {"similarity": 0.1}, "loss.criterion.terms.similarity.temperature": 0.075}
    | {"loss.criterion.terms.similarity.threshold": 0.0, "loss.criterion.terms.similarity.unmatched": "uniform"}
    | {"data.batch_size": 128, "resolution.crop": [224, 224], "optim.optimizer.lr": 1e-4 * 128 / 32}
    | {"optim.schedule.warmup": 0.025, "trainer.steps": 100000, "data.view.flip": 0.5, "trainer.val_every": 1000},
    "eomt/ade20k": {"optim.optimizer.lr": 1e-4, "optim.schedule.warmup": 1500 / 40000, "trainer.steps": 40000},
}


@pytest.mark.parametrize("hparam", ORIGINALS)
def test_a_recipe_carries_the_numbers_of_its_original(compose, hparam):
    cfg = compose(f"hparam={hparam}", *needed(written_choices(hparam)))
    wanted = ORIGINALS[hparam]
    assert {key: OmegaConf.select(cfg, key) for key in wanted} == wanted


def test_no_recipe_warms_up_for_a_number_of_steps():
    seen = 0
    for hparam in options("hparam"):
        schedule = read("hparam", hparam).get("optim", {}).get("schedule", {})
        seen += "warmup" in schedule
        assert schedule.get("warmup", 0) == 0 or isinstance(schedule["warmup"], float), hparam
    assert seen >= 10


def test_rates_come_from_head_and_adapter_and_give_way_to_one_for_all(compose):
    cfg = compose("head=dpt", "adapter=lora")
    assert (cfg.optim.optimizer.lr, cfg.optim.optimizer.head_lr) == (None, read("head", "dpt")["lr"])
    assert cfg.optim.optimizer.backbone_lr == read("adapter", "lora")["lr"]
    assert compose("head=mlp", "head.lr=7e-4").optim.optimizer.head_lr == 7e-4
    for head in options("head"):
        base = next((entry for entry in read("head", head).get("defaults", []) if entry != "_self_"), head)
        assert read("head", base)["lr"] > 0, head


def test_a_head_or_adapter_of_one_s_own_needs_no_rate(compose):
    assert compose("~head").optim.optimizer.head_lr == 1e-3
    assert compose("~adapter").optim.optimizer.backbone_lr == 1e-4
