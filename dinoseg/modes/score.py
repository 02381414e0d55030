"""mode=score: score folders of predictions by a benchmark's official protocol; needs no model and no torch."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoseg import scoring
from dinoseg.errors import UserError
from dinoseg.metrics.protocols.contract import ScoreProtocol
from dinoseg.nodes import instantiate
from dinoseg.report.scores import difference_table, scores_table
from dinoseg.report.table import write_json

logger = logging.getLogger(__name__)


def run(
    cfg: Any,
    *,
    out_dir: Path,
    reference: str | None,
    prediction: str | Sequence[str] | None,
    workers: int | None = None,
    on_error: str = "stop",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score one folder of predictions, or two and their paired difference; print tables and write `scores.json`.

    Args:
        cfg: the whole config, of which `protocol` is read.
        out_dir: the run folder.
        reference: folder of references, laid out as the protocol's official tool expects.
        prediction: folder of predictions, or two of them.
        workers: processes, null for one per core.
        on_error: `stop` where files cannot be scored, or `skip` them.
        resamples: draws for the intervals; 0 for none.
        seed: of these draws.

    Raises:
        UserError: a folder is missing, or files cannot be scored; `problems.json` in the run folder names all.
    """
    folders = _folders(reference, prediction)
    protocol: ScoreProtocol = instantiate(cfg.protocol)
    scored = [_score(protocol, folders[0], folder, out_dir, workers, on_error) for folder in folders[1:]]
    results = [
        {"reference": str(folders[0]), "prediction": str(folder), **_result(protocol, one, resamples, seed)}
        for folder, one in zip(folders[1:], scored, strict=True)
    ]
    for one in results:
        print(f"\n{one['prediction']}\n{scores_table(one)}")
    written = results[0]
    if len(results) == 2:
        gap = scoring.difference(protocol, *scored, resamples=resamples, seed=seed)
        written = {**results[0], "second": results[1], "difference": gap}
        print(f"\n{difference_table(gap, protocol.unit)}")
    write_json(out_dir / "scores.json", written)
    print(f"\nscores:       {out_dir}/scores.json")
    return {**written["scores"], "run": str(out_dir)}


def report(protocol: ScoreProtocol, scored: scoring.Scored, path: Path) -> dict[str, Any]:
    """Print and write the scores of predictions that a mode has just made; return them."""
    result = _result(protocol, scored, resamples=1000, seed=0)
    write_json(path, result)
    print(f"\n{scores_table(result)}")
    return result


def _result(protocol: ScoreProtocol, scored: scoring.Scored, resamples: int, seed: int) -> dict[str, Any]:
    for note in scored.notes[:10]:
        logger.warning("%s", note)
    if scored.problems:
        logger.warning("%d files could not be scored and are left out: see problems.", len(scored.problems))
    return scoring.result(protocol, scored, resamples=resamples, seed=seed)


def _score(
    protocol: ScoreProtocol, reference: Path, prediction: Path, out_dir: Path, workers: int | None, on_error: str
) -> scoring.Scored:
    try:
        found = protocol.find(reference, prediction)
        return scoring.score(protocol, found, where=f"prediction={prediction}", workers=workers, on_error=on_error)
    except scoring.Unscorable as error:
        rows = [{"file": str(path), "reason": reason} for path, reason in error.problems]
        write_json(out_dir / "problems.json", {"prediction": str(prediction), "problems": rows})
        raise


def _folders(reference: str | None, prediction: str | Sequence[str] | None) -> list[Path]:
    """Return the reference folder and one or two prediction folders."""
    given = [prediction] if isinstance(prediction, str) else list(prediction or ())
    if reference is None or not 1 <= len(given) <= 2:
        raise UserError(
            f"mode=score with reference={reference} prediction={prediction}: give reference=DIR and prediction=DIR, or "
            "prediction=[DIR,DIR] for the difference of two."
        )
    folders = [Path(each).expanduser() for each in (reference, *given)]
    for key, folder in zip(("reference", "prediction", "prediction"), folders, strict=False):
        if not folder.is_dir():
            raise UserError(f"{key}={folder} is no folder. Give the folder that holds the {key}s.")
    return folders
