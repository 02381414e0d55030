"""Compare rules of segmentation by example on the same features: print the tables of docs/example.md.

    python benchmarks/example.py WEIGHTS DATA [--draws 4 12]

WEIGHTS is a safetensors file of timm's vit_tiny_patch16_224, DATA a folder with person, camvid and davis2016. Surgery
is rendered. A draw has one or five references and four images to segment; no image is in two draws. Images have 512 px
on their long side and are scored at every fourth pixel. Draws 0 to 3 chose the default rule and its constant, so the
others are measured. Intervals are Student's t over draws. Rules that dinoseg lacks stand in this file.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from tabulate import tabulate

import dinoseg
from dinoseg.evaluation.scoring.intervals import Estimate, jackknife_error
from dinoseg.extensions.example.discriminant import Discriminant
from dinoseg.extensions.example.insid3 import (
    ALPHA,
    ReferencePatches,
    TargetPatches,
    average_clusters,
    average_shots,
    find_clusters,
    find_largest,
    match,
    normalise,
    reduce_mask,
)
from dinoseg.extensions.feature_views.patches import PatchFeatures
from dinoseg.extensions.probe.probe import Candidates, Grid
from dinoseg.extensions.probe.sums import Sums, cell_labels, solve
from dinoseg.extensions.rendering.surgery.write import render_clip
from dinoseg.segmenter.torch_runtime import replicate_in_eval_mode

SIDE, PATCH, STRIDE = 512, 16, 4  # pixels
DRAWS, SHOTS, TARGETS = 12, 5, 4  # of a data set
IGNORED = 255
PERSON = (np.arange(256) > 127).astype(np.uint8)  # label of each id of person and DAVIS
SEQUENCES = ("blackswan", "car-shadow", "cows", "scooter-black")


@dataclass(frozen=True)
class Sample:
    """Image with its labels, of which 0 is the background, and its features.

    Attributes:
        labels: (H, W), IGNORED where they are unknown.
        masks: (R, N) bool, the patches of each label.
        features: normalised (N, C), those of the rule.
        raw: with positions.
        position_free: without positions.
        norms: of the raw features before (N, 1).
        clusters: (N,) of a target; None: of a reference.
        grid: (h, w).
    """

    labels: np.ndarray
    masks: np.ndarray
    features: np.ndarray
    raw: np.ndarray
    position_free: np.ndarray
    norms: np.ndarray
    clusters: np.ndarray | None
    grid: tuple[int, int]


Scorer = Callable[[Sample], np.ndarray]  # target to scores (R, N), -inf of a label that no shot shows
Rule = Callable[[Sequence[Sample]], Scorer]  # fits to shots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("data", type=Path)
    parser.add_argument("--draws", type=int, nargs=2, default=(4, DRAWS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    features = open_features(given.weights)
    heads, counts = [], {name: [] for name in RULES}  # of each rule, (draws, R, 3) of each column
    for name, draws in load_data(given.data, features, range(*given.draws)):
        for one_class in (False, True) if name == "camvid" else (False,):
            for shots in (1, SHOTS):
                heads.append(f"{name}{' class by class' if one_class else ''}, {shots}")
                for rule, fit in RULES.items():
                    found = [score_draw(fit, refs[:shots], targets, one_class) for refs, targets in draws]
                    counts[rule].append(np.stack(found))
    default = counts["discriminant"]
    for title, reference in (("mIoU %", None), ("points to the default", default)):
        rows = []
        for rule, columns in counts.items():
            others = columns if reference is None else reference
            rows.append([rule, *(estimate(*pair, reference is not None) for pair in zip(columns, others, strict=True))])
        print(tabulate(rows, [title, *heads], "pipe", disable_numparse=True), end="\n\n")
    for frame in (1, 39):
        rows = [[rule, *(score_davis(fit, given.data, features, frame))] for rule, fit in RULES.items()]
        print(tabulate(rows, [f"J %, frame {frame}", *SEQUENCES], "pipe", floatfmt=".1f"), end="\n\n")


def open_features(weights: str) -> PatchFeatures:
    keys = {"backbone.name": "vit_tiny_patch16_224", "backbone.mean": [0.5] * 3, "backbone.std": [0.5] * 3}
    model = dinoseg.create_model("timm", num_classes=2, weights=weights, **keys)
    return PatchFeatures(replicate_in_eval_mode(model.model), model.device, nullcontext)


def load_data(root: Path, features: PatchFeatures, draws: range) -> Iterator[tuple[str, list]]:
    """Yield each data set: its name, and references and targets of each draw."""
    rng = random.Random(0)
    unlabelled = np.append(np.arange(1, 12), np.full(245, IGNORED)).astype(np.uint8)  # CamVid has no background
    sides = {
        "person": [("person/train_images", "person/train_masks"), ("person/valid_images", "person/valid_masks")],
        "camvid": [("camvid/train/images", "camvid/train/masks"), ("camvid/val/images", "camvid/val/masks")],
        "surgery": [0, 1000],  # first seeds
    }
    tables = {"person": PERSON, "camvid": unlabelled, "surgery": np.arange(256, dtype=np.uint8)}
    for name, parts in sides.items():
        both = []
        for part, count in zip(parts, (SHOTS, TARGETS), strict=True):
            if isinstance(part, int):
                readers = [partial(render, part + number) for number in range(DRAWS * count)]
            else:
                paths = sorted((root / part[0]).iterdir())
                rng.shuffle(paths)
                readers = [partial(read, path, root / part[1] / f"{path.stem}.png") for path in paths]
            labels = {"person": 2, "camvid": 12, "surgery": 10}[name]
            make = partial(extract, features, table=tables[name], labels=labels, is_target=count == TARGETS)
            both.append([[make(*each()) for each in readers[d * count : (d + 1) * count]] for d in draws])
        yield name, list(zip(*both, strict=True))


def read(image: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
    ids = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    return cv2.imread(str(image))[..., ::-1], ids if ids.ndim == 2 else ids[..., 0]


def render(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return next(render_clip(seed, 1, (288, 512)))


def extract(
    features: PatchFeatures, image: np.ndarray, ids: np.ndarray, table: np.ndarray, labels: int, is_target: bool
) -> Sample:
    """Return an image of `SIDE` with the labels that the table gives its ids."""
    grid = tuple(max(1, round(side * SIDE / max(image.shape[:2]) / PATCH)) for side in image.shape[:2])
    seen = (PATCH * grid[0], PATCH * grid[1])
    method = cv2.INTER_AREA if seen[0] < image.shape[0] else cv2.INTER_LINEAR
    pixels = cv2.resize(np.ascontiguousarray(image), seen[::-1], interpolation=method)
    found = table[cv2.resize(ids, seen[::-1], interpolation=cv2.INTER_NEAREST)]
    raw, norms = features.extract_patches(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float() / 255)
    free = normalise(features.without_position(raw, seen)).reshape(-1, raw.shape[2])
    masks = np.stack([reduce_mask(found == number, seen, grid).ravel() for number in range(labels)])
    raw = raw.reshape(-1, raw.shape[2])
    return Sample(found, masks, raw, raw, free, norms.reshape(-1, 1), find_clusters(raw) if is_target else None, grid)


def score_draw(fit: Rule, references: Sequence[Sample], targets: Sequence[Sample], one_class: bool) -> np.ndarray:
    """Return the pixels (R, 3) of each label but the background that a reference shows: hits, found, true."""
    shown = [n for n in range(1, len(references[0].masks)) if any(each.masks[n].any() for each in references)]
    counts = np.zeros((len(references[0].masks), 3))
    episodes = [(references, targets, {n: n for n in shown})]
    if one_class:
        having = {n: [each for each in references if each.masks[n].any()] for n in shown}
        episodes = [
            ([turn_binary(x, n) for x in having[n]], [turn_binary(x, n) for x in targets], {n: 1}) for n in shown
        ]
    for shots, images, numbers in episodes:
        scorer = fit(shots)
        for image in images:
            found, true = (
                predict(scorer, image, fit in OF_CLUSTERS),
                image.labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE],
            )
            for place, label in numbers.items():
                a, b = (found == label) & (true != IGNORED), true == label
                counts[place] += (a & b).sum(), a.sum(), b.sum()
    return counts


def turn_binary(sample: Sample, number: int) -> Sample:
    """Return an image whose other labels are the background of one."""
    labels = np.where(sample.labels == IGNORED, IGNORED, sample.labels == number).astype(np.uint8)
    own = sample.masks[number]
    return replace(sample, labels=labels, masks=np.stack([np.delete(sample.masks, number, 0).any(0) & ~own, own]))


def predict(scorer: Scorer, image: Sample, of_clusters: bool) -> np.ndarray:
    """Return the labels (H, W) / STRIDE of an image; with scores of clusters, patches are labelled first."""
    scores, factor = scorer(image), PATCH // STRIDE
    shown = np.flatnonzero(np.isfinite(scores).all(1))
    maps = scores[shown].reshape(-1, *image.grid)
    if of_clusters:
        maps = np.arange(len(shown))[:, None, None] == maps.argmax(0)
    return shown[find_largest(maps, (factor * image.grid[0], factor * image.grid[1]))]


def mean_iou(counts: np.ndarray) -> float:
    hits, found, true = counts.sum(0).T
    return float((hits[true > 0] / (found + true - hits)[true > 0]).mean())


def estimate(counts: np.ndarray, others: np.ndarray, is_gap: bool) -> str:
    """Return the mIoU of counts (draws, R, 3) in % with its 95 % interval, or its distance to that of others."""
    draws = range(len(counts))
    score = (lambda a, b: mean_iou(a) - mean_iou(b)) if is_gap else (lambda a, _: mean_iou(a))
    left_out = np.array([score(np.delete(counts, d, 0), np.delete(others, d, 0)) for d in draws])
    found = Estimate(score(counts, others), jackknife_error(left_out), len(draws) - 1, share=not is_gap)
    sign = "+" if is_gap else ""
    low, high = found.ci95 or (np.nan, np.nan)
    return f"{100 * found.value:{sign}.1f} ({100 * low:{sign}.1f} .. {100 * high:{sign}.1f})"


def score_davis(fit: Rule, root: Path, features: PatchFeatures, frame: int) -> Iterator[float]:
    """Yield the IoU in % of a frame of each sequence by the mask of its first frame."""
    for name in SEQUENCES:
        folders = [root / f"davis2016/{kind}/480p/{name}" for kind in ("JPEGImages", "Annotations")]
        first, later = (
            extract(features, *read(folders[0] / f"{n:05}.jpg", folders[1] / f"{n:05}.png"), PERSON, 2, n == frame)
            for n in (0, frame)
        )
        yield 100 * mean_iou(score_draw(fit, [first], [later], False)[None])


def fit_threshold(shots: Sequence[Sample]) -> Scorer:
    """Similarity to the prototype of each label, above the threshold that is the best on the shots."""
    prototypes = find_prototypes(shots)
    offsets = np.full(len(prototypes), -np.inf)
    offsets[0] = 0
    features, masks = join(shots)
    for number in np.flatnonzero(masks.any(1)):
        if number:
            similarity = features @ prototypes[number]
            order = np.argsort(-similarity)
            hits = masks[number][order].cumsum()
            best = (hits / (np.arange(len(order)) + 1 + masks[number].sum() - hits)).argmax()
            offsets[number] = -similarity[order[best]] + 1e-12
    prototypes[0] = 0
    return lambda image: (image.features @ np.nan_to_num(prototypes).T + offsets).T


def fit_nearest(shots: Sequence[Sample]) -> Scorer:
    """Similarity to the prototype of each label."""
    prototypes = find_prototypes(shots)
    return lambda image: mark_unseen((image.features @ prototypes.T).T)


def fit_clusters(shots: Sequence[Sample]) -> Scorer:
    """The same, averaged over clusters of the target; as FoRIS, minus that of the background."""
    nearest = fit_nearest(shots)
    return lambda image: average_over_clusters(nearest(image), image.clusters)


def fit_centres(shots: Sequence[Sample]) -> Scorer:
    """Similarity to the nearest of five k-means centres of each label, times its mean over them, as FSSDINO."""
    features, masks = join(shots)
    centres = [find_centres(features[mask]) if mask.any() else None for mask in masks]

    def score(image: Sample) -> np.ndarray:
        found = [np.full((len(image.features), 1), np.nan) if c is None else image.features @ c.T for c in centres]
        return mark_unseen(np.stack([each.max(1) * each.mean(1) for each in found]))

    return score


def fit_neighbours(shots: Sequence[Sample], count: int = 5) -> Scorer:
    """Share of each label among the five most similar patches of the shots."""
    features, masks = join(shots)
    features, votes = features[masks.any(0)], masks[:, masks.any(0)]

    def score(image: Sample) -> np.ndarray:
        nearest = np.argpartition(-(image.features @ features.T), count, axis=1)[:, :count]
        return np.where(masks.any(1)[:, None], votes[:, nearest].mean(2), -np.inf)

    return score


def fit_most_similar(shots: Sequence[Sample], count: int = 3) -> Scorer:
    """Mean similarity to the three most similar patches of each label."""
    features, masks = join(shots)

    def score(image: Sample) -> np.ndarray:
        similarity = image.features @ features.T
        top = [np.sort(similarity[:, mask], axis=1)[:, -count:] if mask.any() else None for mask in masks]
        return np.stack([np.full(len(similarity), -np.inf) if t is None else t.mean(1) for t in top])

    return score


def fit_insid3(shots: Sequence[Sample]) -> Scorer:
    """mode.rule=insid3 mode.rank=0; above alpha, a patch has a label."""
    references = [ReferencePatches(shot.features, shot.masks[1:]) for shot in shots]

    def score(image: Sample) -> np.ndarray:
        means = [average_clusters(features, image.clusters) for features in (image.features, image.raw)]
        found = match(references, TargetPatches(image.features, image.clusters, *means))
        return np.concatenate([np.full((1, len(image.features)), ALPHA), found])

    return score


def fit_both(shots: Sequence[Sample]) -> Scorer:
    """The same for clusters that are nearer to the label's prototype than to that of the background."""
    insid3, clusters = fit_insid3(shots), fit_clusters(shots)

    def score(image: Sample) -> np.ndarray:
        nearness = clusters(image)
        return np.where(nearness >= nearness[:1], insid3(image), 0)

    return score


