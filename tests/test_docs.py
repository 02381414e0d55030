"""Every command of the README and the guide is run: on small stand-ins for the data, small models, for two steps."""

import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import call, in_this_process
from docs_pages import OURS, PAGES, ROOT, blocks, commands, kind_of
from docs_stand_ins import CPU, SHORT, SMALL, SMALL_SLOTS, VIT, StandIns
from meta_files import RELEASED
from omegaconf import OmegaConf

from dinoseg.__main__ import CONFIGS
from dinoseg.api import modes, runs
from dinoseg.api.compose import read_call, words_of
from dinoseg.api.jobs import run_mode
from dinoseg.api.objects import split_datasets
from dinoseg.cli.typos import check_words
from dinoseg.config.composition import SHIPPED
from dinoseg.config.nodes import instantiate
from dinoseg.extensions.auto import bench_mode as benching

SMALL_RENDER = ("render.train_videos=1", "render.test_videos=1", "render.seconds=1", "render.size=[32,48]")
SMALL_WINDOWS = ("inference.size=64", "inference.shortest=64")
SMALLER = {  # what a mode is given beside the words of its command
    "train": (*SHORT, *CPU, "mode.metrics_only=true"),
    "eval": (*CPU, "mode.metrics_only=true"),
    "probe": CPU,
    "bench": (*SHORT, *CPU, "mode.steps=2", "mode.images=2", "mode.warmup=0", "mode.synthetic=true"),
    "plan": (*SHORT, *CPU),
    "predict": CPU,
    "features": CPU,
    "example": CPU,
    "track": CPU,
    "render": (*SMALL_RENDER, "render.workers=1"),
}
WRITES = {  # what a mode leaves in its run folder, or "run.log"
    **{"train": "scores.json", "eval": "scores.json", "score": "scores.json", "summary": "summary.json"},
    **{"probe": "probe.csv", "plan": "plan.json", "bench": "bench.json", "doctor": "doctor.html"},
    **{"export": "backbone.safetensors", "compare": "compare.csv", "track": "track.json", "features": "summary.json"},
}
EXPORTED = {"safetensors": "model.safetensors", "onnx": "model.onnx"}  # what an export writes that is not the usual one
SERVERS = ("app", "serve")  # run until they say where they listen, asked for their start page, and stopped
GIVEN = {  # names that the Python of the docs does not make itself
    "mask": torch.nn.functional.pad(torch.ones(24, 24, dtype=torch.uint8), (12, 12, 12, 12)),
    "grid": (6, 6),
    "features": torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0)),
}
NOT_RUN = re.compile(  # what needs the package index, an account, a scheduler, a server, or has tests of its own
    r"make (demo|test|docs)$|python3 -m venv |pip install |docker |sbatch |hf auth login$|gh |export |"
    r".* --config-dir mine/|.* logger=mlflow |python benchmarks/"
)
ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
RUN = [command for command in ALL if command.startswith(OURS) and not NOT_RUN.match(command)]
RANKS = [command for command in ALL if command.startswith("torchrun ")]
WALK = [command for command in commands(ROOT / "docs/first_training.md") if command.startswith(f"{OURS}mode=")]
PYTHON = [  # that of test_own_parts.py aside, which imports files of the same page
    pytest.param(page.name, text, marks=[] if page.name == "README.md" else [pytest.mark.heavy])
    for page in PAGES
    for _, text in blocks(page, "python")
    if "from my_parts" not in text
]
FIRST = {kind_of(command): command for command in reversed(RUN) if "mode=train" in command}
ALIKE = [one for one in RUN if "mode=train" in one and one not in WALK and FIRST[kind_of(one)] != one]
READ_FIRST = [one for page in PAGES if page.name in ("README.md", "first_training.md") for one in commands(page)]
QUICK = [one for one in READ_FIRST if one in ALIKE]  # the commands of `WALK` run most modes


def mode_of(command):
    return re.search(r"\bmode=(\w+)", command)[1]


def small_model(words):
    """Return overrides that make the model of a command small."""
    if any(word.startswith("resume=") and word != "resume=auto" for word in words):
        return ()
    if any(word.startswith("init=dinoseg:") for word in words):  # whose weights belong to their backbone
        return ()
    if "hparam=ade20k_m2f" in words:
        return (*RELEASED, *SMALL_WINDOWS, "inference.stride=43")
    if "backbone=timm" in words:
        return (*VIT, *SMALL_SLOTS) if any("slots_" in word for word in words) else VIT
    if any(word.startswith(("hparam=slots", "hparam=dinosavi")) for word in words):
        return (*SMALL, *SMALL_SLOTS)
    if "hparam=slotcontrast_movi_c" in words:
        return (*SMALL, *SMALL_SLOTS, "data.clips.eval_square=56")
    if any(word.startswith("hparam=linear_ade20k") for word in words):
        return (*SMALL, *SMALL_WINDOWS, "inference.stride=43")
    if "hparam=idd_m2f" in words:  # whose parts have the sizes of Meta's files, and no weights here
        return ()
    if {"hparam=idd_lora", "head=dpt", "hparam=unimatch_v2_ade20k"} & set(words):  # whose head reads four maps
        return (*SMALL, "backbone.layers=[0,0,1,1]")
    if any("=eomt" in word or word == "hparam=instance" for word in words) and "head=pmt" not in words:
        windows = SMALL_WINDOWS if "hparam=eomt_ade20k_dinov3" in words else ()
        return (*SMALL, *windows, "head.blocks=1", "head.anneal=even")
    return SMALL


