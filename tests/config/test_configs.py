"""Every config composes, and names only what exists, with the keys that it takes."""

import inspect
import json
import re
import shutil
from copy import deepcopy
from functools import reduce
from itertools import zip_longest
from operator import getitem

import pytest
from config_files import (
    FOLDER,
    GROUPS,
    groups_of,
    main_choices,
    mode_for,
    mode_of,
    nodes,
    options,
    read,
    read_node,
    required_overrides,
    written_choices,
    written_targets,
)
from extensions import extensions_of_config
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import get_object
from mistakes import assert_refused
from omegaconf import OmegaConf
from transformers import AutoConfig

from dinoseg.cli.job_checks import LAUNCH_KEYS
from dinoseg.config import nodes as config_nodes
from dinoseg.config.composition import compose as compose_config
from dinoseg.config.job import read_words
from dinoseg.config.nodes import instantiate
from dinoseg.config.options import option_files
from dinoseg.config.plain import resolve_node, to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.config.stored import Source, compose_stored
from dinoseg.data.opened import prepare_dataset
from dinoseg.data.photometric import PhotometricDistortion
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.objects import OPTION
from dinoseg.experiment.recipe import absolute, config_description
from dinoseg.training.description import INITIAL, SAVED, TEACHER
from dinoseg.training.trainer import Settings

TRACKING = {"model", "device", "autocast", "batch_size"}
# What builder, launch and fit hand over; every other argument stands in a config or has a default
SCORING = {"builder", "out_dir", "split", "supervision", "metrics_only", "official", "restart", "report"}
AT_RUN_TIME = {
    "chooser": {"cfg", "words"},
    "data.clips": {"split"},
    "data.objects": {"dataset", "background"},
    "data.reader": {"split"},
    "data.scoring": SCORING,
    "export": {"source", "out_dir"},
    "features": {"builder", "data_module", "model", "engine", "epochs", "previous_choices"},
    "head": {"in_dim", "num_layers"},
    "head.scoring": SCORING,
    "inference.regions": {"strategy", "classes"},
    "logger.*": {"out_dir", "start_step"},
    "loss.class_weights": {"counts", "classes"},
    "loss.counts": {"dataset"},
    "loss.criterion": {"class_weights"},
    "loss.criterion.terms.*": {"class_weights"},
    "mode": {"cfg", "out_dir"},
    "mode.check": {"cfg"},
    "mode.sweep_end": {"folder", "jobs"},
    "mode.choose_thresholds": {"model", "data", "engine", "strategy"},
    "mode.draw_curves": {"rows", "data", "out_dir"},
    "mode.init_head": {"builder", "model", "data", "engine"},
    "mode.regions": {"strategy", "data", "engine"},
    "mode.scorer": {"protocol", "out_dir"},
    "optim.optimizer": {"model"},
    "pack": {"dataset", "cache_dir"},
    "slots": TRACKING,
    "tracker": TRACKING,
    "trainer.method": {"builder"},
}
OF_MAIN = 1  # `_target_` of options that main.yaml chooses
# What stands beside the keys of a target for somebody else
FOR_OTHERS = {
    "mode": set(LAUNCH_KEYS),
    "head": {"layers", "lr", "scoring"},
    "adapter": {"lr"},
    "inference": {"min_region", "largest_component", "regions"},
}


def check_binds(path, node):
    """Bind the keys of a node to its target: none unknown, and all that is missing comes at run time."""
    target = get_object(node["_target_"])
    assert callable(target) and target.__module__.startswith("dinoseg."), path
    parameters = inspect.signature(target).parameters
    assert not any(
        parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters.values()
    )
    given = {key for key in node if not key.startswith("_")} - FOR_OTHERS.get(path, set())
    handed = AT_RUN_TIME.get(re.sub(r"^(logger|loss\.criterion\.terms)\.\w+$", r"\1.*", path), set())
    later = {name for name in handed if name in parameters or name != "class_weights"}
    # made at once, and called with what the others take
    if path in ("export", "slots", "tracker") and not node.get("_partial_"):
        assert set(inspect.signature(target.__call__).parameters) >= later
        later = set()
    assert not given & later, f"{path} sets what comes at run time: {given & later}"
    assert bool(later) <= bool(node.get("_partial_")), f"{path} waits for {later}, but is not _partial_"
    assert {key for key in node if key.startswith("_")} <= {"_target_", "_partial_"}, path
    inspect.signature(target).bind(**dict.fromkeys(given | later))
    config_nodes.check_arguments(node["_target_"], {key: node[key] for key in given})


