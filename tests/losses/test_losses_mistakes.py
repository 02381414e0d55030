"""Settings, outputs and labels that losses refuse, and what the message of each names."""

import math
from functools import partial

import pytest
import torch
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf
from slot_outputs import compare, outputs_of, reconstruct, run
from tiny_parts import load

from dinoseg import losses
from dinoseg.config.nodes import instantiate
from dinoseg.core.sample_maps import DistanceMap, LabelMap
from dinoseg.core.shapes import MaskOutputs, Prediction, WeightedMasks
from dinoseg.extensions.slots.losses.temporal_similarity import TemporalSimilarity
from dinoseg.losses.class_weights import class_weights
from dinoseg.losses.cldice import SoftClDice
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.fused import Fused, KernelSpec
from dinoseg.losses.mask_classification import FACTORS, MaskClassification
from dinoseg.losses.multilabel import BinaryCrossEntropy
from dinoseg.losses.overlap import Dice, Tversky
from dinoseg.losses.weighted_sum import WeightedSum

WEIGHTS = torch.ones(3)
NAMES = ["road", "car", "pole", "cat"]
find_masks = partial(MaskClassification, WEIGHTS)
TERMS = {"ce": CrossEntropy, "dice": Dice}
SCORES = torch.zeros(2, 3, 4, 4)
IDS = torch.zeros(1, 4, 4, dtype=torch.int64)
LAYERS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
bce = partial(losses.bce_loss, SCORES)
lovasz = partial(losses.lovasz_loss, SCORES[:1], IDS)
cldice = partial(losses.cldice_loss, SCORES[:1], IDS)
NO_SLOTS = ("feature_reconstruction, ", "outputs of a slot head", "cross_entropy")


def weigh(scheme, counts=(70, 20, 10, 0)):
    return class_weights(counts, NAMES[: len(counts)], scheme)


def lose(logits=(1, 3, 4, 4), targets=(1, 4, 4), *, loss="cross_entropy_loss", dtype=torch.int64, **options):
    """Call a loss with logits and targets of these shapes."""
    return getattr(losses, loss)(torch.zeros(logits), torch.zeros(targets, dtype=dtype), **options)


def query_prediction(count):
    outputs = MaskOutputs(torch.zeros(count, 5, 4), torch.zeros(count, 5, 4, 4))
    masks = WeightedMasks(outputs.mask_logits, torch.full((count, 5, 3), 0.2))
    return Prediction(outputs, (4, 4), (1.0, 1.0), None, mixture=True, masks=masks)


def add(terms, **factors):
    return WeightedSum(terms, factors, WEIGHTS)


def read_twins(*kinds):
    """Add two terms that read a map of one name, of these kinds."""

    def make_reader(kind):
        loss = BinaryCrossEntropy(WEIGHTS)
        loss.needs_maps = {"twin": kind}
        return loss

    return WeightedSum(
        {name: partial(make_reader, kind) for name, kind in zip("ab", kinds, strict=True)}, dict.fromkeys("ab", 1.0)
    )


def make_from_config(*words, **options):
    """Return the loss that a command line makes."""
    return instantiate(OmegaConf.create(load(*words)).loss.criterion)(**options)


