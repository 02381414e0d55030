"""Server metrics in Prometheus' text format 0.0.4."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from dinoseg.utils.wording import count_of

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """Cumulative histogram: the number of values at or below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Add one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the histogram's lines of text."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters and histograms of a server; each method may be called from any thread.

    Args:
        waiting: returns the number of items that wait for the model.
        in_hand: returns the number of requests in progress.
    """

    def __init__(self, waiting: Callable[[], int], in_hand: Callable[[], int]) -> None:
        self._lock = threading.Lock()
        self._gauges = {
            "dinoseg_queue_length": ("Images and clips waiting for the model.", waiting),
            "dinoseg_requests_in_hand": ("Accepted requests without response.", in_hand),
        }
        self._requests: Counter[int] = Counter()
        self._errors: Counter[str] = Counter()
        self._latency, self._batches, self._model = Histogram(_SECONDS), Histogram(_IMAGES), Histogram(_SECONDS)

    def answered(self, status: int, seconds: float) -> None:
        """Count a mask request by its response's status, and the seconds that it took."""
        with self._lock:
            self._requests[status] += 1
            self._latency.add(seconds)

    def refused(self, rule: str) -> None:
        """Count a request without a mask, by the rule that it broke."""
        with self._lock:
            self._errors[rule] += 1

    def batch(self, count: int, seconds: float) -> None:
        """Count a batch by its number of images, and the seconds that the model took."""
        with self._lock:
            self._batches.add(count)
            self._model.add(seconds)

    def text(self) -> str:
        """Return all metrics as text."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def summary(self) -> str:
        """Return the number of requests and of each response status, in words."""
        answers = ", ".join(f"{count} x {status}" for status, count in sorted(self._requests.items()))
        return count_of(self._requests.total(), "request") + (f" ({answers})" if answers else "")

    def _lines(self) -> Iterator[str]:
        yield from _head("dinoseg_requests_total", "counter", "Requests for a mask, by response status.")
        yield from (f'dinoseg_requests_total{{code="{code}"}} {n}' for code, n in sorted(self._requests.items()))
        yield from _head("dinoseg_errors_total", "counter", "Refused requests, by violated rule.")
        yield from (f'dinoseg_errors_total{{rule="{rule}"}} {n}' for rule, n in sorted(self._errors.items()))
        for name, (what, value) in self._gauges.items():
            yield from _head(name, "gauge", what)
            yield f"{name} {value()}"
        for name, what, histogram in (
            ("dinoseg_request_seconds", "Time from the first byte of a request to its response.", self._latency),
            ("dinoseg_batch_images", "Batch size of the model.", self._batches),
            ("dinoseg_model_seconds", "Time of the model per batch.", self._model),
        ):
            yield from _head(name, "histogram", what)
            yield from histogram.lines(name)


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
