"""What hparam=auto chooses, rule by rule."""

from dataclasses import replace

import pytest

from dinoseg.config.plain import BUILDS
from dinoseg.extensions.auto import rules
from dinoseg.extensions.auto.facts import ClassFacts, DatasetFacts
from dinoseg.extensions.auto.rules import RecipeCase, length_within
from dinoseg.extensions.auto.timing import RecipeTimes

WIDE = ClassFacts("sky", 0.6, 300.0)
POLE = ClassFacts("pole", 0.004, 3.0)
FACTS = DatasetFacts(184, 51, (360, 480), (WIDE, ClassFacts("road", 0.396, 90.0)))
CASE = RecipeCase(FACTS, "cpu", 16.0, 12, 5_500_000)
THIN = replace(CASE, facts=replace(FACTS, classes=(WIDE, POLE)))
TIMED = RecipeTimes(start=5, tuned=0.2, frozen=0.12, forward=0.0, val=0.1)


def facts_with(*classes, **changes):
    """Return the facts of a dataset with a wide class and these."""
    return replace(FACTS, classes=(WIDE, *classes), **changes)


def test_thin_classes_choose_a_head_that_sees_pixels():
    chosen = rules.head(THIN)
    assert chosen.words == {"head": "detail"} and "pole (3 of 16 px)" in chosen.reason
    wide = replace(THIN, facts=facts_with(replace(POLE, width=8.0)))
    for case in (CASE, wide):
        assert rules.head(case).words == {"head": "detail"} and "half a patch" not in rules.head(case).reason
    assert "half a patch is wider than pole" in rules.head(replace(wide, patch=18.0)).reason
    assert rules.head(replace(THIN, depth=3)).words == {"head": "linear"}
    odd = replace(THIN, even=False, patch=7.0)
    assert rules.head(odd).words == {"head": "multiscale"} and not odd.sees_pixels and THIN.sees_pixels


@pytest.mark.parametrize(
    ("size", "patch", "device", "longest", "crop"),
    [
        ((360, 480), 16.0, "cpu", None, [352, 480]),
        ((227, 320), 14.0, "cpu", None, [224, 308]),
        ((7, 9), 16.0, "cpu", None, [16, 16]),  # smaller than a patch
        ((1080, 1920), 16.0, "cpu", 739, [416, 736]),
        ((1080, 1920), 16.0, "cuda", 1365, [768, 1360]),
        ((1080, 1920), 32.0, "cuda", None, [1056, 1920]),  # resolution.scale=0.5
    ],
)
def test_sizes_are_whole_patches_within_device_limits(size, patch, device, longest, crop):
    case = replace(CASE, facts=replace(FACTS, size=size), patch=patch, device=device)
    chosen = rules.longest(case)
    assert (chosen and chosen.words["resolution.longest"]) == longest
    assert rules.crop(case).words == {"resolution.crop": crop}
    assert longest is None or max(crop) <= longest


def test_a_length_that_is_given_decides_the_crop():
    case = replace(CASE, longest=240)
    assert rules.longest(case) is None and rules.crop(case).words == {"resolution.crop": [176, 240]}
    assert replace(CASE, longest=999).size == FACTS.size  # nothing is enlarged


def test_reducing_makes_classes_thinner():
    case = replace(CASE, facts=facts_with(replace(POLE, width=15.0), size=(1080, 1920)))
    assert case.thin and "pole become thinner still" in rules.longest(case).reason
    assert not replace(case, device="cuda", patch=16.0, facts=replace(case.facts, size=(480, 640))).thin


def test_rare_and_thin_classes_are_named_and_weighted():
    rare = rules.loss(replace(CASE, facts=facts_with(replace(POLE, width=30.0))))
    assert "with less than 2% of the pixels: pole" in rare.reason and rare.words["loss.weights"] == "none"
    assert rules.loss(CASE).words == {"loss": "ce_dice", "loss.weights": "none"}
    assert rules.loss(CASE).reason.startswith("dice weighs all classes equally")
    weighed = {"loss": "ce_dice", "loss.weights": {"pole": 3.0}, "loss.criterion.factors.dice": 2.0}
    assert rules.loss(THIN).words == weighed
    assert "thin, with less than 2% of the pixels: pole" in rules.loss(THIN).reason
    common = replace(THIN, facts=facts_with(replace(POLE, share=0.02)))
    assert rules.loss(common).words["loss.weights"] == "none"
    assert rules.loss(replace(THIN, depth=3)).words["loss.weights"] == "none"
    assert rules.loss(replace(THIN, depth=4)).words == weighed
    for name in BUILDS:  # no table may have such a key
        assert rules.loss(replace(THIN, facts=facts_with(POLE, replace(POLE, name=name)))).words == weighed


