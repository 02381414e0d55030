"""A config read from a checkpoint may say what config files of this machine say at the same place, and plain values."""

import copy
import json
import sys

import pytest
from config_files import FOLDER
from omegaconf import OmegaConf

from dinoseg.config.guard import guard
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import SAVED, config_description
from dinoseg.utils.errors import UserError

SET = ("data.root=.", "data.classes=[dark,bright]", "loss=ce_dice")
LINEAR = "dinoseg.models.heads.linear.LinearHead"
SHELL = [  # targets that reach, or seem to reach, any callable
    "torch.nn.modules.module._WrappedHook.__call__",
    "torch.nn.modules.module._WrappedHook",
    "torch.nn.utils._deprecation_utils.lazy_deprecated_import",
    "torch.nn.Sequential",
    "torch.nn.Linear",
    "torch.nn.Module.apply",
    "torch.nn.functional.os.system",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.utils.stateless.functional_call",
    "torch.nn.modules.lazy.LazyModuleMixin",
    "torch.optim.SGD",
    "torch.optim.optimizer.torch.load",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "torch.package.PackageImporter",
    "torch.jit.load",
    "torch.distributed.launch.main",
    "torch.multiprocessing.spawn.spawn",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils._config_module.install_config_module",
    "torch._inductor.codecache.PyCodeCache.load",
    "torch._dynamo.config_utils.exec",
    "numpy.testing._private.utils.runstring",
    "numpy.testing.rundocs",
    "numpy.load",
    "numpy.f2py.main",
    "setuptools.sandbox.run_setup",
    "setuptools._distutils.spawn.spawn",
    "shutil.rmtree",
    "shutil.move",
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "eval",
    "subprocess.Popen",
    "pty.spawn",
    "timeit.timeit",
    "cProfile.run",
    "code.interact",
    "runpy.run_path",
    "webbrowser.open",
    "pickle.loads",
    "importlib.import_module",
    "functools.partial",
    "functools.reduce",
    "operator.methodcaller",
    "ctypes.CDLL",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "hydra.utils.get_method",
    "hydra._internal.utils._locate",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "omegaconf.OmegaConf.register_new_resolver",
    "omegaconf.OmegaConf.load",
    "pydoc.locate",
    "peft.PeftModel.from_pretrained",
    "transformers.pipeline",
    "transformers.AutoModel.from_pretrained",
    "timm.create_model",
    "accelerate.launchers.notebook_launcher",
    "matplotlib.backends.backend_pgf.LatexManager",
    "yaml.unsafe_load",
    "dinoseg.config.nodes.instantiate",
    "dinoseg.config.nodes.hydra_instantiate",
    "dinoseg.experiment.builder.importlib.import_module",
    "dinoseg.models.model.torch.hub.load",
    "dinoseg.cli.launch.launch",
    "dinoseg.modes.render.render",
    "dinoseg.modes.export.export",
    "dinoseg.training.checkpoint.write",
    "dinoseg.tasks.preparation.sarrarp.prepare",
    "dinoseg.tasks.preparation.idd.prepare",
    "dinoseg.synthetic.surgery.write.render_dataset",
    "dinoseg.tasks.preparation.sarrarp.shutil.rmtree",
    "dinoseg.data.packed.pack.pack",
    "dinoseg.utils.locks.locked",
    "dinoseg.data.packed.store.write_index",
    "dinoseg.data.scan.scan.scan",
    "dinoseg.data.doctor.short.check",
    "dinoseg.data.video.index.index_videos",
    "dinoseg.models.heads.linear",
    "dinoseg.models.heads.linear.LinearHead.forward.__globals__",
    "dinoseg.models.heads.linear.LinearHead.__init__.__globals__",
    "dinoseg.models.heads.linear.LinearHead.__class__",
    "dinoseg.models.heads.linear.nn.Linear",
    "dinoseg.models.heads..linear.LinearHead",
    "..dinoseg.models.heads.linear.LinearHead",
    " dinoseg.models.heads.linear.LinearHead",
    "dinoseg.models.heads.linear.LinearHead ",
    "dinoseg.models.heads.linear.LinearHead\n",
    "dinoseg.models.heads.linear.LinearHe\u0430d",  # a Cyrillic a
    "dinoseg.models.heads.linear.\uff2cinearHead",  # a wide L, which Python reads as an L
    "\x1b[2J",
    "",
    "???",
    "${data.root}",
    "${head._target_}",
]