def check(node, path=""):
    """Resolve a composed config, or the part of it at `path`, and bind all it names; return how many `_target_`s."""
    found = list(nodes(OmegaConf.to_container(node, resolve=True, throw_on_missing=True), path))
    for where, named in found:
        check_binds(where, named)
    return len(list(nodes(to_container(node), path)))  # without those that are interpolations of others


def listed(named):
    """Return the options that a recipe names for a group."""
    return named if isinstance(named, list) else [named] if named else []


def compose_recipe(compose, hparam):
    """Return the options that a recipe chooses, its words, and its config."""
    mode = mode_for(hparam)
    choice = main_choices(mode) | written_choices(hparam)
    own = {".".join(path) for path, _ in written_values(read("hparam", hparam))}
    given = [word for word in required_overrides(choice) if word.partition("=")[0] not in own]
    words = (f"mode={mode}", f"hparam={hparam}", *given)
    return choice, words, compose(*words)


@pytest.fixture(scope="module")
def recipes(compose):
    return {hparam: compose_recipe(compose, hparam) for hparam in options("hparam")}


def check_composed(words, cfg):
    """Compare the config that Hydra has composed with our own composition of the same words."""
    chosen, values, _ = read_words(words, [FOLDER])
    assert to_container(compose_config(chosen, values).cfg) == to_container(cfg), words


def test_some_recipes_and_options_compose_as_by_hydra(compose):
    """The next two tests compare all."""
    for hparam in options("hparam")[::16]:
        check_composed(*compose_recipe(compose, hparam)[1:])
    for each in choices()[8::16]:
        check_composed(*row(compose, *each)[2:])


@pytest.mark.heavy
def test_every_recipe_composes_as_by_hydra(recipes):
    for _, words, cfg in recipes.values():
        check_composed(words, cfg)


@pytest.mark.heavy
def test_every_option_composes_as_by_hydra(rows):
    for _, _, words, cfg in rows:
        check_composed(words, cfg)


def check_restored(cfg):
    """Compare a config with what a checkpoint's description of it gives back; return how many `_target_`s that has."""
    description = json.loads(json.dumps(config_description(Builder(cfg))))  # as a file gives it back
    found = compose_stored(description, Source("resume=file", typed=["backbone.weights"]))
    whole = OmegaConf.create({**to_container(cfg), **found})
    for key in found:
        then, now = (json.loads(json.dumps(resolve_node(each, (key,)))) for each in (cfg, whole))
        assert now == (absolute(then) if key in (INITIAL, TEACHER) else then), key
    return len(list(nodes(found)))


@pytest.mark.heavy
def test_every_recipe_composes_resolves_and_is_restored(recipes):
    checked, given = 0, 0
    targets, saved = 0, 0
    for hparam, (choice, _, cfg) in recipes.items():
        assert "mode" not in read("hparam", hparam), f"hparam={hparam} writes keys of a mode: compose it with each"
        check_written(cfg, read("hparam", hparam), f"hparam={hparam}")
        # so a recipe goes with each extension that it needs
        chosen = [(group, option) for group, named in written_choices(hparam).items() for option in listed(named)]
        needed = [extensions_of_config(f"{group}/{option}") for group, option in chosen]
        assert frozenset().union(*needed) <= extensions_of_config(f"hparam/{hparam}"), hparam
        checked += check(cfg)
        given += check_restored(cfg)
        OmegaConf.resolve(deepcopy(cfg))  # as `--cfg job --resolve` does
        written = {group: written_targets(group, option) for group, option in choice.items()}
        targets += sum(written.values()) + ("chooser" in read("hparam", hparam))
        saved += sum(count for group, count in written.items() if group in SAVED)
    assert len(recipes) == len(list((FOLDER / "hparam").rglob("[!_]*.yaml"))) >= 50
    assert checked - OF_MAIN * len(recipes) == targets >= 14 * len(recipes) and given == saved >= 10 * len(recipes)


