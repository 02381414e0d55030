"""Timing of a composed recipe, in a process of its own."""

import math
import time
from collections.abc import Mapping
from typing import Any

from dinoseg.autotune.rules import REST
from dinoseg.autotune.timing import RecipeTimes, time_recipe
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts
from dinoseg.training.feature_choice import stored_as


def time_candidate(
    values: Mapping[str, Any], *, minutes: float, may_freeze: bool = False, ranks: int = 1, until: float = math.inf
) -> RecipeTimes:
    """Time a plain config; see `time_recipe`. `may_freeze`: also with a backbone that is frozen at first."""
    began = time.perf_counter()
    build = Builder.of(values)
    engine = build.engine(devices=1)
    build = build.changed({"data": {"batch_size": max(1, build.value("data.batch_size") // ranks)}})
    task = build.task()
    task.open(engine)
    return time_recipe(
        training_parts(build),
        task.data_module,
        engine,
        began=began,
        minutes=minutes,
        dtype=stored_as(build.value("features.dtype"), {}),
        rested=training_parts(build, {"optim.optimizer.freeze_backbone_until": REST}) if may_freeze else None,
        ranks=ranks,
        until=until,
    )