def fit_discriminant(shots: Sequence[Sample]) -> Scorer:
    """The default of mode=example."""
    fitted = Discriminant([ReferencePatches(shot.features, shot.masks) for shot in shots])

    def score(image: Sample) -> np.ndarray:
        scores = np.full((len(shots[0].masks), len(image.features)), -np.inf)
        scores[fitted.classes] = fitted(image.features)
        return scores

    return score


def fit_probe(shots: Sequence[Sample]) -> Scorer:
    """mode=probe of the last block: one of several shots chooses ridge and balance, as does a single one itself."""
    counts = sum(np.bincount(shot.labels[shot.labels != IGNORED], minlength=len(shot.masks)) for shot in shots)
    share = torch.from_numpy(counts / counts.sum())
    weightings = torch.stack([torch.where(share > 0, share**-balance, 0) for balance in Grid.balances])
    sums = Sums(shots[0].features.shape[1], weightings)

    def maps(sample: Sample) -> torch.Tensor:
        return torch.from_numpy((sample.raw * sample.norms).T.reshape(1, -1, *sample.grid))

    def add(sample: Sample) -> None:
        labels = torch.from_numpy(sample.labels)[None]
        sums.add(maps(sample), cell_labels(labels, weightings, IGNORED, sample.grid, (1.0, 1.0)))

    for shot in shots[1:] or shots:
        add(shot)
    candidates = Candidates([each for way in solve(sums, Grid.strengths) for each in way], IGNORED)
    candidates.add(maps(shots[0]).float(), torch.from_numpy(shots[0].labels)[None], (1.0, 1.0))
    way, index = divmod(candidates.best().number, len(Grid.strengths))
    if shots[1:]:
        add(shots[0])
    weight, bias = list(solve(sums, [Grid.strengths[index]]))[way][0]
    bias = np.where(counts > 0, bias.numpy(), -np.inf)
    return lambda image: ((image.raw * image.norms) @ weight.numpy().T + bias).T


