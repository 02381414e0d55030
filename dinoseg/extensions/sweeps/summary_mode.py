"""mode=summary: parameter counts of a recipe's model by part, without loading weights."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.experiment.builder import Builder
from dinoseg.training.cost import count_numbers
from dinoseg.utils.atomic import write_json


def summarise(cfg: DictConfig, *, out_dir: Path) -> dict[str, Any]:
    """Print, save and return the total and trainable parameters of backbone, adapter, head and the whole model."""
    model = Builder(cfg).outline()
    adapter = {name for name, _ in model.backbone.named_parameters() if ".lora_" in name}
    parts = {
        "backbone": [p for name, p in model.backbone.named_parameters() if name not in adapter],
        "adapter": [p for name, p in model.backbone.named_parameters() if name in adapter],
        "head": list(model.head.parameters()),
    }
    parts["model"] = [parameter for part in parts.values() for parameter in part]
    counts = {name: count_numbers(parameters) for name, parameters in parts.items()}
    rows = [(name, f"{row['total']:,}", f"{row['trainable']:,}") for name, row in counts.items()]
    print(f"backbone={cfg.choices.backbone} adapter={cfg.choices.adapter} head={cfg.choices.head}\n")
    print(tabulate(rows, headers=["part", "parameters", "trainable"], colalign=("left", "right", "right")))
    write_json(out_dir / "summary.json", counts)
    return counts