def test_views_are_enlarged_only_for_trained_or_pixel_parts():
    scales = [rules.zoom(trains=trains, pixels=pixels) for trains, pixels in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert [choice.words["data.augment.scale"][1] for choice in scales] == [1.0, 1.5, 1.5, 1.5]


def test_adapter_depends_on_backbone_and_number_of_images():
    few = replace(CASE, facts=replace(FACTS, images=19))
    cases = CASE, replace(CASE, parameters=10**8), few, replace(CASE, parameters=0)
    assert [rules.adapter(case).words["adapter"] for case in cases] == ["full", "lora_all", "frozen", "frozen"]


@pytest.mark.parametrize(
    ("case", "tuned", "mixed", "adapter", "share"),
    [
        (CASE, None, 4000, "frozen", None),  # not timed
        (CASE, 2500, 4000, "full", None),
        (CASE, 2499, 4000, "full", 0.4),
        (CASE, 700, 1000, "full", 0.4),
        (CASE, 700, 999, "frozen", None),
        (CASE, 1500, None, "full", None),  # it cannot be frozen at first
        (CASE, 1499, None, "frozen", None),
        (replace(CASE, head="linear"), 600, 5000, "full", None),
        (replace(CASE, head="linear"), 599, 5000, "frozen", None),
        (replace(CASE, parameters=10**8), 1200, 2000, "lora_all", 0.4),
    ],
)
def test_phases_depend_on_how_many_images_fit_into_the_time(case, tuned, mixed, adapter, share):
    chosen = rules.phases(case, rules.adapter(case), tuned, mixed)
    assert chosen.words["adapter"] == adapter
    assert chosen.words.get("optim.optimizer.freeze_backbone_until") == share


@pytest.mark.parametrize(
    ("images", "there", "devices", "size"),
    [
        *((12_000, 184, 1, 8), (6_000, 184, 1, 4), (5_999, 184, 1, 2), (0, 184, 1, 2), (12_000, 5, 1, 5)),
        *((12_000, 5, 2, 4), (0, 184, 4, 4)),
    ],
)
def test_batch_is_small_if_steps_are_few(images, there, devices, size):
    assert rules.batch(images, replace(FACTS, images=there), devices).words == {"data.batch_size": size}


@pytest.mark.parametrize(("images", "share"), [(5_000_000, 4e-7), (30, 0.0666667)])
def test_a_closed_form_of_a_few_images_takes_a_share_above_zero(images, share):
    assert rules.closed_form(1.0, 1.0, replace(FACTS, images=images)).words["data.labelled"] == share


def test_batch_choice_counts_accumulated_micro_batches():
    chosen = rules.batch(12_000, FACTS, 1, accumulate=2)
    assert chosen.words == {"data.batch_size": 4} and "which are 1500 steps" in chosen.reason


def test_times_of_both_phases_are_averaged_by_their_share():
    assert TIMED.of(0.0) == 0.2 and TIMED.of(1.0) == 0.12 and TIMED.of(0.4) == pytest.approx(0.168)
    assert replace(TIMED, tuned=None).of(0.0) == 0.12 and replace(TIMED, frozen=None).of(1.0) == 0.2


def test_length_within_a_time_budget_adds_up():
    length = length_within(600, 0.2, TIMED, FACTS)
    spent = TIMED.start + (length.validations + 2) * 51 * TIMED.val
    assert length.validations == 5 and length.spent == pytest.approx(spent) and length.val_images is None
    assert 0 <= 0.95 * 600 - spent - length.images * 0.2 < 0.2
    assert length.limit == pytest.approx(600 - TIMED.start - 2 * 51 * TIMED.val)


def test_slow_validation_is_reduced_to_fewer_images():
    short = length_within(10.01, 0.2, TIMED, FACTS)  # 3 s of 10: one validation, and the scoring
    assert (short.val_images, short.validations, short.images) == (10, 1, 7)
    assert length_within(30.01, 0.2, TIMED, FACTS).val_images == 30
    assert length_within(60, 0.2, TIMED, FACTS).val_images is None
    assert length_within(1, 0.2, TIMED, FACTS).images == 0
    assert [length_within(seconds, 0.2, TIMED, FACTS).validations for seconds in (100, 300, 480)] == [1, 2, 4]


def test_views_are_cached_if_reused_and_faster():
    length = length_within(600, 0.2, TIMED, FACTS)
    choice, images = rules.cached_views(length, 0.2, 0.1, FACTS)
    assert choice.words == {"data.views": 4}
    assert images * 0.1 + 4 * 184 * 0.1 == pytest.approx(length.images * 0.2, abs=0.2)
    assert rules.cached_views(length, 0.2, 0.01, FACTS) is None  # hardly faster
    assert rules.cached_views(length, 0.2, 0.0, FACTS) is None  # cannot be cached
    assert rules.cached_views(length, 0.2, 0.1, replace(FACTS, images=2000)) is None  # hardly used twice
