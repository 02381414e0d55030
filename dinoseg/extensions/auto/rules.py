"""Rules of `hparam=auto`: functions from a `RecipeCase` to config keys and a reason, in the order of their use.

Their evidence, measured in docs/log, is next to them; rules without measurements say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinoseg.config.plain import BUILDS
from dinoseg.extensions.auto.facts import ClassFacts, DatasetFacts
from dinoseg.extensions.auto.timing import RecipeTimes
from dinoseg.utils.wording import count_of

PATCHES = {"cpu": 1200}  # patches per image; a CPU trains a small backbone at several images a second
PATCHES_ELSE = 4096  # on other devices; the cost of attention is quadratic in the number of patches
THIN = 0.5  # of a patch side; CamVid's poles (2 to 5 px of 16) were found by no head that sees patches only
RARE = 0.02  # share of the pixels; CamVid's poles have 1.03 % and gained from class weights
SMALL_BACKBONE = 40_000_000  # parameters; up to this size all are trained, at 1e-4, larger backbones by LoRA
FEW_IMAGES = 20  # with fewer, training the whole backbone would overfit; not measured
SURELY_TUNED = 2500  # training images (with repetition) from which the backbone is trained from the first step on
MIN_TUNED = 600  # from which tuning beats a frozen backbone, however long that trains, with a head on tokens
MIN_TUNED_DETAIL = 1500  # the same with a head that also sees pixels, which does better on a frozen backbone
MIN_FROZEN_FIRST = 1000  # from which freezing the backbone at first beats a backbone that stays frozen
FROZEN_SHARE = 0.4  # share of such a training with a frozen backbone, whose steps are faster
THIN_WEIGHT = 3.0  # of thin and rare classes; others have 1
THIN_DICE = 2.0  # factor of the dice loss, together with such weights
VIEWS = 4  # fixed views of each image, whose features are cached
MIN_USES = 1.5  # minimum uses of each cached view
MIN_GAIN = 1.2  # minimum gain in training images; below it, new views in each epoch are better
BATCHES = (8, 4, 2)
ENOUGH_STEPS = 1500  # fewer steps lead to a smaller batch: detail did best in 1,500 to 2,000 steps of 2 images
MAX_VALIDATIONS = 5
VALIDATING = 0.05  # maximum share of the time, besides the final evaluation
SCORING = 0.3  # maximum share of the time for one validation and the final evaluation; else fewer images are validated
DEPTH = 4  # blocks that heads other than linear read
# below this the closed-form linear probe scores higher: CamVid 0.468, 35 steps 0.463, 6 steps 0.299; on IDD-Lite and
# person, some 40 steps score 6 to 11 points higher than the probe
MIN_STEPS = 10
SURE = 0.95  # share of the time to plan with, since the load of the machine varies
_SCORED = 2.0  # cost of the final evaluation in validations; it also draws figures and a report


@dataclass(frozen=True)
class RecipeChoice:
    """Config overrides with a reason.

    Attributes:
        words: config keys and groups with their values.
        reason: a sentence without its full stop.
    """

    words: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class RecipeCase:
    """Inputs of the rules: data, device, backbone and typed overrides.

    Attributes:
        facts: of the data.
        device: cpu, cuda or mps.
        patch: side of a patch in image px.
        depth: number of backbone blocks.
        parameters: number of backbone parameters.
        longest: longest image side in px, if given.
        head: option of the head group, if given.
        even: whether the patch size is even, as a head that sees pixels needs it.
    """

    facts: DatasetFacts
    device: str
    patch: float
    depth: int
    parameters: int
    longest: int | None = None
    head: str | None = None
    even: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """Median (H, W) of the model's input, reduced to the number of patches that this device can handle."""
        height, width = self.facts.size
        most = PATCHES.get(self.device, PATCHES_ELSE) * self.patch**2
        factor = min(1.0, (most / (height * width)) ** 0.5)
        if self.longest is not None:
            factor = min(1.0, self.longest / max(height, width))
        return round(factor * height), round(factor * width)

    @property
    def scale_factor(self) -> float:
        """Factor between lengths in the model's input and in the image files."""
        return max(self.size) / max(self.facts.size)

    @property
    def thin(self) -> list[ClassFacts]:
        """Classes whose parts are too thin for the patch grid to resolve."""
        return self.facts.thinner(THIN * self.patch / self.scale_factor)

    @property
    def sees_pixels(self) -> bool:
        """Return whether the head sees pixels in addition to tokens."""
        return (head(self).words["head"] if self.head is None else self.head) == "detail"


