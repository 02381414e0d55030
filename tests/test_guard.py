"""A config read from a checkpoint may name the parts of a model and nothing else."""

import sys

import pytest
from config_files import FOLDER, main_choices, needed, nodes, options, written_choices, written_targets
from omegaconf import OmegaConf

from dinoseg.checks import check_given, guard
from dinoseg.errors import UserError
from dinoseg.resume import KEPT, description_of

EVIL = [
    "dinoseg.data.prepare_sarrarp.prepare",  # writes and removes files
    "dinoseg.data.synthetic.write.render_dataset",
    "dinoseg.data.synthetic.moving_write.render_moving_objects",
    "dinoseg.data.archives.shutil.rmtree",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "dinoseg.model.torch.hub.load",
    "dinoseg.data.loader.torch.hub.load",
    "dinoseg.training.engine.torch.load",
    "torch.nn.functional.os.system",
    "torch.nn.modules.module.torch.load",
    "torch.optim.optimizer.torch.load",
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "eval",
    "subprocess.Popen",
    "dinoseg.launch.socket.socket",
    "dinoseg.build.importlib.import_module",
    "hydra.utils.instantiate",
    "dinoseg.nodes.hydra_instantiate",
    "dinoseg.data.packed.pack",
    "dinoseg.locks.locked",
    "dinoseg.data.packed_store.write_index",
    "dinoseg.data.scan.scan",
    "dinoseg.data.doctor.short.check",
    "dinoseg.data.prepare_idd.prepare",
    "dinoseg.data.video_index.index_videos",
    "dinoseg.nodes.instantiate",  # would instantiate what another target reads from a file
    "dinoseg.launch.launch",
    "dinoseg.__main__.main",
    "dinoseg.modes.render.render",
    "dinoseg.report.log.read_rows",
    "dinosegevil.part",
    "torch.nnevil.part",
    "torch.nn_evil",
    "dinoseg.heads.linear",  # a module
    "torch.nn",
    "dinoseg.heads.linear.LinearHead.forward.__globals__",
    "dinoseg.heads.linear.LinearHead.__init__.__globals__",
    "dinoseg.heads.nothing.Nothing",
    "dinoseg.heads.linear.Nothing",
    "dinoseg.data.loader.Transform",  # neither class nor function
    "dinoseg.heads..linear.LinearHead",
    "..dinoseg.heads.linear.LinearHead",
    "",
    "${data.root}",
]


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda node: node,
        lambda node: {"head": node},
        lambda node: {"data": [{"b": 1}, [{"c": {"d": node}}]]},
        lambda node: {"adapter": {"_target_": "dinoseg.adapters.Lora", "rank": node}},
        lambda node: OmegaConf.create({"trainer": {"b": [node]}}),
        lambda node: {"mode": node},
    ],
    ids=["bare", "in a dict", "in lists", "below a good one", "as a config", "in a group of its own"],
)
def test_what_is_refused(target, wrap):
    with pytest.raises(UserError) as caught:
        guard(wrap({"_target_": target, "_partial_": True}), "resume=file")
    assert str(caught.value).startswith(f"resume=file: _target_={target} is refused")
    assert "may only name" in str(caught.value) and "Do not use this file" in str(caught.value)


def test_a_group_may_only_name_its_own_room():
    guard({"head": {"_target_": "dinoseg.heads.linear.LinearHead"}})
    for group in ("adapter", "data", "backbone", "trainer", "resolution"):
        with pytest.raises(UserError, match=f"is refused in {group}"):
            guard({group: {"_target_": "dinoseg.heads.linear.LinearHead"}})


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "${ oc.env : HOME }",
        "before ${oc.env:HOME} after",
        "${len:${oc.env:HOME}}",
        "${oc.decode:${data.root}}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
        "${data.${oc.env:HOME}}",
    ],
)
def test_interpolations_that_reach_outside_are_refused(text):
    for node in (text, {"data": {"root": text}}, {"classes": ["a", [text]]}):
        with pytest.raises(UserError, match="the interpolation .* is refused"):
            guard({"data": node} if isinstance(node, str) else node)


@pytest.mark.parametrize("group", ["data", "loss"])
@pytest.mark.parametrize("place", ["elsewhere", "/elsewhere", "${data.root}", "${cache_dir}/..", None, 3])
def test_a_checkpoint_may_not_say_where_files_are_written(group, place):
    node = {"_target_": "dinoseg.data.opened.opened", "cache_dir": "${cache_dir}"}
    node = node if group == "data" else {**node, "_target_": "dinoseg.data.frequencies.class_counts"}
    guard({group: {"opened": node}})
    for wrapped in ({"opened": {**node, "cache_dir": place}}, {"terms": [{"deep": {"cache_dir": place}}]}):
        with pytest.raises(UserError, match="cache_dir=.* is refused"):
            guard({group: wrapped})


