"""What a user meets on the command line: help at once, and one clear message for each mistake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import save_progress
from command_line import SMALL, call, succeed, write_data
from config_files import options, read_node
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from refused_trainings import refusal
from safetensors.torch import save_file

import dinoseg
from dinoseg.__main__ import CONFIGS
from dinoseg.cli import job_checks, words
from dinoseg.cli.job_checks import FILE_KEYS
from dinoseg.modes.help import overview
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids, read_image, write_png

TRAIN = ("mode=train", *SMALL)
SCORE = ("mode=score", "reference=masks", "prediction=made", "protocol.num_classes=2")  # which imports no torch
LIGHT = "import sys; from dinoseg.__main__ import main; main(); print('torch' in sys.modules, 'hydra' in sys.modules)"


def process(where, *command, **options):
    return subprocess.run([sys.executable, *command], cwd=where, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with data, and files that are no checkpoints, for commands that leave nothing behind."""
    folder = tmp_path_factory.mktemp("site")
    write_data(folder / "data")
    save_file({"tensor": torch.zeros(2)}, folder / "foreign.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "foreign.safetensors").read_bytes()[:20])
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def place(site, tmp_path):
    """Return a copy of the data that a test may change."""
    return shutil.copytree(site, tmp_path / "place", ignore=shutil.ignore_patterns("outputs"))


def error_message(place, *arguments):
    """Run what must fail, and return its message after checking that it is clean and left no trained run."""
    done = call(place, *arguments)
    assert done.status == 1, done.out + done.err
    assert "Traceback" not in done.err and "InstantiationException" not in done.err, done.err
    assert "usage:" not in done.out
    assert not list(place.glob("outputs/**/*.safetensors")) and not list(place.glob("outputs/**/scores.json"))
    return done.err


def composition_error(place, *arguments):
    """Run what cannot be composed, and return the only line of its message."""
    found = error_message(place, *arguments)
    assert found.startswith("error: ") and len(found.splitlines()) == 1 and "HYDRA" not in found, found
    return found


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("mode=help",), ("mode=nonsense", "-h"), ("mode=help", "seed=1")]
)
def test_help_is_the_overview(arguments, tmp_path):
    done = call(tmp_path, *arguments)
    assert (done.status, done.err) == (0, "") and done.out == overview() + "\n"
    assert not list(tmp_path.iterdir()), "help leaves nothing behind"


def test_a_mode_that_a_config_file_chooses_needs_no_word():
    chosen = OmegaConf.create({"choices": {"mode": "mine"}})
    typed = OverridesParser.create().parse_overrides(["hparam=mine"])
    job_checks._check_mode(chosen, typed)
    chosen.choices.mode = "help"
    with pytest.raises(UserError, match="No mode is given"):
        job_checks._check_mode(chosen, typed)


@pytest.mark.parametrize("mode", [mode for mode in options("mode") if mode != "help"])
def test_help_of_a_mode_is_of_its_own_keys(mode, tmp_path):
    done = call(tmp_path, f"mode={mode}", "--help")
    assert done.status == 0 and not done.err and f"Keys of mode={mode}" in done.out
    own = (read_node("mode", "serve") if mode == "app" else {}) | read_node("mode", mode)
    keys = [key for key in own if not key.startswith("_") and key not in ("defaults", *FILE_KEYS)]
    roots = [key for key in keys if own[key] == f"${{{key}}}"]  # set without `mode.`
    keys = [key for key in keys if key not in roots]
    tables = {key: [f"{key}.{name}" for name in own[key] if name[0] != "_"] for key in keys if type(own[key]) is dict}
    assert all(f"\n  {key}=" in done.out for key in roots)
    shown = [line.split("=")[0].strip() for line in done.out.splitlines() if line.startswith("  mode.")]
    assert shown == [f"mode.{name}" for key in keys for name in tables.get(key, [key])]
    assert "mode.mode=" not in done.out and "hparam:" not in done.out


