"""Progress display for any output: a bar on a terminal; in a pipe or a file, one line every few seconds."""

import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

from dinoseg.utils.wording import printable

T = TypeVar("T")
_EVERY = 5.0  # seconds between two lines
IN_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)  # in Jupyter with ipywidgets


def has_bar() -> bool:
    """Return whether progress is shown as a bar: on a terminal, or as a widget of a notebook."""
    return IN_NOTEBOOK or sys.stderr.isatty()


def measure_waits(
    items: Iterable[T], tell: Callable[[float], None], clock: Callable[[], float] = time.perf_counter
) -> Generator[T, None, None]:
    """Yield from `items`, and pass the waiting time for each item, in seconds, to the callback."""
    iterator = iter(items)
    while True:
        start = clock()
        try:
            item = next(iterator)
        except StopIteration:
            return
        tell(clock() - start)
        yield item


class Bar(tqdm):
    """tqdm's bar, with the same arguments; without `has_bar` it prints a line every few seconds instead."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.as_lines = not has_bar()
        if self.as_lines:
            options |= {"mininterval": _EVERY, "miniters": 1}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None, **options: Any) -> None:
        """Draw the bar, or print the line."""
        if IN_NOTEBOOK:
            super().display(msg, pos, **options)
        elif not self.as_lines:
            super().display(printable(str(self)) if msg is None else msg, pos)
        elif self.n > self.initial:
            print(printable(self._line()), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar; lines need no closing."""
        if self.as_lines:
            self.disable = True
        else:
            super().close()

    def _line(self) -> str:
        state = self.format_dict
        done, total, elapsed = state["n"], state["total"], max(state["elapsed"], 1e-9)
        rate = (done - state["initial"]) / elapsed
        parts = [f"{state['prefix'].removesuffix(': ')}: " if state["prefix"] else "", f"{done:,}"]
        parts += [f" of {total:,}" if total else "", f" {state['unit']}s, {rate:,.1f} {state['unit']}s/s"]
        parts += [f", {tqdm.format_interval((total - done) / rate)} left" if total else ""]
        return "".join(parts) + (f", {state['postfix']}" if state["postfix"] else "")