def with_stand_ins(words, stand_ins):
    """Put places for the words in capitals, those of folders that the command makes aside."""

    def place(found):
        assert found[1] in stand_ins, f"{found[1]}: give it a stand-in, in tests/docs_stand_ins.py"
        return str(stand_ins[found[1]])

    made = ("hydra.run.dir=", "data.root=") if "mode=render" in words else ("hydra.run.dir=",)
    pattern = re.compile(r"(?<=[=\[,])([A-Z][A-Z_]+)(?=[/,\]]|$)")
    return [word if word.startswith(made) else pattern.sub(place, word) for word in words]


def first_job(command):
    """Return the words of a command, and of a sweep those of its first job."""
    words = shlex.split(command.removeprefix(OURS))
    return [re.sub(r"=([^\[,]*),.*", r"=\1", word) for word in words if word != "-m"] if "-m" in words else words


def as_run(command, stand_ins):
    """Return the words of a command that is small, and of a sweep one job."""
    mode = mode_of(command)
    words = with_stand_ins(first_job(command), stand_ins)
    if mode in ("train", "probe", "plan", "bench", "predict", "track") or (
        mode in ("eval", "summary", "features", "example")
        and "resume=" not in command
        and "backbone=tiny_surgical" not in command
    ):
        words += small_model(words)
    if mode in ("track", "eval") and "resume=" not in command:
        words += ["tracker.short_side=48"]
    words += SMALLER.get(mode, ())
    return words + ["render.val_videos=1"] if mode == "render" and "data=movi" in words else words


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("docs"))


def test_the_docs_hold_commands_that_are_run():
    assert len(RUN) >= 40 and len(ALIKE) < len(RUN) / 3
    assert [command for command in ALL if command not in [*RUN, *RANKS] and not NOT_RUN.match(command)] == []


def test_words_of_documented_commands_are_keys_and_options():
    for command in RUN:
        check_words(shlex.split(command.removeprefix(OURS)), [SHIPPED])


def parametrize_commands(tried):
    params = [pytest.param(one, marks=[] if one in QUICK else [pytest.mark.heavy]) for one in tried]
    return pytest.mark.parametrize("command", params)


@parametrize_commands(one for one in RUN if mode_of(one) not in SERVERS and one not in [*ALIKE, *WALK])
def test_documented_command_runs(command, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "run_in_process", in_this_process)
    done = call(tmp_path, *as_run(command, stand_ins))
    # the stand-ins are as alike and as few as no data set is: whether the doctor finds that is not at issue
    assert done.status == 0 or mode_of(command) == "doctor", done.err
    written = {path.name for path in tmp_path.rglob("*")}
    pictures = "references" if "input=val" in command else "a_segmentation"
    if packaged := re.search(r" input=dinoseg:(\w+)", command):
        pictures = f"{packaged[1]}_segmentation"
    pictures = "video_left_overlay.mp4" if "VIDEO" in command else pictures
    expected = pictures if mode_of(command) == "predict" else WRITES.get(mode_of(command), "run.log")
    if option := re.search(r" export=(\w+)", command):
        expected = EXPORTED[option[1]]
    expected = "model.safetensors" if "export=safetensors" in command else expected
    assert expected in written, done.out
    assert "No effect here" not in done.err


@parametrize_commands(ALIKE)
def test_a_training_like_another_is_put_together(command, compose, stand_ins):
    words = with_stand_ins(first_job(command), stand_ins)
    cfg = compose(*words, *small_model(words), *CPU)
    instantiate(cfg.mode.check)(cfg)


@pytest.mark.heavy
@pytest.mark.parametrize("command", [one for one in RUN if mode_of(one) in SERVERS])
def test_a_server_answers_and_stops(command, stand_ins, tmp_path):
    words = [*with_stand_ins(shlex.split(command.removeprefix(OURS)), stand_ins), *CPU, "mode.port=0"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen([sys.executable, "-m", "dinoseg", *words], cwd=tmp_path, **streams)
    try:
        said = next(found[0] for line in server.stdout if (found := re.search(r"http://[\w.:\[\]]+", line)))
        with urllib.request.urlopen(f"{said}/health", timeout=300) as answer:
            assert answer.status == 200
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=300)
    assert server.returncode == 0


