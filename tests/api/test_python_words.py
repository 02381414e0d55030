"""Arguments and errors of calls in the words of Python: values, options with keys, no trace in the caller's Hydra."""

import enum
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import write_data
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import getbase
from mistakes import assert_refused, refusals
from omegaconf import OmegaConf

import dinoseg
from dinoseg.api.compose import compose as compose_words
from dinoseg.api.compose import compose_call, compose_job, read_call, words_of
from dinoseg.config.composition import Value
from dinoseg.config.grammar import write_value
from dinoseg.config.plain import to_container
from dinoseg.metrics import ConfusionMatrix
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

pytestmark = pytest.mark.slow
LETTERS = "abnul1_-. ,=:;'\"\\()[]{}<>|&!?*+~#%@^`/$éßö中İſ\u212a\U0001f33f\t\n"
TEXTS = ["", " ", "null", "None", "true", "1", "1e3", "-1", "inf", "nan", "a b", "a,b", "a=b", "[a]", "{a:b}", "it's"]
TEXTS += [*("\"'\\$~"), "\\'", 'a\\"', "${", "}{", "+a", "a:b", "C:\\data\\x", "range(1,2)", "glob(*)", "a #b"]
TEXTS += ["Döhe", "\\u00f6"]
OF_COMMAND_LINES = re.compile(r"--cfg job|--help|hydra\.run\.dir|add -m")


class Split(str, enum.Enum):  # noqa: UP042 - as of older programs
    VAL = "val"


def text(rng):
    drawn = "".join(rng.choices(LETTERS, k=rng.randrange(8)))
    return rng.choice([rng.choice(TEXTS), drawn]).replace("${", "$")


def value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 5:
        number = rng.choice([0, 1, -7, 2**70, 0.5, -1e-9, 1e300, math.inf, -math.inf, 3.0])
        return [None, rng.random() < 0.5, number, text(rng), text(rng)][kind]
    if kind < 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice([text(rng), f"k{number}", number]): value(rng, depth + 1) for number in range(rng.randrange(3))}


def compose_probe(given):
    return to_container(compose_call({f"++probe.{key}": each for key, each in given.items()}, None).probe)


def compose_record(given):
    """Compose the words that the record of a call has for these values."""
    return to_container(compose_words(words_of({}, [Value(f"probe.{key}", given[key], "++") for key in given])).probe)


@pytest.mark.parametrize("composed", [compose_probe, compose_record])
@pytest.mark.parametrize("count", [100, pytest.param(600, marks=pytest.mark.heavy)])
def test_composed_values_equal_the_given_values(count, composed):
    rng = random.Random(0)
    given = {f"k{number}": value(rng) for number in range(count)}
    found = composed(given)
    assert [key for key in given if repr(found[key]) != repr(given[key])] == []
    assert len({repr(each) for each in given.values()}) > count // 3


@pytest.mark.parametrize(
    ("given", "composed"),
    [
        (np.float32(0.5), 0.5),
        (Path("a folder/it's.png"), "a folder/it's.png"),
        ((1, 2), [1, 2]),
        (Split.VAL, "val"),
        (np.str_("x, y"), "x, y"),
        (math.nan, math.nan),
        ({"a key: (1)": 1}, {"a key: (1)": 1}),
        ({"1": 1, 1: 2, "null": 3}, {"1": 1, 1: 2, "null": 3}),
        ({"\uffff \U00010000": 1}, {"\uffff \U00010000": 1}),
    ],
)
def test_other_types_become_plain_values(given, composed):
    assert repr(compose_probe({"x": given})["x"]) == repr(composed)


def record(words, overrides):
    """Return the words in the record of a call."""
    return compose_job(read_call(words, overrides)).words


def test_words_are_as_typed_where_hydra_reads_them_as_text():
    given = {"head": "mlp", "data.root": "my data/x", "trainer": {"steps": 20}, "data.classes": ["a", "b c"]}
    typed = ["head=mlp", "data.root=my data/x", "trainer.steps=20", 'data.classes=[a,"b c"]', "seed=null"]
    assert record((), given | {"seed": None}) == typed


@pytest.mark.parametrize("path", ["a,b", "[x]", "a b=c", "'q'", "x{y}"])
def test_paths_with_any_characters_are_paths(path):
    assert compose_call({"mode": "predict", "input": Path(path), "data.root": path}, None).input == path


@pytest.mark.parametrize("value", [np.zeros(2), object(), object, {1, 2}, b"x", 1j, [np.zeros(2)]])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match=r"seed=.* cannot be written as an override\. Give plain values"):
        record((), {"seed": value})