@pytest.mark.parametrize("arguments", [("--help",), pytest.param(SCORE, marks=pytest.mark.heavy)])
def test_a_reader_that_goes_away_gets_no_traceback(arguments, tmp_path):
    for folder in ("masks", "made"):
        write_png(tmp_path / folder / "a.png", np.eye(8, dtype=np.uint8))
    reader, writer = os.pipe()
    os.close(reader)
    done = process(tmp_path, "-m", "dinoseg", *arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, [line for line in done.stderr.splitlines() if " INFO " not in line]) == (141, [])


def test_help_imports_neither_torch_nor_hydra(tmp_path):
    done = process(tmp_path, "-c", LIGHT, "--help", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, overview() + "\nFalse False\n"), done.stderr


def test_processes_run_the_tested_package(tmp_path):
    here = Path(__file__).parents[1] / "dinoseg"
    done = process(tmp_path, "-c", "import dinoseg; print(dinoseg.__path__[0])", stdout=subprocess.PIPE)
    assert done.stdout.split() == [str(here)] == list(dinoseg.__path__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (['data.batch_size="8"'], "error: data.batch_size='8' is of type str. Give a whole number"),
        (["trainer.steps=many"], "error: trainer.steps=many is of type str. Give a whole number"),
        (["seed=-1"], "error: seed=-1 is out of range. Give a whole number of at least 0."),
        (["trainer.steps=0"], "error: trainer.steps=0 is out of range. Give a whole number of at least 1"),
        (["trainer.clip=off"], "error: trainer.clip=off is of type str. Give a number"),
        (["mode.report=maybe"], "error: mode.report=maybe is of type str. Give true or false"),
    ],
)
def test_wrong_values_are_refused_before_data_are_listed(site, arguments, message):
    before = {*site.rglob("*")}
    assert message in composition_error(site, *TRAIN, *arguments)
    assert {*site.rglob("*")} == before


@pytest.mark.parametrize(
    "word",
    [
        "data.reader.layout.splits={}",
        "data.background=dark",
        pytest.param("adapter.rank='${seed}'", marks=pytest.mark.heavy),
    ],
)
def test_values_without_a_constraint_are_checked_by_signatures(place, word):
    assert not call(place, "mode=summary", *SMALL, "adapter=lora", word).err.startswith("error: data")


def test_typo_is_one_message_in_a_real_process(site):
    done = process(site, "-m", "dinoseg", *TRAIN, "head=liner")
    assert done.returncode == 1 and "linear" in done.stderr and "Traceback" not in done.stderr


def test_options_of_a_search_path_can_be_chosen(tmp_path):
    write_text(tmp_path / "mine/head/mine.yaml", "defaults: [linear]\nlr: 0.5\n")
    words = (f"hydra.searchpath=[file://{tmp_path}/mine]", "mode=summary", "backbone=tiny", "data.classes=[a,b]")
    done = call(tmp_path, *words, "head=mine", "--cfg", "job")
    assert done.status == 0 and "lr: 0.5" in done.out, done.err
    done = call(tmp_path, *words, "head=other")
    assert done.status == 1 and "head=other is unknown. Choose from cnn" in done.err


