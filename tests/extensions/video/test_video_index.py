"""Stored indices of videos: damaged and hostile files are told apart from what was written."""

import zipfile

import numpy as np
import pytest
from mistakes import assert_refused

from dinoseg.extensions.video import index
from dinoseg.extensions.video.index import ArrayForm, read_arrays
from dinoseg.utils.forms import SchemaError


def npz(path, compress=False, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy(kind, shape, content=b""):
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    "content",
    [
        npy("<f8", (10**15,)),  # as many bytes would be asked for
        npy("<f8", (2**62, 8)),  # their product is no 64-bit number
        npy("<f8", (-1,)),
        npy("<f8", (2,), bytes(8)),
        npy("|O", (1,), b"cos\nsystem\n(S'false'\ntR."),
        npy("<f4", (2,), bytes(8)),
        npy("<f8", (1, 1), bytes(8)),
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY\x01\x00" + b"\xff\xff" + b"(" * 65535,
        b"",
    ],
)
def test_arrays_of_another_form_are_refused_before_they_are_made(tmp_path, content):
    npz(tmp_path / "a.npz", a=content)
    with pytest.raises(SchemaError):
        read_arrays(tmp_path / "a.npz", {"a": ArrayForm("<f8", 1)})


def test_unreadable_array_archives_are_refused(tmp_path, caplog):
    path = tmp_path / "a.npz"
    form = {"a": ArrayForm("<f8", 1)}
    np.savez(path, a=np.arange(3.0))
    assert read_arrays(path, form)["a"].tolist() == [0, 1, 2]
    whole = path.read_bytes()
    for torn in (b"", whole[:40], whole[:-9], whole.replace(b"\x00\x00\xf0\x3f", b"\x00\x00\xf0\x40")):
        path.write_bytes(torn)
        with pytest.raises(SchemaError):
            read_arrays(path, form)
    for times, sums in (([0.0, np.nan], [1, 2]), ([0.0], [1, 2]), ([], [])):
        np.savez(path, times=np.array(times, np.float64), sums=np.array(sums, np.uint32), fps=25.0)
        assert index._load(path) is None and not path.exists()
    assert caplog.text.count("is damaged (") == 3
    assert_refused(lambda: read_arrays(path, form), "No such file", error=SchemaError)
