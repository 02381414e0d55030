"""What a step came to, on its way from the device to the host."""

import torch
from torch import Tensor


class Outcome:
    """The loss of a step, the norm of its gradient, and how many ranks are asked to stop: () each, to be read later.

    From CUDA they are copied while the next step is prepared, so that who reads them then waits for nothing.
    """

    def __init__(self, loss: Tensor, norm: Tensor, asked: Tensor) -> None:
        self.norm = norm
        self._copied: torch.cuda.Event | None = None
        values = self._host = torch.stack([loss, norm, asked.to(norm.device).to(norm.dtype)])
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Return them, once the device has come to the end of their step."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
