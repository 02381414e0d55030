"""An explicit float32 of a training applies to all later uses of its model."""

import pytest
from command_line import SMALL, call, write_data
from omegaconf import OmegaConf
from portable_parts import TINY, export_file, write_untrained

import dinoseg
from dinoseg.experiment.resume import merge, standalone_config
from dinoseg.experiment.source import ModelSource
from dinoseg.export.runtime.write import export_model
from dinoseg.training import checkpoint
from dinoseg.utils.errors import UserError


def test_a_run_in_float32_is_resumed_and_evaluated_in_float32(tmp_path):
    write_data(tmp_path / "data")
    for run, precision in (("exact", "fp32"), ("machine", "auto")):
        done = call(tmp_path, "mode=train", *SMALL, f"engine.precision={precision}", f"hydra.run.dir={run}")
        assert done.status == 0, done.err
        scores = (tmp_path / run / "evaluation/scores.json").read_bytes()
        later = {
            f"{run}_eval": (["mode=eval"], precision),
            f"{run}_typed": (["mode=eval", "engine.precision=bf16"], "bf16"),
            f"{run}_auto": (["mode=eval", "engine.precision=auto"], "auto"),
            f"{run}_train": (["mode=train", "trainer.steps=3"], precision),
        }
        for name, (words, expected) in later.items():
            folder = run if "trainer.steps=3" in words else name
            done = call(tmp_path, *words, f"resume={run}", "engine.device=cpu", f"hydra.run.dir={folder}")
            assert done.status == 0, done.err
            assert OmegaConf.load(tmp_path / folder / "config/config.yaml").engine.precision == expected, name
        assert run == "machine" or (tmp_path / "exact_eval/scores.json").read_bytes() == scores
        info = checkpoint.describe(tmp_path / run / "checkpoints/last.safetensors")
        assert info["progress"]["step"] == 3 and info.get("precision") == (precision if run == "exact" else None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_loaded_or_exported_model_has_the_precision_of_training(compose, tmp_path, precision):
    path = write_untrained(compose, tmp_path, *TINY, "head=linear", f"engine.precision={precision}")
    expected = "fp32" if precision == "fp32" else "auto"
    whole = export_file(path, tmp_path / "out")
    dinoseg.load(whole, device="cpu").save(tmp_path / "again.safetensors")
    for file in (path, whole, tmp_path / "again.safetensors"):
        assert dinoseg.load(file, device="cpu")._precision == expected
        assert dinoseg.load(file, device="cpu", precision="bf16")._precision == "bf16"


def test_a_typed_precision_of_an_export_counts(compose, tmp_path):
    path = write_untrained(compose, tmp_path, *TINY, "head=linear", "engine.precision=fp32")
    for number, (typed, stored) in enumerate({"bf16": None, "auto": None, "fp32": "fp32"}.items()):
        cfg = standalone_config(path, checkpoint.describe(path), {"engine.device": "cpu", "engine.precision": typed})
        export_model(ModelSource(cfg), out_dir=(folder := tmp_path / str(number)))
        assert checkpoint.describe(folder / "model.safetensors").get("precision") == stored


def test_a_machine_s_engine_may_lack_a_precision(compose, tmp_path):
    path = write_untrained(compose, tmp_path, *TINY, "head=linear", "engine.precision=fp32")
    cfg = compose("mode=eval", "data=folder", "data.root=x", "data.classes=[dark,bright]", "~engine.precision")
    assert merge(cfg, [], path, checkpoint.describe(path)).engine.precision == "fp32"


def test_another_stored_precision_is_refused(compose, tmp_path):
    path = write_untrained(compose, tmp_path, *TINY, "head=linear", precision="fp8")
    with pytest.raises(UserError, match=r"its precision is fp8; it must be fp32\. Choose another checkpoint"):
        dinoseg.load(path, device="cpu")