def test_entries_of_heads_are_parsed_back_by_hydra():
    keys = {"weights": "Döhe.pth", "note": "null", "channels": 16, "drop": 0.5, "norm": None, "on": True}
    words = [f"++probe.{key}={write_value(value)}" for key, value in keys.items()]
    assert to_container(compose_words(words).probe) == keys


def test_the_config_is_that_of_the_command_line(compose):
    words = ("mode=train", "hparam=camvid", "head=mlp", "data.root=x", "trainer.steps=9")
    assert to_container(compose_words(words)) == to_container(compose(*words))


test_message_names_value_and_remedy = refusals(
    {
        "group": (lambda: compose_call({"heda": "mlp"}, None), "heda is not a key of the", "Did you mean head?"),
        "name that YAML alone can hold": (lambda: words_of({}, [Value("labels.ä", 1)]), "in a YAML file of your own"),
        "no option": (lambda: compose_call({"head": None}, None), "head=null is unknown. Choose from "),
        "several values": (lambda: compose_words(["head=linear,mlp"]), "head=linear,mlp gives several values", "loop"),
        "resolver, not an override": (
            lambda: compose_words(
                ["data=folder", "data.classes=3", "hydra.run.dir=runs/${dinoseg.len:${data.classes}}"]
            ),
            "data.classes=3 is not a list. Write it in brackets",
        ),
    }
)


def test_own_config_folder_provides_options(tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/mine.yaml").write_text("defaults: [mlp, _self_]\nlr: 5.0\n")
    assert compose_words(["head=mine"], config_dir=tmp_path).head.lr == 5
    assert dinoseg.list_heads("m*", config_dir=tmp_path)[-3:] == ["mine", "mlp", "multiscale"]
    assert_refused(lambda: compose_words(["head=mine"]), "head=mine is unknown")


def test_hydra_state_of_the_caller_is_neither_changed_nor_read(tmp_path):
    (tmp_path / "main.yaml").write_text("x: 1\n")
    OmegaConf.register_new_resolver("len", lambda value: "mine", replace=True)
    try:
        with initialize_config_dir(str(tmp_path), version_base="1.2"):
            HydraConfig.instance().set_config(hydra_compose("main", return_hydra_config=True))
            before = HydraConfig.get()
            hydra = GlobalHydra.instance().hydra
            compose_words(["head=mlp"])
            with pytest.raises(UserError):
                compose_words(["head=mlq"])
            assert HydraConfig.get() is before and GlobalHydra.instance().hydra is hydra
            assert hydra_compose("main").x == 1 and str(getbase()) == "1.2"
        assert OmegaConf.create({"x": "${len:1}"}).x == "mine"
    finally:
        HydraConfig.instance().cfg = None
        OmegaConf.clear_resolver("len")
    assert not GlobalHydra.instance().is_initialized()
    compose_words(["head=mlp"])
    assert not GlobalHydra.instance().is_initialized() and not OmegaConf.has_resolver("len")


def test_options_are_sorted_names_of_files():
    assert dinoseg.list_backbones("dinov3*") == sorted(dinoseg.list_backbones("dinov3*")) != []
    assert dinoseg.list_adapters() == ["frozen", "full", "last_blocks", "lora", "lora_8bit", "lora_all", "qlora"]
    assert "folder" in dinoseg.list_datasets() and "sarrarp_lora" in dinoseg.list_recipes("sarrarp_*")
    assert not [name for name in dinoseg.list_datasets() if name.startswith("_")] and dinoseg.list_heads("x*") == []


def test_threads_compose_at_the_same_time():
    heads = dinoseg.list_heads() * 2
    with ThreadPoolExecutor(4) as pool:
        found = [cfg.choices.head for cfg in pool.map(lambda head: compose_words([f"head={head}"]), heads)]
    assert found == heads and not OmegaConf.has_resolver("len")


AUGMENT = {"color": {"name": "photometric", "space": "hsv"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"adapter": {"name": "lora", "rank": 4}}, ["adapter=lora", "adapter.rank=4"]),
        ({"loss": {"name": "dice"}, "optim": {"optimizer": {"lr": 1.0}}}, ["loss=dice", "optim.optimizer.lr=1.0"]),
        ({"backbone": {"name": "timm"}, "backbone.name": "x"}, ["backbone=timm", "backbone.name=x"]),
        ({"data": {"pixels": "files"}}, ["data/pixels=files"]),
        ({"data/pixels": {"name": "files", "order": [0]}}, ["data/pixels=files", "data.pixels.order=[0]"]),
        ({"data.pixels": "files", "data": {"pixels": {"order": [0]}}}, ["data/pixels=files", "data.pixels.order=[0]"]),
        ({"data": {"augment": AUGMENT}}, ["data/augment/color=photometric", "data.augment.color.space=hsv"]),
        ({"engine": {"device": torch.device("cpu")}}, ["engine.device=cpu"]),
        ({"backbone": {"dtype": torch.bfloat16}}, ["backbone.dtype=bfloat16"]),
        ({"seed": np.int64(3)}, ["seed=3"]),
        ({"data.reader.masks.ids": {3: 4}}, ["data.reader.masks.ids={3:4}"]),
    ],
)
def test_one_argument_holds_an_option_and_its_keys(given, expected):
    assert record(("mode=train",), given) == ["mode=train", *expected]


