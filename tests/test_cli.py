"""What a user meets on the command line: help at once, and one clear message for each mistake."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, call, write_data
from config_files import options, read_node
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from refused_trainings import refusal
from safetensors.torch import save_file

import dinoseg
from dinoseg.__main__ import CONFIGS, main
from dinoseg.cli import launch, words
from dinoseg.cli.ranks import LAUNCH_KEYS
from dinoseg.modes.help import overview
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_image, write_png

TRAIN = ("mode=train", *SMALL)
SCORE = ("mode=score", "reference=masks", "prediction=made", "protocol.num_classes=2")  # which imports no torch
LIGHT = "import sys; from dinoseg.__main__ import main; main(); print('torch' in sys.modules, 'hydra' in sys.modules)"


def process(where, *command):
    return subprocess.run([sys.executable, *command], cwd=where, capture_output=True, text=True)


def test_processes_run_the_tested_package(tmp_path):
    here = Path(__file__).parents[1] / "dinoseg"
    done = process(tmp_path, "-c", "import dinoseg; print(dinoseg.__path__[0])")
    assert done.stdout.split() == [str(here)] == list(dinoseg.__path__)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    write_data(folder / "data")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def place(tmp_path):
    write_data(tmp_path / "data")
    save_file({"tensor": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "foreign.safetensors").read_bytes()[:20])
    (tmp_path / "empty").mkdir()
    return tmp_path


def error_message(place, *arguments):
    """Run what must fail, and return its message after checking that it is clean and left no trained run."""
    done = call(place, *arguments)
    assert done.status == 1, done.out + done.err
    assert "Traceback" not in done.err and "InstantiationException" not in done.err, done.err
    assert not list(place.glob("outputs/**/*.safetensors")) and not list(place.glob("outputs/**/scores.json"))
    return done.err


@pytest.mark.parametrize("arguments", [("moed=train",), ("hparam=typo",), ("nonsense",)])
def test_a_command_line_without_mode_is_checked_too(arguments, tmp_path):
    done = call(tmp_path, *arguments)
    assert done.status == 1 and done.err.startswith(f"error: {arguments[0].split('=')[0]}")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("mode=help",), ("mode=nonsense", "-h"), ("mode=help", "seed=1")]
)
def test_help_is_the_overview(arguments, tmp_path):
    done = call(tmp_path, *arguments)
    assert (done.status, done.err) == (0, "") and done.out == overview() + "\n"
    assert not list(tmp_path.iterdir()), "help leaves nothing behind"


@pytest.mark.parametrize("arguments", [("input=x.png",), ("hparam=demo", "trainer.steps=3"), ("-m", "head=linear,mlp")])
def test_a_command_line_without_a_mode_is_refused(arguments, tmp_path):
    done = call(tmp_path, *arguments)
    assert done.status == 1 and "error: No mode is given. Add mode=NAME. Modes: app, bench," in done.err, done.err
    assert "usage:" not in done.out


def test_a_mode_that_a_config_file_chooses_needs_no_word():
    chosen = OmegaConf.create({"choices": {"mode": "mine"}})
    typed = OverridesParser.create().parse_overrides(["hparam=mine"])
    launch._check_mode(chosen, typed)
    chosen.choices.mode = "help"
    with pytest.raises(UserError, match="No mode is given"):
        launch._check_mode(chosen, typed)


@pytest.mark.parametrize("mode", [mode for mode in options("mode") if mode != "help"])
def test_help_of_a_mode_is_of_its_own_keys(mode, tmp_path):
    done = call(tmp_path, f"mode={mode}", "--help")
    assert done.status == 0 and not done.err and f"Keys of mode={mode}" in done.out
    own = (read_node("mode", "serve") if mode == "app" else {}) | read_node("mode", mode)
    keys = [key for key in own if not key.startswith("_") and key not in ("defaults", *LAUNCH_KEYS[1:])]
    roots = [key for key in keys if own[key] == f"${{{key}}}"]  # set without `mode.`
    keys = [key for key in keys if key not in roots]
    tables = {key: [f"{key}.{name}" for name in own[key] if name[0] != "_"] for key in keys if type(own[key]) is dict}
    assert all(f"\n  {key}=" in done.out for key in roots)
    shown = [line.split("=")[0].strip() for line in done.out.splitlines() if line.startswith("  mode.")]
    assert shown == [f"mode.{name}" for key in keys for name in tables.get(key, [key])]
    assert "mode.mode=" not in done.out and "hparam:" not in done.out


@pytest.mark.parametrize("arguments", [("--help",), ("mode=train", "--help"), SCORE])
def test_a_reader_that_goes_away_gets_no_traceback(arguments, tmp_path):
    for folder in ("masks", "made"):
        write_png(tmp_path / folder / "a.png", np.eye(8, dtype=np.uint8))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dinoseg", *arguments]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, [line for line in done.stderr.splitlines() if " INFO " not in line]) == (141, [])


def test_help_imports_neither_torch_nor_hydra(tmp_path):
    for arguments in ((), ("--help",), ("mode=help",)):
        done = process(tmp_path, "-c", LIGHT, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout == overview() + "\nFalse False\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.batch_size=abc",), "data.batch_size=abc is of type str. Give a whole number"),
        (('data.batch_size="8"',), "data.batch_size=8 is of type str. Give a whole number"),
        (("trainer.steps=many",), "trainer.steps=many is of type str. Give a whole number"),
        (("seed=-1",), "seed=-1 is out of range. Give a whole number of at least 0."),
        (("trainer.steps=0",), "trainer.steps=0 is out of range. Give a whole number of at least 1"),
        (("trainer.clip=off",), "trainer.clip=off is of type str. Give a number"),
        (("mode.report=maybe",), "mode.report=maybe is of type str. Give true or false"),
        (("adapter=lora", "adapter.rank=high"), "adapter.rank=high is of type str. Give a whole number"),
    ],
)
def test_wrong_values_are_refused_before_data_are_listed(place, words, message):
    done = call(place, *TRAIN, *words)
    assert done.status == 1 and done.err.startswith(f"error: {message}") and len(done.err.splitlines()) == 1, done.err
    assert not (place / "outputs").exists()


@pytest.mark.parametrize("word", ["data.reader.layout.splits={}", "data.background=dark", "adapter.rank='${seed}'"])
def test_values_without_a_constraint_are_checked_by_signatures(place, word):
    assert not call(place, "mode=summary", *SMALL, "adapter=lora", word).err.startswith("error: data")


def test_typo_is_one_message_in_a_real_process(place):
    done = process(place, "-m", "dinoseg", *TRAIN, "head=liner")
    assert done.returncode == 1 and "linear" in done.stderr and "Traceback" not in done.stderr


def test_options_of_a_search_path_can_be_chosen(tmp_path):
    part = tmp_path / "mine/head/mine.yaml"
    part.parent.mkdir(parents=True)
    part.write_text("defaults: [linear]\nlr: 0.5\n")
    words = (f"hydra.searchpath=[file://{tmp_path}/mine]", "mode=summary", "backbone=tiny", "data.classes=[a,b]")
    assert call(tmp_path, *words, "head=mine").status == 0
    done = call(tmp_path, *words, "head=other")
    assert done.status == 1 and "head/other" in done.err


@pytest.mark.parametrize("group", ["backbone", "adapter", "head", "loss", "data", "mode", "hparam"])
def test_an_unknown_option_lists_those_there_are(place, group):
    message = error_message(place, *TRAIN, f"{group}=nonsense")
    assert f"error: {group}=nonsense is unknown." in message
    listed = message.split("Choose from ")[1].strip().removesuffix(".").split(", ")
    files = [path for path in os.listdir(f"{CONFIGS}/{group}") if path.endswith(".yaml") and not path.startswith("_")]
    assert listed == sorted(path.removesuffix(".yaml") for path in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.stpes=3"], "trainer.stpes is not a key of the config. Did you mean trainer.steps"),
        (["data.rot=x"], "data.rot is not a key of the config. Did you mean data.root"),
        (["steps=3"], "steps is not a key of the config. Did you mean trainer.steps?"),
        (["mode=trane"], "mode=trane is unknown. Did you mean mode=train?"),
        (["head=liner"], "head=liner is unknown. Did you mean head=linear? Choose from cnn, detail, dpt,"),
        (["-m", "head=linear,mlpp"], "head=mlpp is unknown. Did you mean head=mlp?"),
        (["mode=predict", "mode.shapes.x._target_=os.system"], "mode.shapes.x._target_"),
        (["mode=eval", "mode.resume_from=last"], "mode.resume_from: resume_from can be set in config files only."),
        (["resolution.crop.height=3"], "resolution.crop.height"),
        (["train"], "train is not KEY=VALUE. Did you mean mode=train?"),
        (["--cfg", "job", "+nonsense"], "+nonsense is not KEY=VALUE."),
        (["data.classes=a,b"], "For a list use brackets: 'data.classes=[a,b]'. For a run with each of them, add -m."),
        (["data.classes=[a,b"], "data.classes=[a,b cannot be parsed"),
        (["data.reader.masks.ids={3: 255"], "not closed. Write 'data.reader.masks.ids={3: 255}'."),
        (['data.classes=[a "b,c]'], "Quote the whole word, and the text inside it"),
        (
            ["data.reader.layout.images={split}/b"],
            "the text inside it: 'data.reader.layout.images=\"{split}/b\"'.",
        ),
        (
            ["data=folder", "data.reader.layout.splits={val: b}"],
            "has no val. To add it, put ++ before the word",
        ),
        (["head=mlp", "head.hiden=3"], "head.hiden is not a key of the config."),
        (["head=segformer"], "error: head=segformer is unknown. Choose from cnn,"),
        (["loss=null"], "loss=null is unknown. Choose from bce"),
        (["hparam=sarrap"], "hparam=sarrap is unknown. Did you mean hparam=sarrarp_frozen or hparam=sarrarp_full or"),
        (["backbone=dinov2"], "backbone=dinov2 is unknown. Did you mean backbone=dinov2_vitb14 or"),
        (["backbone=[0]"], "backbone=[0] is a list, and backbone takes one option"),
        (["engine=1"], "engine=1 is unknown. Choose from auto, cpu"),
        (["hparam="], "hparam= is unknown. Choose from"),
        ([f"hparam={'n' * 3000}"], "nnn is unknown. Choose from"),
        (["=3"], "=3 has no key before the equals sign. Write KEY=3,"),
        (["data.root", "=", "data"], "= has no key before the equals sign. Write data.root=data, without spaces."),
        (["data.root", "=data"], "=data has no key before the equals sign. Write data.root=data, without spaces."),
        (["data.root=", "data"], "data.root= data has a space next to the equals sign. Write data.root=data."),
        (["resolution.crop=[64,96", "seed=1"], "a bracket or brace is not closed. Write 'resolution.crop=[64,96]'."),
        (["resolution.crop=[64,", "96]"], "split it at a space. Quote the whole word: 'resolution.crop=[64, 96]'."),
        (
            ["adapter=frozen", "adapter.lr=8"],
            "adapter.lr=8: adapter=frozen has no key lr. Options that have it: adapter",
        ),
        (
            ["adapter=frozen", "adapter.rank=8"],
            "adapter.rank=8: adapter=frozen has no key rank. Options that have it: adapter=lora, adapter=lora_8bit, "
            "adapter=lora_all, adapter=qlora. Choose one of them, or leave the key out.",
        ),
        (
            ["data.pixels.order=[2,1,0]"],
            "has no key pixels.order. Options that have it: data/pixels=files. Write data/pixels=files "
            "data.pixels.order=[2,1,0], or",
        ),
        (
            ["data.pixels={order:[2,1,0]}"],
            "has no key pixels.order. Options that have it: data/pixels=files. Write data/pixels=files "
            "'data.pixels={order:[2,1,0]}', or",
        ),
        (
            ["data.pixels={name:files}"],
            "data.pixels has options, which are words of their own. Choose one: data/pixels",
        ),
        (
            ["data.order=[0]"],
            "data.order is not a key of the config. data.pixels.order is one, with data/pixels=files.",
        ),
        (
            ["data/pixels.order=[0]"],
            "cannot be parsed: only groups have slashes, and their keys have dots. Write 'data.",
        ),
        (["head.num_slots=3"], "head=linear has no key num_slots. Options that have it: head=slots."),
        (["trainer.temperature=2"], "trainer=supervised has no key temperature. Options that have it: trainer=distil."),
        (
            ["mode=train", "mode.split=val"],
            "mode.split=val: mode=train has no key split. Options that have it: mode=eval.",
        ),
        (
            ["mode=train", "tracker.short_side=9"],
            "tracker.short_side=9: mode=train does not read the group tracker. Leave it out, or",
        ),
        (
            ["mode=compare", "data.group=null"],
            "Evaluate each run again: mode=eval resume=RUN data.group=null.",
        ),
        (
            ["mode=train", "tracker=video"],
            "tracker=video: mode=train does not read the group tracker. Leave it out, or choose a mode",
        ),
        (["--steps=3"], "--steps=3 is not a flag. The flags are --help"),
    ],
)
def test_a_command_line_that_cannot_be_composed_is_one_message(place, arguments, message):
    found = error_message(place, *arguments)
    assert found.startswith("error: ") and message in found and "HYDRA" not in found and len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: \xe9", "mine.yaml is not a config file ('utf-8' codec can't decode"),
        ("3", "mine.yaml is not a config file (Invalid loaded object type: int)"),
        ("layers: ${", "mine.yaml is not a config file (no viable alternative at input '${')"),
        ("null: 1", "mine.yaml is not a config file (Incompatible key type"),
        ("layers: " + "[" * 2000, "mine.yaml is not a config file (maximum recursion depth"),
        ("defaults: [mine]", "The defaults list of a config file includes that file again"),
        ("defaults: {}", "Invalid defaults list in 'head/mine', defaults must be a list (got mapping)"),
    ],
)
def test_unreadable_config_file_is_one_message(tmp_path, content, message):
    (tmp_path / "configs/head").mkdir(parents=True)
    (tmp_path / "configs/head/mine.yaml").write_text(content, "latin1")
    found = error_message(tmp_path, *TRAIN, "head=mine", "--config-dir", "configs")
    assert found.startswith("error: ") and message in found and len(found.splitlines()) == 1


def test_group_at_a_place_without_one_is_named(tmp_path):
    found = error_message(tmp_path, *TRAIN, "head@x=mlp")
    assert found.startswith("error: Could not override 'head@x'"), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split: val", "mode=mine: its YAML file must set `_target_"),
        ("[first, second]", "mode=mine: its YAML file must set `_target_"),
        ("{_target_: my.run, _partial_: true, resume_from: newest}", "mode=mine: resume_from=newest is unknown"),
        ("{_target_: my.run, _partial_: true, keeps_folder: maybe}", "mode=mine: keeps_folder=maybe is of type str"),
        ("{defaults: data, _target_: my.run, _partial_: true}", "defaults"),
    ],
)
def test_faulty_file_of_a_mode_is_named(tmp_path, text, message):
    (tmp_path / "configs/mode").mkdir(parents=True)
    (tmp_path / "configs/mode/mine.yaml").write_text(text)
    found = error_message(tmp_path, "mode=mine", "--config-dir", "configs")
    assert found.startswith("error: ") and message in found and len(found.splitlines()) == 1, found


def test_null_in_a_defaults_list_is_refused_before_training(tmp_path):
    (tmp_path / "configs/head").mkdir(parents=True)
    (tmp_path / "configs/head/mine.yaml").write_text("defaults: [mlp, /loss: null, _self_]")
    write_data(tmp_path / "data")
    found = error_message(tmp_path, *TRAIN, "head=mine", "--config-dir", "configs")
    assert "error: The defaults list of a config file sets loss@head.loss to null" in found


def test_refused_resume_leaves_no_config(tmp_path):
    write_data(tmp_path / "data")
    words = [word for word in TRAIN if not word.startswith("adapter=")]
    run = (*words, "trainer=multi_head", "heads=[linear,mlp]", "hydra.run.dir=run")
    assert call(tmp_path, *run).status == 0
    before = {*tmp_path.rglob("*")}
    for words in (["resume=run/heads/mlp"], ["resume=run", "data.root=nowhere"]):
        error_message(tmp_path, "mode=train", *words, "trainer.steps=4")
        assert {*tmp_path.rglob("*")} == before, words


@pytest.mark.parametrize("source", ["http://a.b/c", "nowhere", "file://nowhere", "pkg://no.where", "pkg://dinoseg.no"])
def test_missing_folder_of_the_search_path_is_named(tmp_path, source):
    found = error_message(tmp_path, *TRAIN, f"hydra.searchpath=[{source}]")
    assert f"{source} is not found" in found and len(found.splitlines()) == 1, found


@pytest.mark.parametrize("word", ["head=[linear,mlp]", "trainer=[supervised]", "hparam=[demo]"])
def test_list_for_a_group_of_one_option_is_refused(tmp_path, word):
    found = error_message(tmp_path, *TRAIN, word)
    assert found.startswith(f"error: {word} is a list, and {word.partition('=')[0]} takes one option."), found


@pytest.mark.parametrize("word", ["+head@extra=mlp", "+head@resolution.x=mlp", "+tracker=dinov3", "+prepare=idd"])
def test_group_that_nothing_reads_is_refused(tmp_path, word):
    found = error_message(tmp_path, *TRAIN, word)
    assert found.startswith(f"error: {word.partition('=')[0]} adds a key that nothing reads"), found


@pytest.mark.parametrize("group", ["mode", "loss", "head"])
def test_group_without_keys_in_a_recipe_is_named(tmp_path, group):
    (tmp_path / "configs/hparam").mkdir(parents=True)
    (tmp_path / "configs/hparam/mine.yaml").write_text(f"# @package _global_\n{group}:\n  # steps: 3\n")
    found = error_message(tmp_path, *TRAIN, "hparam=mine", "--config-dir", "configs")
    assert found.startswith(f"error: {group} is null, ") and len(found.splitlines()) == 1, found


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["+trainer.stpes=3"], ["+trainer.stpes adds a key that nothing reads", "spelling"]),
        (["+mode.lgo_every=3"], ["does not take lgo_every", "metrics_only"]),
        (["+data.reader.masks.formt=ids"], ["does not take formt", "format, ids"]),
        (["+backbone.arch.hiden_size=3"], ["no hiden_size", "spelling"]),
        (["seed=null"], ["seed=null is of type NoneType. Give a whole number."]),
        (["+nonsense=3"], ["+nonsense adds a key that nothing reads"]),
        (["+resolution.corp=[3,3]"], ["+resolution.corp adds a key that nothing reads"]),
        (["trainer.steps=many"], ["trainer.steps=many is of type str", "Give a whole number"]),
        (["trainer.clip=1e20"], ["trainer.clip=1e+20 is out of range", "could not be resumed. Give 1099511627776 at"]),
        (["trainer.clip=inf"], ["trainer.clip=inf is out of range"]),
        (
            ["optim.optimizer.lr=1e20"],
            ["optim.optimizer.lr=1e+20 is out of range", "at most 100"],
        ),
        (["head.lr=1e20"], ["head.lr=1e+20 is out of range", "at most 100"]),
        (["adapter.lr=1e20"], ["adapter.lr=1e+20 is out of range", "at most 100"]),
        (["trainer=multi_head", "heads=[{head:linear,lr:1e20}]"], ["lr=1e+20 of linear is not", "at most 100"]),
        (["trainer=multi_head", "heads=[{head:cnn,channels:100000}]"], ["head.channels=100000 is out of range"]),
        (["data.root=nowhere"], ["data.root=nowhere is not a folder"]),
        (["engine.devices=0"], ["engine.devices=0", "at least 1"]),
        (["data.classes=[dark]"], ["With 1 class every probability is 1", "the background and the object"]),
        (["resume=nowhere"], ["resume=nowhere", "outputs/"]),
        (["resume=empti"], ["resume=empti: file or folder not found. Did you mean resume=empty?"]),
        (["resume=foreign.safetensors"], ["not a checkpoint of dinoseg"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_mistake_while_training_is_one_message(place, arguments, parts):
    message = error_message(place, *TRAIN, *arguments)
    assert all(part in message for part in parts), message
    assert message.count("error: ") <= 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["+data.reader.rot=x"], ["does not take rot", "root, split"]),
        (["+optim.optimizer.lrr=1"], ["does not take lrr", "lr, weight_decay"]),
        (["trainer.steps=1.5"], ["steps=1.5 is of type float", "Give a whole number"]),
        (["trainer.steps=true"], ["steps=True is of type bool", "Give a whole number"]),
        (["optim.optimizer.lr=fast"], ["lr=fast is of type str", "Give a number"]),
        (["optim.optimizer.betas=[0.9]"], ["betas=[0.9]", "2 numbers"]),
        (["data.classes=dark"], ["classes=dark is of type str", "list of texts"]),
        (["data.classes=null"], ["data.classes=null is not a list"]),
        (["resolution.crop=wide"], ["resolution.crop=wide is of type str"]),
        (["resolution.crop=[0,1]"], ["crop=[0, 1]", "at least 1"]),
        (["engine.workers=two"], ["engine.workers=two is unknown. Choose a whole number or auto."]),
        (["seed=-1"], ["seed=-1 is out of range. Give a whole number of at least 0."]),
        (["trainer.steps=0"], ["trainer.steps=0", "at least 1"]),
        (["data.root=empty"], ["No folder empty/train/images", "data.reader.layout"]),
        (["adapter=lora", "adapter.rank=0"], ["adapter.rank=0", "at least 1"]),
        (["engine.device=tpu"], ["engine.device=tpu is unknown", "auto, cuda, mps or cpu"]),
        (["data.batch_size=5"], ["data.batch_size=5 with 4 training images", "from 1 to 4"]),
        (["backbone.layers=[2]"], ["backbone.layers=[2]", "2 blocks"]),
        (["backbone.weights=gone.safetensors"], ["backbone.weights=gone.safetensors", "Check the path"]),
        (["loss.weights=heavy"], ["loss.weights=heavy is unknown", "median"]),
        (["loss.weights={cat: 2}"], ["loss.weights: cat is not a class", "The classes are"]),
        (["optim.schedule.kind=linear"], ["optim.schedule.kind=linear is unknown", "cosine"]),
        (["optim.optimizer.lr=0"], ["optim.optimizer.lr=0", "above 0"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_training_of_other_values_is_refused(site, compose, arguments, parts):
    message = refusal(compose, site, TRAIN, [word.removeprefix("+") for word in arguments])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["mode=train"], "data.root and data.classes are not set. Give both, with the class names in id order:"),
        (
            ["mode=train", "data.classes=[a,b]"],
            "data.root is not set. Set it on the command line: data.root=VALUE.\nExpected files:\n- VALUE/t",
        ),
        (["mode=train", "data=ade20k"], "- VALUE/images/training/NAME.jpg\n- VALUE/annotations/training/NAME.png\n- "),
        (["mode=train", "data=coco"], "data.root is not set. Set it on the command line: data.root=VALUE."),
        (
            ["mode=train", "data.root=data"],
            "data.classes is not set. Give the class names in id order: data.classes=[back",
        ),
        (["mode=train", "hparam=sarrarp_lora"], "data.root is not set"),
        (["mode=summary"], "data.root and data.classes are not set"),
        (["mode=prepare", "data=camvid", "data.root=data"], "needs no preparation"),
        (["mode=eval"], "Give resume="),
        (["mode=export"], "Give resume="),
        (["mode=predict", "input=data/val/images"], "Give resume="),
        (["mode=predict"], "give input="),
        (["mode=predict", "input=gone.png"], "input=gone.png"),
        (["mode=eval", "resume=nowhere"], "resume=nowhere"),
        (["mode=eval", "resume=empty"], "resume=empty: it holds neither checkpoints/best.safetensors nor checkpoints/"),
        (["mode=eval", "resume=foreign.safetensors"], "not a checkpoint of dinoseg"),
        (["mode=eval", "resume=cut.safetensors"], "not a readable checkpoint"),
        (["mode=eval", "resume=data/val/images/0.png"], "not a readable checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_another_mode_is_one_message(place, arguments, part):
    assert part in error_message(place, *arguments)


ODD_NAMES = [
    "my photo (1)",
    "a,b",
    "[1] x",
    "x = y",
    "{1}",
    "é ü 漢字",
    "it's",
    '"q"',
    "'q'",
    " lead",
    "#1 $ & !",
    "5",
    "null-",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_files_are_read_as_they_are(name):
    for key, path in (("prediction", f"{name}/val/masks"), ("hydra.run.dir", f"{name} run")):
        (word,) = words.as_text([f"{key}={path}"])
        assert OverridesParser.create().parse_override(word).value() == path


@pytest.mark.parametrize("name", ["é ü 漢字 (1), [2] x = y {3}", "it's #1 $ & !", '"q"', " lead", "5", "null-"])
def test_names_of_files_work_as_they_are(place, name):
    (place / "data").rename(place / name)
    folder = f"{name}/val/masks"
    done = call(
        place,
        "mode=score",
        f"reference={folder}",
        f"prediction={folder}",
        "protocol.num_classes=2",
        f"hydra.run.dir={name} run",
    )
    assert done.status == 0 and (place / f"{name} run/scores.json").is_file(), done.err
    assert "mIoU" in done.out


@pytest.mark.heavy
def test_every_key_of_a_file_takes_any_name(tmp_path, compose):
    odd = "a (1), [2] = {3}"
    assert words.FILES > {"resume", "labels", "mode.restart", "input", "data.root"}
    for key in words.FILES - {"hydra.run.dir", "hydra.sweep.dir"}:
        of_score = ("reference", "prediction", "mode.reference", "mode.prediction")
        mode = "score" if key in of_score else "track"
        (word,) = words.as_text([f"{key}={odd}"])
        head = "mask2former" if key == "head.weights" else "linear"
        search = ["hydra/sweeper=optuna"] if key == "hydra.sweeper.storage" else []
        more = [f"head={head}"] if mode == "track" else []
        cfg = compose(f"mode={mode}", *more, *search, word)
        assert OmegaConf.select(HydraConfig.instance().cfg if search else cfg, key) == odd


def test_only_plain_names_are_quoted(tmp_path):
    kept = ["prediction=[a,b]", "input=null", "input='a b'", "data.classes=[a,b", "seed=${x}", "steps=1,2", "head=a,b"]
    kept += ["-m", "-cd", "a (1)", "~seed"]
    assert words.as_text(kept) == kept
    assert words.as_text(["-m", "resume=a,b"]) == ["-m", "resume=a,b"]
    assert words.as_text(["data.group=^(.+)/"]) == ['data.group="^(.+)/"']


def test_bad_files_are_named(place):
    (place / "data/train/masks/2.png").unlink()
    assert "2" in error_message(place, *TRAIN, "loss.weights=median")
    write_png(place / "data/train/masks/2.png", np.zeros((32, 40), np.uint8))
    message = error_message(place, *TRAIN, "data.batch_size=4")
    assert "2.png" in message and "resize_mask" in message
    write_png(place / "data/train/masks/2.png", np.full((32, 48), 9, np.uint8))
    assert "masks/2.png: 9\n" in error_message(place, *TRAIN, "data.batch_size=4")
    whole = (place / "data/train/images/1.png").read_bytes()
    (place / "data/train/images/1.png").write_bytes(whole[: len(whole) // 2])
    write_png(place / "data/train/masks/2.png", np.zeros((32, 48), np.uint8))
    assert "1.png as an image" in error_message(place, *TRAIN, "data.batch_size=4", "engine.workers=1")


def test_ids_outside_the_classes_are_refused_with_a_mapping(place):
    for path in sorted(place.glob("data/*/masks/*.png")):
        write_png(path, np.where(read_ids(path) == 0, 64, 128).astype(np.uint8))
    message = error_message(place, *TRAIN)
    assert "6 of 6 masks with values that are not classes: 64 (in 6), 128 (in 6)" in message
    assert "To ignore them: '++data.reader.masks.ids={64: 255, 128: 255}' (with these quotes)" in message
    mapped = call(place, *TRAIN, "++data.reader.masks.ids={64: 0, 128: 1}", "mode.metrics_only=true")
    assert mapped.status == 0, mapped.err


def test_command_line_trains_evaluates_and_predicts(place):
    trained = call(place, *TRAIN, draws=True)
    assert trained.status == 0, trained.err
    assert "dark" in trained.out and "scores:" in trained.out
    (run,) = place.glob("outputs/base/train_*")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {
        "run.log",
        "split.json",
        "metrics.jsonl",
        "config/config.yaml",
        "curves.png",
    } <= names
    assert min(read_image(run / "curves.png").shape[:2]) > 150
    assert {"checkpoints/best.safetensors", "checkpoints/last.safetensors", "evaluation/scores.json"} <= names
    again = call(place, "mode=eval", f"resume={run}", "engine=cpu", "engine.workers=0", "mode.metrics_only=true")
    assert again.status == 0, again.err
    (scored,) = place.glob("outputs/base/eval_*")
    assert (scored / "scores.json").read_text() == (run / "evaluation/scores.json").read_text()
    assert not list(scored.glob("predictions")) and len(list(run.glob("evaluation/predictions/*"))) == 4
    segmented = call(place, "mode=predict", f"resume={run}", "input=data/val/images", "engine=cpu")
    assert segmented.status == 0, segmented.err
    assert len(list(place.glob("outputs/base/predict_*/*_segmentation/segmentation_raw.npy"))) == 2
    assert (
        "split=nonsense is unknown"
        in call(place, "mode=eval", f"resume={run}", "engine=cpu", "mode.split=nonsense").err
    )
    other = call(place, "mode=eval", f"resume={run}", "engine=cpu", "head=mlp")
    assert other.status == 1 and "was trained with head=linear" in other.err


def test_composed_config_is_shown(place):
    done = call(place, *TRAIN, "--cfg", "job")
    assert done.status == 0 and "_target_: dinoseg.training.trainer.Settings" in done.out and "steps: 2" in done.out
    assert not (place / "outputs").exists()


def test_a_model_that_no_memory_holds_is_one_message(place, monkeypatch):
    monkeypatch.setattr("dinoseg.config.stored.check_numbers", lambda values: None)  # it would refuse this head
    said = error_message(
        place, *TRAIN, "data.root=data", "head=detail", "head.layers=[-1]", f"head.fine={10**9}", "hydra.run.dir=R"
    )
    lines = [line for line in said.splitlines() if " INFO " not in line]
    assert lines[0].startswith("error: Out of memory (")
    assert (
        "). Free some memory. A training needs less with a smaller backbone, head or batch: mode=plan lists "
        "settings that"
    ) in said
    assert len(lines) == 1 and not (place / "R").exists()


def test_only_the_command_line_enables_the_mps_fallback(monkeypatch, capsys):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.environ", environment := {})
    importlib.reload(dinoseg)
    assert not environment
    monkeypatch.setattr("sys.argv", ["dinoseg"])
    main()
    assert environment["PYTORCH_ENABLE_MPS_FALLBACK"] == "1" and "mode=train" in capsys.readouterr().out


def test_early_interruption_does_not_import_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf; from dinoseg.cli import launch; "
        "cfg = OmegaConf.create({'mode': {'resume_from': 'last'}}); "
        "print(launch._interrupt_note(cfg, Path('.'), launch.RunLocation(Path('.'), Path('.'))), "
        "'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "this run has saved nothing False\n"


def test_python_without_docstrings_is_refused_in_a_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "dinoseg", "mode=train", "hparam=demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: PYTHONOPTIMIZE=2") and done.stderr.count("\n") == 1