@pytest.mark.parametrize("folder", ["/elsewhere", "../up", "masks/..", "${data.root}", "", ".", "C:\\up", None])
def test_a_checkpoint_names_folders_of_its_run_alone(folder):
    for fine in ("masks", "masks/Annotations"):
        guard({"data": {"tracking": {"folder": fine}, "folder": "anything/{split}"}})
    with pytest.raises(UserError, match="data.tracking.folder=.* is refused"):
        guard({"data": {"tracking": {"folder": folder}}})


@pytest.mark.parametrize("key", ["_args_", "_convert_", "_recursive_"])
def test_arguments_without_a_name_are_refused(key):
    node = {"_target_": "dinoseg.data.frequencies.class_counts", key: ["x", "/elsewhere"]}
    for group in ({"official": node}, {"reader": {"_target_": "dinoseg.data.folder.folder_dataset", "deep": [node]}}):
        with pytest.raises(UserError, match=f"the key {key} is refused"):
            guard({"data": group})


def test_interpolations_within_are_fine():
    guard({"a": "${data.num_classes}", "b": ["${..classes}", "${len:${.classes}}"], "root": "C:/data", "n": 3})


def test_every_config_of_ours_is_accepted(compose):
    accepted, expected = 0, 0
    for hparam in options("hparam"):
        choice = main_choices() | written_choices(hparam)
        kept = description_of(compose(f"hparam={hparam}", *needed(choice)))["config"]
        guard(kept)
        unkept = (choice["data"] in ("sarrarp", "idd")) + (choice["data"] in ("sarrarp", "movi"))  # prepare, render
        accepted += len(list(nodes(kept))) + unkept
        expected += sum(written_targets(group, option) for group, option in choice.items() if group in KEPT)
    assert accepted == expected >= 10 * len(list((FOLDER / "hparam").glob("*.yaml")))


def test_every_option_of_ours_is_accepted(compose):
    tried = 0
    for group in set(KEPT) & {path.name for path in FOLDER.iterdir()}:
        for option in options(group):
            guard(description_of(compose(f"{group}={option}", *needed({group: option})))["config"])
            tried += 1
    assert tried == sum(len(list((FOLDER / group).glob("[!_]*.yaml"))) for group in KEPT)


def test_looking_imports_nothing_from_outside(tmp_path, monkeypatch):
    for name in ("planted", "dinosegevil", "torchevil"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\ndef part(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for target in (
        "planted.part",
        "dinosegevil.part",
        "torchevil.part",
        "dinoseg.planted.part",
        "dinoseg.data.planted",
    ):
        with pytest.raises(UserError, match="is refused"):
            guard({"_target_": target})
    new = {name for name in set(sys.modules) - before if name.partition(".")[0] not in ("dinoseg", "torch")}
    assert not new
    with pytest.raises(SystemExit, match="imported"):
        __import__("planted")


VIT = "dinoseg.backbones.transformers_vit.TransformersVit"
TIMM = "dinoseg.backbones.timm_backbone.TimmBackbone"
EOMT = "dinoseg.heads.eomt.EomtHead"


@pytest.mark.parametrize(
    ("target", "key", "value", "kind"),
    [
        (VIT, "layers", ["a"], "list of str"),
        (VIT, "layers", [0, 1.5], "list of float and int"),
        (VIT, "layers", [True], "list of bool"),
        (VIT, "layers", [[1]], "list of list"),
        (VIT, "mean", [0.5, "x", 0.5], "list of float and str"),
        (TIMM, "std", [None], "list of NoneType"),
        (EOMT, "anneal", [[0.1, "b"]], "list of list"),
        (VIT, "layers", 3, "int"),
    ],
)
def test_elements_of_another_type_are_refused(target, key, value, kind):
    with pytest.raises(UserError) as caught:
        check_given(target, {key: value})
    assert str(caught.value).startswith(f"{key}={value} is of type {kind}, but {target} takes ")
    remedy = "Correct the value." if isinstance(value, list) else f"A list is written in brackets: {key}=[{value}]."
    assert "Sequence[" in str(caught.value) and str(caught.value).endswith(remedy)


def test_elements_that_fit_are_accepted():
    for given in (
        {"layers": [0, -1]},
        {"layers": "quarters"},
        {"layers": []},
        {"mean": [0, 0.5, 1]},
        {"arch": {"a": 1}},
    ):
        check_given(VIT, given)
    check_given(TIMM, {"mean": None, "std": (1, 2, 3)})
    check_given(EOMT, {"anneal": [[0, 0.5], [0.2, 1]]})