@pytest.mark.parametrize("group", ["backbone", "adapter", "head", "loss", "data", "mode", "hparam"])
def test_an_unknown_option_lists_those_there_are(site, group):
    message = error_message(site, *TRAIN, f"{group}=nonsense")
    assert f"error: {group}=nonsense is unknown." in message
    listed = message.split("Choose from ")[1].strip().removesuffix(".").split(", ")
    files = [path for path in os.listdir(f"{CONFIGS}/{group}") if path.endswith(".yaml") and not path.startswith("_")]
    assert listed == sorted(path.removesuffix(".yaml") for path in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.stpes=3"], "trainer.stpes is not a key of the config. Did you mean trainer.steps"),
        (["steps=3"], "steps is not a key of the config. Did you mean trainer.steps?"),
        (["mode=trane"], "mode=trane is unknown. Did you mean mode=train?"),
        (["head=liner"], "head=liner is unknown. Did you mean head=linear? Choose from cnn, detail, dpt,"),
        (["-m", "head=linear,mlpp"], "head=mlpp is unknown. Did you mean head=mlp?"),
        (["mode=predict", "mode.shapes.x._target_=os.system"], "mode.shapes.x._target_"),
        (["mode=eval", "mode.resume_from=last"], "mode.resume_from can be set in config files only."),
        (["resolution.crop.height=3"], "resolution.crop.height"),
        (["train"], "Write key and value as one word, without spaces. Did you mean mode=train?"),
        (["data.classes=a,b"], "For a list use brackets: 'data.classes=[a,b]'. A run with each of them needs -m"),
        (["data.classes=[a,b"], "data.classes=[a,b cannot be parsed"),
        (["data.reader.masks.ids={3: 255"], "not closed. Write 'data.reader.masks.ids={3: 255}'."),
        (['data.classes=[a "b,c]'], "Quote the whole word, and the text inside it"),
        (["data.reader.layout.images={split}/b"], "the text inside it: 'data.reader.layout.images=\"{split}/b\"'."),
        (
            ["data=folder", "data.reader.layout.splits={val: b}"],
            "data.reader.layout.splits.val=b: data=folder lacks",
        ),
        (["loss=null"], "loss=null is unknown. Choose from bce"),
        (["hparam=sarrap"], "hparam=sarrap is unknown. Did you mean hparam=sarrarp_frozen or hparam=sarrarp_full or"),
        (["head=[linear,mlp]"], "error: head=[linear,mlp] is a list, and head takes one option."),
        (["engine=1"], "engine=1 is unknown. Choose from auto, cpu"),
        (["hparam="], "hparam= is unknown. Choose from"),
        ([f"hparam={'n' * 3000}"], "nnn is unknown. Choose from"),
        (["data.root", "=", "data"], "data.root is not KEY=VALUE. Write key and value as one word, without spaces."),
        (["data.root", "=data"], "data.root is not KEY=VALUE. Write key and value as one word, without spaces."),
        (["data.root=", "data"], "error: data is not KEY=VALUE. Write key and value as one word, without spaces."),
        (["resolution.crop=[64,96", "seed=1"], "a bracket or brace is not closed. Write 'resolution.crop=[64,96]'."),
        (["resolution.crop=[64,", "96]"], "split it at a space. Quote the whole word: 'resolution.crop=[64, 96]'."),
        (
            ["adapter=frozen", "adapter.rank=8"],
            "adapter.rank=8: adapter=frozen lacks this key. Options that have it: adapter=lora, adapter=lora_8bit, "
            "adapter=lora_all, adapter=qlora. Choose one, or leave the key out.",
        ),
        (
            ["data.pixels.order=[2,1,0]"],
            "data.pixels.order=[2,1,0]: data=folder lacks this key. Options that have it: data/pixels=files. Choose",
        ),
        (
            ["data.pixels={order:[2,1,0]}"],
            "data.pixels.order=[2,1,0]: data=folder lacks this key. Options that have it: data/pixels=files.",
        ),
        (["data.pixels={name:files}"], "data.pixels is a group of keys. Set one of them: data/pixels="),
        (
            ["data.order=[0]"],
            "data.order is not a key of the config. Did you mean data.pixels.order?",
        ),
        (["data/pixels.order=[0]"], "only groups have slashes, and their keys have dots. Write 'data."),
        (["mode=train", "tracker.short_side=9"], "mode=train does not read the group tracker. Leave it out, or"),
        (
            ["mode=compare", "data.group=null"],
            "mode=compare does not read the group data. Leave it out",
        ),
        pytest.param(
            ["mode=train", "tracker=video"],
            "tracker=video: mode=train does not read the group tracker. Leave it out",
            marks=pytest.mark.heavy,
        ),
        (["--steps=3"], "--steps=3 is not a flag. The flags are --help"),
        (["mode=train", "+seed=3"], "An item is already at 'seed'"),
        (["mode=train", "hydra/launcher=slurm"], "'hydra/launcher/slurm'. Choose from basic, joblib, "),
        (["mode=train", "+head@extra=mlp"], "error: +head@extra adds a key that nothing reads"),
        pytest.param(["mode=train", "+tracker=dinov3"], "+tracker adds a key that nothing", marks=pytest.mark.heavy),
        (["input=x.png"], "error: No mode is given. Add mode=NAME. Modes: app, bench,"),
        (["hparam=demo", "trainer.steps=3"], "error: No mode is given. Add mode=NAME. Modes: app, bench,"),
        (["mode=train", "+trainer.stpes=3"], "error: +trainer.stpes adds a key that nothing reads. Check its spelling"),
    ],
)
def test_a_command_line_that_cannot_be_composed_is_one_message(site, arguments, message):
    assert message in composition_error(site, *arguments)


