"""The table at the end of a sweep."""

import csv
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tabulate import tabulate

COLUMNS = {  # of a table row, with how they are written
    "miou": ".4f",
    "miou_no_background": ".4f",
    "accuracy": ".4f",
    "J&F-Mean": ".4f",
    "FG-ARI": ".4f",
    "mBO": ".4f",
    "loss": ".4f",
    "parameters": ",",
    "trainable": ",",
    "images_per_s": ".1f",
    "memory_gib": ".2f",
}


RANKED = ("miou", "J&F-Mean", "FG-ARI")  # the first that any job has decides the order; else the lowest loss


class SweepTable(Callback):
    """Collects what each job of a multirun returned; prints a table and writes sweep.csv beside the jobs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Keep a finished job's overrides and scores."""
        scores = job_return._return_value if isinstance(job_return._return_value, dict) else {}
        words = [item.removeprefix("++") for item in job_return.overrides or []]  # of a checkpoint's own keys
        overrides = [word for word in words if not word.startswith("mode=")]
        row: dict[str, Any] = {"job": len(self.rows), "overrides": " ".join(overrides)}
        row |= {name: scores.get(name) for name in COLUMNS}
        self.rows.append(row | {"run": scores.get("run"), "note": scores.get("error", "")})

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table, best first."""
        held = [key for key in COLUMNS if any(row[key] is not None for row in self.rows)]
        score, sign = next(((key, -1) for key in RANKED if key in held), ("loss", 1))
        if score not in held and not any(row["note"] for row in self.rows):
            return
        rows = sorted(self.rows, key=lambda row: (row[score] is None, sign * (row[score] or 0)))
        keys = ["job", "overrides", *held, "note"]
        shown = [{key: _written(key, row[key]) for key in keys} for row in rows]
        widths = [None, 60, *[None] * len(held), 60]
        aligned = ("right", "left", *["right"] * len(held), "left")
        print("\n" + tabulate(shown, headers="keys", maxcolwidths=widths, disable_numparse=True, colalign=aligned))
        folder = Path(config.hydra.sweep.dir)
        with open(folder / "sweep.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\nwritten to {folder / 'sweep.csv'}")


def _written(key: str, value: Any) -> str:
    if value is None:
        return ""
    return format(value, COLUMNS[key]) if key in COLUMNS else str(value)