def test_modes_declare_their_launch_keys():
    said = {mode: read_node("mode", mode) for mode in options("mode")}
    read = dict.fromkeys(("eval", "export", "predict", "serve", "track"), "best") | {"train": "last"}
    assert {mode: said[mode].get("resume_from") for mode in read} == read  # a mode that is added may read one, too
    distributed = {mode for mode, keys in said.items() if keys.get("devices") == "${engine.devices}"}
    assert distributed >= {"eval", "probe", "train"}
    assert {mode: keys["resumes_with"] for mode, keys in said.items() if "resumes_with" in keys} == {
        "predict": "predict.json"
    }
    assert {mode for mode, keys in said.items() if "check" in keys} == {"train"}


def written_values(node, path=()):
    """Yield path and value of all that a file sets itself, but what only the user can know."""
    for key, value in node.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            yield from written_values(value, here)
        elif (
            here[-1] != "defaults"
            and value != "???"
            and not str(value).startswith("${dinoseg.class_file:")
            and here != ("data", "root")
        ):
            yield here, value


def check_written(cfg, own, option):
    """Check that all that an option's file sets is what is composed; return how many values."""
    composed = OmegaConf.to_container(cfg)
    written = list(written_values(own))
    for path, value in written:
        assert reduce(getitem, path, composed) == value, f"{option}: {path} is lost"
    return len(written)


def choices():
    """Return modes and options that have each option of each group at least once: of modes that compose it."""
    modes = {group: mode_of(group) for group in GROUPS if group not in ("mode", "hparam", "prepare", "render")}
    of_groups = {*modes.values()}
    found = [(mode, {}) for mode in options("mode") if mode not in {*of_groups, "prepare", "render"}]
    for mode in sorted(of_groups):
        groups = {group: options(group) for group, each in modes.items() if each == mode}
        found += [(mode, dict(zip(groups, chosen, strict=True))) for chosen in zip_longest(*groups.values())]
    for group in ("prepare", "render"):  # chosen by the dataset
        found += [(group, {"data": option, group: option}) for option in options(group)]
    return found


def row(compose, mode, chosen):
    """Return the choices of a config, its words, and the config; None leaves a group at its default."""
    chosen = {"mode": mode, **{group: option for group, option in chosen.items() if option is not None}}
    whole = main_choices(mode) | chosen
    words = [f"{group}={option}" for group, option in chosen.items()]
    words += required_overrides(whole) if "data" in whole else []
    return chosen, whole, words, compose(*words)


def check_row(chosen, whole, _, cfg):
    """Check that a config has all that its options write; return how many `_target_`s and values."""
    found = check(cfg)
    assert found == sum(written_targets(*pair) for pair in whole.items()) + OF_MAIN, chosen
    return found, sum(check_written(cfg, in_place(*pair), "=".join(pair)) for pair in chosen.items())


@pytest.fixture(scope="module")
def rows(compose):
    return [row(compose, *each) for each in choices()]


def test_some_options_compose_and_are_restored(compose):
    """The next three tests look at all."""
    for each in choices()[::16]:
        chosen, whole, words, cfg = row(compose, *each)
        check_row(chosen, whole, words, cfg)
        if whole["mode"] == "train":
            check_restored(cfg)
            check_backbone(whole["backbone"], cfg.backbone)


@pytest.mark.heavy
def test_every_option_of_every_other_group_composes(rows):
    checked, values = map(sum, zip(*(check_row(*each) for each in rows), strict=True))
    tried = {pair for chosen, *_ in rows for pair in chosen.items()}
    others = ("hydra", "local", "hparam", "runtime")
    files = [path for path in FOLDER.glob("*/*.yaml") if path.parent.name not in others]
    assert len(tried) == len([path for path in files if path.stem[0] != "_"]) >= 40
    assert checked >= 10 * len(rows) and values > 4 * len(tried)


def in_place(group, option):
    """Return what an option's file sets, at the keys where it is composed."""
    text = (FOLDER / group / f"{option}.yaml").read_text("utf-8")
    return read(group, option) if "@package _global_" in text else {group: read(group, option)}


