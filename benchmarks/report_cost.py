"""What report.html costs: the same evaluation with and without it, in turns, in one process.

    python benchmarks/report_cost.py resume=RUN mode.official=false [KEY=VALUE ...]

Prints the median seconds of each and their ratio; the model is read anew each time, as by the command. Seconds are
those of this process, which others on the machine do not lengthen: give engine.workers=0.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra

from dinoseg import __main__

TURNS = 3


def seconds(words: list[str], folder: Path) -> float:
    """Return the processor's seconds that a command takes."""
    started = time.process_time()
    with patch.object(sys, "argv", ["dinoseg", "mode=eval", *words, f"hydra.run.dir={folder}"]):
        try:
            __main__.main()
        except SystemExit as end:
            if end.code:
                raise
        finally:
            GlobalHydra.instance().clear()
    return time.process_time() - started


def main() -> None:
    """Print the table."""
    asked = {"without": "mode.report=false", "with report": "mode.report=true"}
    for pictures in ("mode.metrics_only=true", "mode.metrics_only=false"):
        times: dict[str, list[float]] = {name: [] for name in asked}
        with tempfile.TemporaryDirectory() as folder:
            seconds([*sys.argv[1:], pictures], Path(folder) / "warm")
            for turn in range(TURNS):
                for name, word in asked.items():
                    times[name].append(
                        seconds([*sys.argv[1:], pictures, word], Path(folder) / f"{name.replace(' ', '_')}_{turn}")
                    )
        medians = {name: statistics.median(values) for name, values in times.items()}
        told = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
        print(f"{pictures}: {told}, ratio {medians['with report'] / medians['without']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
