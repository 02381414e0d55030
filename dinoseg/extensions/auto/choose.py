"""Choice of a recipe that fits data and time: collect facts, apply rules, time the resulting recipe once."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Annotated, Any

from omegaconf import DictConfig

from dinoseg.core.shapes import SegmentationData
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto import rules
from dinoseg.extensions.auto.facts import DatasetFacts, facts_of, headline
from dinoseg.extensions.auto.rules import Length, RecipeCase, RecipeChoice, length_within
from dinoseg.extensions.auto.separate_process import run_in_process
from dinoseg.extensions.auto.timing import RecipeTimes, estimate_times, time_recipe
from dinoseg.extensions.auto.training_parts import training_parts
from dinoseg.inference.memory import OutOfMemory
from dinoseg.training.engine import Engine
from dinoseg.utils.ranges import Range
from dinoseg.utils.wording import count_of, printable

_MINUTES = (
    "a number of minutes from 1 to 1000000 (two years), or trainer.steps instead of hparam=auto for a shorter training"
)
Minutes = Annotated[float, Range(_MINUTES, 1, 1e6)]  # below 1, start and timing may take the whole budget
CHOOSING = 0.25  # maximum share of the budget until the timing ends
_MIN_TIMED = 0.02  # share of the budget; with less time left, nothing is timed
_MEASURING = 0.6  # share of the timing's time limit after which steps are not repeated
_MIN_LEFT = 0.2  # share of the budget reserved for training, however long choosing took
FREEZE = "optim.optimizer.freeze_backbone_until"
_FROZEN = {"adapter": "frozen", "optim.optimizer.backbone_lr": None}  # which has no rate
_CLOSED_FORM = {"adapter", "head", "head.init", "data.labelled"}  # typed keys that rule out the closed-form head

Compose = Callable[[Sequence[RecipeChoice]], DictConfig]


class Budget:
    """The time of an `hparam=auto` command, counted from the construction of this object.

    Args:
        minutes: for everything.
    """

    def __init__(self, minutes: Minutes) -> None:
        self.minutes = minutes
        self._began = monotonic()

    @property
    def for_timing(self) -> float:
        """Seconds left until the timing has to end."""
        return self._began + 60 * CHOOSING * self.minutes - monotonic()

    @property
    def left(self) -> float:
        """Seconds left for the training: at least a fixed share of the budget, however long choosing took."""
        return 60 * max(self.minutes - (monotonic() - self._began) / 60, _MIN_LEFT * self.minutes)


def choose(
    compose: Compose,
    data: tuple[SegmentationData, SegmentationData],
    engine: Engine,
    given: frozenset[str],
    budget: Budget,
) -> tuple[str, list[RecipeChoice]]:
    """Return a summary of data, budget and device, and all choices, including those that typed overrides replace.

    Args:
        compose: returns the config with choices applied; typed overrides take precedence.
        data: training and validation images.
        engine: of one device.
        given: keys and groups typed on the command line, which stay unchanged.
        budget: time for everything.

    Raises:
        OutOfMemory: the timed steps do not fit into memory.
    """
    _log(f"inspects data and machine: budget.minutes={budget.minutes:g} starts now")
    base = Builder(compose(()))
    facts = facts_of(*data, base.cache_dir)
    case = _describe_case(base, facts, engine, given)
    devices = base.value("engine.devices")
    # on a CPU, ranks started by the training share the threads that a single process is timed with
    ranks = 1 if engine.device.type == "cpu" else devices
    by_data = rules.by_data(case)
    adapter = rules.adapter(case)
    if "adapter" in given:
        adapter = RecipeChoice({"adapter": base.options["adapter"]}, "as given")
    timed = Builder(compose([*by_data, adapter, rules.batch(0, facts, devices)]))
    trains = timed.outline().backbone.first_trained is not None
    may_stay_frozen = "adapter" not in given
    times = _time(timed, budget, trains=trains, freezes=may_stay_frozen or not trains, ranks=ranks)
    if trains and may_stay_frozen:
        # ranks wait for one another all the same, so freezing at first saves them no time
        may_freeze = timed.value(FREEZE) is not None and FREEZE not in given and devices == 1
        adapter = _settle_adapter(case, adapter, times, budget, may_freeze=may_freeze)
        trains = adapter.words["adapter"] != "frozen"

    image = times.of(adapter.words.get(FREEZE, 0.0) if trains else 1.0)
    length = length_within(budget.left, image, times, facts)
    views = None
    if not trains and "data.views" not in given:
        views = rules.cached_views(length, image, times.forward, facts)
    if views is not None:
        length = replace(length, images=views[1])
    batch = rules.batch(length.images, facts, devices, timed.value("trainer.accumulate"))
    choices = [*by_data, adapter, rules.zoom(trains=trains, pixels=case.sees_pixels), batch]
    choices += [] if views is None else [views[0]]
    sized = Builder(compose(choices))
    per_step = sized.value("data.batch_size") * sized.value("trainer.accumulate")
    solvable = not trains and not facts.has_layers and given.isdisjoint(_CLOSED_FORM)
    if length.images < rules.MIN_STEPS * per_step and solvable:
        replaced = {"adapter", "head"}
        choices = [each for each in choices if replaced.isdisjoint(each.words)]
        choices.append(rules.closed_form(budget.left, image, facts))
        length = replace(length, images=0)
    choices.append(_choose_steps(length, per_step, budget))
    return headline(facts, budget.minutes, engine.device.type), choices


def _log(doing: str) -> None:
    print(printable(f"hparam=auto {doing}"), file=sys.stderr)


def _describe_case(base: Builder, facts: DatasetFacts, engine: Engine, given: frozenset[str]) -> RecipeCase:
    model = base.outline()
    return RecipeCase(
        facts,
        engine.device.type,
        model.patch_size / base.value("resolution.scale"),
        model.backbone.depth,
        sum(parameter.numel() for parameter in model.backbone.parameters()),
        base.value("resolution.longest"),
        base.options["head"] if "head" in given else None,
        even=model.patch_size % 2 == 0,
    )


def _settle_adapter(
    case: RecipeCase, adapter: RecipeChoice, times: RecipeTimes, budget: Budget, *, may_freeze: bool
) -> RecipeChoice:
    """Return how to train the backbone, from how many images fit into the time left."""

    def count_images(frozen_share: float) -> int:
        return length_within(budget.left, times.of(frozen_share), times, case.facts).images

    tuned = None if times.tuned is None else count_images(0.0)
    mixed = count_images(rules.FROZEN_SHARE) if may_freeze else None
    return rules.phases(case, adapter, tuned, mixed)


def _choose_steps(length: Length, per_step: int, budget: Budget) -> RecipeChoice:
    steps = max(1, length.images // per_step)
    words: dict[str, Any] = {"trainer.steps": steps, "trainer.val_every": math.ceil(steps / length.validations)}
    words["trainer.max_minutes"] = float(f"{length.limit / 60:.3g}")
    fewer = ""
    if length.val_images is not None:
        words["trainer.val_images"] = length.val_images
        fewer = f"; there is no time to validate on more than {count_of(length.val_images, 'image')}"
    return RecipeChoice(
        words,
        f"{budget.left / 60:.1f} of {budget.minutes:g} minutes are left, {length.spent:.0f} s of them for the start, "
        f"{count_of(length.validations, 'validation')} and the scoring; {1 - rules.SURE:.0%} are a margin{fewer}",
    )


def _time(builder: Builder, budget: Budget, *, trains: bool, freezes: bool, ranks: int) -> RecipeTimes:
    """Time a recipe in a separate process, until a share of the budget is spent; estimate its times after that."""
    seconds = budget.for_timing
    height, width = builder.value("resolution.crop")
    what = f"adapter={builder.options['adapter']} head={builder.options['head']}"
    _log(f"times {what} on crops of {height} x {width} (height x width), for at most {max(0.0, seconds):.0f} s")
    least = 60 * _MIN_TIMED * budget.minutes
    if seconds < least:
        return estimate_times(least)
    work = partial(
        time_config,
        trains=trains,
        freezes=freezes,
        minutes=budget.minutes,
        ranks=ranks,
        until=monotonic() + _MEASURING * seconds,
    )
    try:
        times = run_in_process(work, builder.config, timeout=seconds)
    except TimeoutError:
        _log("estimates the speed: timing took too long")
        return estimate_times(seconds)
    if times is None:
        raise OutOfMemory("Out of memory in the first steps. mode=plan lists settings that fit.")
    return times


def time_config(
    values: Mapping[str, Any], *, trains: bool, freezes: bool, minutes: float, ranks: int = 1, until: float = math.inf
) -> RecipeTimes:
    """Time a plain config with a trained backbone, a frozen one, or both; see `time_recipe`."""
    began = time.perf_counter()
    builder = Builder.of(values)
    engine = builder.engine(devices=1)
    builder = builder.with_changes({"data": {"batch_size": max(1, builder.value("data.batch_size") // ranks)}})
    training = builder.make_training()
    training.open_data(engine)
    return time_recipe(
        training_parts(builder) if trains else None,
        training_parts(builder, _FROZEN if trains else None) if freezes else None,
        training.data_module,
        engine,
        began=began,
        minutes=minutes,
        ranks=ranks,
        until=until,
    )
