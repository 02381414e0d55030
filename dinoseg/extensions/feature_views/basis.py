"""Principal components of the features of any number of images, exact, in memory that does not grow with them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_file
from dinoseg.utils.wording import format_value

LOWEST, HIGHEST = 0.01, 0.99  # quantiles between which a component is drawn
ROWS = 2**18  # patches that are read from the file at once
_BINS = 2**16
_NAME = "dinoseg.features"  # of the metadata in the file
_GREATEST = 1e12  # of the values in a file
_INFO = forms.object_with(components=forms.list_of(forms.whole(1)))
_TENSORS = ("mean", "directions", "low", "high", "eigenvalues")


@dataclass
class Moments:
    """Number, mean (C,) and scatter (C, C) of feature vectors, in float64.

    The scatter is the sum of (x - mean) (x - mean)'. Parts are joined as in Chan, Golub and LeVeque (1983), without
    the cancellation of a sum of squares.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Return those of the features (..., C) of one image."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        mean = flat.mean(0)
        centred = flat - mean
        return cls(len(flat), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both together."""
        if not self.count:
            return other
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)

    def principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the variances (C,), largest first, and the unit vectors (C, C), one per row.

        The entry of largest magnitude of each vector is positive; of several, the first.
        """
        variances, columns = np.linalg.eigh(self.scatter / self.count)
        axes = columns.T[::-1]
        largest = np.abs(axes).argmax(1)
        signs = np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)
        return np.maximum(variances[::-1], 0.0), axes * signs[:, None]