@pytest.mark.heavy
def test_each_job_of_a_sweep_without_a_mode_is_refused(site):
    found = error_message(site, "-m", "head=linear,mlp")
    assert found.count("error: No mode is given. Add mode=NAME. Modes: app, bench,") == 2


NO_FILE = "mine.yaml is not a config file"


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("head", "name: \xe9", f"{NO_FILE} ('utf-8' codec can't decode"),
        ("head", "3", f"{NO_FILE} (Invalid loaded object type: int)"),
        ("head", "layers: ${", f"{NO_FILE} (no viable alternative at input '${{')"),
        pytest.param("head", "null: 1", f"{NO_FILE} (Incompatible key type", marks=pytest.mark.heavy),
        pytest.param("head", "layers: " + "[" * 600, f"{NO_FILE} (maximum recursion depth", marks=pytest.mark.heavy),
        ("head", "defaults: [mine]", "includes that file again. Remove the entry."),
        ("head", "defaults: {}", f"{NO_FILE} (it must hold keys, and `defaults` a list)"),
        ("head", "defaults: [mlp, /loss: null, _self_]", "a config file sets loss@head.loss to null"),
        ("mode", "split: val", "mode=mine: its YAML file must set `_target_"),
        ("mode", "[first, second]", "mode=mine: its YAML file must set `_target_"),
        ("mode", "{defaults: data, _target_: a.b, _partial_: true}", "defaults"),
        ("hparam", "# @package _global_\nmode:\n  # steps: 3\n", "error: mode is null, "),
        pytest.param("hparam", "# @package _global_\nhead:\n", "error: head is null, ", marks=pytest.mark.heavy),
    ],
)
def test_faulty_config_file_is_one_message(site, tmp_path, option, content, message):
    path = tmp_path / f"configs/{option}/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(content, "latin1")
    words = () if option == "mode" else TRAIN
    assert message in composition_error(site, *words, f"{option}=mine", "--config-dir", tmp_path / "configs")