@pytest.fixture(scope="module")
def kept(request):
    """Return the config of a checkpoint as its file holds it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from dinoseg.config.resolvers import register_resolvers

    register_resolvers()
    HydraConfig.instance().cfg = None
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        cfg = compose("main", list(SET))
    groups = {key: "base" for key in ("hparam", *SAVED)}
    return as_read(config_description(Builder(OmegaConf.create({**to_container(cfg), "choices": groups}))))


def as_read(description):
    """Return a description's config as a file gives it back."""
    return json.loads(json.dumps(description["config"]))


def planted(kept, place, value):
    """Return a config with a value put at a dotted place."""
    config = copy.deepcopy(kept)
    node, (*above, last) = config, place.split("/")
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[last] = value
    return config


def test_a_config_of_ours_is_accepted(kept):
    guard(kept, "resume=file")


@pytest.mark.parametrize("target", SHELL, ids=ascii)
def test_a_target_that_no_config_file_names_is_refused_anywhere(kept, target):
    guard(kept, "resume=file")  # which imports what is allowed
    before = set(sys.modules)
    for place in ("head", "loss/criterion", "loss/criterion/terms/ce", "data/reader", "backbone/arch/hidden_act", "x"):
        value = {"_target_": target, "_partial_": True}
        if place in ("head", "loss/criterion", "data/reader"):
            value = {**copy.deepcopy(_at(kept, place)), **value}
        with pytest.raises(UserError, match="_target_=.* is refused: no config file on this machine names it"):
            guard(planted(kept, place, value), "resume=file")
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] not in ("dinoseg",)}


def _at(config, place):
    for key in place.split("/"):
        config = config[key]
    return config


