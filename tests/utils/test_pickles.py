"""PyTorch files that ask for much more memory than they have bytes are refused before torch reads them."""

import argparse
import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from mistakes import assert_refused

from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import read_tensor_file

HEADS = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def global_opcode(module, name):
    return f"c{module}\n{name}\n".encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def nested_hex_call(times):
    """Return a text that is encoded as hexadecimal digits so many times: each one doubles it."""
    first = global_opcode("_codecs", "encode") * (times + 1) + text("a") + text("latin1") + b"\x86R"
    return first + (text("hex") + b"\x86R") * times


ASKING = {
    "bytearray": global_opcode("builtins", "bytearray") + number(2**30) + b"\x85R",
    "Python 2's": global_opcode("__builtin__", "bytearray") + number(2**30) + b"\x85R",
    "an object": global_opcode("builtins", "bytearray") + number(2**30) + b"\x85\x81",
    "bytes": nested_hex_call(30),
    "a tensor": global_opcode("torch", "FloatTensor") + number(2**30) + b"\x85R",
}


def write(path, value, *, zipped, compress=zipfile.ZIP_STORED):
    """Write a file whose pickle is a dict with one value."""
    content = b"\x80\x02}" + text("x") + value + b"s."
    if not zipped:
        heads = b"".join(pickle.dumps(head, 2) for head in HEADS)
        path.write_bytes(heads + content + pickle.dumps([], 2))
        return path
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, part in (("a/data.pkl", content), ("a/byteorder", b"little"), ("a/version", b"3\n")):
            archive.writestr(name, part)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ASKING)
def test_file_that_would_fill_the_memory_is_not_read(kind, zipped, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))
    path = write(tmp_path / "x.pth", ASKING[kind], zipped=zipped)
    assert path.stat().st_size < 2000
    with pytest.raises(UserError, match=r"^w=.*x\.pth: not a readable PyTorch file of tensors only \(it holds \S+\)"):
        read_tensor_file(path, "w")


def test_an_archive_holds_no_more_than_its_file_has_bytes(tmp_path):
    path = write(tmp_path / "x.pth", text("a" * 10**6), zipped=True, compress=zipfile.ZIP_DEFLATED)
    assert_refused(lambda: read_tensor_file(path, "w"), "x.pth: ", "larger than the file")
    write(path, text("a"), zipped=True)
    with zipfile.ZipFile(path, "a") as archive:  # torch ignores case, and reads one of the two
        archive.writestr("a/DATA.pkl", b"\x80\x02}" + text("x") + ASKING["bytearray"] + b"s.")
    assert_refused(lambda: read_tensor_file(path, "w"), "x.pth: ", "it holds builtins.bytearray")
    write(path, text("a"), zipped=True)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.PKL", b"\x80\x02}" + text("x") + ASKING["bytearray"] + b"s.")
    assert_refused(lambda: read_tensor_file(path, "w"), "x.pth: ", "it holds builtins.bytearray")


@pytest.mark.parametrize("zipped", [True, False])
def test_common_contents_of_weight_files_are_read(zipped, tmp_path):
    layer = torch.nn.Linear(2, 3)
    layer.bias.origin = "kept beside the values"
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)
    content = {
        "model": layer.state_dict(),
        "parameters": OrderedDict(layer.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-3, name="dino", betas=(0.9, 0.95), size=torch.Size([2]), kind=torch.float16),
        "kinds": {str(kind): torch.ones(2, 2).to(kind) for kind in kinds},
        "float8": torch.ones(2).to(torch.float8_e4m3fn if zipped else torch.float16),  # not in torch's older format
        "seen": {1, 2},
        "epoch": 3,
    }
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    (tmp_path / "x.pth").write_bytes(stream.getvalue())
    found = read_tensor_file(tmp_path / "x.pth", "w")
    assert found.keys() == content.keys() and found["args"] == content["args"]
    assert torch.equal(found["parameters"]["weight"], layer.weight)
    assert all(torch.equal(found["kinds"][name], value) for name, value in content["kinds"].items())
