"""Pairing of images and masks by name; incomplete pairs are recorded with a reason, to be rejected or skipped later."""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, list_reasons

_FEW = 3  # reasons listed where no pair is complete, since all will be alike


@dataclass(frozen=True)
class IncompletePair:
    """Incomplete pair, or all incomplete pairs of a video.

    Args:
        name: name of the pair, or of the video's first. It takes part in the split like a complete pair, so that the
            splits do not change when it is fixed.
        reason: the fault, including the file.
        remedy: how to fix it.
        title: name in messages; "": `name`.
    """

    name: str
    reason: str
    remedy: str
    title: str = ""

    @property
    def origin(self) -> str:
        """Return the reason, which includes the file."""
        return self.reason


def pair_by_name(
    images: Mapping[str, Path], masks: Mapping[str, Path], folders: tuple[Path, Path], remedy: str
) -> dict[str, Pair | IncompletePair]:
    """Return the pairs, and the images and masks without counterpart, by name.

    Args:
        images: name to file.
        masks: name to file.
        folders: folders of the images and of the masks.
        remedy: how to fix images or masks without counterpart.
    """
    by_name: dict[str, Pair | IncompletePair] = {
        name: Pair(name, images[name], masks[name]) for name in images.keys() & masks
    }
    if images.keys() != masks.keys():
        reasons = {
            **_explain_lacking(images, masks, "mask", folders[1]),
            **_explain_lacking(masks, images, "image", folders[0]),
        }
        by_name |= {name: IncompletePair(name, reason, remedy) for name, reason in reasons.items()}
    return by_name


def _explain_lacking(files: Mapping[str, Path], others: Mapping[str, Path], kind: str, folder: Path) -> dict[str, str]:
    """Return the reason of each name of files without counterpart; `kind` and `folder` are those of the others."""
    twins = {_normalise_name(name): path for name, path in others.items() if name not in files}
    reasons = {}
    for name in files.keys() - others.keys():
        reasons[name] = f"{files[name]} has no {kind} in {folder}."
        if twin := twins.get(_normalise_name(name)):
            reasons[name] += f" {twin} only looks the same: one has accents as separate characters (Unicode "
            reasons[name] += "NFD, as macOS writes them), the other does not (NFC). Rename one."
    return reasons


def collect_pairs(
    candidates: Iterable[Pair | IncompletePair], split: str, labels: Labels, masks: Masks, *, has_layers: bool = False
) -> PairDataset:
    """Return the dataset of the complete pairs; it records the incomplete ones.

    Raises:
        UserError: no pair is complete.
    """
    whole: list[Pair] = []
    lacking: dict[str, str] = {}
    remedies: dict[str, None] = {}  # ordered set
    for candidate in candidates:
        if isinstance(candidate, Pair):
            whole.append(candidate)
        else:
            lacking[candidate.title or candidate.name] = candidate.reason
            remedies[candidate.remedy] = None
    dataset = PairDataset(whole, labels, masks, lacking, "\n".join(remedies), has_layers=has_layers)
    if not whole:
        raise incomplete_pairs_error(dataset, split)
    return dataset


def incomplete_pairs_error(dataset: PairDataset, split: str) -> UserError:
    """Return the error that lists the incomplete pairs."""
    lacking = dataset.lacking
    if not len(dataset):
        return UserError(f"Split {split} has no image with its mask:{list_reasons(lacking, _FEW)}\n{dataset.remedy}")
    return UserError(
        f"Split {split} has {count_of(dataset.pairs, 'image')} with a mask, and {len(lacking)} incomplete "
        f"pairs:{list_reasons(lacking)}\n{dataset.remedy}\nTo leave them out: on_error=skip."
    )


def _normalise_name(name: str) -> str:
    return unicodedata.normalize("NFC", name)
