"""Baselines and suggestions before training: constant-class scores, colour statistics, class weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dinoseg.data.doctor.findings import Finding, Scanned, share

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_FAR = 1.0  # warn if a mean is off by more of the backbone's standard deviations
_SPREAD = 2.5  # warn if a standard deviation differs by a larger factor


def suggest(splits: Sequence[Scanned], mean: Sequence[float], std: Sequence[float]) -> Iterator[Finding]:
    """Yield notes on baselines and settings; `mean` and `std` are the backbone's, in 0..1."""
    for part in splits:
        yield from _baseline(part)
    yield from _colors(splits, mean, std)
    yield from _weights(splits)


def constant_class(part: Scanned) -> dict[str, Any] | None:
    """Return the most common class of a split, and the scores of predicting it everywhere.

    Its IoU is its share of the labelled pixels; the IoU of every other class present is 0.
    """
    total = int(part.counts.sum())
    if not total:
        return None
    commonest = int(part.counts.argmax())
    accuracy = float(part.counts[commonest]) / total
    return {"class": commonest, "accuracy": accuracy, "miou": accuracy / int((part.counts > 0).sum())}


def class_weights(counts: np.ndarray) -> dict[str, list[float]]:
    """Return weights (K,) by median frequency and by the inverse square root of frequency.

    Both are scaled to a mean of 1 over the classes present, as by loss.weights=median; other classes have weight 1.
    """
    there = counts > 0
    frequency = np.where(there, counts, 1) / max(1, counts.sum())
    raw = {"median": np.median(frequency[there]) / frequency, "inverse_sqrt": frequency**-0.5} if there.any() else {}
    return {name: np.where(there, value / value[there].mean(), 1.0).tolist() for name, value in raw.items()}


def color_statistics(splits: Sequence[Scanned]) -> dict[str, Any] | None:
    """Return mean and standard deviation (red, green, blue) in 0..1 over all pixels, or None without decoded images."""
    records = [r for part in splits for r in part.records if r.decoded and r.image_size and r.color_sums]
    pixels = sum(r.image_size[0] * r.image_size[1] for r in records if r.image_size)
    if not pixels:
        return None
    # Python integers are unbounded: only the final divisions round
    sums = [sum(record.color_sums[channel] for record in records) for channel in range(3)]
    squares = [sum(record.color_squares[channel] for record in records) for channel in range(3)]
    spread = [(pixels * square - total**2) ** 0.5 / pixels for total, square in zip(sums, squares, strict=True)]
    return {"mean": [total / pixels / 255 for total in sums], "std": [value / 255 for value in spread]}


def _baseline(part: Scanned) -> Iterator[Finding]:
    constant = constant_class(part)
    if constant is not None:
        yield Finding(
            "note",
            "constant_class_baseline",
            f"Predicting {part.classes[constant['class']]} everywhere scores {share(constant['miou'], 1)} mIoU and "
            f"{share(constant['accuracy'], 1)} pixel accuracy on {part.split}.",
            remedy="A useful model scores much higher.",
        )


def _colors(splits: Sequence[Scanned], mean: Sequence[float], std: Sequence[float]) -> Iterator[Finding]:
    colors = color_statistics(splits)
    if colors is None:
        return
    away = [abs(ours - theirs) / unit for ours, theirs, unit in zip(colors["mean"], mean, std, strict=True)]
    ratios = [ours / theirs for ours, theirs in zip(colors["std"], std, strict=True)]
    far = max(away) > _FAR or max(ratios) > _SPREAD or min(ratios) < 1 / _SPREAD
    yield Finding(
        "warning" if far else "note",
        "colors",
        f"Red, green and blue have mean {_numbers(colors['mean'])} and standard deviation {_numbers(colors['std'])}; "
        f"the backbone normalises by {_numbers(mean)} and {_numbers(std)}.",
        remedy=(
            "Check the images: exposure, channel order, more than 8 bits. If they are correct, train more of the "
            "backbone (adapter=lora or full)."
            if far
            else ""
        ),
    )


def _weights(splits: Sequence[Scanned]) -> Iterator[Finding]:
    part: Scanned = next((candidate for candidate in splits if candidate.split == "train"), splits[0])
    weights: Mapping[str, list[float]] = class_weights(part.counts)
    if weights:
        lines = [f"{name} {_numbers(values, 2)}" for name, values in weights.items()]
        there = part.counts[part.counts > 0]
        yield Finding(
            "note",
            "class_weights",
            f"The most frequent class of {part.split} has {there.max() / there.min():.0f} times the pixels of the "
            f"rarest. Class weights would be: {'; '.join(lines)}.",
            remedy="If the rare classes matter: loss.weights=median.",
        )


def _numbers(values: Sequence[float], digits: int = 3) -> str:
    return "[" + ", ".join(f"{value:.{digits}f}" for value in values) + "]"