@pytest.mark.heavy
def test_checkpoint_restores_every_option(rows):
    given = set()
    for chosen, whole, _, cfg in rows:
        if whole["mode"] == "train":
            check_restored(cfg)
            given |= {pair for pair in chosen.items() if pair[0] in SAVED}
    groups = {*SAVED} & {*groups_of("train")}
    assert len(given) == sum(len(list((FOLDER / group).glob("[!_]*.yaml"))) for group in groups)


def test_hidden_options_are_bases_with_missing_values():
    hidden = sorted(path for path in FOLDER.glob("*/_*.yaml") if path.stem != OPTION)  # which only calls choose
    assert hidden
    for path in hidden:
        others = [each for each in FOLDER.rglob("*.yaml") if each != path]
        name = re.compile(rf"\b{path.stem}\b")  # and not that of another base, which begins with it
        users = [each for each in others if name.search(each.read_text("utf-8"))]
        assert users, f"nothing starts from {path}"


def check_backbone(option, node):
    """Check that an option sets only keys of its family's config."""
    backbone = OmegaConf.to_container(node)
    if "arch" in backbone:  # timm knows its own models
        known = AutoConfig.for_model(backbone.get("family", "dinov3_convnext")).to_dict()
        assert not set(backbone["arch"]) - set(known), option
        heads = backbone["arch"].get("num_attention_heads", 1)
        assert backbone["weights"] and backbone["arch"].get("hidden_size", 1) % heads == 0


@pytest.mark.heavy
def test_backbone_options_set_only_keys_of_their_family(rows):
    found = {chosen["backbone"]: cfg.backbone for chosen, _, _, cfg in rows if "backbone" in chosen}
    for option, node in found.items():
        check_backbone(option, node)
    assert len(found) == len(list((FOLDER / "backbone").glob("[!_]*.yaml")))


def leaves(node, path=""):
    """Yield every key that no `_target_` takes."""
    for key, value in node.items():
        if not isinstance(value, dict) or not value:
            yield f"{path}{key}"
        elif "_target_" not in value:
            yield from leaves(value, f"{path}{key}.")


@pytest.mark.parametrize("data", ["folder", "sarrarp"])
def test_every_other_key_is_read(compose, data):
    cfg = OmegaConf.to_container(compose(f"data={data}", *required_overrides({"data": data})))
    python = "\n".join(path.read_text() for path in FOLDER.parent.rglob("*.py"))
    configs = "\n".join(path.read_text() for path in FOLDER.rglob("*.yaml"))
    keys = list(leaves({key: value for key, value in cfg.items() if key != "choices"}))
    assert {"seed", "cache_dir", "resolution.crop", "data.batch_size", "loss.weights", "data.num_classes"} <= set(keys)
    read = set(re.findall(r'"([\w.]+)"', python))  # as `Builder` reads it
    for path in re.findall(r"\bcfg\.([\w.]+)", python):
        names = path.split(".")
        read |= {".".join(names[:length]) for length in range(1, len(names) + 1)}
    for target, place in ((Settings, "trainer"), (prepare_dataset, "data")):  # as `Builder` reads their keys
        read |= {f"{place}.{name}" for name in inspect.signature(target).parameters}
    pointed = set(re.findall(r"\$\{(\.*[\w.]+)\}", configs))
    relative = {path.lstrip(".") for path in pointed if path.startswith(".")}
    assert not [key for key in keys if key not in read | pointed and key.split(".")[-1] not in relative]


