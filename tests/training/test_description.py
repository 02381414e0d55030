"""A checkpoint's description is held against what dinoseg writes, where it is read."""

import json
from contextlib import nullcontext

import pytest
import torch
from checkpoint_files import INFO
from safetensors.torch import save_file
from torch import nn

from dinoseg.data.classes.labels import Labels
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import describe, outline, read, write
from dinoseg.training.description import FORMAT
from dinoseg.training.loading import check_fits, check_size, limit_model_size, load_average, load_optimizer
from dinoseg.training.optim import MovingAverage
from dinoseg.utils.errors import UserError

WEIGHT = "head.classify.weight"
DEEP = "[" * 100_000 + "]" * 100_000
HALF_DEEP = json.loads("[" * 60 + "]" * 60)
ODD = {  # key, value, what the refusal says
    "a list for the config": ("config", [], "its config is"),
    "a text for the config": ("config", "x", "its config is"),
    "no config": ("config", None, "its config is"),
    "a null group": ("config", {**INFO["config"], "data": None}, "its config is .* each with its keys"),
    "a number for a group": ("config", {**INFO["config"], "head": 3}, "its config is"),
    "a group that is not there": ("config", {"seed": 0}, "its config is"),
    "a text for the seed": ("config", {**INFO["config"], "seed": "0"}, "its config is"),
    "yes for the seed": ("config", {**INFO["config"], "seed": True}, "its config is"),
    "a list for choices": ("choices", ["x"], "its choices is"),
    "choices of numbers": ("choices", {**INFO["choices"], "head": 3}, "its choices is"),
    "choices of lists": ("choices", {**INFO["choices"], "head": ["x"]}, "its choices is"),
    "too few choices": ("choices", {"head": "x"}, "its choices is"),
    "choices that ask": ("choices", {**INFO["choices"], "head": "${oc.env:HOME}"}, "its choices is"),
    "choices that are missing": ("choices", {**INFO["choices"], "head": "???"}, "its choices is"),
    "too many options": ("choices", {**INFO["choices"], "metric": ["x"] * 101}, "its choices is"),
    "options that ask": ("choices", {**INFO["choices"], "metric": ["${oc.env:HOME}"]}, "its choices is"),
    "options of numbers": ("choices", {**INFO["choices"], "metric": ["x", 3]}, "its choices is"),
    "choices for terminals": ("choices", {**INFO["choices"], "head": "\x1b[2J"}, "its choices is"),
    "a number for the folder": ("folder", 3, "its folder is 3; it must be a folder"),
    "a list for the folder": ("folder", ["x"], "its folder is"),
    "a folder that ends early": ("folder", "a\0b", "its folder is"),
    "a text for classes": ("classes", "ab", "its classes is ab"),
    "no classes": ("classes", [], "its classes is"),
    "numbers for classes": ("classes", [1, 2], "its classes is"),
    "an empty class": ("classes", ["a", ""], "its classes is"),
    "a long class": ("classes", ["a", "b" * 3000], "at most 100 printable characters"),
    "a class for terminals": ("classes", ["a", "\x1b]0;x\x07"], "its classes is"),
    "half a letter": ("classes", ["a", "\ud800"], "its classes is"),
    "too many classes": ("classes", [str(number) for number in range(256)], "its classes is"),
    "a dict for the palette": ("palette", {}, "its palette is"),
    "pairs for the palette": ("palette", [[0, 0], [1, 1]], "its palette is"),
    "fractions for the palette": ("palette", [[0.5, 0, 0], [1, 1, 1]], "its palette is"),
    "large numbers for the palette": ("palette", [[256, 0, 0], [1, 1, 1]], "its palette is"),
    "a short palette": ("palette", [[0, 0, 0]], "1 colours for 2 classes"),
    "a list for frozen": ("frozen", [], "its frozen is"),
    "numbers for frozen": ("frozen", {"head": 3}, "its frozen is"),
    "a list for progress": ("progress", [], "its progress is"),
    "a text for the step": ("progress", {"step": "3"}, "its progress is"),
    "a step below 0": ("progress", {"step": -1}, "its progress is"),
    "half a step": ("progress", {"step": 0.5}, "its progress is"),
    "a list for the best": ("progress", {"best": [1]}, "its progress is"),
    "a best that is no number": ("progress", {"best": float("nan")}, "must be finite numbers of step"),
    "a best that none beats": ("progress", {"best": float("inf")}, "must be finite numbers of step"),
    "a best below all": ("progress", {"best": float("-inf")}, "must be finite numbers of step"),
    "a text for what is idle": ("idle", "0", "its idle is 0; it must be a whole number"),
    "a text for the ignored id": ("ignore_index", "255", "its ignore_index is"),
    "a large ignored id": ("ignore_index", 256, "its ignore_index is"),
    "a text for the format": ("format", "1", "its format is"),
    "yes for the format": ("format", True, "its format is"),
    "a later format": ("format", FORMAT + 1, "Update dinoseg"),
    "an earlier format": ("format", FORMAT - 1, "written in format 0; this version of dinoseg reads format 1"),
    "a deep config": ("config", {**INFO["config"], "data": {"a": HALF_DEEP}}, "nested deeper than"),
    "a huge text": ("folder", "x" * 2**20, "characters, above the limit"),
}


