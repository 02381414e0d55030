"""Tensor files that we write: whole or not at all, and for the group to read."""

import json
import stat
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dinoseg.utils import tensor_files
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import check_weights, outline, write_tensors


def test_a_written_file_stands_alone_and_others_may_read_it(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    write_tensors(path, {"a": torch.arange(6).view(2, 3).T}, {"of": "us"})
    assert load_file(path)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_what_cannot_be_written_leaves_the_older_file(tmp_path, monkeypatch, error):
    def save(tensors, part, header):
        part.write_bytes(b"half")
        raise error

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")
    monkeypatch.setattr(tensor_files, "save_file", save)
    with pytest.raises(UserError, match="a.safetensors could not be written .*MiB are free"):
        write_tensors(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [torch.tensor(7.0, dtype=torch.float16), torch.tensor(7, dtype=torch.int32)])
def test_counters_may_have_another_type_that_holds_their_value(value):
    check_weights({"count": value}, "init=x", {"count": torch.tensor(0)})
    check_weights({"count": value.to("meta")}, "init=x", {"count": torch.tensor(0)})


@pytest.mark.parametrize("value", [torch.tensor(7.5), torch.tensor(float("inf")), torch.tensor(7, dtype=torch.uint8)])
def test_counters_that_lose_their_value_or_are_quantised_are_refused(value):
    with pytest.raises(UserError, match=r"init=x: count is \w+ instead of int64"):
        check_weights({"count": value}, "init=x", {"count": torch.tensor(0)})


def test_a_type_that_no_weights_have_is_named_as_in_the_file(tmp_path):
    header = b'{"w":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(SafetensorError, match="w has the type F8_E8M0"):
        outline(tmp_path / "w.safetensors")


def test_a_side_that_no_tensor_has_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(SafetensorError, match=r"'?w'? has the shape \[0, 18446744073709551615\]"):
        outline(path)
    with pytest.raises(UserError, match="backbone.weights=.*not a readable safetensors file"):
        tensor_files.read_tensor_file(path, "backbone.weights")
