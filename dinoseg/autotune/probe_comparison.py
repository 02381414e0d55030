"""Report of the comparison with the linear-probe baseline, and its file in the run folder."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoseg.autotune.causes import causes_of
from dinoseg.autotune.probe_baseline import TrainedRun, compare
from dinoseg.inference.memory import reason_of, tells_shortage
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
NAME = "floor.json"  # in the run folder
_CAUSES = 3.0  # time limit for the search of causes, as a multiple of the comparison's limit


def compare_with_linear_probe(run: TrainedRun, out_dir: Path, *, seconds: float) -> dict[str, Any] | None:
    """Compare a run with the linear probe, report scores and causes, and return the content of `floor.json`.

    Args:
        run: the training.
        out_dir: the run folder.
        seconds: time limit of the comparison; no further cause is tested after three times that.
    """
    engine = run.engine
    if engine.is_main:
        (out_dir / NAME).unlink(missing_ok=True)  # outdated, if the run was resumed since
    try:
        comparison = compare(run, seconds=seconds)
        until = time.monotonic() + _CAUSES * seconds
        causes = causes_of(replace(comparison, until=until)) if comparison else []
    except (MemoryError, RuntimeError, UserError) as error:
        if engine.world > 1 or not (isinstance(error, UserError) or tells_shortage(error)):
            raise  # other ranks would wait
        logger.warning("The run is complete, but its comparison with the linear probe failed: %s", reason_of(error))
        return None
    if comparison is None:
        return None
    found = {
        "run_miou": comparison.scores["miou"],
        "floor_miou": comparison.probe["miou"],
        "train_images": len(comparison.train),
        "val_images": len(comparison.val),
        "below": comparison.is_below,
        "causes": causes,
    }
    if engine.is_main:
        write_json(out_dir / NAME, found)
        print(f"linear probe: {comparison.summary}")
        if comparison.is_below:
            why = "".join(f"\n- {cause}." for cause in causes) or " No likely cause was found."
            logger.warning("This run scores below the linear probe on the same backbone before training.%s", why)
        for cause in () if comparison.is_below else causes:
            logger.warning("%s.", cause)
    return found