def without_positions(fit: Rule) -> Rule:
    """Return a rule on features without positions (mode.rank=null); clusters keep theirs."""

    def change(sample: Sample) -> Sample:
        return replace(sample, features=sample.position_free)

    return lambda shots: (lambda scorer: lambda image: scorer(change(image)))(fit([change(shot) for shot in shots]))


def join(shots: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return all features (n, C) and masks (R, n)."""
    return np.concatenate([shot.features for shot in shots]), np.concatenate([shot.masks for shot in shots], axis=1)


def find_prototypes(shots: Sequence[Sample]) -> np.ndarray:
    """Return the prototype of each label (R, C), nan of a label that no shot shows."""
    found = np.full((len(shots[0].masks), shots[0].features.shape[1]), np.nan)
    for number, row in enumerate(found):
        having = [shot.features[shot.masks[number]] for shot in shots if shot.masks[number].any()]
        if having:
            row[:] = average_shots(having)
    return found


def find_centres(features: np.ndarray, count: int = 5) -> np.ndarray:
    """Return centres by spherical k-means, from the patch farthest from those before on."""
    centres = features[:1]
    while len(centres) < min(count, len(features)):
        centres = np.concatenate([centres, features[[(features @ centres.T).max(1).argmin()]]])
    for _ in range(20):
        nearest = (features @ centres.T).argmax(1)
        centres = np.stack(
            [normalise(features[nearest == n].sum(0)) if n in nearest else c for n, c in enumerate(centres)]
        )
    return centres


def mark_unseen(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scores), -np.inf, scores)


def average_over_clusters(scores: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return scores (R, N) averaged over the cluster of each patch."""
    areas, seen = np.bincount(clusters), np.isfinite(scores).all(1)
    means = [
        np.bincount(clusters, row) / areas if each else np.full(len(areas), -np.inf)
        for row, each in zip(scores, seen, strict=True)
    ]
    return np.stack(means)[:, clusters]


RULES: dict[str, Rule] = {
    "discriminant": fit_discriminant,
    "discriminant, rank=null": without_positions(fit_discriminant),
    "insid3": fit_insid3,
    "insid3, rank=null": without_positions(fit_insid3),
    "insid3, nearer than background": fit_both,
    "similarity above a threshold": fit_threshold,
    "nearest prototype": fit_nearest,
    "the same over clusters": fit_clusters,
    "5 centres of k-means": fit_centres,
    "5 nearest patches": fit_neighbours,
    "3 most similar patches": fit_most_similar,
    "mode=probe": fit_probe,
}
OF_CLUSTERS = {RULES["insid3"], RULES["insid3, rank=null"], fit_both, fit_clusters}

if __name__ == "__main__":
    main()
