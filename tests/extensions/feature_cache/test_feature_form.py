import math
from io import BytesIO

import pytest
import torch
from mistakes import assert_refused, refusals

from dinoseg.extensions.feature_cache.form import TYPES, from_file, restore_features, round_features, size_of, to_bytes
from dinoseg.utils.forms import SchemaError

KEY = "0123456789abcdef" * 2
SHAPES = [[(1, 1, 1)], [(5, 3, 7), (8, 1, 2)], [(9, 4)], [(6,), (2, 3, 4, 5)]]


def tensors(shapes, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made) * 10 ** (number - 1) for number, shape in enumerate(shapes)]


def encode_features(given, stored):
    return to_bytes(KEY, round_features(given, stored))


def read_back(given, stored):
    return from_file(KEY, BytesIO(encode_features(given, stored)), verify=True)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_features_are_read_back_in_their_stored_dtype(stored, shapes):
    given = tensors(shapes)
    for before, after in zip(given, restore_features(read_back(given, stored)), strict=True):
        assert torch.equal(before.to(getattr(torch, stored)), after)
    assert size_of(given, stored) == len(encode_features(given, stored))


@pytest.mark.parametrize("shapes", SHAPES)
def test_int8_is_within_half_a_step_of_its_token(shapes):
    given = tensors(shapes, seed=1)
    given[0].flatten()[0] = 0
    for before, after in zip(given, restore_features(read_back(given, "int8")), strict=True):
        step = before.double().abs().amax(-1, keepdim=True) / 127
        error = (before.double() - after.double()).abs()
        assert after.dtype == torch.float32 and (error <= step * 0.5 * (1 + 1e-5)).all()
        again = restore_features(round_features([after], "int8"))[0]
        assert torch.allclose(again, after, rtol=1e-6, atol=0)
    assert size_of(given, "int8") == len(encode_features(given, "int8"))


def test_a_token_of_zeros_and_one_of_tiny_numbers_come_back():
    given = torch.stack([torch.zeros(3), torch.tensor([0, 3e-38, -1e-38]), torch.tensor([1e30, -1e30, 0])])
    after = restore_features(round_features([given], "int8"))[0]
    assert torch.allclose(after, given, rtol=0.01) and not after[0].any()


@pytest.mark.parametrize("stored", TYPES)
def test_bytes_among_features_are_stored_unchanged(stored):
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    given = [pixels, *tensors([(9, 4)]), pixels[:, :1], *tensors([(2, 3, 4)]), torch.full((1, 1, 1), 7e4)]
    given = given[:4] if stored in ("float32", "int8") else given  # with numbers that float16 does not have
    after = restore_features(read_back(given, stored))
    assert [part.shape for part in after] == [part.shape for part in given]
    assert all(torch.equal(after[place], given[place]) and after[place].dtype == torch.uint8 for place in (0, 2))
    assert size_of(given, stored) == len(encode_features(given, stored))


TOO_LARGE = ("3.4e+38 overflow in bfloat16", "features.dtype=float32")
test_numbers_that_cannot_be_stored_are_refused = refusals(
    {
        "NaN": (lambda: round_features([torch.zeros(2), torch.tensor([1, math.nan])], "float32"), "not finite"),
        "infinity": (lambda: round_features([torch.tensor([1, -math.inf])], "float32"), "not finite"),
        "beyond float16": (lambda: round_features([torch.tensor([3.4e38])], "float16"), *TOO_LARGE),
        "beyond bfloat16": (lambda: round_features([torch.tensor([3.4e38])], "bfloat16"), *TOO_LARGE),
    }
)


def test_float16_overflow_is_stored_as_bfloat16():
    assert round_features([torch.tensor([-65504.0])], "float16")[0] == -65504
    given = [torch.tensor([[1.0, 2.0]]), torch.tensor([[7e4, 3.0]])]
    assert [part.dtype for part in round_features(given, "float16")] == [torch.bfloat16] * 2
    for before, after in zip(given, read_back(given, "float16"), strict=True):
        assert torch.equal(before.bfloat16(), after)
    assert len(encode_features(given, "float16")) == size_of(given, "float16")


@pytest.mark.parametrize("stored", TYPES)
def test_any_byte_that_is_another_is_seen(stored):
    content = bytearray(encode_features(tensors([(3, 2, 2), (2, 3)]), stored))
    for place in range(len(content)):
        content[place] ^= 0x10
        with pytest.raises(SchemaError):
            from_file(KEY, BytesIO(content), verify=True)
        content[place] ^= 0x10
    from_file(KEY, BytesIO(content), verify=True)


def test_truncated_longer_or_other_file_is_seen_without_checksum():
    content = encode_features(tensors([(40, 3, 7)]), "float16")
    for wrong in (b"", content[:10], content[:40], content[:-64], content[:-1], content + bytes(64)):
        with pytest.raises(SchemaError):
            from_file(KEY, BytesIO(wrong), verify=False)
    with pytest.raises(SchemaError, match="other features"):
        from_file(KEY[::-1], BytesIO(content), verify=False)


def test_one_image_of_more_than_is_read_back_is_refused(monkeypatch):
    monkeypatch.setattr("dinoseg.extensions.feature_cache.form.MAX_BYTES", 2**10)
    assert_refused(lambda: encode_features([torch.zeros(300, 1, 1)], "float32"), "resolution.longest")


@pytest.mark.parametrize("scales", [[], [torch.ones(2)], [torch.ones(4, 3)]])
def test_numbers_without_their_scales_are_refused(scales):
    with pytest.raises(SchemaError, match="lacks the scales"):
        restore_features([torch.ones(4, 3, dtype=torch.int8), *scales])
