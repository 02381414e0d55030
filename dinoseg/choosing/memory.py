"""What of a recipe has to change, so that its steps fit the memory that is free."""

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from dinoseg.choosing.rules import Choice
from dinoseg.costs.fitting import Fitting
from dinoseg.costs.target import KINDS, Target
from dinoseg.inference.memory import OutOfMemory, free_bytes
from dinoseg.training.engine import Engine


@dataclass(frozen=True)
class Memory:
    """The memory of a device, and what may be changed for it.

    Attributes:
        engine: of one device.
        given: keys and groups that were typed, which do not change.
        ranks: that take of the same memory, as those of a CPU do.
    """

    engine: Engine
    given: frozenset[str]
    ranks: int = 1

    def changes(self, cfg: DictConfig) -> list[Choice]:
        """Return what has to change so that a step fits, as mode=plan would say.

        Raises:
            OutOfMemory: nothing suffices.
        """
        fitting, free = self._need(cfg)
        if fitting is None or fitting.as_it_is.need <= free:
            return []
        found = fitting.found()
        if found is None:
            raise OutOfMemory(
                f"A training step takes about {fitting.least.need / 2**30:.1f} GiB at least, and "
                f"{free / 2**30:.1f} GiB are free. Give a smaller resolution.crop, backbone or adapter."
            )
        changes = [change for change in found.changes if self.given.isdisjoint(change.words)]
        return [Choice(change.words, f"to fit {free / 2**30:.1f} GiB: {change.reason}") for change in changes]

    def fits(self, cfg: DictConfig) -> bool:
        """Return whether a step fits as it is, as far as that is known."""
        fitting, free = self._need(cfg)
        return fitting is None or fitting.as_it_is.need <= free

    def _need(self, cfg: DictConfig) -> tuple[Fitting | None, float]:
        """Return what a step needs, and the bytes that are free; None where that is not known."""
        kind, free = self.engine.device.type, free_bytes(self.engine.device) / self.ranks
        if kind not in KINDS or math.isinf(free) or cfg.engine.sharding != "none":
            return None, free
        target = Target(kind, round(free), bf16=self.engine.half, world=cfg.engine.devices)
        return Fitting(cfg, target, may_change_model="adapter" not in self.given), free
