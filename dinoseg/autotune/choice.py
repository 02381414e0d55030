"""Search for a recipe that fits data, memory and time: collect facts, apply rules, time the resulting candidates."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

from omegaconf import DictConfig

from dinoseg.autotune import rules
from dinoseg.autotune.facts import Facts, facts_of, headline
from dinoseg.autotune.given import left_of
from dinoseg.autotune.length import FLOOR, SURE, Length, length_within
from dinoseg.autotune.memory import Memory
from dinoseg.autotune.rules import Case, Choice
from dinoseg.autotune.timing import Seconds, time_recipe, unmeasured
from dinoseg.autotune.trial import check_alone
from dinoseg.config.checks import check_given
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.data.splits import keep_evenly_spaced
from dinoseg.experiment import build
from dinoseg.inference.memory import OutOfMemory
from dinoseg.training.engine import Engine
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range
from dinoseg.utils.wording import count_of
from dinoseg.utils.workers import in_own_process

Compose = Callable[[Sequence[Choice]], DictConfig]
Minutes = Annotated[float, Range("a number of minutes above 0 and at most 1000000 (two years)", 0, 1e6, open_at=(0,))]
_ROOM = 2**30  # bytes of disk space that the feature cache leaves free
_LEAST_TIMED = 0.02  # share of the budget; with less time left, a candidate is not timed
_MEASURING = 0.6  # share of a candidate's time limit after which timed steps are not repeated
_LEAST_LEFT = 0.2  # share of the budget reserved for training, however long the search took


@dataclass(frozen=True)
class Tried:
    """A candidate that was timed.

    Attributes:
        choices: that define the candidate.
        cfg: config with these choices.
        timed: measured times.
        length: training that fits into the remaining time.
        is_closed_form: whether a linear head is solved in closed form instead of training.
    """

    choices: tuple[Choice, ...]
    cfg: DictConfig
    timed: Seconds
    length: Length
    is_closed_form: bool = False


@dataclass(frozen=True)
class Candidate:
    """A way to train the backbone that may be timed.

    Attributes:
        case: inputs of the rules; its images may be reduced.
        way: the adapter.
        surely: number of training images from which the candidate is chosen without timing others.
        least: number of training images from which it is chosen if no other candidate is.
    """

    case: Case
    way: Choice
    surely: float
    least: float


class Chooser:
    """Search of a recipe for one dataset and machine.

    Args:
        compose: returns the whole config with choices applied; typed overrides take precedence.
        given: keys and groups typed on the command line, which stay unchanged.
        minutes: budget for everything, counted from now.
        tell: receives progress messages.
        joined: ranks on this machine that torchrun or Slurm started, each with its share of the cores; 0: the training
            starts its own ranks.

    Attributes:
        about: one-line summary of data, budget and device; "" until `choose` has returned.
    """

    def __init__(
        self,
        compose: Compose,
        given: frozenset[str],
        minutes: Minutes,
        tell: Callable[[str], None],
        *,
        joined: int = 0,
    ) -> None:
        self.compose, self.given, self.tell = compose, given, tell
        self.about = ""
        self._began, self._minutes = monotonic(), minutes
        self._ends, self._choosing_ends = (self._began + 60 * share * minutes for share in (1, rules.CHOOSING))
        self._longest = 0.0  # seconds of the slowest timed candidate
        self._trained: dict[str, bool] = {}
        self.cfg = compose(())
        if build.on_clips(self.cfg) or "unlabelled" in self.cfg.trainer:
            raise UserError(
                f"hparam=auto chooses for images and their masks, not for trainer={self.cfg.choices.trainer}. Give a "
                "recipe by its name: mode=help lists them."
            )
        check_alone(self.cfg)
        build.lengths(self.cfg, samples=1)  # raises for invalid numbers of steps or batches, as training would
        drawn = {"batch_size": self.cfg.data.batch_size, "views": self.cfg.data.get("views")}
        drawn["class_mix"] = self.cfg.data.get("class_mix", 0.0)
        check_given("dinoseg.training.image_feed.ImageFeed", drawn, {key: f"data.{key}" for key in drawn})
        instantiate(self.cfg.data.augment)  # raises for an invalid crop
        val_images = {"count": self.cfg.trainer.get("val_images")}
        check_given("dinoseg.data.splits.keep_evenly_spaced", val_images, {"count": "trainer.val_images"})
        self.engine: Engine = instantiate(self.cfg.engine, instead={"devices": 1})
        devices, on_cpu = self.cfg.engine.devices, self.engine.device.type == "cpu"
        self._model = build.outline(self.cfg)
        ranks = (joined or devices) if on_cpu else 1
        self.memory = Memory(self.engine, given, self._model.backbone, ranks)
        # on a CPU, ranks started by the training share the threads that a single process is timed with
        self._ranks = 1 if on_cpu and not joined else devices

    def choose(self) -> list[Choice]:
        """Return all choices in the order in which they were made, including those that typed overrides replace.

        Raises:
            UserError: no candidate fits into memory.
        """
        train, val = build.dataset(self.cfg, "train", reduced=True), build.dataset(self.cfg, "val")
        facts = facts_of(train, keep_evenly_spaced(val, self.cfg.trainer.get("val_images")), self.cfg.cache_dir)
        case = self._case(facts)
        by_data, tried = self._way(case)
        chosen = [*by_data, *tried.choices, *self._batch(tried, by_data, case)]
        if not tried.is_closed_form:
            tried = replace(tried, length=self._length(tried.cfg, tried.timed, facts))  # less time is left
        chosen += [*self._rates(tried.cfg), *self._views(tried), self._steps(tried, self._composed(chosen), facts)]
        self.about = headline(facts, self._minutes, self.engine.device.type)
        return chosen

    def _case(self, facts: Facts) -> Case:
        model = self._model
        return Case(
            facts,
            self.engine.device.type,
            model.patch_size / self.cfg.resolution.scale,
            model.backbone.depth,
            sum(parameter.numel() for parameter in model.backbone.parameters()),
            self.cfg.resolution.longest,
            self.cfg.choices.head if "head" in self.given else None,
            even=model.patch_size % 2 == 0,
        )

    def _way(self, case: Case) -> tuple[list[Choice], Tried]:
        """Choose how to train the backbone; return the choices that follow from the data, and the timed candidate.

        Both are chosen together, since smaller images may leave time to tune the backbone. The cheapest candidate is
        timed first. The others follow in order of preference while there is time for the search.
        """
        candidates = self._candidates(case)
        first = self._try(candidates[0], 1, len(candidates))
        whole: Tried | None = None  # tunes the backbone, on images that are not reduced further
        enough: tuple[Candidate, Tried, float, str] | None = None
        slow = skipped = ""  # notes on candidates with too little time, and on candidates that were not timed
        for number, candidate in enumerate(candidates[1:], start=2):
            tried = self._try(candidate, number, len(candidates))
            if isinstance(tried, str):
                skipped += f"; {tried}"
                continue
            if tried.length.images >= candidate.surely:
                return self._settled(candidate, tried, slow + skipped)
            whole = tried if candidate.case is case else whole
            fewest = max(candidate.least, rules.LEAST_STEPS * _per_step(tried.cfg))
            if enough is None and tried.length.images >= fewest:
                enough = candidate, tried, fewest, slow  # without the notes on this candidate and later ones
            of = " that are smaller" if candidate.case.smaller < 1 else ""
            adapter = tried.cfg.choices.adapter
            slow += f"; with adapter={adapter} there would be time for {tried.length.images} images{of}"
        if enough is not None:
            candidate, tried, fewest, before = enough
            tried = replace(tried, length=self._length(tried.cfg, tried.timed, case.facts))  # less time is left by now
            if tried.length.images >= fewest:
                return self._settled(candidate, tried, before + skipped)
        if whole is not None and (rested := self._rested(whole, case)):
            return rules.by_data(case), _noted(rested, slow + skipped)
        if isinstance(first, str):
            raise OutOfMemory(first)
        return self._shortened(*self._settled(candidates[0], first, slow + skipped), case)

    def _settled(self, candidate: Candidate, tried: Tried, notes: str) -> tuple[list[Choice], Tried]:
        return rules.by_data(candidate.case), _noted(tried, notes)

    def _candidates(self, case: Case) -> list[Candidate]:
        """Return the candidates: the cheapest (the fallback) first, then the others in order of preference."""
        any_number, never = -math.inf, math.inf
        if "adapter" in self.given:
            return [Candidate(case, Choice({"adapter": self.cfg.choices.adapter}, "as given"), any_number, never)]
        *tuned, frozen = rules.ways(case)
        candidates = [Candidate(case, frozen, any_number, never)]
        for way in tuned:
            least = never if self._may_rest(case) else rules.least_tuned(case)
            candidates.append(Candidate(case, way, rules.SURELY_TUNED, least))
            less = rules.smaller(case)
            if less is not None and not self._sizes_given:
                candidates.append(Candidate(less, rules.ways(less)[0], rules.LEAST_SMALLER, never))
        return candidates

    @property
    def _sizes_given(self) -> bool:
        return any(key.partition(".")[0] == "resolution" for key in self.given)

    def _rested(self, tuned: Tried, case: Case) -> Tried | None:
        """Return the variant that freezes the backbone at first; None if it was not timed or takes too long."""
        if tuned.timed.resting is None:
            return None
        image = rules.REST * tuned.timed.resting + (1 - rules.REST) * tuned.timed.image
        timed = replace(tuned.timed, image=image, kept=None)
        length = self._length(tuned.cfg, timed, case.facts)
        if length.images < max(rules.LEAST_RESTED, rules.LEAST_STEPS * _per_step(tuned.cfg)):
            return None
        return Tried((rules.rested(case), *tuned.choices[1:]), tuned.cfg, timed, length)

    def _may_rest(self, case: Case) -> bool:
        able = "backbone_begin" in self.cfg.optim.optimizer and self.cfg.engine.devices == 1  # saves ranks no time
        typed = self.given & {"adapter", "optim.optimizer.backbone_begin"}
        return able and not typed and case.sees_pixels and case.smaller == 1

    def _try(self, candidate: Candidate, number: int, count: int) -> Tried | str:
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
        if number > 1 and left <= max(self._least_timed, self._longest):
            return f"{words} was not tried, since the time for choosing was spent"
        by_data = rules.by_data(candidate.case)
        choices, cfg = self._composed_for([*by_data, candidate.way], candidate.case)
        height, width = cfg.resolution.crop
        self.tell(
            f"times adapter={cfg.choices.adapter} head={cfg.choices.head} on crops of {height} x {width} (height x "
            f"width): candidate {number} of at most {count}, {max(0.0, left):.0f} s at most"
        )
        try:
            if left < self._least_timed:
                raise TimeoutError
            timed = self._time(cfg, candidate.case, left)
        except OutOfMemory as error:
            return f"{words} does not fit the memory" if number > 1 else str(error)
        except TimeoutError:
            if number > 1:
                return f"{words} was stopped, since timing it took longer than {left:.0f} s"
            timed = unmeasured(max(left, self._least_timed))
        self._longest = max(self._longest, monotonic() - began)
        return Tried(tuple(choices[len(by_data) :]), cfg, timed, self._length(cfg, timed, candidate.case.facts))

    def _composed_for(self, choices: Sequence[Choice], case: Case) -> tuple[list[Choice], DictConfig]:
        """Return `choices` extended by the choices that follow from them, and the config for timing."""
        trial = self._least_batch(case)
        adapter = choices[-1].words["adapter"]
        trains = self._trains_backbone(self.cfg) if "adapter" in self.given else adapter != "frozen"
        found = [*choices, rules.zoom(trains=trains, pixels=case.sees_pixels)]
        cfg = self._composed([trial, *found])
        changes = self.memory.changes(cfg)
        return ([*found, *changes], self._composed([trial, *found, *changes])) if changes else (found, cfg)

    def _trains_backbone(self, cfg: DictConfig) -> bool:
        """Return whether any backbone parameter is trained; cached per adapter, since it needs a model outline."""
        key = repr(plain(cfg.adapter))
        if key not in self._trained:
            self._trained[key] = build.outline(cfg).backbone.first_trained is not None
        return self._trained[key]

    def _time(self, cfg: DictConfig, case: Case, seconds: float) -> Seconds:
        until = monotonic() + _MEASURING * seconds
        work = partial(
            time_recipe, minutes=self._minutes, may_rest=self._may_rest(case), ranks=self._ranks, until=until
        )
        timed = in_own_process(work, plain(cfg), timeout=seconds)
        if timed is None:
            raise OutOfMemory("Memory did not suffice for a few steps. mode=plan says what fits.")
        return timed

    def _shortened(self, by_data: list[Choice], tried: Tried, case: Case) -> tuple[list[Choice], Tried]:
        """Return a training of at least `LEAST_STEPS` steps: on smaller images, else a head solved in closed form."""
        least = rules.LEAST_STEPS * _per_step(tried.cfg)
        if not self._sizes_given and case.longest is None:
            whole = tried.timed
            for smaller in rules.SHRUNK:
                if tried.length.images >= least:
                    break
                by_data = rules.by_data(replace(case, smaller=smaller))
                cfg = self._composed([*by_data, self._least_batch(case), *tried.choices])
                timed = whole.on_smaller_images(smaller)
                tried = replace(tried, cfg=cfg, timed=timed, length=self._length(cfg, timed, case.facts))
        heads = any(key.partition(".")[0] == "head" for key in self.given)
        if tried.length.images >= least or heads or "data.labelled" in self.given or self._trains_backbone(tried.cfg):
            return by_data, tried
        choice = rules.closed_form(self._left, tried.timed.frozen or tried.timed.image, case.facts)
        cfg = self._composed([*by_data, self._least_batch(case), *tried.choices, choice])
        length = replace(tried.length, images=0, views=None)
        return by_data, replace(tried, choices=(*tried.choices, choice), cfg=cfg, length=length, is_closed_form=True)

    @property
    def _least_timed(self) -> float:
        """Seconds below which timing a candidate is not worth starting its process."""
        return _LEAST_TIMED * 60 * self._minutes

    @property
    def _left(self) -> float:
        """Seconds left for the training: at least a fixed share of the budget, however long the search took."""
        return max(self._ends - monotonic(), _LEAST_LEFT * 60 * self._minutes)

    def _length(self, cfg: DictConfig, timed: Seconds, facts: Facts) -> Length:
        """Return the training length that fits into the remaining time."""
        return length_within(self._left, timed, facts, views=self._possible_views(cfg, timed, facts))

    def _batch(self, tried: Tried, by_data: Sequence[Choice], case: Case) -> Iterator[Choice]:
        """Yield the batch size: the desired one, or the largest below it that fits into memory.

        Nothing is yielded if fitting the memory has already set the batch size.
        """
        if any("data.batch_size" in choice.words for choice in tried.choices):
            return
        sized = partial(rules.batch, tried.length.images, case.facts, self.cfg.engine.devices)
        sized = partial(sized, accumulate=tried.cfg.trainer.accumulate)
        wanted, tried_with = sized(), self._least_batch(case)
        for most in rules.BATCHES:
            choice = sized(most=most)
            if choice.words == tried_with.words:
                break
            if self.memory.fits(self._composed([*by_data, *tried.choices, choice])):
                break
        less = "" if choice.words == wanted.words else f"; {wanted.words['data.batch_size']} would not fit the memory"
        yield replace(choice, reason=f"{choice.reason}{less}")

    def _least_batch(self, case: Case) -> Choice:
        return rules.batch(0, case.facts, self.cfg.engine.devices)

    def _possible_views(self, cfg: DictConfig, timed: Seconds, facts: Facts) -> list[int | None]:
        if "data.views" in self.given:
            return [cfg.data.views]
        free = shutil.disk_usage(_existing(Path(cfg.cache_dir).expanduser())).free - _ROOM
        if timed.kept is None or cfg.data.class_mix or cfg.engine.cache == "off":
            return [None]
        held = [views for views in rules.VIEWS if timed.bytes * (views * facts.images + facts.val_images) < free]
        return [None, *held]

    def _rates(self, cfg: DictConfig) -> Iterator[Choice]:
        optimizer = cfg.optim.optimizer
        words: dict[str, float] = {"optim.optimizer.head_lr": optimizer.head_lr}
        told = f"{optimizer.head_lr:g} is what head={cfg.choices.head} learns at by its file"
        if self._trains_backbone(cfg):
            words["optim.optimizer.backbone_lr"] = optimizer.backbone_lr
            told += f", {optimizer.backbone_lr:g} adapter={cfg.choices.adapter}"
        yield Choice(words, told)

    def _views(self, tried: Tried) -> Iterator[Choice]:
        if tried.length.views is not None:
            yield Choice(
                {"data.views": tried.length.views},
                f"features of {count_of(tried.length.views, 'view')} of each image are kept (engine.cache="
                f"{tried.cfg.engine.cache}): {tried.timed.kept:.2g} s an image in place of {tried.timed.image:.2g} s",
            )

    def _steps(self, tried: Tried, cfg: DictConfig, facts: Facts) -> Choice:
        length, words = tried.length, dict[str, Any]()
        steps = max(1, length.images // _per_step(cfg))
        words["trainer.steps"], words["trainer.val_every"] = steps, math.ceil(steps / length.validations)
        # counted from now: choosing the batch size and composing the config took time, too
        limit = length_within(self._left, tried.timed, facts, views=[length.views]).limit
        words["trainer.max_minutes"] = float(f"{limit / 60:.3g}")
        fewer = ""
        if length.val_images is not None:
            words["trainer.val_images"] = length.val_images
            fewer = f"; there is no time to validate more than {count_of(length.val_images, 'image')} at once"
        return Choice(
            words,
            f"{self._left / 60:.1f} of {self._minutes:g} minutes are left, "
            f"{tried.length.spent:.0f} s of them for the start, {count_of(tried.length.validations, 'validation')} and "
            f"the scoring; {FLOOR:.0%} are counted for the closed form, {1 - SURE:.0%} stay free{fewer}",
        )

    def _composed(self, choices: Sequence[Choice]) -> DictConfig:
        return self.compose(left_of(choices, self.given)[0])


def _per_step(cfg: DictConfig) -> int:
    return int(cfg.data.batch_size * cfg.trainer.accumulate)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _noted(tried: Tried, notes: str) -> Tried:
    """Return `tried` with notes on the other candidates appended to the reason of its first choice."""
    first, *others = tried.choices
    return replace(tried, choices=(replace(first, reason=f"{first.reason}{notes}"), *others))
