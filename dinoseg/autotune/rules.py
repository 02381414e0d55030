"""The rules by which `hparam=auto` chooses: a function each, in the order in which they are asked, with its reason.

A rule sees a `Case` and says which keys it sets and why, or None where it has nothing to say. What it rests on stands
beside it, measured in docs/results.md and docs/experiments.md; where nothing was measured it says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinoseg.autotune.facts import ClassFacts, Facts
from dinoseg.config.plain import BUILDS
from dinoseg.utils.wording import count_of

PATCHES = {"cpu": 1200}  # of an image, by device: what a CPU trains on at several images a second with a small backbone
PATCHES_ELSE = 4096  # attention is quadratic in them
THIN = 0.5  # of a patch: CamVid's poles, 2 to 5 px of 16, were found by no head on patches alone
RARE = 0.02  # of the pixels; CamVid's poles have 1.03 %, and gained by their weight
SMALL_BACKBONE = 40_000_000  # parameters that are all trained at 1e-4; larger ones by LoRA
FEW_IMAGES = 20  # by which a whole backbone would be fitted to them; not measured
SURELY_TUNED = 2500  # images that are trained on, with which nothing but tuning is tried
LEAST_TUNED = 600  # with which it wins over a frozen backbone, however long that one trains, under a head on tokens
LEAST_TUNED_DETAIL = 1500  # under one that sees pixels, too, and gets further on a frozen backbone
REST = 0.4  # share of a training in which the backbone rests, and steps take less time
LEAST_RESTED = 1000  # images that are trained on, in all, with which that wins over a frozen backbone
SMALLER = 2 / 3  # of the images' sides, where that leaves time to tune the backbone
LEAST_SMALLER = 1200  # images of that size that are trained on, for it to win
THIN_WEIGHT = 3.0  # of a class that is thin and rare, where others have 1
THIN_DICE = 2.0  # times the overlap, beside such weights
VIEWS = (4, 2, 1)  # of each image, whose features are kept
LEAST_USES = 1.5  # of each kept view
LEAST_GAIN = 1.2  # times as many images, below which views that never come twice are better
BATCHES = (8, 4, 2)
ENOUGH_STEPS = 1500  # below which a smaller batch is taken: detail did best in 1,500 to 2,000 steps of 2
MOST_VALIDATIONS = 5
VALIDATING = 0.05  # share of the time, at most, beside the scoring at the end
SCORING = 0.3  # share of the time, at most, of one validation and that scoring: else fewer images are validated
CHOOSING = 0.25  # share of the time, at most, in which candidates are timed
SHRUNK = (0.5, 0.25)  # of the images' sides, where the time is too short for larger ones
DEPTH = 4  # blocks that heads other than linear read
LEAST_STEPS = 10  # below which nothing is learnt: images shrink, then the closed form takes the place of training


@dataclass(frozen=True)
class Choice:
    """What is set, and why.

    Attributes:
        words: keys of the config, and groups, with their values.
        reason: a sentence without its full stop.
    """

    words: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Case:
    """What is chosen for.

    Attributes:
        facts: of the data.
        device: cpu, cuda or mps.
        patch: px of the image that a patch sees on a side.
        depth: blocks of the backbone.
        parameters: of it.
        longest: to which images are reduced, where that is given.
        head: where that is given.
        smaller: what the sides of images are multiplied by, so that there is time to tune the backbone.
        even: whether patches have an even number of pixels, as a head that sees pixels needs it.
    """

    facts: Facts
    device: str
    patch: float
    depth: int
    parameters: int
    longest: int | None = None
    head: str | None = None
    smaller: float = 1.0
    even: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """The median (H, W) as a model sees it, reduced to the patches that this device bears."""
        height, width = self.facts.size
        most = PATCHES.get(self.device, PATCHES_ELSE) * self.patch**2
        factor = min(1.0, (most / (height * width)) ** 0.5) * self.smaller
        if self.longest is not None:
            factor = min(1.0, self.longest / max(height, width))
        return round(factor * height), round(factor * width)

    @property
    def reduced(self) -> float:
        """What lengths in the images are multiplied by."""
        return max(self.size) / max(self.facts.size)

    @property
    def thin(self) -> list[ClassFacts]:
        """Classes whose parts are thinner than the grid of patches resolves."""
        return self.facts.thinner(THIN * self.patch / self.reduced)

    @property
    def sees_pixels(self) -> bool:
        """Whether the head sees pixels beside tokens."""
        return (head(self).words["head"] if self.head is None else self.head) == "detail"


Rule = Callable[[Case], Choice | None]


def longest(case: Case) -> Choice | None:
    """Reduce images that have more patches than the device bears."""
    if case.longest is not None or case.reduced == 1:
        return None
    height, width = case.facts.size
    if case.smaller in SHRUNK:
        return Choice(
            {"resolution.longest": max(case.size)},
            f"the time is too short for {LEAST_STEPS} steps on images of {height} x {width} (median)",
        )
    if case.smaller < 1:
        return Choice(
            {"resolution.longest": max(case.size)},
            f"images of {height} x {width} (median), smaller by a third, leave time to tune the backbone, which brings "
            "more than pixels where no class is thin",
        )
    lost = f"; {_named(case.thin)} become thinner still: give a larger one where they matter" if case.thin else ""
    return Choice(
        {"resolution.longest": max(case.size)},
        f"images of {height} x {width} (median) are {height * width / case.patch**2:.0f} patches, more than the "
        f"{PATCHES.get(case.device, PATCHES_ELSE)} that a {case.device} is given{lost}",
    )


def crop(case: Case) -> Choice | None:
    """Take whole images as crops, down to whole patches: what is validated is then what was trained."""
    patch = max(1, round(case.patch))
    sides = [max(patch, side // patch * patch) for side in case.size]
    return Choice(
        {"resolution.crop": sides}, f"whole images (median {case.size[0]} x {case.size[1]}), in patches of {patch}"
    )


def head(case: Case) -> Choice:
    """Let a head see pixels beside tokens, whether or not classes are thinner than patches.

    Frozen ViT-Tiny, CamVid: detail 0.646, multiscale 0.563 of mIoU, linear 0.533. Of a budget of ten minutes, all
    weights, IDD-Lite: detail 0.656 in 605 s, multiscale 0.632 in 508 s (seed 0); no class is thin there.
    """
    if case.depth < DEPTH:
        return Choice({"head": "linear"}, f"the backbone has {count_of(case.depth, 'block')}, too few to read several")
    if not case.even:
        return Choice({"head": "multiscale"}, "four blocks tell more than one; detail takes no patches of an odd size")
    if not case.thin:
        return Choice({"head": "detail"}, "it sees pixels beside four blocks, and no other did better on three sets")
    return Choice(
        {"head": "detail"},
        f"{_named(case.thin)} {'is' if len(case.thin) == 1 else 'are'} thinner than half a patch "
        f"({_widths(case)} of {case.patch / case.reduced:.0f} px): the head sees pixels, too",
    )


def loss(case: Case) -> Choice | None:
    """Count the overlap of each class beside its pixels.

    CamVid, frozen, multiscale: 0.563 with it, 0.545 without. Weights of `median` lost 5 points of mIoU under detail;
    three times the weight of poles alone, with dice counted twice, had poles at 0.211 and 0.170, a mIoU of 0.650 and
    0.654, where without it was 0.099 and 0.641; these are 1.03 % of the pixels.
    """
    slender = [each for each in case.thin if each.share < RARE and each.name not in BUILDS]
    if slender and case.depth >= DEPTH:
        weights = {each.name: THIN_WEIGHT for each in slender}
        return Choice(
            {"loss": "ce_dice", "loss.weights": weights, "loss.criterion.factors.dice": THIN_DICE},
            f"{_named(slender)} {'is' if len(slender) == 1 else 'are'} thin, with below {RARE:.0%} of the pixels: what "
            f"is missed there weighs {THIN_WEIGHT:g} times, and overlap counts twice",
        )
    rare = case.facts.rarer(RARE)
    told = f"{_named(rare)} {'has' if len(rare) == 1 else 'have'} below {RARE:.0%} of the pixels; " if rare else ""
    return Choice(
        {"loss": "ce_dice", "loss.weights": "none"},
        f"{told}overlap counts each class alike, whatever its pixels; weights by rarity cost the other classes more",
    )


BY_DATA: Sequence[Rule] = (longest, crop, head, loss)


def by_data(case: Case) -> list[Choice]:
    """Return what the data alone decides."""
    return [found for rule in BY_DATA if (found := rule(case))]


def smaller(case: Case) -> Case | None:
    """Return the case with smaller images, where no class would be thin in them.

    person, ViT-Tiny: 0.919 by LoRA after 1,200 images of 320 px, 0.894 frozen after 4,325 of 480 px; under multiscale,
    and not measured under detail.
    """
    made = replace(case, smaller=SMALLER)
    return None if case.longest is not None or made.thin else made


def ways(case: Case) -> list[Choice]:
    """Return how the backbone may be trained, the best first; each is taken if time suffices, the last in any case.

    CamVid, multiscale: all weights 0.615 after 600 images and 0.664 after 3,360, LoRA 0.619 after 2,800, frozen 0.563
    after 4,000. Detail: all weights 0.628 after 600 images and 0.694 after 2,400, frozen 0.664 after 3,000.
    """
    frozen = Choice(
        {"adapter": "frozen"}, "the backbone stays as it is: its features can be kept, and a step takes less"
    )
    if case.facts.images < FEW_IMAGES or not case.parameters:
        return [frozen]
    tuned = _tuned(case)
    won = "won with fewer images of this size" if case.smaller < 1 else f"won from about {least_tuned(case)} images on"
    return [Choice(tuned.words, f"{tuned.reason}, which {won}"), frozen]


def least_tuned(case: Case) -> int:
    """Return how many images have to be trained on, for tuning to win over a frozen backbone in the same time."""
    return LEAST_TUNED_DETAIL if case.sees_pixels else LEAST_TUNED


def rested(case: Case) -> Choice:
    """Let the backbone rest at first, under a head that sees pixels and gets far without it.

    CamVid, detail, ten minutes of two cores: 0.689 so, 0.670 frozen.
    """
    tuned = _tuned(case)
    return Choice(
        {**tuned.words, "optim.optimizer.backbone_begin": REST},
        f"{tuned.reason}, once the head has learnt on a backbone that rests for {REST:.0%} of the training, in steps "
        "that take less time",
    )


def closed_form(seconds: float, image: float, facts: Facts) -> Choice:
    """Solve a linear head from as many images as there is time for, where there is none for training.

    Args:
        seconds: for everything that is left.
        image: seconds in which the frozen backbone sees one.
        facts: of the data.
    """
    images = max(2, int(seconds / 3 / image))
    words: dict[str, Any] = {"head": "linear", "head.init": "probe"}
    if images < facts.images:
        words["data.labelled"] = float(f"{images / facts.images:.6g}")
    return Choice(words, f"there is no time for {LEAST_STEPS} steps: the head is solved in closed form")


def zoom(*, trains: bool, pixels: bool = False) -> Choice:
    """Enlarge views at random where the backbone learns from them, or the head sees pixels.

    CamVid, frozen, linear: 0.498 after 1,000 steps with factors of 0.75 to 1.5, 0.533 after 500 without. Detail
    learnt poles with factors of 1 to 1.5 (see `loss`).
    """
    if trains:
        return Choice(
            {"data.augment.scale": [1.0, 1.5]}, "a backbone that is tuned learns from views enlarged at random"
        )
    if pixels:
        return Choice(
            {"data.augment.scale": [1.0, 1.5]}, "a head that sees pixels learns from views enlarged at random"
        )
    return Choice({"data.augment.scale": [1.0, 1.0]}, "a head alone fits images of one scale best")


def batch(images: int, facts: Facts, devices: int, *, accumulate: int = 1, most: int = BATCHES[0]) -> Choice:
    """Take fewer images at once where steps would be few: a head begins from nothing, and steps count more.

    CamVid, detail: in batches of 2 ahead of 4 after as many images. On several devices each has its share.

    Args:
        images: that are trained on.
        facts: of the data.
        devices: that share a batch.
        accumulate: batches in a step.
        most: images at once that memory bears.
    """
    sizes = [size for size in BATCHES if size <= most and images // (size * accumulate) >= ENOUGH_STEPS]
    size = max(devices, min((*sizes, BATCHES[-1])[0], facts.images) // devices * devices)
    steps = count_of(images // (size * accumulate), "step")
    return Choice({"data.batch_size": size}, f"{images} images can be trained on, which are {steps}")


def _tuned(case: Case) -> Choice:
    millions = f"{case.parameters / 1e6:.3g} million parameters"
    if case.parameters <= SMALL_BACKBONE:
        return Choice({"adapter": "full"}, f"{millions}: all of them are tuned")
    return Choice({"adapter": "lora_all"}, f"{millions}: low-rank updates of all layers take less memory")


def _named(classes: Sequence[ClassFacts]) -> str:
    names = [each.name for each in classes[:3]]
    more = len(classes) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _widths(case: Case) -> str:
    return ", ".join(f"{each.width:.0f}" for each in case.thin[:3])
