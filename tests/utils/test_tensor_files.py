"""Tensor files that we write: whole or not at all, and for the group to read."""

import stat
from functools import partial

import pytest
import torch
from mistakes import assert_refused
from safetensors import SafetensorError
from safetensors.torch import load_file

from dinoseg.utils import tensor_files
from dinoseg.utils.tensor_files import check_weights, copy_values, is_finite, outline, write_tensors


def test_a_written_file_stands_alone_and_others_may_read_it(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    write_tensors(path, {"a": torch.arange(6).view(2, 3).T}, {"of": "us"})
    assert load_file(path)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_failed_write_preserves_the_older_file(tmp_path, monkeypatch, error):
    def save(tensors, part, header):
        part.write_bytes(b"half")
        assert part.parent.name.startswith(".a.safetensors.")  # what a kill leaves is known by its name
        raise error

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")
    monkeypatch.setattr(tensor_files, "save_file", save)
    write = partial(write_tensors, path, {"a": torch.zeros(1)}, {})
    assert_refused(write, "a.safetensors could not be written ", "MiB are free")
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_a_type_that_no_weights_have_is_named_as_in_the_file(tmp_path):
    header = b'{"w":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    assert_refused(lambda: outline(tmp_path / "w.safetensors"), "w has the type F8_E8M0", error=SafetensorError)


SHAPES = [(), (0,), (3,), (2**15,), (5, 2**15 + 1), (3, 2**21)]  # in one piece, in several, and whole


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_value_that_is_not_finite_is_found(shape, dtype):
    value = torch.ones(shape, dtype=dtype)
    assert is_finite(value) and is_finite(value.T if value.dim() == 2 else value)
    for odd in (float("nan"), float("inf"), float("-inf")) if value.numel() else ():
        for place in (0, -1):
            tampered = value.clone()
            tampered.view(-1)[place] = odd
            assert not is_finite(tampered) and not is_finite(tampered.T if value.dim() == 2 else tampered)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_copied_from_any_memory_layout(shape):
    source = torch.rand(shape, dtype=torch.float64)
    target = torch.zeros(shape)
    copy_values(target, source)
    assert torch.equal(target, source.float())
    if source.dim() == 2:
        other = torch.zeros(shape[::-1]).T
        copy_values(other, source)
        copy_values(target, other)
        assert torch.equal(other, source.float()) and torch.equal(target, other)


def test_a_small_tensor_is_processed_by_the_calling_thread():
    """Threads that wait for one another take longer than the operation where the machine is busy."""
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.aminmax, torch.Tensor.copy_):
                sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    value = torch.rand(3, 2**16)
    with Watch():
        assert is_finite(value)
        copy_values(torch.empty_like(value), value)
    assert sizes and max(sizes) <= 2**15


def test_tensors_of_another_shape_are_refused():
    expected = {"a": torch.zeros(3, 2)}
    assert_refused(lambda: check_weights({"a": torch.zeros(2, 3)}, "w", expected), "shape [2, 3] instead of [3, 2]")
