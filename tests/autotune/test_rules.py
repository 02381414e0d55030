"""What hparam=auto chooses, rule by rule."""

from dataclasses import replace

import pytest

from dinoseg.autotune import rules
from dinoseg.autotune.facts import ClassFacts, DatasetFacts
from dinoseg.autotune.rules import RecipeCase, length_within
from dinoseg.autotune.timing import RecipeTimes
from dinoseg.config.plain import BUILDS

WIDE = ClassFacts("sky", 0.6, 300.0)
POLE = ClassFacts("pole", 0.004, 3.0)
FACTS = DatasetFacts(184, 51, (360, 480), (WIDE, ClassFacts("road", 0.396, 90.0)))
CASE = RecipeCase(FACTS, "cpu", 16.0, 12, 5_500_000)
THIN = replace(CASE, facts=replace(FACTS, classes=(WIDE, POLE)))
# a second's parts as in docs/log/detail_head.md: live, from kept features, frozen
TIMED = RecipeTimes(start=5, image=0.2, cached=0.12, frozen=0.066, bytes=10**6, val=0.1)


def test_a_head_that_sees_pixels_is_taken_and_what_is_thinner_than_half_a_patch_is_named():
    chosen = rules.head(THIN)
    assert chosen.words == {"head": "detail"} and "pole is thinner" in chosen.reason and "(3 of 16 px)" in chosen.reason
    wide = replace(THIN, facts=replace(FACTS, classes=(WIDE, replace(POLE, width=8.0))))
    for case in (CASE, wide):
        assert rules.head(case).words == {"head": "detail"} and "thinner" not in rules.head(case).reason
    assert "pole is thinner" in rules.head(replace(wide, patch=18.0)).reason
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
def test_sizes_are_whole_patches_and_no_more_than_a_device_bears(size, patch, device, longest, crop):
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
    facts = replace(FACTS, size=(1080, 1920), classes=(WIDE, replace(POLE, width=15.0)))
    case = replace(CASE, facts=facts)
    assert case.thin and "pole become thinner still" in rules.longest(case).reason
    assert not replace(case, device="cuda", patch=16.0, facts=replace(facts, size=(480, 640))).thin


def test_rare_classes_are_named_for_the_overlap():
    rare = replace(CASE, facts=replace(FACTS, classes=(WIDE, replace(POLE, width=30.0))))
    assert "pole has less than 2% of the pixels" in rules.loss(rare).reason
    assert rules.loss(rare).words["loss.weights"] == "none"
    assert rules.loss(CASE).words == {"loss": "ce_dice", "loss.weights": "none"}
    assert rules.loss(CASE).reason.startswith("dice weighs all classes equally")


def test_what_is_thin_and_rare_weighs_more_where_a_head_sees_it():
    weighed = {"loss": "ce_dice", "loss.weights": {"pole": 3.0}, "loss.criterion.factors.dice": 2.0}
    assert rules.loss(THIN).words == weighed
    assert "pole is thin, with less than 2% of the pixels" in rules.loss(THIN).reason
    common = replace(THIN, facts=replace(FACTS, classes=(WIDE, replace(POLE, share=0.02))))
    assert rules.loss(common).words["loss.weights"] == "none"
    assert rules.loss(replace(THIN, depth=3)).words["loss.weights"] == "none"
    assert rules.loss(replace(THIN, depth=4)).words == weighed
    for name in BUILDS:  # no table may have such a key
        named = replace(THIN, facts=replace(FACTS, classes=(WIDE, POLE, replace(POLE, name=name))))
        assert rules.loss(named).words == weighed


