"""A recipe for data, memory and time: facts, then rules, then what is measured of the recipe that they give."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated

from omegaconf import DictConfig

from dinoseg import build
from dinoseg.choosing import rules
from dinoseg.choosing.facts import Facts, facts_of, headline
from dinoseg.choosing.given import left_of
from dinoseg.choosing.length import FLOOR, SURE, Length, length_within
from dinoseg.choosing.memory import Memory
from dinoseg.choosing.rules import Case, Choice
from dinoseg.choosing.timing import Seconds, time_recipe
from dinoseg.config.checks import check_given
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.costs.trial import check_alone
from dinoseg.errors import UserError
from dinoseg.inference.memory import OutOfMemory
from dinoseg.processes.workers import in_own_process
from dinoseg.ranges import Range
from dinoseg.training.engine import Engine
from dinoseg.wording import count_of

Compose = Callable[[Sequence[Choice]], DictConfig]
Minutes = Annotated[float, Range("a number of minutes above 0 and at most 1000000 (two years)", 0, 1e6, open_at=(0,))]
_ROOM = 2**30  # bytes of the disk that kept features leave


@dataclass(frozen=True)
class Tried:
    """A way to train that was measured.

    Attributes:
        choices: by which it is this one.
        cfg: with these.
        timed: what it takes.
        length: what of it fits into the time.
    """

    choices: tuple[Choice, ...]
    cfg: DictConfig
    timed: Seconds
    length: Length


class Chooser:
    """Chooses for one data set and machine.

    Args:
        compose: gives the whole config with choices, under what was typed.
        given: keys and groups that were typed, which are taken as they are.
        minutes: for everything, from now on.
        tell: takes what is done next, in words.
        joined: ranks of this machine that torchrun or Slurm has started, each with its share of the processors; 0: the
            training starts its own.

    Attributes:
        about: what was chosen for, in words; known once that is done.
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
        self._ends, self._minutes = monotonic() + 60 * minutes, minutes
        self.cfg = compose(())
        if self.cfg.trainer.feed != "images":
            raise UserError(
                f"hparam=auto chooses for images and their masks, not for trainer={self.cfg.choices.trainer}. Give a "
                "recipe by its name: mode=help lists them."
            )
        check_alone(self.cfg)
        build.lengths(self.cfg, samples=1)  # refuses what is no number of steps or batches, as the training would
        drawn = {key: self.cfg.data[key] for key in ("batch_size", "views", "class_mix")}
        check_given("dinoseg.training.image_feed.ImageFeed", drawn, {key: f"data.{key}" for key in drawn})
        self.engine: Engine = instantiate(self.cfg.engine, instead={"devices": 1})
        devices, on_cpu = self.cfg.engine.devices, self.engine.device.type == "cpu"
        self.memory = Memory(self.engine, given, ranks=(joined or devices) if on_cpu else 1)
        # ranks that the training itself starts on a CPU share the threads with which one alone is timed
        self._ranks = 1 if on_cpu and not joined else devices

    def choose(self) -> list[Choice]:
        """Return the choices, in the order in which they were made; those too that were typed otherwise.

        Raises:
            UserError: the time is too short, or memory does not suffice for any way.
        """
        train, val = build.dataset(self.cfg, "train", reduced=True), build.dataset(self.cfg, "val")
        facts = facts_of(train, val, self.cfg.cache_dir)
        case = self._case(facts)
        by_data, tried = self._way(case)
        chosen = [*by_data, *tried.choices, *self._batch(tried, by_data, case)]
        tried = replace(tried, length=self._length(tried.cfg, tried.timed, facts))  # that took time, too
        chosen += [*self._rates(tried.cfg), *self._views(tried), self._steps(tried, self._composed(chosen))]
        self.about = headline(facts, self._minutes, self.engine.device.type)
        return chosen

    def _case(self, facts: Facts) -> Case:
        model = build.outline(self.cfg)
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
        """Return the first way of training the backbone for which there is time, the last one in any case.

        With it, what the data decides: smaller images may leave time to tune.
        """
        short: UserError | None = None
        whole: Tried | None = None  # that tunes the backbone, on images that are no smaller
        enough: tuple[list[Choice], Tried, float] | None = None
        slow = ""
        for seen, way, wanted, least in self._ways(case):
            if enough is not None and wanted < 0:
                by_data, tried, fewest = enough
                tried = replace(tried, length=self._length(tried.cfg, tried.timed, case.facts))  # of what time is left
                if tried.length.images >= fewest:
                    return by_data, tried
            if wanted < 0 and whole is not None and (rested := self._rested(whole, case)):
                return rules.by_data(case), rested
            by_data = rules.by_data(seen)
            way = replace(way, reason=f"{way.reason}{slow}")
            try:
                tried = self._tried([*by_data, way], seen)
            except OutOfMemory as error:
                short = error
                continue
            tried = replace(tried, choices=tried.choices[len(by_data) :])
            if tried.length.images >= wanted:
                self._check_time(tried, case.facts)
                return by_data, tried
            whole = tried if seen is case else whole
            fewest = max(least, rules.LEAST_STEPS * _per_step(tried.cfg))
            if tried.length.images >= fewest:
                enough = by_data, tried, fewest
            of = " that are smaller" if seen.smaller < 1 else ""
            adapter = tried.cfg.choices.adapter
            slow += f"; with adapter={adapter} there would be time for {tried.length.images} images{of}"
        assert short is not None
        raise short

    def _ways(self, case: Case) -> Iterator[tuple[Case, Choice, float, float]]:
        """Yield ways of training, the best first; with how many images each is taken, and with how many by the last."""
        any_number, never = -math.inf, math.inf
        if "adapter" in self.given:
            yield case, Choice({"adapter": self.cfg.choices.adapter}, "as given"), any_number, never
            return
        *tuned, frozen = rules.ways(case)
        for way in tuned:
            yield case, way, rules.SURELY_TUNED, never if self._may_rest(case) else rules.least_tuned(case)
            less = rules.smaller(case)
            if less is not None and not any(key.partition(".")[0] == "resolution" for key in self.given):
                yield less, rules.ways(less)[0], rules.LEAST_SMALLER, never
        yield case, frozen, any_number, never

    def _rested(self, tuned: Tried, case: Case) -> Tried | None:
        """Return the way that tunes the backbone once the head has learnt while it rests, if there is time for it."""
        if tuned.timed.resting is None:
            return None
        image = rules.REST * tuned.timed.resting + (1 - rules.REST) * tuned.timed.image
        timed = replace(tuned.timed, image=image, kept=None)
        length = self._length(tuned.cfg, timed, case.facts)
        if length.images < max(rules.LEAST_RESTED, rules.LEAST_STEPS * _per_step(tuned.cfg)):
            return None
        return Tried((rules.rested(case), *tuned.choices[1:]), tuned.cfg, timed, length)

    def _may_rest(self, case: Case) -> bool:
        able = "backbone_begin" in self.cfg.optim.optimizer and self.cfg.engine.devices == 1  # ranks gain no time by it
        typed = self.given & {"adapter", "optim.optimizer.backbone_begin"}
        return able and not typed and case.sees_pixels and case.smaller == 1

    def _tried(self, choices: Sequence[Choice], case: Case) -> Tried:
        trial = self._least_batch(case)
        cfg = self._composed([*choices, trial])
        choices = [*choices, _zoom(cfg), *self.memory.changes(cfg)]
        cfg = self._composed([trial, *choices])
        height, width = cfg.resolution.crop
        way = f"adapter={cfg.choices.adapter} head={cfg.choices.head}"
        self.tell(f"measures steps of {way} on crops of {height} x {width} (height x width)")
        time = partial(time_recipe, minutes=self._minutes, may_rest=self._may_rest(case), ranks=self._ranks)
        if (timed := in_own_process(time, plain(cfg))) is None:
            raise OutOfMemory("Memory did not suffice for a few steps. mode=plan says what fits.")
        return Tried(tuple(choices), cfg, timed, self._length(cfg, timed, case.facts))

    def _length(self, cfg: DictConfig, timed: Seconds, facts: Facts) -> Length:
        """Return what fits into the time that is left."""
        views = self._possible_views(cfg, timed, facts)
        return length_within(self._ends - monotonic(), timed, facts, views=views)

    def _batch(self, tried: Tried, by_data: Sequence[Choice], case: Case) -> Iterator[Choice]:
        """Yield how many images are taken at once, where memory has not decided it: no more than fit."""
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

    def _check_time(self, tried: Tried, facts: Facts) -> None:
        """Refuse a time in which hardly a step is left beside one validation."""
        least = rules.LEAST_STEPS * _per_step(tried.cfg)
        if tried.length.images >= least:
            return
        spent = 60 * self._minutes - (self._ends - monotonic())
        needed = (spent + 1.2 * (tried.length.spent + least * tried.timed.image)) / 60
        raise UserError(
            f"budget.minutes={self._minutes:g} is too short for one validation of "
            f"{count_of(facts.val_images, 'image')} and {count_of(rules.LEAST_STEPS, 'step')}: a validation takes "
            f"{facts.val_images * tried.timed.val:.1f} s here, a training image {tried.timed.image:.2g} s, and "
            f"choosing took {spent:.0f} s. Give budget.minutes={math.ceil(10 * needed) / 10:g} or more, or name a "
            "recipe."
        )

    def _rates(self, cfg: DictConfig) -> Iterator[Choice]:
        optimizer = cfg.optim.optimizer
        words: dict[str, float] = {"optim.optimizer.head_lr": optimizer.head_lr}
        told = f"{optimizer.head_lr:g} is what head={cfg.choices.head} learns at by its file"
        if _is_tuned(cfg):
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

    def _steps(self, tried: Tried, cfg: DictConfig) -> Choice:
        steps = max(1, tried.length.images // _per_step(cfg))
        return Choice(
            {"trainer.steps": steps, "trainer.val_every": math.ceil(steps / tried.length.validations)},
            f"{(self._ends - monotonic()) / 60:.1f} of {self._minutes:g} minutes are left, "
            f"{tried.length.spent:.0f} s of them for the start, {count_of(tried.length.validations, 'validation')} and "
            f"the scoring; {FLOOR:.0%} are counted for the closed form, {1 - SURE:.0%} stay free",
        )

    def _composed(self, choices: Sequence[Choice]) -> DictConfig:
        return self.compose(left_of(choices, self.given)[0])


def _per_step(cfg: DictConfig) -> int:
    return int(cfg.data.batch_size * cfg.trainer.accumulate)


def _is_tuned(cfg: DictConfig) -> bool:
    return build.outline(cfg).backbone.first_trained is not None


def _zoom(cfg: DictConfig) -> Choice:
    return rules.zoom(trains=_is_tuned(cfg), pixels=cfg.choices.head == "detail")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
