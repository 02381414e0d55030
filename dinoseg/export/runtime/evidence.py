"""Scores and data fingerprint of a run, collected for its exported files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.training.checkpoint import FOLDER
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import shown
from dinoseg.utils.yaml_text import read_yaml

COUNTED = "every pixel of the split counted once, ignored pixels excluded"
_MEASURES = ("miou", "dice", "accuracy", "mean_accuracy")
_SHARE = forms.maybe(forms.number(0, 1))
_FOUND = forms.table(forms.plain)
_SCORES = forms.holding(miou=_SHARE, pixels=forms.whole(), classes=forms.listing(forms.holding(iou=_SHARE)))
_OFFICIAL = forms.holding(protocol=forms.text, scores=forms.table(forms.plain), ci95=forms.table(forms.plain))
_EVALUATED = forms.holding(resume=forms.text, mode=forms.holding(split=forms.text))  # config of a mode=eval run
_LARGEST = 2**17  # bytes of a config file; dinoseg's have a twentieth
_SPLIT = forms.table(forms.listing(forms.text))


def scores_of(path: Path, classes: Sequence[str], evaluation: str | None) -> dict[str, Any] | None:
    """Return scores with their protocol, from an evaluation folder or the end of training; None where there are none.

    Args:
        path: the checkpoint.
        classes: a name for each id.
        evaluation: folder of a mode=eval run; None: the evaluation at the end of the training.

    Raises:
        UserError: if the folder holds no scores, or those of another checkpoint.
    """
    if evaluation is None:
        folder, split = path.parent.parent / "evaluation", "val"
        has_scores = path.parent.name == FOLDER and path.stem == "best" and (folder / "scores.json").is_file()
        # an evaluation older than the checkpoint scored an earlier best
        if not has_scores or (folder / "scores.json").stat().st_mtime < path.stat().st_mtime:
            return None
    else:
        folder = Path(evaluation).expanduser()
        split = _split_of(folder, path)
    where = f"export.scores={folder}"
    scores = _read(folder / "scores.json", _SCORES, where)
    found = {
        "split": split,
        "protocol": COUNTED,
        "pixels": scores["pixels"],
        "values": {key: scores.get(key) for key in _MEASURES},
        "ci95": scores.get("ci95"),
        "per_class": {name: row["iou"] for name, row in zip(classes, scores["classes"], strict=False)},
    }
    if (folder / "official_scores.json").is_file():
        official = _read(folder / "official_scores.json", _OFFICIAL, where)
        found["official"] = {
            key: official.get(key) for key in ("protocol", "scores", "ci95", "n", "unit", "rules", "interval")
        }
    try:
        _FOUND(found, "it")
    except forms.Misshapen as error:
        raise UserError(f"{where}: its scores are invalid ({error}). Run mode=eval again.") from None
    return found


def data_of(path: Path, name: str) -> dict[str, Any]:
    """Return a fingerprint of a run's training data: counts and hashes of the file names, without the names.

    Args:
        path: the checkpoint.
        name: of the data set's config.
    """
    found: dict[str, Any] = {"name": name}
    try:
        split = forms.read_json(path.parent.parent / "split.json", _SPLIT)
    except (OSError, forms.Misshapen, UserError):
        return found
    for side, names in split.items():
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        found[side] = {"count": len(names), "names_sha256": digest}
    return found


def _split_of(folder: Path, path: Path) -> str:
    """Return the split on which a mode=eval run scored this checkpoint."""
    try:
        config = read_yaml(folder / "config" / "config.yaml", _LARGEST)
        _EVALUATED(config, "it")
        resumed, same = config["resume"], Path(config["resume"]).resolve() == path.resolve()
    except (OSError, ValueError, UserError) as error:  # a name may be no valid path
        raise UserError(f"export.scores={folder} is not a run folder of mode=eval ({error}). Give one.") from None
    if not same:
        raise UserError(
            f"export.scores={folder}: those scores belong to {shown(resumed, 500)}, not to {path}. Evaluate this "
            "checkpoint."
        )
    return config["mode"]["split"]


def _read(path: Path, form: forms.Form, where: str) -> Mapping[str, Any]:
    try:
        return forms.read_json(path, form)
    except (OSError, forms.Misshapen) as error:
        raise UserError(f"{where}: {path.name} is invalid ({error}). Run mode=eval again.") from None
