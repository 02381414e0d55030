import ast
import functools
import importlib.metadata
import os
import shutil
import sys
import types

import pytest
import torch
from mistakes import assert_refused
from small_trainings import write_pairs
from tiny_parts import tiny_vit
from torch import nn

from dinoseg.data.pairs import pair as pairs
from dinoseg.extensions.feature_cache import key
from dinoseg.extensions.feature_cache.key import code_hash, image_hash, origin, weights_hash
from dinoseg.extensions.feature_cache.store import DiskStore
from dinoseg.extensions.packed.pack import pack
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.models.adapters import Frozen
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel, frozen_tensors
from dinoseg.utils.units import hash_of

PARTS = {"weights": "w1", "code": "c1", "type": "float16", "cut": "maps of blocks 2, 5"}


def weights():
    made = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(30, 500, generator=made),
        "half": torch.randn(7, 3, generator=made).bfloat16(),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
        "strided": torch.randn(6, 5, generator=made).T,
    }


def test_weights_hash_covers_every_value_name_shape_and_dtype():
    first = weights_hash(weights().items())
    assert first == weights_hash(weights().items())
    others = []
    for name, value in weights().items():
        for place in {0, value.numel() // 2, value.numel() - 1} if value.numel() else ():
            changed = weights()
            changed[name] = changed[name].contiguous()
            changed[name].view(-1)[place] += 1
            others.append(changed)
        others.append({f"{each}x" if each == name else each: tensor for each, tensor in weights().items()})
        others.append({**weights(), name: value.reshape(*value.shape, 1)})
        others.append({**weights(), name: value.double()})
    others += [dict(list(weights().items())[1:]), {}]
    hashes = {weights_hash(each.items()) for each in others}
    assert len(hashes | {first}) == len(others) + 1
    # the layout in memory does not count
    assert weights_hash({**weights(), "strided": weights()["strided"].contiguous()}.items()) == first


@pytest.mark.slow  # bitsandbytes is imported
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_quantised_weights_count(bits):
    def hash_scaled(factor):
        backbone = tiny_vit()
        for block in backbone.blocks:
            block.mlp.up_proj.weight.data *= factor  # the same whole numbers, of another scale
        model = SegmentationModel(Frozen(bits=bits)(backbone).to("cpu"), LinearHead(24, 1, 3))
        first = weights_hash(frozen_tensors(model))
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        assert weights_hash(frozen_tensors(model)) == first
        return first

    assert hash_scaled(1) == hash_scaled(1) != hash_scaled(2)


def test_frozen_tensors_include_running_means_of_frozen_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).requires_grad_(False), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    means = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert {name for name, _ in frozen_tensors(model)} == {"0.weight", "0.bias", *means}


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """Return what makes a module of a name, whose file holds a text."""

    def make(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        module = types.ModuleType(name)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, module.__file__, "exec"), module.__dict__)
        return module

    return make


def test_code_hash_covers_base_classes_and_libraries(make_module, monkeypatch):
    def model(text, base="from torch import nn\nclass Base(nn.Module): pass\n"):
        make_module("base", base)
        return nn.Sequential(nn.Linear(1, 1), make_module("mine", text).Mine())

    text = "from base import Base\nclass Mine(Base): pass\n"
    first = code_hash([model(text)])
    assert first != code_hash([model(text, "from torch import nn\nclass Base(nn.Module): 'changed'\n")])
    assert first == code_hash([model(text)]) != code_hash([model(text + "# changed\n")])
    assert first != code_hash([nn.Linear(1, 1)]) == code_hash([nn.Linear(2, 2)])
    monkeypatch.setattr(importlib.metadata, "version", lambda library: "0")
    assert first != code_hash([model(text)])


def test_code_that_draws_views_counts(make_module):
    def hashes_of(text):
        module = make_module("views", text)
        return [code_hash([], each) for each in (module.Draw(), module.draw, functools.partial(module.draw, 1))]

    text = "class Base: pass\nclass Draw(Base): pass\ndef draw(*given): return given\n"
    first, later = hashes_of(text), hashes_of(text + "# changed\n")
    assert first == hashes_of(text) and not {*first, code_hash([])} & {*later} and code_hash([]) not in first


