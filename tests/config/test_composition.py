"""Configs that dinoseg composes are those that Hydra composes; `test_configs.py` compares every shipped option."""

import re
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from config_files import FOLDER
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf

from dinoseg.config import composition, resolvers
from dinoseg.config.composition import Value, compose
from dinoseg.config.job import job_config, read_words
from dinoseg.config.plain import to_container
from dinoseg.config.resolvers import register_resolvers

pytestmark = pytest.mark.slow
register_resolvers()
RECIPE = """# @package _global_
defaults: [/hparam/camvid, override /head: mine, override /data/augment/color: photometric, override /loss: dice]
head: {width: 5}
trainer: {steps: 7}
hydra: {run: {dir: "runs/${hydra.runtime.choices.head}"}}
"""
FILES = {
    "hparam/own": RECIPE,
    "hparam/below/own": "# @package _global_\ndefaults: [below/near, override /adapter: lora]\nseed: 3\n",
    "hparam/below/near": "# @package _global_\nseed: 4\nresolution: {scale: 0.5}\n",
    "head/mine": "defaults: [linear, {part: small}, _self_]\nwidth: 3\n",
    "head/part/small": "size: 1\n",
    "head/part/large": "size: 2\n",
    "data/mine": "defaults: [folder, {/protocol@official: ade20k}, _self_]\nclasses: [a, b]\n",
    "local/default": "# @package _global_\ndefaults: [override /adapter: full]\ndata: {root: here}\nseed: 9\n",
    "more/first": "x: 1\n",
    "metric/own": "own: {y: 2}\n",
    "head/pointer": "defaults: [linear, _self_]\nother: ${resolution}\nlayers: null\nlr: ???\n",
    "hparam/into": "# @package _global_\ndefaults: [override /head: pointer]\nhead: {other: {x: 1}, layers: {a: 1}}\n",
}
TRAIN = ("mode=train", "data.root=R")
JOBS = {
    "recipe": (*TRAIN, "hparam=own"),
    "recipe with typed options": (*TRAIN, "hparam=own", "loss=cross_entropy", "head.width=6", "head/part=large"),
    "recipe in a folder": (*TRAIN, "hparam=below/own", "adapter=frozen"),
    "typed before local": (*TRAIN, "seed=1", "adapter=lora", "adapter.rank=3"),
    "keys below a reference": (*TRAIN, "hparam=into"),
    "lists": (*TRAIN, "metric=[own,boundary_iou]", "logger=[]", "metric.own.y=4"),
    "one option of a list": (*TRAIN, "metric=own"),
    "placed group": (*TRAIN, "data=mine", "protocol@data.official=cityscapes"),
    "own group": (*TRAIN, "+more=first"),
    "own group elsewhere": (*TRAIN, "+more@loss.more=first"),
    "group left out": ("mode=track", "~slots", "input=x"),
    "dataset that chooses": ("mode=prepare", "data=idd", "data.root=R"),
    "dataset without preparation": ("mode=prepare", "data=mine"),
    "added, forced and removed keys": (*TRAIN, "+head.extra=1", "++head.more.deep=[1]", "~optim.schedule.warmup"),
    "tables": (*TRAIN, "loss.weights={a: 2, b: 0.5}", "data.augment={scale: [1, 2]}", "++data.reader.masks.ids={3: 1}"),
    "short forms": (*TRAIN, "hparam=sarrarp_lora", "resolution.crop=64", "trainer.steps=5"),
    "interpolation": (*TRAIN, "head.lr=${seed}", "trainer.val_every=null"),
    "run folder": (*TRAIN, "hydra.run.dir=out/${seed}"),
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / f"config/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "config"


def compose_by_hydra(words, folder, shipped=FOLDER):
    with initialize_config_dir(str(shipped), version_base="1.3"):
        cfg = hydra_compose("main", [*words, f"hydra.searchpath=['file://{folder}']"], return_hydra_config=True)
    return job_config(cfg, cfg.hydra), cfg.hydra


def compose_words(words, folder):
    options, values, _ = read_words(words, [FOLDER, folder])
    return compose(options, values, [folder])


def check_equal(found, expected, run):
    assert to_container(found.cfg) == to_container(expected)
    choices = {key: option for key, option in to_container(run.runtime.choices).items() if "hydra/" not in key}
    assert to_container(found.hydra.runtime.choices) == choices and found.hydra.run.dir == run.run.dir


@pytest.mark.parametrize("name", JOBS)
def test_composed_config_equals_that_of_hydra(folder, name, monkeypatch):
    if "local" not in name:
        (folder / "local/default.yaml").unlink()
    OmegaConf.register_new_resolver("now", lambda _: "then", replace=True)
    monkeypatch.setattr(resolvers, "datetime", SimpleNamespace(now=lambda: datetime(2026, 11, 30)))
    check_equal(compose_words(JOBS[name], folder), *compose_by_hydra(JOBS[name], folder))


def test_local_config_next_to_the_shipped_options(folder, tmp_path, monkeypatch):
    shipped = shutil.copytree(FOLDER, tmp_path / "cfg", ignore=shutil.ignore_patterns("local"))
    (shipped / "local").mkdir()
    (shipped / "local/default.yaml").write_text("# @package _global_\nseed: 5\nhydra: {run: {dir: mine}}\n")
    monkeypatch.setattr(composition, "SHIPPED", shipped)
    expected, hydra = compose_by_hydra(("mode=train", "hparam=below/own"), folder, shipped)
    found = compose({"mode": "train", "hparam": "below/own"}, folders=[folder])
    assert (found.cfg.seed, found.cfg.resolution.scale, found.hydra.run.dir) == (5, 0.5, "mine")
    found.cfg.config_dirs = expected.config_dirs  # in which Hydra has the copy as well
    check_equal(found, expected, hydra)


def test_values_given_in_python_descend_into_tables():
    given = [Value("trainer", {"steps": 4, "clip": None}), Value("loss.weights", {"a": 2.0, "b": 0.5})]
    found = compose({"mode": "train"}, given)
    assert (found.cfg.trainer.steps, found.cfg.trainer.epochs, found.cfg.trainer.clip) == (4, None, None)
    assert found.cfg.loss.weights == {"a": 2, "b": 0.5}
    assert [value.key for value in found.values] == ["trainer.steps", "trainer.clip", "loss.weights"]


def test_text_is_set_as_it_is():
    texts = ["null", "1e3", "a,b", "[x]", "it's", "{a: 1}", "", "ü \\ '"]
    found = compose({"mode": "train"}, [Value("data.classes", texts), Value("data.root", "a=b")])
    assert found.cfg.data.classes == texts and found.cfg.data.root == "a=b"


def test_keys_of_a_checkpoint_are_left_to_it():
    given = [Value("head", {"channels": 9}), Value("head.dropout", 0.5)]
    found = compose({"mode": "train"}, given, later=["head"])
    assert "channels" not in found.cfg.head and found.cfg.head.dropout == compose({"mode": "train"}).cfg.head.dropout
    assert found.values == [Value("head.channels", 9), Value("head.dropout", 0.5)]
    assert_refused(lambda: compose({"mode": "train"}, given, later=["data"]), "head.channels")


def test_hydra_of_a_program_is_neither_read_nor_changed(monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", dict(store.repo))
    store.store(group="optim", name="adamw", node={"speed": 1})
    before = dict(store.repo)
    cfg = compose({"mode": "train", "optim": "adamw"}).cfg
    assert "optimizer" in cfg.optim and "speed" not in cfg.optim
    assert store.repo == before and not GlobalHydra.instance().is_initialized()


def test_no_other_module_composes_by_hydra():
    calls = re.compile(r"from hydra import .*\b(compose|initialize\w*)\b|hydra\.(compose|initialize\w*)\(")
    package = FOLDER.parent
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if calls.search(path.read_text())}
    assert found <= {"cli/typos.py"}  # explains an error of hydra.main


def in_file(name, text):
    """Return a function that composes options with one more file in the current folder."""

    def act(*values, **options):
        path = Path(f"{name}.yaml").absolute()
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode("latin1"))
        group, _, option = name.partition("/")
        return compose({"mode": "train", group: option, **options}, values, [path.parents[1]])

    return act