HEAD = {"_target_": LINEAR, "_partial_": True, "layers": [-1], "num_classes": 2, "lr": 1e-3}
ODD = {  # place, value, what the refusal says
    "a head where a backbone goes": ("backbone", {"_target_": LINEAR}, "names it there"),
    "a head in an argument": ("head/num_classes", {"_target_": LINEAR, "_partial_": True}, "names it there"),
    "a layout in a mask": (
        "data/reader/masks/ids",
        {"_target_": "dinoseg.data.formats.folder.FolderLayout"},
        "they name no class",
    ),
    "an opener in a list": ("adapter/device", [[{"_target_": "dinoseg.data.opened.opened"}]], "they name no class"),
    "a term of another loss": ("loss/criterion/terms/ce/_target_", "dinoseg.losses.overlap.Dice", "names it there"),
    "a term of a new name": (
        "loss/criterion/terms/x",
        {"_target_": "dinoseg.losses.overlap.Dice"},
        "they name no class",
    ),
    "a number as a target": ("head/_target_", 3, "names it there"),
    "a list as a target": ("head/_target_", [LINEAR], "names it there"),
    "a node as a target": ("head/_target_", {"_target_": LINEAR}, "names it there"),
    "no target at all": ("head/_target_", None, "names it there"),
    "half a node": ("seed", {"_partial_": True}, "names it there"),
    "called at once": ("head/_partial_", False, "_partial_=False is refused"),
    "not called": ("adapter/_partial_", True, "_partial_=True is refused"),
    "a text for yes": ("head/_partial_", "true", "_partial_=true is refused"),
    "arguments without names": ("data/reader/_args_", ["/", "train"], "the key _args_"),
    "arguments of a layout": ("data/reader/layout/_args_", ["/"], "the key _args_"),
    "convert": ("head/_convert_", "all", "the key _convert_"),
    "recursive": ("head/_recursive_", False, "the key _recursive_"),
    "mode": ("head/_mode_", "x", "the key _mode_"),
    "a dunder": ("head/__class__", "x", "the key __class__"),
    "a dotted key": ("head/a.b", 1, "the key a.b"),
    "a key with an index": ("head/a[0]", 1, r"the key a\[0\]"),
    "a key that interpolates": ("head/${seed}", 1, "the key "),
    "an empty key": ("head/", 1, "the key "),
    "a number as a key": ("resolution", {1: 2}, "the key 1"),
    "a key with a line break": ("head/a\nb", 1, "the key "),
    "a key of no argument": ("head/evil", 1, "takes no evil"),
    "a key of no argument with a node": ("head/layers", {"_target_": LINEAR}, "takes no layers"),
    "an environment variable": ("data/root", "${oc.env:HOME}", "interpolation is refused"),
    "with blanks": ("data/root", "${ oc.env : HOME }", "interpolation is refused"),
    "within a text": ("data/root", "a ${oc.env:HOME} b", "interpolation is refused"),
    "within a length": ("data/root", "${len:${oc.env:HOME}}", "interpolation is refused"),
    "within cells": ("data/root", "${cells:${resolution},${oc.env:HOME}}", "interpolation is refused"),
    "cells of a text": ("data/root", "${cells:/etc/passwd}", "interpolation is refused"),
    "decoded": ("data/root", "${oc.decode:${data.group}}", "interpolation is refused"),
    "selected": ("data/root", "${oc.select:mode}", "interpolation is refused"),
    "created": ("data/root", "${oc.create:{a:1}}", "interpolation is refused"),
    "the time": ("data/root", "${now:%Y}", "interpolation is refused"),
    "hydra's": ("data/root", "${hydra:runtime.cwd}", "interpolation is refused"),
    "a class file": ("data/root", "${class_file:classes}", "interpolation is refused"),
    "one in another": ("data/root", "${data.${data.group}}", "interpolation is refused"),
    "one that never ends": ("data/root", "${data.root", "interpolation is refused"),
    "escaped": ("data/root", "\\${oc.env:HOME}", "interpolation is refused"),
    "an escaped pointer": ("data/root", "\\${data.on_error}", "interpolation is refused"),
    "put together by an escape": ("data/root", "\\${oc.env${data.on_error}HOME}", "interpolation is refused"),
    "put together by a sign": ("data/root", "$${data.on_error}", "interpolation is refused"),
    "at itself": ("data/root", "${data.root}", "is a chain of interpolations"),
    "at what is built": ("head/num_classes", "${data.opened}", "refers to a component"),
    "at a group that is built": ("head/num_classes", "${data}", "refers to a component"),
    "at a group beside": ("head/num_classes", "${.}", "interpolation is refused"),
    "at a mode": ("head/num_classes", "${mode}", "refers to a component"),
    "through another": ("data", {"a": "${data.b}x", "c": "${data.a}"}, "is a chain of interpolations"),
    "places for files": ("data/opened/cache_dir", "elsewhere", "must not choose where files are written"),
    "places for counts": ("loss/counts/cache_dir", "/elsewhere", "must not choose where files are written"),
    "places below the cache": ("data/opened/cache_dir", "${cache_dir}/..", "must not choose where files are written"),
    "places by another key": ("data/opened/cache_dir", "${data.root}", "must not choose where files are written"),
    "places in a table": ("data/opened/cache_dir", {"a": "/elsewhere"}, "not a folder name"),
    "no place": ("data/opened/cache_dir", None, "not a folder name"),
    "a place of number": ("data/opened/cache_dir", 3, "not a folder name"),
    "masks elsewhere": ("data/tracking", {"folder": "/elsewhere"}, "folders below its run folder"),
    "masks above": ("data/tracking", {"folder": "masks/../.."}, "folders below its run folder"),
    "masks on a drive": ("data/tracking", {"folder": "C:\\up"}, "folders below its run folder"),
    "masks nowhere": ("data/tracking", {"folder": None}, "not a folder name"),
    "masks by another key": ("data", {"a": {"folder": "/elsewhere"}, "tracking": "${data.a}"}, "below its run folder"),
    "masks beside what fails": (
        "data",
        {"a": {"folder": "/elsewhere", "b": "${len:${nothing}}"}, "tracking": "${.a}"},
        "below its run folder",
    ),
    "masks of a table": ("data/tracking", {"folder": {"a": "b"}}, "not a folder name"),
    "rounds by another key": ("head", {**HEAD, "iterations": "${trainer.steps}"}, "at most"),
    "a scale by another key": ("resolution/scale", "${trainer.steps}", "at most"),
    "a crop by another key": ("resolution/crop", "${optim.x}", "at most"),
    "a batch by another key": ("data/batch_size", "${optim.x.0}", "at most"),
    "a batch of sides elsewhere": ("resolution/crop", "${optim.y}", "batches of"),
    "processes by another key": ("data/workers", "${optim.x.0}", "at most"),
    "a table for what is built": ("data/reader/masks", {"format": "ids"}, "names it there"),
    "a number for what is built": ("data/reader/partition", 3, "put a _target_ there"),
    "a text for what is built": ("data/reader", "x", "put a _target_ there"),
    "a list for what is built": ("loss/criterion", [["a"]], "put a _target_ there"),
    "what is built by another key": ("data/augment", "${optim.x}", "put a _target_ there"),
    "weights of nobody": ("backbone/weights", "~nobody-here/x", "Set its current path:"),
    "weights that were moved": ("backbone/weights", "/gone/vit.safetensors", "Set its current path:"),
    "weights of a long name": ("backbone/weights", "a" * 4000, "no config file on this machine"),
    "weights of a broken name": ("backbone/weights", "a\0b", "no config file on this machine"),
    "preparing": ("data/prepare", {"_target_": "dinoseg.tasks.preparation.idd.prepare"}, "must not access files"),
    "rendering": ("data/render", "x", "must not access files"),
    "a hub of one's own": ("backbone/weights", "evil/weights", "no config file on this machine names it"),
    "a request of a hub": ("backbone/weights", "facebook/dinov2-small@refs/pr/7", "no config file on this machine"),
    "weights above the package": ("backbone/weights", "dinoseg:../../x", "no config file on this machine"),
    "weights by another key": ("backbone/weights", "${data.root}", "no config file on this machine"),
    "weights of a number": ("backbone/weights", 3, "no config file on this machine"),
    "queries": ("head/num_classes", 10**12, "at most"),
    "a huge number": ("head/num_classes", 10**400, "at most"),
    "a huge number below": ("head/num_classes", -(10**12), "at most"),
    "a width": ("backbone/arch/hidden_size", 2**40, "at most"),
    "a depth": ("backbone/arch/num_hidden_layers", 10**9, "at most"),
    "not a number": ("resolution/scale", float("nan"), "at most"),
    "infinity": ("optim/optimizer/lr", float("inf"), "at most"),
    "a scale": ("resolution/scale", 1e6, "at most"),
    "a crop": ("resolution/crop", [16384, 16384], "batches of"),
    "processes": ("data/workers", 10**5, "at most"),
    "a long table": ("data/reader/masks/ids", dict.fromkeys(map(str, range(30000)), 0), "more than 20000 values"),
    "a long text": ("data/root", "a" * 10**5, "100000 characters"),
    "bytes": ("data/root", b"x", "of type bytes"),
    "an object": ("data/root", object(), "of type object"),
}