test_message_names_key_value_and_remedy = refusals(
    {
        "weight of no class": (lambda: weigh({"dog": 2.0}), "scheme: dog is not a class", "road, car, pole, cat"),
        "unknown scheme": (lambda: weigh("best"), "scheme=best is unknown. Choose one of none, one_minus_frequency"),
        "scheme of counts": (lambda: losses.compute_class_weights([1, 2], "most"), "scheme=most is unknown"),
        "negative weight": (lambda: lose(class_weights=[1.0, -1.0, 1.0]), "class_weights=", "numbers of at least 0"),
        "weight of NaN": (lambda: lose(class_weights=[1.0, math.nan, 1.0]), "class_weights=", "numbers of at least 0"),
        "one weight": (lambda: lose(class_weights=[1.0]), "class_weights=[1.0]: give 3 numbers"),
        "weights of 0": (lambda: lose(class_weights=[0.0, 0.0, 0.0]), "give 3 numbers", "not all of them 0"),
        "no pixels": (lambda: losses.compute_class_weights([0, 0]), "scheme=median: ", "no labelled pixel"),
        "smoothing of 1": (lambda: lose(label_smoothing=1.0), "label_smoothing=1.0 is out of range. Give", "below 1"),
        "no hard pixel": (lambda: lose(hard_fraction=0), "hard_fraction=0 is out of range", "above 0 and at most 1"),
        "more than all pixels": (lambda: Focal(WEIGHTS, hard_fraction=1.5), "hard_fraction=1.5 is out of range"),
        "unknown average": (lambda: lose(average="known"), "average=known is unknown. Choose one of labelled, all"),
        "hard pixels of all": (lambda: lose(average="all", hard_fraction=0.5), "average=all and hard_fraction=0.5"),
        "negative gamma": (lambda: Focal(WEIGHTS, gamma=-0.1), "gamma=-0.1 is out of range. Give a number of at least"),
        "negative alpha": (lambda: Tversky(WEIGHTS, alpha=-1.0), "alpha=-1.0", "at least 0"),
        "beta of 0": (lambda: Tversky(WEIGHTS, beta=0.0), "beta=0.0", "above 0"),
        "per_image as a number": (lambda: [lovasz(per_image=each) for each in (True, 1)], "per_image=1"),
        "no class of clDice": (lambda: SoftClDice(WEIGHTS, classes=[]), "from 0 to 2"),
        "class K of clDice": (lambda: cldice(classes=[3]), "classes=", "3", "from 0 to 2"),
        "classes as a number": (lambda: cldice(classes=1), "classes=1", "Give a list of whole numbers"),
        "no erosion": (lambda: SoftClDice(WEIGHTS, iterations=0), "iterations=0", "from 1 to 64"),
        "many erosions": (lambda: SoftClDice(WEIGHTS, iterations=65), "iterations=65", "from 1 to 64"),
        "flat logits": (lambda: lose((2, 3, 4)), "The logits are torch.float32 [2, 3, 4]. Give floats"),
        "array": (lambda: losses.cross_entropy_loss(SCORES.numpy(), IDS), "The logits are ndarray. Give floats (B, K"),
        "integers": (lambda: losses.dice_loss(SCORES.int(), IDS), "The logits are torch.int32 [2, 3, 4, 4]. Give"),
        "layers as ids": (
            lambda: lose(targets=(1, 1, 4, 4)),
            "int64 [1, 1, 4, 4]. Give class ids (1, H, W)",
            "bce_loss take",
        ),
        "floats as ids": (lambda: lose(dtype=torch.float32), "Give class ids"),
        "too few targets": (lambda: lose((2, 3, 4, 4)), "int64 [1, 4, 4]. Give class ids (2, H, W)"),
        "too few targets of queries": (lambda: losses.dice_loss(query_prediction(2), IDS), "Give class ids (2, H, W)"),
        "one layer of three": (lambda: bce(LAYERS[:, 0]), "[2, 4, 4]. Give layers (2, 3, H, W)"),
        "two layers of three": (lambda: bce(LAYERS[:, :2]), "[2, 2, 4, 4]. Give layers (2, 3, H, W)"),
        "layers of 2": (lambda: bce(LAYERS + 2), "hold the ids [2], which are neither"),
        "layers of one image": (lambda: bce(LAYERS[:1]), "[1, 3, 4, 4]. Give layers (2, 3, H, W)"),
        # would leave out all pixels of a class, or all others
        "ignored 0": (lambda: bce(LAYERS, ignore_index=0), "ignore_index=0: layers hold 0 and 1"),
        "ignored 1": (lambda: bce(LAYERS, ignore_index=1), "ignore_index=1: layers hold 0 and 1"),
        "logits for a loss of masks": (lambda: lose(loss="mask_classification_loss"), "that predicts masks"),
        "a head without masks": (lambda: run(SCORES, find_masks()), "a head that predicts masks: mask2former or eomt"),
        "negative no_object": (lambda: find_masks(no_object=-0.1), "no_object=-0.1 is out of range", "at least 0"),
        "no points": (lambda: find_masks(num_points=0), "num_points=0 is out of range", "whole number of at least 1"),
        "few candidates": (lambda: find_masks(oversample=0.5), "oversample=0.5 is out of range", "at least 1"),
        "importance above 1": (lambda: find_masks(importance=1.5), "importance=1.5 is out of range", "from 0 to 1"),
        "unknown ignored": (lambda: find_masks(ignored="void"), "ignored=void is unknown", "excluded, background"),
        "cubic": (lambda: find_masks(interpolation="cubic"), "interpolation=cubic is unknown", "nearest, bilinear"),
        "a factor is missing": (
            lambda: find_masks(factors={"class": 2.0, "mask": 5.0}),
            "factors=",
            "class, mask, dice, and no other",
        ),
        "factor of no part": (
            lambda: find_masks(factors={**FACTORS, "box": 1.0}),
            "factors=",
            "class, mask, dice, and no other",
        ),
        "reconstruction without slots": (lambda: reconstruct(SCORES), *NO_SLOTS),
        "similarity without slots": (lambda: compare(SCORES), *NO_SLOTS),
        "no similarity": (lambda: compare(outputs_of(similarity=None)), "Give the head similarity=true"),
        "one frame": (lambda: compare(outputs_of(length=1)), "1 frame. Give clips of 2 frames"),
        "temperature of 0": (lambda: TemporalSimilarity(temperature=0), "temperature=0 is out of range", "above 0"),
        "threshold below -1": (lambda: TemporalSimilarity(threshold=-1.1), "threshold=-1.1"),
        "threshold of 1": (lambda: TemporalSimilarity(threshold=1.0), "threshold=1.0 is out of range. Give a cosine"),
        "factor of no term": (lambda: add(TERMS, ce=1.0, dise=1.0), "factors=", "ce, dice, and no other"),
        "a term without a factor": (lambda: add(TERMS, ce=1.0), "factors={'ce': 1.0}: give one", "ce, dice"),
        "negative factor": (
            lambda: add(TERMS, ce=1.0, dice=-1.0),
            "factors=",
            "-1.0",
            "a number of at least 0 for each",
        ),
        "factor of NaN": (lambda: add(TERMS, ce=math.nan, dice=1.0), "factors=", "nan", "at least 0 for each"),
        "no terms": (lambda: add({}), "terms=[]: give at least one term"),
        "a term named weight": (lambda: add({"weight": Dice}, weight=1.0), "terms=['weight']: ", "any name but weight"),
        "key of a term": (lambda: add({"hard": partial(Focal, gamma=-1.0)}, hard=1.0), "terms.hard.gamma=-1.0 is out"),
        "terms of layers and of ids": (
            lambda: add({"ce": CrossEntropy, "bce": BinaryCrossEntropy}, ce=1.0, bce=1.0),
            "bce of task=multilabel cannot be added",
        ),
        "one map of two kinds": (lambda: read_twins(LabelMap(), DistanceMap()), "Two terms read the map twin"),
        "class weights of slots": (
            lambda: WeightedSum({"similarity": TemporalSimilarity, "dice": Dice}, {"similarity": 1.0, "dice": 1.0}),
            "terms.dice weights classes, but this loss has none. Remove the",
        ),
        "a value of a term on the command line": (
            lambda: make_from_config("loss=video_similarity", "loss.criterion.terms.similarity.temperature=0"),
            "loss.criterion.terms.similarity.temperature=0 is out of range. Give",
        ),
        "an unknown key of a term": (
            lambda: make_from_config("loss=ce_dice", "+loss.criterion.terms.dice.gamma=1", class_weights=WEIGHTS),
            "does not take gamma",
        ),
    }
)


