"""Which numbers keys take: each is said where the value is used, and what is outside is refused by its whole key."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from types import UnionType
from typing import get_args

import pytest
from command_line import SMALL, call, succeed, write_data
from config_files import FOLDER, nodes, read
from hydra.utils import get_object
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.cli.job_checks import LAUNCH_KEYS
from dinoseg.config.nodes import check_arguments, instantiate
from dinoseg.config.stored import Source, compose_stored
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.report.loggers.logger import Logger
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Range, check_value
from dinoseg.utils.wording import format_text

NAN, INFINITY = float("nan"), float("inf")
OWN_CHECK = {  # numbers whose rule is no range
    **dict.fromkeys(("Frozen", "Full", "LastBlocks", "Lora"), {"bits"}),  # 4 or 8
    "SlotHead": {"num_slots", "steps"},
    "plan": {"memory"},  # bytes, with or without a unit
}
REGIONS = ("min_region", "largest_component", "regions")
OF_OTHERS = {"adapter": ("lr",), "mode": LAUNCH_KEYS, "inference": REGIONS}  # keys beside a target's own
ELSEWHERE = {"in_dim", "num_layers", "ignore_index"}  # given at run time; checked by `Labels`


def is_number(annotation):
    parts = get_args(annotation) if isinstance(annotation, UnionType) else [annotation]
    return any(part in (int, float) for part in parts)


def is_ranged(annotation):
    parts = (annotation, *get_args(annotation))
    return any(isinstance(each, Range) for part in parts for each in getattr(part, "__metadata__", ()))


def given_at_run_time(target):
    """Return the arguments that a tracker or a logger gets besides those of the config."""
    bases = [base for base in (Tracker, Logger) if inspect.isclass(target) and issubclass(target, base)]
    return {name for base in bases for name in inspect.signature(base).parameters}


def test_every_number_of_a_config_has_a_range():
    files = [path for path in FOLDER.glob("*/*.yaml") if path.parent.name != "hydra"]
    found = {node["_target_"] for path in files for _, node in nodes(read(path.parent.name, path.stem))}
    ranged = 0
    bare = {}
    for target in map(get_object, found):
        parameters = inspect.signature(target).parameters.values()
        ranged += sum(is_ranged(each.annotation) for each in parameters)
        names = {each.name for each in parameters if is_number(each.annotation)} - ELSEWHERE
        names -= given_at_run_time(target)
        if names - OWN_CHECK.get(target.__name__, set()):
            bare[target.__name__] = names
    assert not bare and len(found) > 50 and ranged > 100


@pytest.fixture(scope="module")
def cfg(compose):
    """Return the config of a training whose options have many numbers, with the mode of a prediction."""
    options = ("adapter=lora", "backbone=tiny", "head=cnn", "inference=windows", "inference.size=[64,48]")
    cfg = compose("mode=train", *options, "backbone.mean=[0,0,0]", "data.root=x", "data.classes=[a,b]")
    of_predict = compose("mode=predict")
    cfg.input, cfg.mode = None, of_predict.mode
    return cfg


@pytest.fixture
def change(cfg):
    """Return a function that returns a copy of the config with values put at keys."""

    def change(values):
        changed = copy.deepcopy(cfg)
        for key, value in values.items():
            OmegaConf.update(changed, key, value)
        return changed

    return change


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("optim.optimizer.lr", 1e20, "Give a number above 0 and at most 100, or null."),
        ("optim.optimizer.weight_decay", INFINITY, "Give a finite number."),
        ("optim.optimizer.weight_decay", 10**400, "Give a finite number."),
        ("optim.optimizer.weight_decay", -0.1, "Give a number of at least 0."),
        ("optim.optimizer.layer_decay", 1.5, "Give a number above 0 and at most 1, or null."),
        ("optim.optimizer.freeze_backbone_until", 1, "Give a number of at least 0 and below 1."),
        ("optim.optimizer.backbone_lr_scale", 1e20, "Give a number from 0 to 100."),
        ("optim.schedule.warmup", -1, "Give a number of at least 0."),
        ("optim.schedule.warmup_start", 1.5, "Give a number from 0 to 1, or null."),
        ("optim.schedule.backbone_warmup", -1, "Give a number of at least 0, or null."),
        ("optim.optimizer.betas", [0.9, 1.0], "Give a number of at least 0 and below 1 for each."),
        ("optim.schedule.min_lr_ratio", NAN, "Give a number from 0 to 1."),
        ("adapter.dropout", NAN, "Give a number of at least 0 and below 1."),
        ("data.augment.scale", [NAN, 1], "Give a number above 0 for each."),
        ("data.augment.color.hue", 0.7, "Give a number from 0 to 0.5."),
        ("data.augment.affine.degrees", 181, "Give a number from 0 to 180."),
        ("data.augment.affine.translate", 0.95, "Give a number from 0 to 0.9."),
        ("data.augment.affine.shear", 61, "Give a number from 0 to 60."),
        ("mode.opacity", NAN, "Give a number from 0 to 1."),
        ("mode.batch_size", 0, "Give a whole number of at least 1."),
        ("engine.workers", -1, "Give a whole number of at least 0."),
        ("engine.eval_batch_size", 0, "Give a whole number of at least 1."),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_whole_key(change, key, value, rule):
    node = OmegaConf.select(change({key: value}), key.rpartition(".")[0])
    with pytest.raises(UserError) as caught:
        instantiate(node, exclude=OF_OTHERS.get(key.split(".")[0], ()))
    assert str(caught.value) == f"{key}={format_text(str(value), 200)} is out of range. {rule}"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("trainer.clip", -1, "out of range. Give a number above 0, or null."),
        ("trainer.ema", 1, "out of range. Give a number above 0 and below 1, or null."),
        ("trainer.val_images", 0, "out of range. Give a whole number of at least 1, or null."),
        ("data.workers", 0, "out of range. Give a whole number of at least 1, or null."),
        ("data.on_error", "ignore", "unknown. Choose one of stop, skip."),
    ],
)
def test_a_value_that_is_read_by_its_key_is_refused_by_it(change, tmp_path, key, value, rule):
    write_data(tmp_path)
    builder = Builder(change({key: value, "data.root": str(tmp_path)}))
    reads = {
        "data": lambda: builder.dataset("val"),
        "trainer": lambda: (builder.loop_settings(1), builder.make_training()),
    }
    assert_refused(reads[key.partition(".")[0]], f"{key}={value} is {rule}")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("optim.optimizer.betas", [0.9], "Give a list of 2 numbers."),
        ("inference.size", [3, 4, 5], "Give a whole number or a list of 2 whole numbers."),
        ("inference.stride", [4, 4, 4], "Give a whole number or a list of 2 whole numbers or null."),
    ],
)
def test_a_list_of_another_length_is_refused_by_its_key(change, key, value, rule):
    with pytest.raises(UserError) as caught:
        instantiate(
            OmegaConf.select(change({key: value}), key.rpartition(".")[0]), exclude=OF_OTHERS.get(key.split(".")[0], ())
        )
    assert str(caught.value).startswith(f"{key}={value}") and str(caught.value).endswith(rule)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("resolution.longest", 2**21, "numbers up to 1048576"),
        ("trainer.clip", 1e20, "numbers up to 1099511627776"),
        ("inference.scales.0", 17, "numbers up to 16"),
        *(("seed", each, "numbers up to ") for each in (NAN, -INFINITY)),
        *((f"data.augment.{key}", NAN, "numbers up to ") for key in ("scale.1", "color.hue")),
    ],
)
def test_numbers_of_a_training_are_limited_as_in_checkpoints(change, key, value, rule):
    text = assert_refused(lambda: config_description(Builder(change({key: value}))), "could not be resumed", rule)
    assert text.startswith(f"This config: {key}={value} is ")


def test_head_steps_have_the_limit_of_a_training(compose):
    steps = [[40_000, 120_000], [90_000, 400_000], [10**6, 2 * 10**6], [0, 2**40]]
    cfg = compose("mode=train", "head=eomt", "backbone=tiny", f"head.anneal={steps}", "data.root=x", "data.classes=[a]")
    description = config_description(Builder(cfg))
    compose_stored(description, Source("resume=file"))
    for key, value in (("head.anneal.3.1", 2**41), ("head.num_queries", 2**17), ("head.blocks", 10**6)):
        other = copy.deepcopy(cfg)
        stored = OmegaConf.create(description["config"])
        for changed in (other, stored):
            OmegaConf.update(changed, key, value)
        refused = {**description, "config": OmegaConf.to_container(stored)}
        assert_refused(partial(config_description, Builder(other)), f"{key}={value} is refused", " numbers up to")
        assert_refused(partial(compose_stored, refused, Source("resume=file")), f"{key}={value} is refused")


@pytest.mark.parametrize("value", [NAN, INFINITY, -1.0, 1e18])
def test_a_scale_of_no_size_is_refused(change, value):
    changed = change({"resolution.scale": value})
    words = (f"resolution.scale={value} is out of range. Give a number above 0 and at most 16",)
    assert_refused(lambda: Builder(changed).model(untrained=True), *words)


@pytest.mark.parametrize(("crop", "scale"), [([1, 1], 1), ([32, 7], 1), ([32, 32], 0.2)])
def test_a_crop_below_a_patch_is_refused(change, crop, scale):
    changed = change({"backbone.patch_size": 8, "resolution.crop": crop, "resolution.scale": scale})
    words = ("is less than one patch of the backbone, 8 pixels. Give a larger crop.",)
    assert_refused(lambda: Builder(changed).model(untrained=True), *words)


def test_a_message_names_the_key_that_is_typed(tmp_path, compose):
    reader = compose("data.root=x", "data.classes=dark").data.reader  # where data.reader.classes points to
    assert_refused(lambda: instantiate(reader), "data.classes=dark is of type str. Give ", "list of texts")
    protocol = compose("mode=score", "protocol.num_classes=two").protocol
    assert_refused(lambda: instantiate(protocol), "protocol.num_classes=two is of type str")
    done = call(tmp_path, "mode=render", "data=movi", "data.root=x", "render.seconds=0.5")
    assert done.err.startswith("error: render.seconds=0.5 is of type float. Give a whole number")


def test_one_number_is_a_square_crop(tmp_path):
    succeed(tmp_path, "mode=summary", *SMALL, "resolution.crop=224", "hydra.run.dir=run")
    assert OmegaConf.load(tmp_path / "run/config/config.yaml").resolution.crop == [224, 224]


def test_tables_and_unions_have_ranges_too():
    factors = {"factors": {"a": 1.0, "b": INFINITY}}
    target = "dinoseg.losses.weighted_sum.WeightedSum"
    assert_refused(lambda: check_arguments(target, factors), "finite number for each")
    mixed = {"ce": 1, "dice": "a"}
    words = ("is of type dict of int and str. Give a mapping to numbers",)
    assert_refused(lambda: check_value("factors", mixed, Mapping[str, float]), *words)
    check_arguments("dinoseg.training.trainer.Settings", {"clip": None, "ema": 0.5, "steps": 1})
