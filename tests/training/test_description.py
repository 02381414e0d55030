"""A checkpoint's description is held against what dinoseg writes, where it is read."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from checkpoint_files import INFO
from mistakes import assert_refused
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

DEEP = "[" * 100_000 + "]" * 100_000
HALF_DEEP = json.loads("[" * 60 + "]" * 60)
CONFIG, CHOICES = INFO["config"], INFO["choices"]
ODD = {  # what an entry may not be
    "config": ["x", {**CONFIG, "data": None}, {"seed": 0}, {**CONFIG, "seed": True}],
    "choices": [
        *(["x"], {"head": "x"}, {**CHOICES, "metric": ["${oc.env:HOME}"]}),
        *({**CHOICES, "head": odd} for odd in (3, ["x"], "${oc.env:HOME}", "???", "\x1b[2J")),
    ],
    "folder": [3],
    "classes": ["ab", [], ["a", ""], ["a", "\x1b]0;x\x07"], ["a", "\ud800"]],
    "palette": [{}, [[0, 0], [1, 1]], [[256, 0, 0], [1, 1, 1]]],
    "frozen": [{"head": 3}],
    "progress": [{"step": -1}, {"step": 0.5}],
    "ignore_index": ["255", 256],
    "format": ["1", True],
}
ODD_ROWS = [(key, value, "its description is invalid (it.") for key, values in ODD.items() for value in values] + [
    ("config", {**CONFIG, "data": None}, "it.config.data is None; it must be an object"),
    ("config", {**CONFIG, "data": {"a": HALF_DEEP}}, "nested at most 32 levels deep"),
    ("folder", "x" * 2**20, "characters, above the limit"),
    ("classes", ["a", "b" * 3000], "it must be a name of 1 to 100 characters"),
    ("palette", [[0, 0, 0]], "it must be a list of 2"),
    ("progress", {"best": float("nan")}, "it.progress.best is nan; it must be a number"),
    ("progress", {"best": float("-inf")}, "it.progress.best is -inf; it must be a number"),
    ("idle", "0", "it.idle is '0'; it must be a whole number"),
    ("precision", "${oc.env:HOME}", "it must be fp32"),
    ("format", FORMAT + 1, "it has format 3, and this version of dinoseg reads format 2"),
]


def file_of(path, text):
    save_file({"model/x": torch.zeros(1)}, path, {"dinoseg": text} if text is not None else None)
    return path


@pytest.mark.parametrize(("key", "value", "says"), ODD_ROWS)
@pytest.mark.parametrize("look", [describe, outline, read])
def test_invalid_description_value_is_refused(tmp_path, key, value, says, look):
    path = file_of(tmp_path / "x.safetensors", json.dumps({"format": FORMAT, **INFO, key: value}))
    message = assert_refused(lambda: look(path), says)
    assert message.startswith(f"resume={path}: ") and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("text", [DEEP, "{", "9" * 5000, "[]", "null", "", None, "{}"], ids=lambda text: str(text)[:8])
def test_text_without_a_description_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="its description is invalid|but not a checkpoint"):
        describe(file_of(tmp_path / "x.safetensors", text))


@pytest.mark.parametrize("name", ["", "a" * 101, "a\nb", "\x1b[2J"])
def test_class_names_a_checkpoint_cannot_store_are_refused(name):
    assert_refused(lambda: Labels.of(["fine", name], None, 255), "of 1 to 100 printable")


def model_and_file(path, dtype):
    """Return a small model, and a file of its weights with one of another type."""
    model = SegmentationModel(RgbBackbone(), LinearHead(3, 1, 2))
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    name = "model/head.classify.weight"
    write(path, tensors | {name: tensors[name].to(dtype)}, INFO)
    return model, path


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("look", [outline, read])
def test_tensors_of_another_type_are_refused(tmp_path, dtype, look):
    model, path = model_and_file(tmp_path / "x.safetensors", dtype)
    unknown = dtype == torch.complex64 and look is outline  # a header with a type that no weights have
    said = "has the type C64, which is not one of" if unknown else "1 tensors of another type"
    assert_refused(lambda: check_fits(model, look(path)), said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("look", [outline, read])
def test_types_that_dinoseg_writes_fit(tmp_path, dtype, look):
    model, path = model_and_file(tmp_path / "x.safetensors", dtype)
    check_fits(model, look(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_with_nan_or_infinity_are_refused(tmp_path, value):
    path = tmp_path / "x.safetensors"
    write(path, {"model/fine": torch.ones(2), "model/weight": torch.tensor([1.0, value])}, INFO)
    assert_refused(lambda: read(path), "1 of its tensors hold NaN or infinity (such as model/weight")


def optimizer_of(module):
    names, parameters = zip(*module.named_parameters(), strict=True)
    return torch.optim.AdamW([{"params": list(parameters), "names": list(names)}])


def test_state_of_another_shape_type_or_name_is_refused(tmp_path):
    model = nn.Linear(2, 3, bias=False)
    optimizer = optimizer_of(model)
    average = MovingAverage(model.named_parameters(), 0.9)
    for key, value in (
        ("weight/exp_avg", torch.zeros(3, 3)),
        ("weight/exp_avg", torch.zeros(3, 2, dtype=torch.int64)),
        ("other/exp_avg", torch.zeros(3, 2)),
        ("weight", torch.zeros(3, 2)),
    ):
        write(tmp_path / "x.safetensors", {f"optimizer/{key}": value}, INFO | {"idle": 1})
        load = partial(load_optimizer, optimizer, read(tmp_path / "x.safetensors"))
        assert_refused(load, f"optimizer state {key} ", " fits no parameter")
    for name, value in (("weight", torch.zeros(2, 2)), ("x", torch.zeros(3, 2)), ("weight", torch.zeros(3, 2).bool())):
        write(tmp_path / "x.safetensors", {f"ema/{name}": value}, INFO)
        assert_refused(partial(load_average, average, read(tmp_path / "x.safetensors")), "of its moving average")


MOMENTS = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3, 2), "exp_avg_sq": torch.ones(3, 2)}
ODD_STATE = {
    "a step for each weight": {"step": torch.ones(3, 2)},
    "a moment of one number": {"exp_avg": torch.tensor(1.0)},
    "a moment of half precision": {"exp_avg": torch.zeros(3, 2).half()},
}


@pytest.mark.parametrize("changes", [*ODD_STATE.values(), {}], ids=[*ODD_STATE, "sound"])
def test_state_that_fused_adamw_cannot_read_is_refused(tmp_path, changes):
    optimizer = optimizer_of(nn.Linear(2, 3, bias=False))
    state = {f"optimizer/weight/{key}": value for key, value in (MOMENTS | changes).items()}
    write(tmp_path / "x.safetensors", state, INFO)
    with pytest.raises(UserError, match="fits no parameter of this model") if changes else nullcontext():
        load_optimizer(optimizer, read(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("idle", "refused"), [(0, True), (1, False), (None, True)])
def test_missing_parameter_state_is_refused_unless_idle(tmp_path, idle, refused):
    optimizer = optimizer_of(nn.Linear(2, 3))
    state = {f"optimizer/weight/{key}": value for key, value in MOMENTS.items()}
    write(tmp_path / "x.safetensors", state, INFO | ({} if idle is None else {"idle": idle}))
    with pytest.raises(UserError, match="lacks parameters .* such as bias") if refused else nullcontext():
        load_optimizer(optimizer, read(tmp_path / "x.safetensors"))


def make_on_meta(make):
    with torch.device("meta"), limit_model_size("resume=x"):
        return make()


def test_a_model_larger_than_the_machine_is_not_made(monkeypatch):
    assert_refused(lambda: make_on_meta(lambda: nn.Linear(10**7, 10**7)), "that does not fit into memory")
    monkeypatch.setattr("dinoseg.training.loading._MAX_PARTS", 1000)
    parts = (nn.Identity() for _ in range(1001))
    assert_refused(lambda: make_on_meta(lambda: nn.ModuleList(parts)), "resume=x: ", "more than 1000 parts")
    many = make_on_meta(lambda: nn.ModuleList(nn.Linear(2**15, 2**15) for _ in range(200)))
    assert_refused(lambda: check_size(many, "resume=x"), "resume=x: ", "a model of 800 GiB")