def composing(*values, **options):
    return lambda: compose(options, [Value(*value) for value in values])


test_message_names_option_or_key_and_remedy = refusals(
    {
        "option": (composing(mode="train", head="liner"), "head=liner is unknown. Did you mean head=linear?"),
        "mode": (composing(mode="trane"), "mode=trane is unknown", "mode=train"),
        "group of another mode": (composing(mode="train", tracker="video"), "tracker=video: mode=train does not read"),
        "group without a mode": (composing(tracker="video"), "No mode is given. Add mode=NAME"),
        "place": (composing(**{"mode": "train", "head@x": "mlp"}), "head@x=mlp", "Leave out @x"),
        "recipe of another mode": (composing(mode="compare", hparam="camvid"), "hparam=camvid sets ", "mode=compare"),
        "key": (composing(("trainer.stpes", 3), mode="train"), "trainer.stpes is not a key", "trainer.steps?"),
        "key of an option": (
            composing(("adapter.rank", 4), mode="train"),
            "adapter=frozen lacks this key",
            "adapter=lora",
        ),
        "key of a list": (composing(("metric.nsd", 4), mode="train"), "metric.nsd=4", "metric=[nsd]"),
        "key below a value": (composing(("seed.x", 3), mode="train"), "seed.x"),
        "root key": (composing(("teacher", "x"), mode="train"), "teacher=x", "trainer=distil"),
        "key of another mode": (composing(("tracker.size", 1), mode="train"), "tracker.size=1: mode=train"),
        "removed key": (composing(("nothing", None, "~"), mode="train"), "nothing is not a key"),
        "removed group": (composing(**{"mode": "train", "~tracker": None}), "tracker", "mode=train"),
        "defaults of itself": (in_file("head/again", "defaults: [again]"), "again.yaml", "includes that file again"),
        "no mapping": (in_file("head/number", "3"), "number.yaml is not a config file"),
        "no YAML": (in_file("head/broken", "a: [1"), "broken.yaml is not a config file"),
        "no UTF-8": (in_file("head/latin", "name: \xe9"), "latin.yaml is not a config file"),
        "defaults that are no list": (
            in_file("head/dict", "defaults: {}"),
            "dict.yaml is not a config file",
            "defaults",
        ),
        "two keys in an entry": (
            in_file("head/two", "defaults: [{a: b, c: d}]"),
            "two.yaml",
            "its defaults list holds",
        ),
        "base that is missing": (in_file("head/gone", "defaults: [nowhere]"), "head=nowhere is unknown"),
        "group twice": (in_file("head/twice", "defaults: [{/loss@_global_.loss: dice}]"), "twice.yaml", "loss"),
    }
)
