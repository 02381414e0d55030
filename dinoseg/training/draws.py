"""Random draws of models that take turns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Draws:
    """The random draws of one of several models that take turns: each draws as if it were alone."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._now()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Draw in here from where this model stood."""
        torch.set_rng_state(self._state[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._state[1], self._cuda)
        yield
        self._state = self._now()

    def _now(self) -> list[Tensor]:
        on_device = [] if self._cuda is None else [torch.cuda.get_rng_state(self._cuda)]
        return [torch.get_rng_state(), *on_device]
