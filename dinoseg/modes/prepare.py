"""mode=prepare: make a downloaded data set ready to read."""

import json
import logging
from pathlib import Path
from typing import Any

from dinoseg.config.nodes import instantiate
from dinoseg.data.formats.sarrarp_files import TRAIN_FOLDERS
from dinoseg.errors import UserError
from dinoseg.preparation.pseudo_labels import Propagation, propagate

log = logging.getLogger(__name__)


def prepare(cfg: Any, *, out_dir: Path) -> None:
    """Run the data set's own preparation (`cfg.data.prepare`) and write its counts to `prepared.json`.

    With `cfg.data.prepare.propagate`, the frames between the masks of training videos get pseudo-labels, too.

    Raises:
        UserError: the data set needs none, or what its preparation finds wrong.
    """
    if cfg.data.prepare is None:
        raise UserError(
            f"The data set under data.root={cfg.data.root} needs no preparation: train on it as it is, "
            "with mode=train and the same data=."
        )
    # what propagates comes first: a backbone that cannot be had is known before hours of extraction
    propagation = Propagation.of(cfg) if cfg.data.prepare.get("propagate") else None
    counts = instantiate(cfg.data.prepare)()
    if propagation is not None:
        training = [name for name in counts if name.split("/")[0] in TRAIN_FOLDERS]
        found = propagate(propagation, [Path(cfg.data.root).expanduser() / name for name in training])
        counts = {name: {**numbers, **found.get(name, {})} for name, numbers in counts.items()}
    path = out_dir / "prepared.json"
    path.write_text(json.dumps(counts, indent=1), encoding="utf-8")
    log.info("%s is ready. What was counted in each of its folders (also in %s):", cfg.data.root, path)
    for name, numbers in counts.items():
        log.info("%s: %s", name, ", ".join(f"{what} {count}" for what, count in numbers.items()))
