"""What is told of a training that is held against its floor, and what is written of it."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.autotune.causes import causes_of
from dinoseg.autotune.floor import FLOOR, held_against_floor, told
from dinoseg.inference.memory import reason_of, tells_shortage
from dinoseg.models.model import Segmenter
from dinoseg.tasks.regime import Regime
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_LOOKING = 3.0  # times what the comparison may take: for the causes of a run that is below


def tell_floor(
    cfg: DictConfig,
    regime: Regime,
    engine: Engine,
    model: Segmenter,
    out_dir: Path,
    *,
    seconds: float,
    best_step: int,
    steps: int,
) -> dict[str, Any] | None:
    """Hold a run against its closed form, say where it is below that, and why; return what `floor.json` says.

    Args:
        cfg: the whole config.
        regime: of the run.
        engine: of the run.
        model: with the best checkpoint's weights.
        out_dir: the run folder.
        seconds: that the comparison may take; after three times that no further cause is looked for.
        best_step: after which the model had these weights.
        steps: that were done.
    """
    if engine.is_main:
        (out_dir / FLOOR).unlink(missing_ok=True)  # of a run that has gone on since
    try:
        held = held_against_floor(cfg, regime, engine, model, seconds=seconds)
        until = time.monotonic() + _LOOKING * seconds
        causes = causes_of(replace(held, best_step=best_step, steps=steps, until=until)) if held else []
    except (MemoryError, RuntimeError, UserError) as error:
        if engine.world > 1 or not (isinstance(error, UserError) or tells_shortage(error)):
            raise  # other ranks would wait
        logger.warning("The run is whole, but could not be held against its closed form: %s", reason_of(error))
        return None
    if held is None:
        return None
    found = {
        "run_miou": held.run["miou"],
        "floor_miou": held.floor["miou"],
        "train_images": len(held.train),
        "val_images": len(held.val),
        "below": held.is_below,
        "causes": causes,
    }
    if engine.is_main:
        write_json(out_dir / FLOOR, found)
        print(f"floor:        {told(held)}")
        if held.is_below:
            why = "".join(f"\n- {cause}." for cause in causes) or " None of the causes that are tried was found."
            below = "This run is below its floor: a linear head on the same backbone as it came does more.%s"
            logger.warning(below, why)
        for cause in () if held.is_below else causes:
            logger.warning("%s.", cause)
    return found
