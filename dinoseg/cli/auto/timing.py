"""Timing of a composed recipe, in a process of its own."""

import math
import time
from collections.abc import Mapping
from typing import Any

from dinoseg.autotune.rules import REST
from dinoseg.autotune.timing import RecipeTimes, time_recipe
from dinoseg.config.nodes import instantiate
from dinoseg.experiment.builder import build_task
from dinoseg.experiment.step import restored, training_parts
from dinoseg.training.feature_choice import stored_as


def time_candidate(
    values: Mapping[str, Any], *, minutes: float, may_rest: bool = False, ranks: int = 1, until: float = math.inf
) -> RecipeTimes:
    """Time a plain config; see `time_recipe`. `may_rest`: also with a backbone that is frozen at first."""
    began = time.perf_counter()
    cfg = restored(values)
    engine = instantiate(cfg.engine, instead={"devices": 1})
    cfg.data.batch_size = max(1, cfg.data.batch_size // ranks)
    task = build_task(cfg)
    task.open(engine)
    return time_recipe(
        training_parts(cfg),
        task.feed,
        engine,
        began=began,
        minutes=minutes,
        dtype=stored_as(cfg.features.dtype, {}),
        rested=training_parts(cfg, {"optim.optimizer.backbone_begin": REST}) if may_rest else None,
        ranks=ranks,
        until=until,
    )