@pytest.mark.parametrize(
    "words",
    [
        ["resume=segmenter", "data.root=nowhere"],
        pytest.param(["resume=segmenter/checkpoints/best.safetensors"], marks=pytest.mark.heavy),
    ],
)
def test_refused_resume_leaves_no_config(trained, words):
    before = {*trained.iterdir(), *(trained / "segmenter").rglob("*")}
    error_message(trained, "mode=train", *words, "trainer.steps=6")
    assert {*trained.iterdir(), *(trained / "segmenter").rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["head@x=mlp"], ["head@x=mlp: no defaults list has the group head at x. Leave out @x."]),
        (["+mode.lgo_every=3"], ["does not take lgo_every", "metrics_only"]),
        (["+data.reader.masks.formt=ids"], ["does not take formt", "format, ids"]),
        (["+backbone.arch.hiden_size=3"], ["no hiden_size", "spelling"]),
        (["seed=null"], ["seed=null is of type NoneType. Give a whole number."]),
        (["optim.optimizer.lr=1e20"], ["optim.optimizer.lr=1e+20 is out of range", "at most 100"]),
        pytest.param(["head.lr=1e20"], ["head.lr=1e+20 is out of range", "at most 100"], marks=pytest.mark.heavy),
        pytest.param(
            ["head=cnn", "head.channels=100000"],
            ["head.channels=100000 is refused"],
            marks=pytest.mark.heavy,
        ),
        (["data.root=nowhere"], ["data.root=nowhere: file or folder not found"]),
        (["data.root=.", "features.gib=-1"], ["features.gib=-1 is out of range", "above 0"]),
        (["engine.devices=0"], ["engine.devices=0", "at least 1"]),
        (["data.classes=[dark]"], ["With 1 class every probability is 1", "the background and the object"]),
        (["resume=nowhere"], ["resume=nowhere", "outputs/"]),
        (["resume=empti"], ["resume=empti: file or folder not found. Did you mean resume=empty?"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_mistake_while_training_is_one_message(site, arguments, parts):
    message = error_message(site, *TRAIN, *arguments)
    assert all(part in message for part in parts) and message.count("error: ") <= 1, message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["+optim.optimizer.lrr=1"], ["does not take lrr", "lr, weight_decay"]),
        (["trainer.steps=1.5"], ["steps=1.5 is of type float", "Give a whole number"]),
        (["trainer.steps=true"], ["steps=True is of type bool", "Give a whole number"]),
        (["data.classes=null"], ["data.classes=null is not a list"]),
        (["resolution.crop=wide"], ["resolution.crop=wide is of type str"]),
        (["resolution.crop=[0,1]"], ["crop=[0, 1]", "less than one patch", "Give a larger crop"]),
        (["engine.workers=two"], ["engine.workers=two is unknown. Choose a whole number or auto."]),
        (["data.root=empty"], ["No folder empty/train/images", "data.reader.layout"]),
        (["engine.device=tpu"], ["engine.device=tpu is not available here"]),
        (["data.batch_size=5"], ["data.batch_size=5 with 4 training images", "from 1 to 4"]),
        pytest.param(["backbone.layers=[2]"], ["backbone.layers=[2]", "2 blocks"], marks=pytest.mark.heavy),
        (["backbone.weights=gone.safetensors"], ["backbone.weights=gone.safetensors", "Check the path"]),
        (["loss.weights=heavy"], ["loss.weights=heavy is unknown", "median"]),
        (["loss.weights={cat: 2}"], ["loss.weights: cat is not a class", "The classes are"]),
        (["optim.schedule.kind=linear"], ["optim.schedule.kind=linear is unknown", "cosine"]),
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
        (["mode=train", "data.classes=[a,b]"], "command line: data.root=VALUE.\nExpected files:\n- VALUE/t"),
        pytest.param(
            ["mode=train", "data=ade20k"],
            "- VALUE/images/training/NAME.jpg\n- VALUE/annotations/training/NAME.png\n- ",
            marks=pytest.mark.heavy,
        ),
        (["mode=train", "data=coco"], "data.root is not set. Set it on the command line: data.root=VALUE."),
        (["mode=train", "data.root=data"], "Give the class names in id order: data.classes=[back"),
        (["mode=summary"], "data.root and data.classes are not set"),
        (["mode=prepare", "data=camvid", "data.root=data"], "needs no preparation"),
        (["mode=eval"], "Give resume="),
        (["mode=export"], "Give resume="),
        (["mode=predict", "input=data/val/images"], "Give resume="),
        (["mode=predict"], "give input="),
        (["mode=predict", "input=gone.png"], "input=gone.png"),
        (["mode=eval", "resume=empty"], "resume=empty: it holds neither checkpoints/best.safetensors nor checkpoints/"),
        (["mode=eval", "resume=foreign.safetensors"], "not a checkpoint of dinoseg"),
        (["mode=eval", "resume=cut.safetensors"], "not a readable checkpoint"),
        (["mode=eval", "resume=data/val/images/0.png"], "not a readable checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_another_mode_is_one_message(site, arguments, part):
    assert part in error_message(site, *arguments)


@pytest.mark.parametrize(
    "name",
    [
        *("my photo (1)", "a,b", "[1] x", "x = y", "{1}", "é ü 漢字", "it's"),
        *('"q"', "'q'", " lead", "#1 $ & !", "5", "null-"),
    ],
)
def test_names_of_files_are_read_as_they_are(name):
    for key, path in (("prediction", f"{name}/val/masks"), ("hydra.run.dir", f"{name} run")):
        (word,) = words.as_text([f"{key}={path}"])
        assert OverridesParser.create().parse_override(word).value() == path


@pytest.mark.parametrize("name", ["é ü 漢字 (1), [2] x = y {3} it's #1 $ & !", '"q"', " lead", "null-"])
def test_names_of_files_work_as_they_are(place, name):
    (place / "data").rename(place / name)
    paths = (f"reference={name}/val/masks", f"prediction={name}/val/masks", f"hydra.run.dir={name} run")
    done = call(place, "mode=score", *paths, "protocol.num_classes=2")
    assert done.status == 0 and "mIoU" in done.out and (place / f"{name} run/scores.json").is_file(), done.err


@pytest.mark.heavy
def test_every_key_of_a_file_takes_any_name(compose):
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


def test_only_plain_names_are_quoted():
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
    succeed(place, *TRAIN, "++data.reader.masks.ids={64: 0, 128: 1}", "mode.metrics_only=true")


@pytest.mark.heavy
def test_command_line_trains_evaluates_and_predicts(place):
    trained = call(place, *TRAIN, draws=True)
    assert trained.status == 0, trained.err
    assert "dark" in trained.out and "scores:" in trained.out
    (run,) = place.glob("outputs/base/train_*")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"run.log", "split.json", "metrics.jsonl", "config/config.yaml", "curves.png"} <= names
    assert {"checkpoints/best.safetensors", "checkpoints/last.safetensors", "evaluation/scores.json"} <= names
    assert min(read_image(run / "curves.png").shape[:2]) > 150
    succeed(place, "mode=eval", f"resume={run}", "engine=cpu", "engine.workers=0", "mode.metrics_only=true")
    (scored,) = place.glob("outputs/base/eval_*")
    assert (scored / "scores.json").read_text() == (run / "evaluation/scores.json").read_text()
    assert not list(scored.glob("predictions")) and len(list(run.glob("evaluation/predictions/*"))) == 4
    succeed(place, "mode=predict", f"resume={run}", "input=data/val/images", "engine=cpu")
    assert len(list(place.glob("outputs/base/predict_*/*_segmentation/segmentation_raw.npy"))) == 2
    refused = call(place, "mode=eval", f"resume={run}", "engine=cpu", "mode.split=nonsense")
    assert refused.status == 1 and "split=nonsense is unknown" in refused.err


def test_composed_config_is_shown(tmp_path):
    done = call(tmp_path, *TRAIN, "--cfg", "job")
    assert done.status == 0 and "_target_: dinoseg.methods.images.ImageTraining" in done.out and "steps: 2" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_a_model_that_no_memory_holds_is_one_message(site, monkeypatch):
    monkeypatch.setattr("dinoseg.config.stored.check_values", lambda *_: None)  # it would refuse this head
    huge = ("head=detail", "head.layers=[-1]", f"head.fine={10**9}", "hydra.run.dir=R")
    said = error_message(site, *TRAIN, "data.root=data", *huge)
    (line,) = [line for line in said.splitlines() if " INFO " not in line]
    assert line.startswith("error: Out of memory (") and not (site / "R").exists()
    assert "). Free some memory. A training needs less with a smaller backbone, head or batch: mode=plan lists " in line


@pytest.mark.parametrize(
    ("is_saved", "note"), [(False, "this run has saved nothing"), (True, "holds step 3. To resume,")]
)
def test_early_interruption_does_not_import_torch(tmp_path, is_saved, note):
    if is_saved:
        save_progress(tmp_path, step=3)
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf; from dinoseg.cli import launch; "
        "from dinoseg.runs.location import RunLocation; "
        "cfg = OmegaConf.create({'mode': {'resume_from': 'last'}}); "
        "print(launch._interrupt_note(cfg, Path('.'), RunLocation(Path('.'), Path('.'))), "
        "'torch' in sys.modules)"
    )
    printed = process(tmp_path, "-c", code, stdout=subprocess.PIPE).stdout
    assert note in printed and printed.endswith(" False\n")