@pytest.mark.heavy
@pytest.mark.parametrize("command", RANKS)
def test_documented_ranks_run(command, stand_ins, tmp_path):
    launcher, _, words = command.partition(" -m dinoseg ")
    program = [str(Path(sys.executable).with_name("torchrun")), *shlex.split(launcher)[1:], "-m", "dinoseg"]
    done = subprocess.run([*program, *as_run(words, stand_ins)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "pixel accuracy" in done.stdout, done.stderr


def composed_keys(node, path=""):
    """Yield each key of a composed config, nodes included."""
    for key, value in node.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from composed_keys(value, f"{path}{key}.")


def test_migration_page_names_existing_keys_and_options(compose):
    page = (ROOT / "docs/coming_from.md").read_text()
    here = re.findall(r"^\| .* \| (.*) \|$", page, flags=re.M)
    words = {word for cell in here for word in re.findall(r"`([^`]+)`", cell)}
    configs = [
        compose("mode=train", "adapter=last_blocks", "backbone=timm", "backbone.name=test_vit", "data.root=."),
        compose("mode=train", "data.root=.", "loss=ce_dice"),
        compose("mode=predict", "input=."),
    ]
    known = {key for cfg in configs for key in composed_keys(OmegaConf.to_container(cfg))}
    known |= {"hparam", "resume", "hydra.run.dir", "dinoseg.create_model", "dinoseg.load"}
    files = Path(CONFIGS)
    options = {word for word in words if (files / f"{word.replace('=', '/')}.yaml").is_file()}
    assert words - options - known == {"resume=auto", "defaults"} and len(options) > 20 and len(words) > 80


def run_small(mode, words, overrides, *options, **named):
    """Run a mode as a function does, with what `SMALLER` gives to a command beside its words."""
    _, datasets = split_datasets(overrides)
    given = {"data": overrides["data"]} if datasets else {}
    plain = {key: value for key, value in overrides.items() if key not in given}
    words = [*words, *words_of(*read_call((), plain)[:2])]
    small = (*SMALLER.get(mode, ()), *(small_model(words) if mode in ("train", "track") else ()))
    if datasets:  # half of the few images of the stand-in
        small = (*small, "data.batch_size=1")
    return run_mode(mode, [*words, *small], given, *options, **named)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # transformers, without a GPU
@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_documented_python_runs(page, code, stand_ins, tmp_path, monkeypatch):
    if "import lightning" in code:
        pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    monkeypatch.chdir(tmp_path)
    quoted = re.compile(r'(?<!out_dir=)"([A-Z][A-Z_]+)(?=[/"])')  # what the code makes is in this folder
    code = quoted.sub(lambda found: f'"{stand_ins[found[1]]}' if found[1] in stand_ins else found[0], code)
    for module in (modes, runs):
        monkeypatch.setattr(module, "run_mode", run_small)
    exec(compile(code, page, "exec"), dict(GIVEN))


class LightningTrainer:
    """The loop of Lightning's Trainer in its documentation, for machines without Lightning."""

    def __init__(self, max_steps, **_):
        self.steps = max_steps

    def fit(self, module, batches):
        optimizer = module.train().configure_optimizers()
        for number, batch in zip(range(self.steps), batches, strict=False):
            loss = module.training_step(batch, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_lightning_example_trains_by_its_hooks(stand_ins, tmp_path, monkeypatch):
    code = next(each.values[1] for each in PYTHON if "import lightning" in each.values[1])
    names = {"LightningModule": torch.nn.Module, "Trainer": LightningTrainer}
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(**names))
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("FOLDER", str(stand_ins["FOLDER"])), "python.md", "exec"), {})
    assert (tmp_path / "model.safetensors").is_file()


def test_the_page_of_ten_minutes_leads_to_scored_predictions(stand_ins, tmp_path):
    for line in WALK:
        # in one folder, as a newcomer does: what one command makes, the next one reads
        words = [word.replace("FOLDER", str(stand_ins["FOLDER"])) for word in shlex.split(line.removeprefix(OURS))]
        more = {"train": (*SMALL, *SHORT, *CPU), "predict": CPU, "eval": CPU}.get(mode_of(line), ())
        done = call(tmp_path, *words, *more)
        assert done.status == 0 or "mode=doctor" in words, done.err  # the stand-ins are few and alike
        if "mode=score" in words:
            assert "leaf" in done.out and "mIoU" in done.out
    assert sorted(path.name for path in (tmp_path / "PREDICTED/masks").iterdir()) == ["a.png", "b.png", "classes.json"]
    assert list(tmp_path.rglob("report.html"))
    assert WALK[1] in commands(ROOT / "README.md")
