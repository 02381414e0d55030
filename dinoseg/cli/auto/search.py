"""Search for a recipe that fits data, memory and time: collect facts, apply rules, time the resulting candidates."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

from dinoseg.autotune import rules
from dinoseg.autotune.facts import DatasetFacts, facts_of, headline
from dinoseg.autotune.fitting import Recipe
from dinoseg.autotune.memory import Memory
from dinoseg.autotune.rules import PROBING, REST, SURE, Length, RecipeCase, RecipeChoice, length_within
from dinoseg.autotune.timing import RecipeTimes, estimate_times, time_recipe
from dinoseg.cli.auto.given import drop_typed
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sizes import Size
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.step import training_parts
from dinoseg.inference.memory import OutOfMemory
from dinoseg.training.engine import Engine
from dinoseg.training.feature_choice import stored_as
from dinoseg.utils.ranges import Range
from dinoseg.utils.wording import count_of
from dinoseg.utils.workers import run_in_process

_MINUTES = (
    "a number of minutes from 1 to 1000000 (two years), or trainer.steps instead of hparam=auto for a shorter training"
)
Minutes = Annotated[float, Range(_MINUTES, 1, 1e6)]  # below 1, start and timing may take the whole budget
_ROOM = 2**30  # bytes of disk space that the feature cache leaves free
_MIN_TIMED = 0.02  # share of the budget; with less time left, a candidate is not timed
_MEASURING = 0.6  # share of a candidate's time limit after which timed steps are not repeated
_COMPOSED = 3  # compositions of the config after the last candidate is timed, which are part of choosing
_MIN_LEFT = 0.2  # share of the budget reserved for training, however long the search took


@dataclass(frozen=True)
class ComposedRecipe:
    """Values of a config that is composed with choices.

    Attributes:
        values: the whole config, plain.
        parts: returns the parts of its training with overrides.
        adapter: option of the adapter group.
        head: option of the head group.
        crop: (H, W) of the training images.
        scale: backbone pixels per image pixel.
        longest: longest image side in px; None: no limit.
        batch_size: images of a batch, over all devices.
        accumulate: batches per step.
        views: fixed views of each image; None: new views in each epoch.
        cache: where features are cached.
        cache_dir: folder of all caches.
        devices: that share a batch.
        head_lr: learning rate of the head.
        backbone_lr: learning rate of the backbone.
        freezes: whether the optimizer may freeze the backbone at first.
    """

    values: Mapping[str, Any]
    parts: Recipe
    adapter: str
    head: str
    crop: Size
    scale: float
    longest: int | None
    batch_size: int
    accumulate: int
    views: int | None
    cache: str
    cache_dir: str
    devices: int
    head_lr: float
    backbone_lr: float
    freezes: bool

    @property
    def per_step(self) -> int:
        """Images of a step."""
        return self.batch_size * self.accumulate


Compose = Callable[[Sequence[RecipeChoice]], ComposedRecipe]


@dataclass(frozen=True)
class TimedCandidate:
    """A candidate that was timed.

    Attributes:
        choices: that define the candidate.
        recipe: composed with these choices.
        times: measured.
        length: training that fits into the remaining time.
        is_closed_form: whether a linear head is solved in closed form instead of training.
    """

    choices: tuple[RecipeChoice, ...]
    recipe: ComposedRecipe
    times: RecipeTimes
    length: Length
    is_closed_form: bool = False


@dataclass(frozen=True)
class RecipeCandidate:
    """A way to train the backbone that may be timed.

    Attributes:
        case: inputs of the rules; its images may be reduced.
        way: the adapter.
        surely: number of training images from which the candidate is chosen without timing others.
        least: number of training images from which it is chosen if no other candidate is.
    """

    case: RecipeCase
    way: RecipeChoice
    surely: float
    least: float


class RecipeSearch:
    """Search of a recipe for one dataset and machine.

    Args:
        compose: returns the recipe with choices applied; typed overrides take precedence.
        data: training and validation images.
        engine: of one device.
        given: keys and groups typed on the command line, which stay unchanged.
        minutes: budget for everything, counted from now.
        report: receives progress messages.
        joined: ranks on this machine that torchrun or Slurm started, each with its share of the cores; 0: the training
            starts its own ranks.

    Attributes:
        about: one-line summary of data, budget and device; "" until `choose` has returned.
    """

    def __init__(
        self,
        compose: Compose,
        data: tuple[SegmentationData, SegmentationData],
        engine: Engine,
        given: frozenset[str],
        minutes: Minutes,
        report: Callable[[str], None],
        *,
        joined: int = 0,
    ) -> None:
        self.compose, self.data, self.given, self.report = compose, data, given, report
        self.about = ""
        began, self._minutes = monotonic(), minutes
        self._ends, self._choosing_ends = (began + 60 * share * minutes for share in (1, rules.CHOOSING))
        self._longest = 0.0  # seconds of the slowest timed candidate
        self._trained: dict[str, bool] = {}
        self.base = compose(())
        self._choosing_ends -= _COMPOSED * (monotonic() - began)
        self._device = engine.device.type
        self._model = self.base.parts({}).outline()
        devices, on_cpu = self.base.devices, self._device == "cpu"
        self.memory = Memory(engine, given, self._model.backbone, (joined or devices) if on_cpu else 1, devices)
        # on a CPU, ranks started by the training share the threads that a single process is timed with
        self._ranks = 1 if on_cpu and not joined else devices

    def choose(self) -> list[RecipeChoice]:
        """Return all choices in the order in which they were made, including those that typed overrides replace.

        Raises:
            UserError: no candidate fits into memory.
        """
        facts = facts_of(*self.data, self.base.cache_dir)
        case = self._case(facts)
        by_data, timed = self._way(case)
        chosen = [*by_data, *timed.choices, *self._batch(timed, by_data, case)]
        if not timed.is_closed_form:
            timed = replace(timed, length=self._length(timed.recipe, timed.times, facts))  # less time is left
        chosen += [*self._rates(timed.recipe), *self._views(timed)]
        chosen.append(self._steps(timed, self._composed(chosen), facts))
        self.about = headline(facts, self._minutes, self._device)
        return chosen

    def _case(self, facts: DatasetFacts) -> RecipeCase:
        model = self._model
        return RecipeCase(
            facts,
            self._device,
            model.patch_size / self.base.scale,
            model.backbone.depth,
            sum(parameter.numel() for parameter in model.backbone.parameters()),
            self.base.longest,
            self.base.head if "head" in self.given else None,
            even=model.patch_size % 2 == 0,
        )

    def _way(self, case: RecipeCase) -> tuple[list[RecipeChoice], TimedCandidate]:
        """Choose how to train the backbone; return the choices that follow from the data, and the timed candidate.

        Both are chosen together, since smaller images may leave time to tune the backbone. The cheapest candidate is
        timed first. The others follow in order of preference while there is time for the search.
        """
        candidates = self._candidates(case)
        first = self._try(candidates[0], 1, len(candidates))
        whole: TimedCandidate | None = None  # tunes the backbone, on images that are not reduced further
        enough: tuple[RecipeCandidate, TimedCandidate, float, str] | None = None
        slow = skipped = ""  # notes on candidates with too little time, and on candidates that were not timed
        for number, candidate in enumerate(candidates[1:], start=2):
            timed = self._try(candidate, number, len(candidates))
            if isinstance(timed, str):
                skipped += f"; {timed}"
                continue
            if timed.length.images >= candidate.surely:
                return self._settled(candidate, timed, slow + skipped)
            whole = timed if candidate.case is case else whole
            fewest = max(candidate.least, rules.MIN_STEPS * timed.recipe.per_step)
            if enough is None and timed.length.images >= fewest:
                enough = candidate, timed, fewest, slow  # without the notes on this candidate and later ones
            of = " that are smaller" if candidate.case.smaller < 1 else ""
            adapter = timed.recipe.adapter
            slow += f"; with adapter={adapter} there would be time for {timed.length.images} images{of}"
        if enough is not None:
            candidate, timed, fewest, before = enough
            length = self._length(timed.recipe, timed.times, case.facts)  # less time is left by now
            timed = replace(timed, length=length)
            if timed.length.images >= fewest:
                return self._settled(candidate, timed, before + skipped)
        if whole is not None and (rested := self._rested(whole, case)):
            return rules.by_data(case), _noted(rested, slow + skipped)
        if isinstance(first, str):
            raise OutOfMemory(first)
        return self._shortened(*self._settled(candidates[0], first, slow + skipped), case)

    def _settled(
        self, candidate: RecipeCandidate, timed: TimedCandidate, notes: str
    ) -> tuple[list[RecipeChoice], TimedCandidate]:
        return rules.by_data(candidate.case), _noted(timed, notes)

    def _candidates(self, case: RecipeCase) -> list[RecipeCandidate]:
        """Return the candidates: the cheapest (the fallback) first, then the others in order of preference."""
        any_number, never = -math.inf, math.inf
        if "adapter" in self.given:
            return [RecipeCandidate(case, RecipeChoice({"adapter": self.base.adapter}, "as given"), any_number, never)]
        *tuned, frozen = rules.ways(case)
        candidates = [RecipeCandidate(case, frozen, any_number, never)]
        for way in tuned:
            least = never if self._may_freeze(case) else rules.min_images_to_tune(case)
            candidates.append(RecipeCandidate(case, way, rules.SURELY_TUNED, least))
            less = rules.smaller(case)
            if less is not None and not self._has_typed_sizes:
                candidates.append(RecipeCandidate(less, rules.ways(less)[0], rules.MIN_SMALLER, never))
        return candidates

    @property
    def _has_typed_sizes(self) -> bool:
        return any(key.partition(".")[0] == "resolution" for key in self.given)

    def _rested(self, tuned: TimedCandidate, case: RecipeCase) -> TimedCandidate | None:
        """Return the variant that freezes the backbone at first; None if it was not timed or takes too long."""
        if tuned.times.resting is None:
            return None
        image = rules.REST * tuned.times.resting + (1 - rules.REST) * tuned.times.image
        times = replace(tuned.times, image=image, cached=None)
        length = self._length(tuned.recipe, times, case.facts)
        if length.images < max(rules.MIN_FROZEN, rules.MIN_STEPS * tuned.recipe.per_step):
            return None
        return TimedCandidate((rules.rested(case), *tuned.choices[1:]), tuned.recipe, times, length)

    def _may_freeze(self, case: RecipeCase) -> bool:
        able = self.base.freezes and self.base.devices == 1  # saves ranks no time
        typed = self.given & {"adapter", "optim.optimizer.freeze_backbone_until"}
        return able and not typed and case.sees_pixels and case.smaller == 1

    def _try(self, candidate: RecipeCandidate, number: int, count: int) -> TimedCandidate | str:
        """Time a candidate; return a note instead if memory or the time for the search does not suffice.

        The first candidate is estimated if timing it times out: from its time limit, or from a share of the budget if
        reading the data used up the time for the search. `trainer.max_minutes` stops a training that turns out slower.
        Later candidates are timed only if more time is left than the slowest candidate took so far.

        Args:
            candidate: to time.
            number: of the candidate, from 1.
            count: number of candidates.
        """
        began = monotonic()
        words = " ".join(f"{key}={value}" for key, value in candidate.way.words.items())
        words += " on smaller images" if candidate.case.smaller < 1 else ""
        left = self._choosing_ends - began
        if number > 1 and left <= max(self._min_timing_seconds, self._longest):
            return f"{words} was not tried: the time for choosing was used up"
        note, by_data = "", rules.by_data(candidate.case)
        choices, recipe = self._composed_for([*by_data, candidate.way], candidate.case)
        left = self._choosing_ends - monotonic()  # composing the recipe took time, too
        height, width = recipe.crop
        self.report(
            f"times adapter={recipe.adapter} head={recipe.head} on crops of {height} x {width} (height x "
            f"width): candidate {number} of at most {count}, {max(0.0, left):.0f} s at most"
        )
        try:
            if left < self._min_timing_seconds:
                raise TimeoutError
            times = self._time(recipe, candidate.case, left)
        except OutOfMemory as error:
            return f"{words} does not fit into memory" if number > 1 else str(error)
        except TimeoutError:
            if number > 1:
                return f"{words} was stopped: timing it took longer than {left:.0f} s"
            times = estimate_times(max(left, self._min_timing_seconds))
            note = "; its speed is estimated (no time to measure it)"
        self._longest = max(self._longest, monotonic() - began)
        length = self._length(recipe, times, candidate.case.facts)
        return _noted(TimedCandidate(tuple(choices[len(by_data) :]), recipe, times, length), note)

    def _composed_for(
        self, choices: Sequence[RecipeChoice], case: RecipeCase
    ) -> tuple[list[RecipeChoice], ComposedRecipe]:
        """Return `choices` extended by the choices that follow from them, and the recipe for timing."""
        trial = self._min_batch(case)
        adapter = choices[-1].words["adapter"]
        trains = self._trains_backbone(self.base) if "adapter" in self.given else adapter != "frozen"
        found = [*choices, rules.zoom(trains=trains, pixels=case.sees_pixels)]
        recipe = self._composed([trial, *found])
        changes = self.memory.changes(recipe.parts)
        return ([*found, *changes], self._composed([trial, *found, *changes])) if changes else (found, recipe)

    def _trains_backbone(self, recipe: ComposedRecipe) -> bool:
        """Return whether any backbone parameter is trained; cached per adapter, since it needs a model outline."""
        key = repr(recipe.values["adapter"])
        if key not in self._trained:
            self._trained[key] = recipe.parts({}).outline().backbone.first_trained is not None
        return self._trained[key]

    def _time(self, recipe: ComposedRecipe, case: RecipeCase, seconds: float) -> RecipeTimes:
        until = monotonic() + _MEASURING * seconds
        work = partial(
            time_candidate, minutes=self._minutes, may_freeze=self._may_freeze(case), ranks=self._ranks, until=until
        )
        times = run_in_process(work, recipe.values, timeout=seconds)
        if times is None:
            raise OutOfMemory("Out of memory in the first steps. mode=plan lists settings that fit.")
        return times

    def _shortened(
        self, by_data: list[RecipeChoice], timed: TimedCandidate, case: RecipeCase
    ) -> tuple[list[RecipeChoice], TimedCandidate]:
        """Return a training of at least `MIN_STEPS` steps: on smaller images, else a head solved in closed form."""
        least = rules.MIN_STEPS * timed.recipe.per_step
        if not self._has_typed_sizes and case.longest is None:
            whole = timed.times
            for smaller in rules.SHRUNK:
                if timed.length.images >= least:
                    break
                by_data = rules.by_data(replace(case, smaller=smaller))
                recipe = self._composed([*by_data, self._min_batch(case), *timed.choices])
                times = whole.on_smaller_images(smaller)
                timed = replace(timed, recipe=recipe, times=times, length=self._length(recipe, times, case.facts))
        heads = any(key.partition(".")[0] == "head" for key in self.given)
        if (
            timed.length.images >= least
            or heads
            or "data.labelled" in self.given
            or self._trains_backbone(timed.recipe)
        ):
            return by_data, timed
        choice = rules.closed_form(self._left, timed.times.frozen or timed.times.image, case.facts)
        recipe = self._composed([*by_data, self._min_batch(case), *timed.choices, choice])
        length, choices = replace(timed.length, images=0, views=None), (*timed.choices, choice)
        return by_data, replace(timed, choices=choices, recipe=recipe, length=length, is_closed_form=True)

    @property
    def _min_timing_seconds(self) -> float:
        """Seconds below which timing a candidate is not worth starting its process."""
        return _MIN_TIMED * 60 * self._minutes

    @property
    def _left(self) -> float:
        """Seconds left for the training: at least a fixed share of the budget, however long the search took."""
        return max(self._ends - monotonic(), _MIN_LEFT * 60 * self._minutes)

    def _length(self, recipe: ComposedRecipe, times: RecipeTimes, facts: DatasetFacts) -> Length:
        """Return the training length that fits into the remaining time."""
        return length_within(self._left, times, facts, views=self._possible_views(recipe, times, facts))

    def _batch(
        self, timed: TimedCandidate, by_data: Sequence[RecipeChoice], case: RecipeCase
    ) -> Iterator[RecipeChoice]:
        """Yield the batch size: the desired one, or the largest below it that fits into memory.

        Nothing is yielded if fitting the memory has already set the batch size.
        """
        if any("data.batch_size" in choice.words for choice in timed.choices):
            return
        sized = partial(rules.batch, timed.length.images, case.facts, self.base.devices)
        sized = partial(sized, accumulate=timed.recipe.accumulate)
        wanted, timed_with = sized(), self._min_batch(case)
        for most in rules.BATCHES:
            choice = sized(most=most)
            if choice.words == timed_with.words:
                break
            if self.memory.suffices(self._composed([*by_data, *timed.choices, choice]).parts):
                break
        less = "" if choice.words == wanted.words else f"; {wanted.words['data.batch_size']} would not fit into memory"
        yield replace(choice, reason=f"{choice.reason}{less}")

    def _min_batch(self, case: RecipeCase) -> RecipeChoice:
        return rules.batch(0, case.facts, self.base.devices)

    def _possible_views(self, recipe: ComposedRecipe, times: RecipeTimes, facts: DatasetFacts) -> list[int | None]:
        if "data.views" in self.given:
            return [recipe.views]
        free = shutil.disk_usage(_existing(Path(recipe.cache_dir).expanduser())).free - _ROOM
        if times.cached is None or recipe.cache == "off":
            return [None]
        held = [views for views in rules.VIEWS if times.bytes * (views * facts.images + facts.val_images) < free]
        return [None, *held]

    def _rates(self, recipe: ComposedRecipe) -> Iterator[RecipeChoice]:
        words: dict[str, float] = {"optim.optimizer.head_lr": recipe.head_lr}
        reason = f"{recipe.head_lr:g} is the default of head={recipe.head}"
        if self._trains_backbone(recipe):
            words["optim.optimizer.backbone_lr"] = recipe.backbone_lr
            reason += f", {recipe.backbone_lr:g} that of adapter={recipe.adapter}"
        yield RecipeChoice(words, reason)

    def _views(self, timed: TimedCandidate) -> Iterator[RecipeChoice]:
        if timed.length.views is not None:
            yield RecipeChoice(
                {"data.views": timed.length.views},
                f"features of {count_of(timed.length.views, 'view')} of each image are cached "
                f"(engine.cache={timed.recipe.cache}): {timed.times.cached:.2g} s per image instead of "
                f"{timed.times.image:.2g} s",
            )

    def _steps(self, timed: TimedCandidate, recipe: ComposedRecipe, facts: DatasetFacts) -> RecipeChoice:
        length, words = timed.length, dict[str, Any]()
        steps = max(1, length.images // recipe.per_step)
        words["trainer.steps"], words["trainer.val_every"] = steps, math.ceil(steps / length.validations)
        # counted from now: choosing the batch size and composing the config took time, too
        limit = length_within(self._left, timed.times, facts, views=[length.views]).limit
        words["trainer.max_minutes"] = float(f"{limit / 60:.3g}")
        fewer = ""
        if length.val_images is not None:
            words["trainer.val_images"] = length.val_images
            fewer = f"; there is no time to validate on more than {count_of(length.val_images, 'image')}"
        return RecipeChoice(
            words,
            f"{self._left / 60:.1f} of {self._minutes:g} minutes are left, {timed.length.spent:.0f} s of them for the "
            f"start, {count_of(timed.length.validations, 'validation')} and the scoring; {PROBING:.0%} are reserved "
            f"for the closed-form probe, {1 - SURE:.0%} as a margin{fewer}",
        )

    def _composed(self, choices: Sequence[RecipeChoice]) -> ComposedRecipe:
        return self.compose(drop_typed(choices, self.given)[0])


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _noted(timed: TimedCandidate, notes: str) -> TimedCandidate:
    """Return `timed` with notes on the other candidates appended to the reason of its first choice."""
    first, *others = timed.choices
    return replace(timed, choices=(replace(first, reason=f"{first.reason}{notes}"), *others))


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
