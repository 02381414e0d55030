"""mode=prepare: preparation of a downloaded dataset for reading."""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from dinoseg.experiment.builder import Builder
from dinoseg.utils.errors import UserError

log = logging.getLogger(__name__)


def prepare(cfg: DictConfig, *, out_dir: Path) -> None:
    """Run the preparation of the dataset (group `prepare`) and write its counts to `prepared.json`.

    Raises:
        UserError: the dataset needs no preparation, or its preparation fails.
    """
    root = cfg.data.root
    if "prepare" not in cfg:
        raise UserError(
            f"The dataset under data.root={root} needs no preparation: train on it with mode=train and the same data=."
        )
    counts: dict[str, dict[str, int]] = Builder(cfg).part("prepare")()
    path = out_dir / "prepared.json"
    path.write_text(json.dumps(counts, indent=1), encoding="utf-8")
    log.info("%s is ready. Counts of each of its folders (also in %s):", root, path)
    for name, numbers in counts.items():
        log.info("%s: %s", name, ", ".join(f"{what} {count}" for what, count in numbers.items()))
