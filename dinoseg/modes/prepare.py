"""mode=prepare: preparation of a downloaded dataset for reading."""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from dinoseg.data.formats.sarrarp_files import TRAIN_FOLDERS
from dinoseg.experiment.builder import Builder
from dinoseg.tasks.preparation.pseudo_labels import Propagation, propagate
from dinoseg.utils.errors import UserError

log = logging.getLogger(__name__)


def prepare(cfg: DictConfig, *, out_dir: Path) -> None:
    """Run the dataset's own preparation (`cfg.data.prepare`) and write its counts to `prepared.json`.

    With `cfg.data.prepare.propagate`, the frames between the masks of training videos also get pseudo-labels.

    Raises:
        UserError: the dataset needs no preparation, or its preparation fails.
    """
    build, root = Builder(cfg), cfg.data.root
    if cfg.data.prepare is None:
        raise UserError(
            f"The dataset under data.root={root} needs no preparation: train on it with mode=train and the same data=."
        )
    propagation = None
    if cfg.data.prepare.get("propagate"):  # built before hours of extraction, to fail early without a backbone
        engine, settings = build.engine(), build.part("tracker")
        propagation = Propagation.build(
            build.backbone(),
            settings,
            engine,
            build.labels,
            min_agreement=cfg.data.prepare.min_agreement,
            backbone_config=build.settings("backbone"),
        )
    counts: dict[str, dict[str, int]] = build.part("data.prepare")()
    if propagation is not None:
        training = [name for name in counts if name.split("/")[0] in TRAIN_FOLDERS]
        for name, labels in propagate(propagation, Path(root).expanduser(), training).items():
            counts[name] |= labels
    path = out_dir / "prepared.json"
    path.write_text(json.dumps(counts, indent=1), encoding="utf-8")
    log.info("%s is ready. Counts of each of its folders (also in %s):", root, path)
    for name, numbers in counts.items():
        log.info("%s: %s", name, ", ".join(f"{what} {count}" for what, count in numbers.items()))
