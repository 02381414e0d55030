"""What a training imports before its first step, and by its end."""

import pytest
from command_line import SMALL, write_data
from heavy_imports import forks, heavy_imports

BACKBONE = (
    "from transformers import AutoModel; from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel"
)
TRAINING = """
from torch.optim.optimizer import register_optimizer_step_pre_hook
from dinoseg.__main__ import main
register_optimizer_step_pre_hook(lambda *_: found.append(seen()))
sys.argv = {words}
main()
"""
END = {"matplotlib", "jinja2", "scipy", "scipy.optimize"}  # curves, report and its temperature
KINDS = {  # what each kind imports beside torch, its backbone's class and the usual parts of a run
    ("adapter=frozen", "head=linear"): set(),
    ("adapter=full", "head=eomt", "head.blocks=1", "loss=mask_classification"): {"scipy", "scipy.optimize"},
    ("adapter=lora", "head=linear"): {"peft"},
}


@pytest.mark.heavy
@forks
def test_trainings_import_only_what_they_use(tmp_path):
    write_data(tmp_path / "data")
    runs = [
        ["dinoseg", "mode=train", *SMALL, "trainer.steps=1", *words, f"hydra.run.dir={number}"]
        for number, words in enumerate(KINDS)
    ]
    (backbone,), *trainings = heavy_imports(BACKBONE, *(TRAINING.format(words=words) for words in runs), where=tmp_path)
    usual = backbone | {"accelerate", "tensorboard"}
    for used, (at_step, at_end) in zip(KINDS.values(), trainings, strict=True):
        assert at_step == usual | used
        assert at_end == at_step | END