@pytest.mark.parametrize(("place", "value", "says"), ODD.values(), ids=ODD)
def test_what_no_config_file_says_is_refused(kept, place, value, says):
    kept = {**kept, "optim": {**kept["optim"], "x": [2**20, 2**20], "y": [2**14, 2**14]}}
    kept = {**kept, "trainer": {**kept["trainer"], "steps": 2**40}}
    with pytest.raises(UserError, match=says) as caught:
        guard(planted(kept, place, value), "resume=file", {"mode": {"_target_": "x"}, "cache_dir": "c"})
    assert str(caught.value).startswith("resume=file: ") and str(caught.value).isprintable()


def test_weights_are_given_to_classes_of_any_name(kept):
    names = ["it's", "a.b/c", "~", "k: v", "no", "1e3", "_background_", "h\xf6he", "grass (wet)"]
    guard(planted(kept, "loss/weights", dict.fromkeys(names, 3.0)), "resume=file")
    for name in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_", "a\nb"):
        with pytest.raises(UserError, match=r"loss.weights.* is refused"):
            guard(planted(kept, "loss/weights", {name: 3.0}), "resume=file")
    with pytest.raises(UserError, match="names it there"):
        guard(planted(kept, "loss/weights", {"a.b": {"_target_": LINEAR}}), "resume=file")


def test_interpolations_that_multiply_are_refused(kept):
    data = {**kept["data"], "words": ["word"] * 1000, "more": ["${data.words}"] * 1000}
    with pytest.raises(UserError, match="resolve to more than"):
        guard({**kept, "data": data}, "resume=file")
    doubled = {f"b{number}": f"${{.b{number - 1}}}${{.b{number - 1}}}" for number in range(1, 60)}
    with pytest.raises(UserError, match="is a chain of interpolations"):
        guard({**kept, "data": {**kept["data"], "b0": "xx", **doubled}}, "resume=file")
    around = {"a": "${data.b}", "b": "${data.a}"}
    with pytest.raises(UserError, match="is a chain of interpolations"):
        guard({**kept, "data": {**kept["data"], **around}}, "resume=file")
    below = {"big": {"c": [0] * 3000}, "y": {"a": "${..big}"}, "t": ["${data.y.a.c}"] * 3000}
    with pytest.raises(UserError, match="is a chain of interpolations"):
        guard({**kept, "data": {**kept["data"], **below}}, "resume=file")


def test_interpolations_within_are_fine(kept):
    data = {
        **kept["data"],
        "a": ["${..classes}", "${len:${.classes}}", "${data.classes}"],
        "b": "${.on_error}/x: $"[:-2],
    }
    guard({**kept, "data": data}, "resume=file")


def test_what_is_resolved_is_not_resolved_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    cfg = OmegaConf.create({"a": "$", "b": "{oc.env:SECRET}", "node": {"_target_": LINEAR, "x": "${a}${b}"}})
    with pytest.raises(UserError, match="is still an interpolation after it is resolved"):
        instantiate(cfg.node)


