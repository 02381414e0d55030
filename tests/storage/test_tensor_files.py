"""Tensor files that we write: whole or not at all, and for the group to read."""

import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dinoseg.errors import UserError
from dinoseg.storage import tensor_files
from dinoseg.storage.tensor_files import write_tensors


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
