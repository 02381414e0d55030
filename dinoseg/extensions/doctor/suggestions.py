"""Baselines and suggestions before training: constant-class scores and class imbalance."""

from collections.abc import Iterator, Sequence
from typing import Any

from dinoseg.data.checks.findings import Finding, ScannedSplit, share


def suggest(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Yield notes on baselines and settings."""
    for part in splits:
        yield from _baseline(part)
    yield from _imbalance(splits)


def constant_class(part: ScannedSplit) -> dict[str, Any] | None:
    """Return the most common class of a split, and the scores of predicting it everywhere; None for layers.

    Its IoU is its share of the labelled pixels; the IoU of every other class present is 0.
    """
    total = int(part.counts.sum())
    if not total or part.has_layers:
        return None
    commonest = int(part.counts.argmax())
    accuracy = float(part.counts[commonest]) / total
    return {"class": commonest, "accuracy": accuracy, "miou": accuracy / int((part.counts > 0).sum())}


def _baseline(part: ScannedSplit) -> Iterator[Finding]:
    constant = constant_class(part)
    if constant is not None:
        yield Finding(
            "note",
            "constant_class_baseline",
            f"Predicting {part.classes[constant['class']]} everywhere scores {share(constant['miou'], 1)} mIoU and "
            f"{share(constant['accuracy'], 1)} pixel accuracy on {part.split}.",
            remedy="A useful model scores much higher.",
        )


def _imbalance(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    part = next((candidate for candidate in splits if candidate.split == "train"), splits[0])
    there = part.counts[part.counts > 0]
    if there.size:
        yield Finding(
            "note",
            "class_imbalance",
            f"The most frequent class of {part.split} has {there.max() / there.min():.1f} times the pixels of the "
            "rarest.",
            remedy="If the rare classes matter: loss.weights=median.",
        )