def file_of(path, text, tensors=None):
    save_file(tensors or {"model/x": torch.zeros(1)}, path, {"dinoseg": text} if text is not None else None)
    return path


@pytest.mark.parametrize(("key", "value", "says"), ODD.values(), ids=ODD)
def test_invalid_description_value_is_refused(tmp_path, key, value, says):
    text = json.dumps({"format": FORMAT, **INFO, key: value})
    path = file_of(tmp_path / "x.safetensors", text)
    for look in (describe, outline, read):
        with pytest.raises(UserError, match=says) as caught:
            look(path)
        assert str(caught.value).startswith(f"resume={path}: ") and str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", [DEEP, "{", "1e999999", "9" * 5000, "[]", "null", "3", "", None, "{}"], ids=lambda text: str(text)[:8]
)
def test_text_without_a_description_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="cannot be read|but not a checkpoint|lacks"):
        describe(file_of(tmp_path / "x.safetensors", text))


def test_written_description_is_read_back(tmp_path):
    progress = {"step": 3, "best": 0.5, "best_step": 0, "stale": 1}
    write(tmp_path / "x.safetensors", {"model/x": torch.ones(2, 3)}, {**INFO, "progress": progress})
    assert describe(tmp_path / "x.safetensors")["progress"]["step"] == 3
    found = outline(tmp_path / "x.safetensors").tensors["model/x"]
    assert (found.shape, found.dtype, found.device.type) == ((2, 3), torch.float32, "meta")


@pytest.mark.parametrize("name", ["", "a" * 101, "a\nb", "\x1b[2J"])
def test_class_names_a_checkpoint_cannot_store_are_refused(name):
    with pytest.raises(UserError, match="give names of 1 to 100 printable"):
        Labels.of(["fine", name], None, 255)