FIVE = torch.ones(5)
test_weights_of_other_classes_are_refused = refusals(
    {
        "cross-entropy": (lambda: run(SCORES, CrossEntropy(FIVE)), "size of the tensor (3)", "existing size (5)"),
        "focal": (lambda: run(SCORES, Focal(FIVE)), "size of the tensor (3)", "existing size (5)"),
        "kernel": (
            lambda: Fused(IDS, (1.0, 1.0), 255, KernelSpec(FIVE))._of_classes(SCORES, None),
            "size of the tensor (3)",
            "existing size (5)",
        ),
    },
    error=RuntimeError,
)


@pytest.mark.parametrize(
    "target", ["losses.focal.Focal", "extensions.slots.losses.temporal_similarity.TemporalSimilarity"]
)
def test_a_term_that_is_not_partial_is_named(target):
    own = (f"+loss.criterion.terms.own={{_target_: dinoseg.{target}}}", "+loss.criterion.factors.own=1.0")
    make = partial(make_from_config, "loss=ce_dice", *own, class_weights=WEIGHTS)
    assert_refused(make, "loss.criterion.terms.own ", "Set `_partial_: true` there")


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_by_name_is_a_number_above_0_that_float32_has(weight):
    assert_refused(lambda: weigh({"pole": weight}), "scheme={'pole': ", " for each.")


@pytest.mark.parametrize("counts", [[10.9, 1.9], [-1, 5], [1, math.nan], {0: 900, 1: 100}, torch.tensor([0.5, 3])])
def test_counts_of_classes_are_whole_numbers(counts):
    assert_refused(lambda: losses.compute_class_weights(counts), "counts: give a whole number")


def test_names_of_strangers_are_shown_in_one_short_line():
    names = [f"class {number}" for number in range(200)]
    scheme = {"a\n\x1b" + "b" * 10**6: 2}
    said = assert_refused(lambda: class_weights([5] * 200, names, scheme), "class 29 and 170 more")
    assert "\n" not in said and "\x1b" not in said and len(said) < 700
