"""Report of the comparison with the linear-probe baseline, and the file `floor.json`."""

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
from dinoseg.tasks.task import TrainingTask
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_LOOKING = 3.0  # time limit for the search of causes, as a multiple of the comparison's limit


def tell_floor(
    cfg: DictConfig,
    regime: TrainingTask,
    engine: Engine,
    model: Segmenter,
    out_dir: Path,
    *,
    seconds: float,
    best_step: int,
    steps: int,
) -> dict[str, Any] | None:
    """Compare a run with the linear probe, report scores and causes, and return the content of `floor.json`.

    Args:
        cfg: the whole config.
        regime: of the run.
        engine: of the run.
        model: with the weights of the best checkpoint.
        out_dir: the run folder.
        seconds: time limit of the comparison; no further cause is tested after three times that.
        best_step: step of the best checkpoint.
        steps: number of training steps done.
    """
    if engine.is_main:
        (out_dir / FLOOR).unlink(missing_ok=True)  # outdated, if the run was resumed since
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