def test_own_code_that_computes_counts():
    computes_nothing = (  # of the values of features: messages, checks, files, processes, maps, class ids
        *("utils", "report", "core/class_ids.py", "core/object_ids.py", "core/sample_maps.py"),
        *("core/task.py", "core/objects.py", "core/targets.py"),
        "extensions/clips",
        *("extensions/packed/store.py", "data/pairs/dataset.py"),  # images are identified by their bytes
    )
    package = key.Path(key.dinoseg.__file__).parent

    def below(places):
        return {path for place in places for path in [package / place, *(package / place).rglob("*.py")]}

    counts, rest = below(key._SOURCES), below(computes_nothing)
    for path in (path for path in counts if path.suffix == ".py" and "feature_cache" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dinoseg."):
                own = package.joinpath(*node.module.split(".")[1:])
                named = [own / f"{name.name}.py" for name in node.names]
                for found in [each for each in (own.with_suffix(".py"), *named) if each.exists()]:
                    assert found in counts | rest, f"{path.name} imports {found}"


def test_own_source_that_counts_is_there(monkeypatch):
    package = key.Path(key.dinoseg.__file__).parent
    first = code_hash([])
    with monkeypatch.context() as patched:
        patched.setattr(key, "_SOURCES", ("core/geometry.py",))
        assert code_hash([]) != first
    assert all((package / place).exists() for place in key._SOURCES)
    assert all(list((package / place).rglob("*.py")) for place in key._SOURCES if not place.endswith(".py"))


@pytest.mark.parametrize("other", [{part: "other"} for part in PARTS])
def test_features_of_other_settings_are_not_used_and_logged(other, tmp_path, caplog):
    caplog.set_level("INFO")
    name = origin(tmp_path, PARTS)
    store = DiskStore(tmp_path, name, "float16")
    store.put(hash_of(1), [torch.ones(2, 2)])
    assert origin(tmp_path, dict(reversed(PARTS.items()))) == name and not caplog.records
    changed = origin(tmp_path, {**PARTS, **other})
    assert changed != name and DiskStore(tmp_path, changed, "float16").get(hash_of(1)) is None
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"with other {next(iter(other))}:" in told and str(tmp_path) in told
    assert origin(tmp_path, {**PARTS, **other}) == changed and len(caplog.records) == 1


def test_nearest_other_origin_is_logged_and_no_copy(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(3):
        name = origin(tmp_path, {name: f"{number}{name}" for name in PARTS})
    caplog.clear()
    origin(tmp_path, {**{name: f"1{name}" for name in PARTS}, "code": "other"})
    assert "with other code" in caplog.text
    caplog.clear()
    (tmp_path / name).rename(tmp_path / "copy")
    assert origin(tmp_path, {name: f"2{name}" for name in PARTS}) == name and not caplog.records


@pytest.mark.parametrize("note", ["", "[]", '{"weights": 1}', "{" * 10_000, None])
def test_damaged_origin_note_is_written_again(note, tmp_path, caplog):
    path = tmp_path / origin(tmp_path, PARTS) / "origin.json"
    before = path.read_text()
    path.unlink()
    path.mkdir() if note is None else path.write_text(note)
    assert origin(tmp_path, PARTS) == path.parent.name
    assert note is None or path.read_text() == before


def test_a_root_that_cannot_be_written_is_left_to_the_store(tmp_path):
    (tmp_path / "root").write_text("no folder")
    assert origin(tmp_path / "root", PARTS)


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path, [(5, 6 + number) for number in range(3)])


def test_image_hash_depends_on_bytes_not_on_name_or_place(data, tmp_path):
    hashes = [image_hash(data, index) for index in range(3)]
    assert len(set(hashes)) == 3
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    assert pairs.image_hash(tmp_path / "copy.png") == hashes[0]
    time = os.stat(tmp_path / "0.png").st_mtime_ns
    shutil.copy(tmp_path / "1.png", tmp_path / "0.png")
    os.utime(tmp_path / "0.png", ns=(time, time))
    assert image_hash(data, 0) == hashes[1]


def test_a_file_is_read_once(data, monkeypatch):
    first = image_hash(data, 0)
    monkeypatch.setattr("builtins.open", None)
    assert image_hash(data, 0) == first


def test_frames_of_a_video_differ(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"not looked into")
    frames = [VideoFrame(tmp_path / "film.mp4", index) for index in (0, 1, 0)]
    first, second, again = map(pairs.image_hash, frames)
    assert first == again != second


def test_packed_images_are_known_by_their_pixels(data, tmp_path):
    packed = pack(data, cache_dir=tmp_path / "cache", workers=1)
    hashes = [image_hash(packed, index) for index in range(3)]
    assert len(set(hashes)) == 3 and [image_hash(packed, index) for index in range(3)] == hashes
    kept = packed.keep(["1", "2"])
    assert [image_hash(kept, index) for index in range(2)] == hashes[1:]
    smaller = pack(data, cache_dir=tmp_path / "cache", workers=1, longest=4)
    assert not {image_hash(smaller, index) for index in range(3)} & set(hashes)


def test_images_without_files_are_known_by_their_pixels():
    class RandomOrder:
        def __getitem__(self, index):
            return {"image": torch.full((3, 2 + index // 2, 4 - index // 2), index % 2, dtype=torch.uint8)}

    hashes = [image_hash(RandomOrder(), index) for index in range(4)]
    assert len({*hashes}) == 4 and hashes == [image_hash(RandomOrder(), index) for index in range(4)]


def test_missing_image_is_an_error(data, tmp_path):
    (tmp_path / "2.png").unlink()
    assert_refused(lambda: image_hash(data, 2), "2.png", error=FileNotFoundError)