def longest(case: RecipeCase) -> RecipeChoice | None:
    """Reduce images that have more patches than the device can handle."""
    if case.longest is not None or case.scale_factor == 1:
        return None
    height, width = case.facts.size
    lost = ""
    if case.thin:
        lost = f"; {_join_class_names(case.thin)} become thinner still: set a larger value if they matter"
    return RecipeChoice(
        {"resolution.longest": max(case.size)},
        f"images of {height} x {width} (median) are {height * width / case.patch**2:.0f} patches, above the limit of "
        f"{PATCHES.get(case.device, PATCHES_ELSE)} for {case.device}{lost}",
    )


def crop(case: RecipeCase) -> RecipeChoice:
    """Use whole images, rounded down to whole patches, as crops: validation then matches training."""
    patch = max(1, round(case.patch))
    sides = [max(patch, side // patch * patch) for side in case.size]
    return RecipeChoice(
        {"resolution.crop": sides},
        f"whole images (median {case.size[0]} x {case.size[1]}), rounded down to patches of {patch} px",
    )


def head(case: RecipeCase) -> RecipeChoice:
    """Choose a head that sees pixels in addition to tokens, whether or not classes are thinner than patches.

    CamVid, frozen ViT-Tiny: mIoU 0.646 with detail, 0.563 with multiscale, 0.533 with linear. IDD-Lite, all weights,
    budget of ten minutes: detail 0.656 in 605 s, multiscale 0.632 in 508 s (seed 0), although no class is thin there.
    """
    if case.depth < DEPTH:
        return RecipeChoice(
            {"head": "linear"},
            f"the backbone has {count_of(case.depth, 'block')}, too few for a head that reads several",
        )
    if not case.even:
        return RecipeChoice(
            {"head": "multiscale"}, "four blocks carry more information than one; head=detail needs an even patch size"
        )
    reason = "it reads pixels in addition to four blocks, and no other head scored higher on three datasets"
    if case.thin:
        widths = ", ".join(f"{each.width:.0f}" for each in case.thin[:3])
        patch = case.patch / case.scale_factor
        reason += f"; half a patch is wider than {_join_class_names(case.thin)} ({widths} of {patch:.0f} px)"
    return RecipeChoice({"head": "detail"}, reason)


def loss(case: RecipeCase) -> RecipeChoice:
    """Add dice to cross-entropy; weight thin, rare classes more.

    CamVid, frozen, multiscale: mIoU 0.563 with dice, 0.545 without. Weights by `median` lost 5 points of mIoU with
    detail. Weight 3 on poles alone (1.03 % of the pixels) with doubled dice gave them an IoU of 0.211 (seed 0) and
    0.170 (seed 2), with mIoU 0.650 and 0.654. Without, it was 0.099, with mIoU 0.641. Classes that overlap get dice
    too, and no weights; not measured.
    """
    if case.facts.has_layers:
        return RecipeChoice(
            {"loss": "bce_dice", "loss.weights": "none"},
            "each class is predicted by itself, and dice weighs small classes as much as large ones",
        )
    slender = [each for each in case.thin if each.share < RARE and each.name not in BUILDS]
    if slender and case.depth >= DEPTH:
        weights = {each.name: THIN_WEIGHT for each in slender}
        return RecipeChoice(
            {"loss": "ce_dice", "loss.weights": weights, "loss.criterion.factors.dice": THIN_DICE},
            f"thin, with less than {RARE:.0%} of the pixels: {_join_class_names(slender)}; they get a class weight of "
            f"{THIN_WEIGHT:g}, and dice is doubled",
        )
    reason = "dice weighs all classes equally; class weights by rarity lower the scores of the other classes"
    rare = case.facts.rarer(RARE)
    if rare:
        reason += f"; with less than {RARE:.0%} of the pixels: {_join_class_names(rare)}"
    return RecipeChoice({"loss": "ce_dice", "loss.weights": "none"}, reason)


def by_data(case: RecipeCase) -> list[RecipeChoice]:
    """Return the choices that follow from the data alone."""
    found = [longest(case), crop(case), head(case), loss(case)]
    return [choice for choice in found if choice is not None]


def adapter(case: RecipeCase) -> RecipeChoice:
    """Choose how to train the backbone if there is enough time; see `phases`."""
    if case.facts.images < FEW_IMAGES or not case.parameters:
        return RecipeChoice({"adapter": "frozen"}, "the backbone is frozen: there is too little to train it with")
    millions = f"{case.parameters / 1e6:.3g} million parameters"
    if case.parameters <= SMALL_BACKBONE:
        return RecipeChoice({"adapter": "full"}, f"{millions}: all of them are trained")
    return RecipeChoice({"adapter": "lora_all"}, f"{millions}: LoRA in all layers takes less memory")


def phases(case: RecipeCase, trained: RecipeChoice, tuned: int | None, mixed: int | None) -> RecipeChoice:
    """Choose how long the backbone stays frozen, from the number of training images that fit into the time.

    mIoU on CamVid with multiscale: all weights 0.615 after 600 images and 0.664 after 3,360, frozen 0.563 after 4,000.
    With detail: all weights 0.628 after 600 images and 0.694 after 2,400, frozen 0.664 after 3,000. Ten minutes on two
    cores with detail: 0.689 if the backbone is frozen at first, 0.670 if it always is.

    Args:
        case: data, device and backbone.
        trained: from `adapter`, with a backbone that is trained.
        tuned: images that fit if the backbone is trained from the first step on; None: its steps were not timed.
        mixed: images that fit if it is frozen for the first `FROZEN_SHARE` of the steps; None: it cannot be.
    """
    if tuned is None:
        return RecipeChoice({"adapter": "frozen"}, "the backbone is frozen: there was no time to try to train it")
    least = MIN_TUNED_DETAIL if case.sees_pixels else MIN_TUNED
    if case.sees_pixels and mixed is not None:
        least = SURELY_TUNED
        if MIN_FROZEN_FIRST <= mixed and tuned < least:
            return RecipeChoice(
                {**trained.words, "optim.optimizer.freeze_backbone_until": FROZEN_SHARE},
                f"{trained.reason}; the backbone is frozen for the first {FROZEN_SHARE:.0%} of the training, in which "
                "steps take less time",
            )
    if tuned >= least:
        return trained
    return RecipeChoice(
        {"adapter": "frozen"},
        f"the backbone is frozen: there is time to train it on only {count_of(tuned, 'image')}, with repetition",
    )


def closed_form(seconds: float, image: float, facts: DatasetFacts) -> RecipeChoice:
    """Solve a linear head in closed form on as many images as fit, if there is no time for training.

    Args:
        seconds: time left for everything.
        image: seconds per image of a training step.
        facts: of the data.
    """
    images = max(2, int(seconds / 3 / image))
    words: dict[str, Any] = {"adapter": "frozen", "head": "linear", "head.init": "probe"}
    if images < facts.images:
        words["data.labelled"] = float(f"{images / facts.images:.6g}")
    return RecipeChoice(words, f"there is no time for {MIN_STEPS} steps: the head is solved in closed form")


def zoom(*, trains: bool, pixels: bool) -> RecipeChoice:
    """Enlarge views at random if the backbone is trained or the head sees pixels.

    CamVid, frozen, linear: mIoU 0.498 after 1,000 steps with factors of 0.75 to 1.5, 0.533 after 500 without. Detail
    learned poles with factors of 1 to 1.5 (see `loss`).
    """
    if trains or pixels:
        learner = "a trained backbone" if trains else "a head that reads pixels"
        return RecipeChoice({"data.augment.scale": [1.0, 1.5]}, f"{learner} benefits from views enlarged at random")
    return RecipeChoice(
        {"data.augment.scale": [1.0, 1.0]}, "a head on a frozen backbone scores highest with images of one scale"
    )


def batch(images: int, facts: DatasetFacts, devices: int, accumulate: int = 1) -> RecipeChoice:
    """Reduce the batch size if there would be few steps: a head that starts from scratch needs steps.

    CamVid, detail: batches of 2 beat batches of 4 after the same number of images. Several devices share a batch.

    Args:
        images: number of training images, with repetition.
        facts: of the data.
        devices: that share a batch.
        accumulate: batches per step.
    """
    sizes = [size for size in BATCHES if images // (size * accumulate) >= ENOUGH_STEPS]
    size = max(devices, min((*sizes, BATCHES[-1])[0], facts.images) // devices * devices)
    steps = count_of(images // (size * accumulate), "step")
    return RecipeChoice({"data.batch_size": size}, f"{images} images fit into the time, which are {steps}")


def _join_class_names(classes: Sequence[ClassFacts]) -> str:
    names = [each.name for each in classes[:3]]
    more = len(classes) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def cached_views(
    length: "Length", frozen: float, forward: float, facts: DatasetFacts
) -> tuple[RecipeChoice, int] | None:
    """Return fixed views whose features are cached, and the number of training images that then fit; None: no views.

    Steps take `frozen` seconds per image without a cache, of which cached features save `forward`.
    """
    distinct = VIEWS * facts.images
    images = int((length.images * frozen - distinct * forward) / (frozen - forward)) if forward < frozen else 0
    if images < max(MIN_USES * distinct, MIN_GAIN * length.images):
        return None
    reason = (
        f"features of {VIEWS} views of each image are cached, which saves {forward:.2g} of {frozen:.2g} s per image"
    )
    return RecipeChoice({"data.views": VIEWS}, reason), images


@dataclass(frozen=True)
class Length:
    """Length of a training within a time budget.

    Attributes:
        images: training images, with repetition; 0 if there is no time for any.
        val_images: images of each validation and of the final evaluation; None: all.
        validations: besides the final evaluation.
        spent: seconds besides the steps.
        limit: seconds for the steps and the validations between them.
    """

    images: int
    val_images: int | None
    validations: int
    spent: float
    limit: float


def length_within(seconds: float, image: float, times: RecipeTimes, facts: DatasetFacts) -> Length:
    """Return the training that fits into a number of seconds.

    Args:
        seconds: from now until the final evaluation has ended.
        image: seconds per image of a training step.
        times: measured times.
        facts: of the data.
    """
    most = max(1, int(SCORING * seconds / max((1 + _SCORED) * times.val, 1e-9)))
    val_images = None if most >= facts.val_images else most
    validation = (val_images or facts.val_images) * times.val
    validations = max(1, min(MAX_VALIDATIONS, int(VALIDATING * seconds / max(validation, 1e-9))))
    overhead = times.start + _SCORED * validation
    spent = overhead + validations * validation
    # the trainer knows the duration of a validation only after the first one
    limit = max(1.0, seconds - overhead - (validation if validations == 1 else 0))
    images = int((SURE * seconds - spent) / image)
    return Length(max(0, images), val_images, validations, spent, limit)
