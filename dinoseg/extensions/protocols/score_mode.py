"""mode=score: official benchmark scores of prediction folders; needs no model and no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dinoseg.config.nodes import argument_keys
from dinoseg.extensions.protocols.contract import Cases, ScoreProtocol
from dinoseg.extensions.protocols.davis_layout import tracked_sequence
from dinoseg.extensions.protocols.folders import ScoringResult, Unscorable, score_cases
from dinoseg.extensions.protocols.report import result_of, write_problems
from dinoseg.extensions.protocols.score_classes import find_score_groups, score_protocol, warn_of_unread_data
from dinoseg.extensions.protocols.summary import difference
from dinoseg.inference.class_record import CLASS_RECORD, MASK_FOLDER
from dinoseg.report.table import difference_table, scores_table
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.ranges import Count, OnError

DEFAULT_PROTOCOL = "semantic"


def run(
    cfg: DictConfig,
    *,
    out_dir: Path,
    reference: str | None,
    prediction: str | Sequence[str] | None,
    workers: Count | None = None,
    on_error: OnError = "stop",
) -> dict[str, Any]:
    """Score one or two folders of predictions, with the paired difference of two; print tables and write `scores.json`.

    Args:
        cfg: the whole config; `protocol` is read, and `data` if it defines the classes.
        out_dir: the run folder.
        reference: folder of references, laid out as the protocol's official tool expects.
        prediction: folder of predictions, such as a run folder of mode=predict or mode=track, or two of them.
        workers: processes, null for one per core.
        on_error: `stop` if files cannot be scored, or `skip` them.

    Raises:
        UserError: an option is invalid, a folder is missing, or files cannot be scored; `problems.json` in the run
            folder lists all of them.
    """
    folders = _folders(reference, prediction)
    chosen = (cfg.get("choices") or {}).get("protocol")
    if chosen == DEFAULT_PROTOCOL and all(folder.suffix == ".json" for folder in folders):
        raise UserError(
            f"protocol={DEFAULT_PROTOCOL} reads folders of masks, and {folders[0]} is a JSON file. For files of "
            "objects choose protocol=coco_instances or protocol=coco_panoptic."
        )
    protocol = score_protocol(cfg, folders[1:], out_dir)
    warn_of_unread_data(out_dir, reads_classes=cfg.protocol.get("classes", ()) is None)
    find_groups = find_score_groups(cfg.data.get("group"), protocol, folders[1:], out_dir)
    with name_parameters(argument_keys(cfg.protocol)):
        scored = _score_all(protocol, folders[0], folders[1:], out_dir, find_groups, workers=workers, on_error=on_error)
    results = [
        {
            "reference": str(folders[0]),
            "prediction": str(folder),
            **result_of(protocol, one, out_dir / "scores.json"),
        }
        for folder, one in zip(folders[1:], scored, strict=True)
    ]
    for one in results:
        print(f"\n{one['prediction']}\n{scores_table(one)}")
    written = results[0]
    if len(results) == 2:
        gap = difference(protocol, *scored)
        written = {**results[0], "second": results[1], "difference": gap}
        print(f"\n{difference_table(gap, written['unit'], written['scored_unit'])}")
    write_json(out_dir / "scores.json", written)
    print(f"\nscores:       {out_dir}/scores.json")
    return {**written["scores"], "run": str(out_dir)}


def _score_all(
    protocol: ScoreProtocol,
    reference: Path,
    predictions: Sequence[Path],
    out_dir: Path,
    find_groups: Callable[[Cases], dict[str, str]],
    *,
    workers: int | None,
    on_error: OnError,
) -> list[ScoringResult]:
    """Score each folder; errors of all folders are raised together, after all were tried."""
    scored, problems, messages = [], {}, []
    for folder in predictions:
        try:
            listing = protocol.find(reference, folder)
            if folder.resolve() == reference.resolve():
                listing.notes.insert(0, f"prediction={folder} is the reference itself: its scores are meaningless.")
            where = f"reference={reference} and prediction={folder}"
            groups = find_groups(listing)
            scored.append(
                score_cases(protocol, listing, where=where, groups=groups, workers=workers, on_error=on_error)
            )
        except Unscorable as error:
            problems[folder] = error.problems
            messages.append(str(error))
        except UserError as error:
            messages.append(str(error))
    if problems:
        write_problems(out_dir, problems)
    if messages:
        raise UserError("\n".join(dict.fromkeys(messages)))
    return scored


def _folders(reference: str | None, prediction: str | Sequence[str] | None) -> list[Path]:
    """Return the reference folder and one or two prediction folders."""
    predictions = [prediction] if isinstance(prediction, str) else list(prediction or ())
    if reference is None or not 1 <= len(predictions) <= 2:
        raise UserError(
            "mode=score needs two folders of masks: set reference=DIR and prediction=DIR, or prediction=[DIR,DIR] to "
            "compare two predictions."
        )
    folders = [Path(name).expanduser() for name in (reference, *predictions)]
    for key, folder in zip(("reference", "prediction", "prediction"), folders, strict=False):
        is_json = folder.suffix == ".json"  # of COCO's protocols, which name a missing file; others refuse it
        if not (folder.is_dir() or is_json):
            raise UserError(f"{key}={folder} is not a folder. Give the folder that holds the {key}s.")
    return [folders[0], *map(_find_masks, folders[1:])]


def _find_masks(folder: Path) -> Path:
    """Return the folder of the masks in a run folder of mode=predict or mode=track; else the folder itself."""
    masks = folder / MASK_FOLDER
    return masks if (masks / CLASS_RECORD).is_file() or tracked_sequence(masks) is not None else folder