def test_name_that_is_no_option_is_a_key():
    words = ["backbone=timm", "backbone.name=vit_tiny_patch16_224"]
    assert record(words[:1], {"backbone": {"name": "vit_tiny_patch16_224"}}) == words


CLASSES = ["a", "b"]
RANK_0 = {"name": "lora", "rank": 0}
CALLS = {  # how a message begins
    "head.layrs": lambda: dinoseg.create_model("tiny", num_classes=2, **{"head.layrs": [1]}),
    "tracker.size": lambda: dinoseg.create_model("tiny", num_classes=2, **{"tracker.size": 1}),
    "trainer.stepz": lambda: dinoseg.train("demo", trainer={"stepz": 3}),
    "data.clases": lambda: dinoseg.open_dataset(root=".", clases=CLASSES),
    "data.root": lambda: dinoseg.open_dataset("camvid"),
    "data.root=nowhere: file or folder not found": lambda: dinoseg.open_dataset(root="nowhere", classes=CLASSES),
    "data.root and data.classes are not set": dinoseg.open_dataset,
    "backbone.name": lambda: dinoseg.create_model("timm", num_classes=2),
    "backbone.weights=nowhere.pt: file": lambda: dinoseg.create_model("tiny", num_classes=2, weights="nowhere.pt"),
    "adapter.rank=0 is out of": lambda: dinoseg.create_model("tiny", num_classes=2, adapter=RANK_0),
    "head=linear,mlp": lambda: dinoseg.train("demo", "head=linear,mlp"),
    "head=other": lambda: dinoseg.create_model("tiny", head="other", num_classes=2),
    "data.root=nowhere: file or folder": lambda: dinoseg.train(data={"root": "nowhere", "classes": CLASSES}),
    "config_dir=nowhere is not a folder": lambda: dinoseg.list_heads(config_dir="nowhere"),
}


@pytest.mark.parametrize("start", CALLS)
def test_errors_name_arguments_and_no_command_line(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = assert_refused(CALLS[start], start, error=ValueError)  # which a UserError is
    assert message.startswith(start) and not OF_COMMAND_LINES.search(message)


def test_errors_of_items_name_no_command_line(tmp_path):
    write_data(tmp_path)
    for mask in (tmp_path / "train/masks").iterdir():
        write_png(mask, np.full((32, 48), 7, np.uint8))
    data = dinoseg.open_dataset(root=tmp_path, classes=["dark", "bright"])
    assert not OF_COMMAND_LINES.search(assert_refused(lambda: data[0], "7"))


def test_scores_are_found_in_any_spelling():
    ours = dinoseg.Scores({"miou": 0.5}, "folder")
    official = dinoseg.Scores({"scores": {"mIoU": 0.25}}, "folder")
    assert ours["mIoU"] == ours["miou"] == 0.5 and official["mIoU"] == official["miou"] == 0.25
    assert "mIoU" in ours and ours.get("dice") is None and list(ours) == ["miou"]
    with pytest.raises(KeyError, match="dise"):
        ours["dise"]
    assert ours._ipython_key_completions_() == ["miou"]


def test_confusion_matrices_add_move_and_print():
    first, second = ConfusionMatrix(2), ConfusionMatrix(2)
    first.update(torch.tensor([[0, 1]]), torch.tensor([[0, 255]]))
    second.update(torch.tensor([[1, 1]]), torch.tensor([[1, 0]]))
    total = first + second
    assert [each.compute()["pixels"] for each in (first, second, total)] == [1, 2, 3]
    assert total.to("cpu") is total and first.to(torch.device("meta")).counts.is_meta
    assert repr(total) == "dinoseg.metrics.ConfusionMatrix(2 classes, 3 pixels, 1 ignored)"


def test_partial_backbone_names_its_line(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/part.yaml").write_text("defaults: [rgb]\n_partial_: true\n")
    with pytest.raises(UserError, match="backbone: .*`_partial_: true` gives no object, so remove that line"):
        dinoseg.create_model("part", num_classes=2, config_dir=tmp_path)