@dataclass
class Basis:
    """Components of features and the ranges in which they are drawn.

    Args:
        mean: (C,) float64.
        directions: (1 + K, C) float64: the first component, then those that are drawn.
        low: (1 + K,) 1st percentile of each projection.
        high: (1 + K,) 99th percentile.
        eigenvalues: (C,) variances of all components, largest first.
        info: what the features are: backbone, layer, normalise, position, rank, components.
    """

    mean: np.ndarray
    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray
    eigenvalues: np.ndarray
    info: dict[str, Any]

    @classmethod
    def fit(cls, moments: Moments, components: Sequence[int], info: dict[str, Any]) -> "Basis":
        """Return the basis of moments, without ranges yet; `components` count from 1.

        Raises:
            UserError: the features have fewer components.
        """
        variances, axes = moments.principal_axes()
        if max(components) > len(axes):
            raise UserError(
                f"components={list(components)}: these features have {len(axes)} components, one for each channel. "
                f"Give numbers from 1 to {len(axes)}."
            )
        rows = [0, *(number - 1 for number in components)]
        nothing = np.zeros(len(rows))
        return cls(moments.mean, axes[rows], nothing, nothing, variances, {**info, "components": list(components)})

    @property
    def shares(self) -> np.ndarray:
        """Return the share of the variance of each component (C,), largest first; 0 if all features are equal."""
        return self.eigenvalues / max(self.eigenvalues.sum(), np.finfo(np.float64).tiny)

    @property
    def effective_rank(self) -> float:
        """Return exp of the entropy of the shares of variance (Roy and Vetterli, 2007)."""
        shares = self.shares[self.shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def check(self, values: np.ndarray) -> None:
        """Refuse features (..., C) of another width.

        Raises:
            UserError: the basis is of other features.
        """
        if values.shape[-1] != len(self.mean):
            raise UserError(
                f"basis: it is of features with {len(self.mean)} channels, and these have {values.shape[-1]}. Use the "
                "backbone that it was fitted to, or fit a new one."
            )

    def project(self, values: np.ndarray) -> np.ndarray:
        """Return the projections (..., 1 + K) float32 of features (..., C)."""
        return ((values.astype(np.float64) - self.mean) @ self.directions.T).astype(np.float32)

    def colours(self, projections: np.ndarray) -> np.ndarray:
        """Return the colours (..., K) in 0..1 of projections (..., 1 + K); 0.5 for a component that is constant."""
        spans = self.high - self.low
        scaled = (projections.astype(np.float64) - self.low) / np.where(spans > 0, spans, 1)
        return np.where(spans > 0, scaled.clip(0, 1), 0.5)[..., 1:]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, which `load` reads."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        with atomic_file(Path(path)) as part:
            part.write_bytes(save(tensors, {_NAME: json.dumps(self.info)}))

    @classmethod
    def load(cls, path: str | PathLike[str], info: dict[str, Any], key: str = "basis") -> "Basis":
        """Read a basis for features as `info` states; its own components and ranges stay.

        Args:
            path: file of `save`.
            info: what the features are that it will be used for.
            key: of the config, which names the file in messages.

        Raises:
            UserError: it is no such file, or of other features.
        """
        check_file(Path(path), key)
        try:
            with safe_open(path, framework="np") as file:
                stored = forms.parse_json((file.metadata() or {}).get(_NAME, ""), _INFO)
                arrays = {name: file.get_tensor(name).astype(np.float64) for name in _TENSORS}
            count, width = arrays["directions"].shape
            shapes = ((width,), (count, width), (count,), (count,), (width,))
            fits = [arrays[name].shape for name in _TENSORS] == [*shapes] and count == 1 + len(stored["components"])
            is_bounded = all((np.abs(value) < _GREATEST).all() for value in arrays.values())  # and no NaN
            if not fits or not is_bounded or max(check_components(stored["components"])) > width:
                raise ValueError("shapes or values")
        # TypeError and AttributeError: of types that NumPy lacks
        except (SafetensorError, ValueError, TypeError, AttributeError, UserError, forms.SchemaError):
            raise UserError(
                f"{key}={path} holds no basis of features. Give a basis.safetensors of mode=features."
            ) from None
        for name, value in info.items():
            if stored.get(name) != value:
                raise UserError(
                    f"{key}={path} was fitted to features with {name}={format_value(stored.get(name))}, and these have "
                    f"{name}={format_value(value)}. Use the same {name}, or leave {key} out to fit a new basis."
                )
        return cls(**arrays, info=stored)


def check_components(components: Sequence[int]) -> list[int]:
    """Return one to three numbers of components.

    Raises:
        UserError: there are others.
    """
    numbers = list(components)
    is_few = 1 <= len(numbers) == len({*numbers}) <= 3
    if not is_few or not all(type(number) is int and number >= 1 for number in numbers):
        raise UserError(f"components={numbers}: give one to three different numbers from 1, such as [1,2,3].")
    return numbers


class Projections:
    """Projections of patches (N, 1 + K) float32 in a temporary file, in the order in which they were added.

    Args:
        folder: of the file, which is deleted when it is closed.
        width: 1 + K.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width, self.count = folder, width, 0
        self._file = TemporaryFile(dir=folder)

    def __enter__(self) -> "Projections":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, projections: np.ndarray) -> None:
        """Append the projections (..., 1 + K) of an image."""
        try:
            self._file.write(np.ascontiguousarray(projections, np.float32).tobytes())
            self._file.flush()
        except OSError as error:
            error.filename = str(self.folder / "temporary projections")  # the file has no name
            raise
        self.count += projections.size // self.width

    def cut(self, count: int) -> None:
        """Remove all patches but the first `count`."""
        self._file.seek(count * self.width * 4)
        self._file.truncate()
        self.count = count

    def rewind(self) -> None:
        """Start to read from the first patch."""
        self._file.seek(0)

    def read(self, count: int) -> np.ndarray:
        """Return the next projections (count, 1 + K), or as many as are left."""
        data = self._file.read(count * self.width * 4)
        return np.frombuffer(data, np.float32).reshape(-1, self.width)

    def quantiles(self, *shares: float) -> list[np.ndarray]:
        """Return the quantile (1 + K,) of each column for each share, interpolated as by `numpy.quantile`, exactly.

        The neighbouring values are found by their bits: histograms of the upper, then of the lower 16, so that memory
        does not depend on the number of patches. The file is read twice.
        """
        places = [share * (self.count - 1) for share in shares]
        ranks = [min(int(place) + step, self.count - 1) for place in places for step in (0, 1)]
        values = self._at_ranks(ranks)
        return [
            _interpolate(low, high, place % 1)
            for low, high, place in zip(values[::2], values[1::2], places, strict=True)
        ]

    def _at_ranks(self, ranks: Sequence[int]) -> np.ndarray:
        """Return the values (R, 1 + K) float64 of each column at 0-based ranks in ascending order."""
        upper = np.zeros((self.width, _BINS), np.int64)
        for keys in self._keys():
            for column in range(self.width):
                upper[column] += np.bincount(keys[:, column] >> 16, minlength=_BINS)
        ends = upper.cumsum(1)
        chosen = np.stack([(ends <= rank).sum(1) for rank in ranks])  # (R, 1 + K)
        lower = {place: np.zeros(_BINS, np.int64) for bins in chosen for place in enumerate(bins)}
        for keys in self._keys():
            for (column, bin), counts in lower.items():
                own = keys[:, column]
                counts += np.bincount(own[own >> 16 == bin] & (_BINS - 1), minlength=_BINS)
        found = np.zeros_like(chosen)
        for number, rank in enumerate(ranks):
            for column, bin in enumerate(chosen[number]):
                left = rank - (ends - upper)[column, bin]
                found[number, column] = bin << 16 | (lower[column, bin].cumsum() <= left).sum()
        return _from_keys(found.astype(np.uint32)).astype(np.float64)

    def _keys(self) -> Iterator[np.ndarray]:
        """Yield all projections in pieces, as integers in the same order (uint32 of IEEE 754 floats)."""
        self.rewind()
        while len(values := self.read(ROWS)):
            yield _to_keys(values)


def _interpolate(low: np.ndarray, high: np.ndarray, weight: float) -> np.ndarray:
    # as NumPy's `_lerp`, which is exact at both ends
    return np.where(weight < 0.5, low + (high - low) * weight, high - (high - low) * (1 - weight))


def _to_keys(values: np.ndarray) -> np.ndarray:
    bits = (values + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def _from_keys(keys: np.ndarray) -> np.ndarray:
    return np.where(keys >> 31, keys & np.uint32(2**31 - 1), ~keys).view(np.float32)