def test_views_are_enlarged_for_what_learns_from_them():
    scales = [rules.zoom(trains=trains, pixels=pixels) for trains, pixels in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert [choice.words["data.augment.scale"][1] for choice in scales] == [1.0, 1.5, 1.5, 1.5]


def test_images_may_be_smaller_where_no_class_is_thin():
    less = rules.smaller(CASE)
    assert less.size == (240, 320) and rules.crop(less).words == {"resolution.crop": [240, 320]}
    assert rules.longest(less).words == {"resolution.longest": 320}
    assert "smaller by a third, leave time to train the backbone" in rules.longest(less).reason
    assert rules.smaller(THIN) is None and rules.smaller(replace(CASE, longest=400)) is None
    soon_thin = replace(CASE, facts=replace(FACTS, classes=(WIDE, replace(POLE, width=11.0))))
    assert not soon_thin.thin and rules.smaller(soon_thin) is None
    large = replace(CASE, facts=replace(FACTS, size=(1080, 1920)))
    assert rules.smaller(large).size == tuple(round(side * 2 / 3 * large.reduced) for side in (1080, 1920))
    assert "with fewer images of this size" in rules.ways(less)[0].reason


def test_ways_depend_on_the_backbone_and_on_how_many_images_there_are():
    names = [[way.words["adapter"] for way in rules.ways(case)] for case in (CASE, replace(CASE, parameters=10**8))]
    assert names == [["full", "frozen"], ["lora_all", "frozen"]]
    assert "from about 600 images on" in rules.ways(replace(CASE, head="multiscale"))[0].reason
    assert "from about 1500 images on" in rules.ways(CASE)[0].reason
    for case in (replace(CASE, facts=replace(FACTS, images=19)), replace(CASE, parameters=0)):
        assert [way.words["adapter"] for way in rules.ways(case)] == ["frozen"]


def test_a_backbone_that_rests_first_is_tuned_as_one_of_its_size_is():
    for case, adapter in ((THIN, "full"), (replace(THIN, parameters=10**8), "lora_all")):
        way = rules.rested(case)
        assert way.words == {"adapter": adapter, "optim.optimizer.freeze_backbone_until": rules.REST}
        assert "; the backbone is frozen for the first 40% of the training" in way.reason


def test_from_how_many_images_tuning_wins_depends_on_the_head_that_is_taken():
    cases = CASE, THIN, replace(THIN, depth=3), replace(THIN, head="linear"), replace(CASE, even=False)
    assert [rules.min_images_to_tune(case) for case in cases] == [1500, 1500, 600, 600, 600]


@pytest.mark.parametrize(
    ("images", "there", "devices", "size"),
    [(12_000, 184, 1, 8), (6_000, 184, 1, 4), (5_999, 184, 1, 2), (0, 184, 1, 2), (12_000, 5, 1, 5)]
    + [(12_000, 5, 2, 4), (0, 184, 4, 4)],
)
def test_a_batch_is_small_where_steps_are_few(images, there, devices, size):
    assert rules.batch(images, replace(FACTS, images=there), devices).words == {"data.batch_size": size}


def test_a_batch_is_no_larger_than_memory_bears_and_parts_of_a_step_count():
    sized = {most: rules.batch(12_000, FACTS, 1, most=most).words["data.batch_size"] for most in (8, 4, 2)}
    assert sized == {8: 8, 4: 4, 2: 2}
    chosen = rules.batch(12_000, FACTS, 1, accumulate=2)
    assert chosen.words == {"data.batch_size": 4} and "which are 1500 steps" in chosen.reason


def test_what_fits_a_time_adds_up(compose):
    length = length_within(600, TIMED, FACTS)
    spent = TIMED.start + (length.validations + 2) * 51 * TIMED.val
    assert length.validations == 5 and length.spent == pytest.approx(spent)
    training = length.images * TIMED.cached + length.views * 184 * TIMED.frozen
    factor = 1 + compose("mode=train").mode.probe_baseline
    left = 0.95 * 600 - spent - factor * training
    assert length.views == 4 and 0 <= left < factor * TIMED.cached


def test_views_are_kept_where_each_is_used_again_and_that_pays():
    assert length_within(600, replace(TIMED, cached=None), FACTS).views is None
    assert length_within(600, replace(TIMED, cached=0.19), FACTS).views is None
    assert length_within(120, TIMED, FACTS).views in (1, 2)
    large = length_within(600, TIMED, replace(FACTS, images=10_000, val_images=51))
    assert large.views is None and large.images * TIMED.image <= 570
    assert length_within(600, TIMED, FACTS, views=[None]).views is None
    given = length_within(600, TIMED, FACTS, views=[1])
    assert given.views == 1 and given.images > length_within(600, TIMED, FACTS).images


def test_fewer_images_are_validated_where_all_of_them_would_take_the_time():
    short = length_within(10.01, TIMED, FACTS)
    assert (short.val_images, short.validations, short.images) == (
        10,
        1,
        7,
    )  # 3 s of 10: one validation, and the scoring
    assert length_within(30.01, TIMED, FACTS).val_images == 30 and length_within(60, TIMED, FACTS).val_images is None
    assert length_within(1, TIMED, FACTS).images == 0
    assert [length_within(seconds, TIMED, FACTS).validations for seconds in (100, 300, 480)] == [1, 2, 4]  # a twentieth


def test_views_that_hardly_come_twice_are_not_kept():
    fast = replace(TIMED, cached=0.01, frozen=0.01, val=0.01)
    spent = fast.start + 3 * 51 * fast.val
    found = [
        length_within((spent + 1.03 * (1.84 + steps)) / 0.95 + 1e-6, fast, FACTS, views=(None, 1))
        for steps in (2.3, 2.8)
    ]
    assert [each.views for each in found] == [None, 1]  # 230 and 280 images of 184
    assert found[1].images == 280


@pytest.mark.parametrize(("images", "share"), [(5_000_000, 4e-7), (30, 0.0666667)])
def test_a_closed_form_of_a_few_images_takes_a_share_above_zero(images, share):
    assert rules.closed_form(1.0, 1.0, replace(FACTS, images=images)).words["data.labelled"] == share