def test_shared_facts_are_set_once(compose):
    words = ("hparam=sarrarp_lora", "adapter.rank=4", "backbone=dinov2_vits14", "resolution.crop=[30,50]")
    cfg = compose(*words, "data.root=X")
    assert cfg.adapter.alpha == 4 and cfg.head.patch_size == 14 and cfg.head.num_classes == 10
    assert cfg.data.augment.crop == [30, 50] and cfg.data.reader.root == "X"
    typed = ("adapter=lora", "adapter.rank=7", "head=mlp", "backbone.patch_size=9", "resolution.longest=99")
    typed += ("data.classes=[a,b,c,d]", "data.ignore_index=77", "loss.weights=inverse", "engine.devices=3")
    cfg = compose("mode=train", *typed, "cache_dir=C")
    assert cfg.adapter.alpha == 7 and compose(*typed, "adapter.alpha=3").adapter.alpha == 3
    assert cfg.head.patch_size == 9 and cfg.data.augment.longest == 99 and cfg.head.num_classes == 4
    assert cfg.data.reader.ignore_index == cfg.data.augment.ignore_index == cfg.loss.criterion.ignore_index == 77
    assert cfg.loss.class_weights.scheme == "inverse" and cfg.loss.counts.cache_dir == "C" and cfg.mode.devices == 3
    assert compose("loss.weights={a: 2, b: 0.5}").loss.class_weights.scheme == {"a": 2, "b": 0.5}
    for mode in ("prepare", "render"):
        assert compose(f"mode={mode}", "data=sarrarp", "data.root=X")[mode].root == "X"
    assert compose("engine.devices=3", "mode=eval").mode.devices == 3
    assert compose("mode=predict", "input=a.png").mode.input == "a.png"


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the config folder, without local files."""
    return shutil.copytree(FOLDER, tmp_path / "cfg", ignore=shutil.ignore_patterns("local"))


def compose_in(folder, *overrides):
    register_resolvers()
    with initialize_config_dir(str(folder), version_base="1.3"):
        return hydra_compose("main", list(overrides))


def test_recipe_chooses_its_colour_augmentation(compose, copy):
    text = (
        "# @package _global_\ndefaults: [override /data/augment/color: photometric]\n"
        "data: {augment: {relative_to: short, fill: [124, 116, 104], color: {additive: true, space: hsv}}}\n"
    )
    (copy / "hparam/official.yaml").write_text(text)
    cfg = compose_in(copy, "hparam=official", "data.augment.color.hue=0.2", "data.augment.padding=end")
    augment = instantiate(cfg.data.augment)
    assert augment.color == PhotometricDistortion(32 / 255, 0.5, 0.5, 0.2, additive=True, space="hsv")
    assert (augment.relative_to, augment.padding, augment.fill) == ("short", "end", [124, 116, 104])
    typed = compose("data/augment/color=photometric")
    assert instantiate(typed.data.augment.color) == PhotometricDistortion(32 / 255, 0.5, 0.5, 0.05)
    assert typed.choices["data/augment/color"] == "photometric"
    cfg.data.augment.fill = [0, 0, 256]
    assert_refused(lambda: instantiate(cfg.data.augment), "data.augment.fill=", "number from 0 to 255 for each")


def test_local_paths_override_only_recipes(copy):
    def root_and_workers(*overrides):
        cfg = compose_in(copy, *overrides)
        return cfg.data.root, cfg.engine.workers

    assert root_and_workers("hparam=demo") == ("outputs/demo/data", "auto")
    (copy / "local").mkdir()
    (copy / "local/default.yaml").write_text("# @package _global_\ndata: {root: mine}\nengine: {workers: 5}\n")
    assert root_and_workers("hparam=demo") == ("mine", 5)
    assert root_and_workers("hparam=demo", "data.root=given", "engine.workers=0") == ("given", 0)


def test_files_of_a_defaults_list_come_before_the_option(tmp_path):
    files = [path.relative_to(FOLDER).as_posix() for path in option_files([FOLDER], "hparam", "sarrarp_lora_lowres")]
    assert files[-2:] == ["hparam/sarrarp_lora.yaml", "hparam/sarrarp_lora_lowres.yaml"]  # the first by its whole path
    assert "supervised" in [path.stem for path in option_files([FOLDER], "trainer", "slots")]
    assert [*option_files([tmp_path], "head", "x")] == []


def test_folds_evaluate_last_weights_unless_others_are_typed(compose):
    words = ("mode=train", "data=folder", "data.root=x", "data.classes=[a,b]")
    fold = ("data.folds=3", "data.fold=0")
    assert (
        compose(*words).trainer.evaluate == compose(*words, *fold, "trainer.evaluate=best").trainer.evaluate == "best"
    )
    assert compose(*words, *fold).trainer.evaluate == "last"
