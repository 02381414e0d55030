"""Random draws of models that take turns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Draws:
    """The random draws of one of several models that take turns: each draws as if it were alone."""

    def __init__(self, device: torch.device) -> None:
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        self._state = self._now()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Draw in here from where this model stood."""
        torch.set_rng_state(self._state[0])
        if self._accelerator is not None:
            self._accelerator.set_rng_state(self._state[1])
        yield
        self._state = self._now()

    def _now(self) -> list[Tensor]:
        on_device = [] if self._accelerator is None else [self._accelerator.get_rng_state()]
        return [torch.get_rng_state(), *on_device]