def test_the_command_line_may_trust_a_package(kept, tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").write_text("")
    (tmp_path / "my_package/heads.py").write_text(
        "import os\nfrom os import *\nclass Head:\n    def __init__(self, width): pass\nclass _Hidden: pass\n"
    )
    (tmp_path / "my_package/broken.py").write_text("import missing_on_windows\nclass Head: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def head(target, **given):
        return planted(kept, "head", {"_target_": target, "_partial_": True, **given})

    fine = head("my_package.heads.Head", width=3)
    with pytest.raises(UserError, match=r"trust=\[PACKAGE\]"):
        guard(fine, "resume=file")
    assert "my_package" not in sys.modules
    for trust in ("my_package", "my_package.heads", "my_package.heads.Head"):
        guard(fine, "resume=file", trust=[trust])
    for other in ("my_packag", "my_package.head", "heads", "", "my_package.heads.Head.x"):
        with pytest.raises(UserError, match="names it there"):
            guard(fine, "resume=file", trust=[other])
    for target, says in (
        ("my_package.heads.os.system", "does not name that package|neither a class nor a function"),
        ("my_package.heads.system", "does not name that package|neither a class nor a function"),
        ("my_package.heads.makedirs", "does not name that package"),
        ("my_package.heads._Hidden", "names it there"),
        ("my_package.heads.Head.__init__", "names it there"),
        ("my_package.heads", "neither a class nor a function"),
        ("my_package.nothing.Head", "is allowed, but cannot be imported here .*No module named 'my_package.nothing'"),
        ("my_package.broken.Head", "is allowed, but cannot be imported here .*No module named 'missing_on_windows'"),
        ("my_packages.heads.Head", "names it there"),
    ):
        with pytest.raises(UserError, match=says):
            guard(head(target), "resume=file", trust=["my_package"])
    with pytest.raises(UserError, match="takes no depth"):
        guard(head("my_package.heads.Head", depth=3), "resume=file", trust=["my_package"])
    guard(planted(kept, "backbone/weights", "my-org/my-dino"), "resume=file", trust=["my-org/my-dino"])
    guard(planted(kept, "backbone/weights", "my-org/my-dino"), "resume=file", typed=["backbone.weights"])


def test_what_the_command_line_composed_is_known(kept):
    term = {"_target_": "dinoseg.losses.focal.Focal", "_partial_": True}
    mine = planted(kept, "loss/criterion/terms/focal", term)
    with pytest.raises(UserError, match="they name no class"):
        guard(mine, "resume=file")
    guard(mine, "resume=file", {**mine, "cache_dir": "c", "engine": {"device": "cpu"}})


def test_the_users_own_config_files_are_known(kept, tmp_path):
    from dinoseg.config.registry import read_chosen, read_registry

    (tmp_path / "head").mkdir()
    (tmp_path / "parts").mkdir()
    (tmp_path / "hparam").mkdir()
    (tmp_path / "head/mine.yaml").write_text(
        "{_target_: my.Head, norm: {_target_: my.Norm}, list: [{_target_: my.Item}]}"
    )
    (tmp_path / "hparam/mine.yaml").write_text("# @package _global_\nloss: {criterion: {terms: {a: {_target_: T}}}}")
    (tmp_path / "parts/a.yaml").write_text("_target_: my.Part\n")
    (tmp_path / "parts/b.yaml").write_text("# @package head.last\n_target_: my.Last\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text("defaults: [/parts@first: a, /parts: a, /parts@x: b, other@y, _self_]\n")
    (tmp_path / "data/other.yaml").write_text("_target_: my.Other\n")
    (tmp_path / "data/deep").mkdir()
    (tmp_path / "data/deep/not.yaml").write_text("_target_: os.system\n")
    found = {place: sorted(here.targets) for place, here in read_registry((tmp_path,)).items() if here.targets}
    assert found == {
        ("head",): ["my.Head"],
        ("head", "norm"): ["my.Norm"],
        ("head", "list", "*"): ["my.Item"],
        ("loss", "criterion", "terms", "a"): ["T"],
        ("data", "first"): ["my.Part"],
        ("data", "parts"): ["my.Part"],
        ("data", "x"): ["my.Last"],
        ("data", "y"): ["my.Other"],
        ("data",): ["my.Other"],
    }
    chosen = read_chosen([tmp_path], (("data/deep", "not"), ("parts@head.first", "a"), ("+parts", "b")))
    assert chosen["data", "deep"].targets == {"os.system"} and chosen["head", "first"].targets == {"my.Part"}