def smallest():
    return SegmentationModel(RgbBackbone(), LinearHead(3, 1, 2))


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_tensors_of_another_type_are_refused(tmp_path, dtype):
    model = smallest()
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    write(tmp_path / "x.safetensors", tensors | {f"model/{WEIGHT}": tensors[f"model/{WEIGHT}"].to(dtype)}, INFO)
    for look in (outline, read):
        unknown = dtype == torch.complex64 and look is outline  # a header with a type that no weights have
        message = "has the type C64, which is not one of" if unknown else "1 tensors of another type"
        with pytest.raises(UserError, match=message):
            check_fits(model, look(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types_that_dinoseg_writes_fit(tmp_path, dtype):
    model = smallest()
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    write(tmp_path / "x.safetensors", tensors | {f"model/{WEIGHT}": tensors[f"model/{WEIGHT}"].to(dtype)}, INFO)
    for look in (outline, read):
        check_fits(model, look(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_with_nan_or_infinity_are_refused(tmp_path, value):
    path = tmp_path / "x.safetensors"
    write(path, {"model/fine": torch.ones(2), "model/weight": torch.tensor([1.0, value])}, INFO)
    with pytest.raises(UserError, match="1 of its tensors hold NaN or infinity .such as model/weight"):
        read(path)


def optimizer_of(module):
    names, parameters = zip(*module.named_parameters(), strict=True)
    return torch.optim.AdamW([{"params": list(parameters), "names": list(names)}])


def test_state_of_another_shape_type_or_name_is_refused(tmp_path):
    model = nn.Linear(2, 3, bias=False)
    optimizer, average = optimizer_of(model), MovingAverage(model.named_parameters(), 0.9)
    for key, value in (
        ("weight/exp_avg", torch.zeros(3, 3)),
        ("weight/exp_avg", torch.zeros(3, 2, dtype=torch.int64)),
        ("other/exp_avg", torch.zeros(3, 2)),
        ("weight", torch.zeros(3, 2)),
    ):
        write(tmp_path / "x.safetensors", {f"optimizer/{key}": value}, INFO | {"idle": 1})
        with pytest.raises(UserError, match=f"optimizer state {key} .* fits no parameter"):
            load_optimizer(optimizer, read(tmp_path / "x.safetensors"))
    for name, value in (("weight", torch.zeros(2, 2)), ("x", torch.zeros(3, 2)), ("weight", torch.zeros(3, 2).bool())):
        write(tmp_path / "x.safetensors", {f"ema/{name}": value}, INFO)
        with pytest.raises(UserError, match="of its moving average"):
            load_average(average, read(tmp_path / "x.safetensors"))


MOMENTS = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3, 2), "exp_avg_sq": torch.ones(3, 2)}
ODD_STATE = {
    "no step": {"step": None},
    "no moment": {"exp_avg": None},
    "one more": {"evil": torch.tensor(1.0)},
    "a step before the first": {"step": torch.tensor(-5.0)},
    "a step for each weight": {"step": torch.ones(3, 2)},
    "a moment of one number": {"exp_avg": torch.tensor(1.0)},
    "a moment of half precision": {"exp_avg": torch.zeros(3, 2).half()},
    "squares below zero": {"exp_avg_sq": -torch.ones(3, 2)},
}


@pytest.mark.parametrize("changes", [*ODD_STATE.values(), {}], ids=[*ODD_STATE, "sound"])
def test_state_of_another_optimizer_than_adamw_is_refused(tmp_path, changes):
    optimizer = optimizer_of(nn.Linear(2, 3, bias=False))
    state = {f"optimizer/weight/{key}": value for key, value in (MOMENTS | changes).items() if value is not None}
    write(tmp_path / "x.safetensors", state, INFO)
    with pytest.raises(UserError, match="state of weight is not that of AdamW") if changes else nullcontext():
        load_optimizer(optimizer, read(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("idle", "refused"), [(0, True), (1, False), (None, True)])
def test_missing_parameter_state_is_refused_unless_idle(tmp_path, idle, refused):
    optimizer = optimizer_of(nn.Linear(2, 3))
    state = {f"optimizer/weight/{key}": value for key, value in MOMENTS.items()}
    write(tmp_path / "x.safetensors", state, INFO | ({} if idle is None else {"idle": idle}))
    with pytest.raises(UserError, match="lacks parameters .* such as bias") if refused else nullcontext():
        load_optimizer(optimizer, read(tmp_path / "x.safetensors"))


@pytest.mark.slow
def test_a_model_larger_than_the_machine_is_not_made():
    with (
        pytest.raises(UserError, match="that does not fit into memory"),
        torch.device("meta"),
        limit_model_size("resume=x"),
    ):
        nn.Linear(10**7, 10**7)
    with pytest.raises(UserError, match="more than 50000 parts"), torch.device("meta"), limit_model_size("resume=x"):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(10**9))
    with torch.device("meta"):
        many = nn.ModuleList(nn.Linear(2**15, 2**15) for _ in range(200))
    with pytest.raises(UserError, match="a model of 800 GiB"):
        check_size(many, "resume=x")
    with limit_model_size("resume=x"):
        nn.Linear(2, 2)
