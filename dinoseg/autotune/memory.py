"""What of a recipe has to change, so that its steps fit the memory that is free."""

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from dinoseg.autotune.fitting import Fitting
from dinoseg.autotune.rules import Choice
from dinoseg.autotune.target import KINDS, Target
from dinoseg.core.contracts import Backbone
from dinoseg.inference.memory import OutOfMemory, free_bytes
from dinoseg.training.engine import Engine

_AMPLE = 0.5  # share of the free memory


@dataclass(frozen=True)
class Memory:
    """The memory of a device, and what may be changed for it.

    Attributes:
        engine: of one device.
        given: keys and groups that were typed, which do not change.
        backbone: without numbers, whatever is trained of it.
        ranks: that take of the same memory, as those of a CPU do.
    """

    engine: Engine
    given: frozenset[str]
    backbone: Backbone
    ranks: int = 1

    def changes(self, cfg: DictConfig) -> list[Choice]:
        """Return what has to change so that a step fits, as mode=plan would say.

        Raises:
            OutOfMemory: nothing suffices.
        """
        if self._is_ample(cfg):
            return []
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
        if self._is_ample(cfg):
            return True
        fitting, free = self._need(cfg)
        return fitting is None or fitting.as_it_is.need <= free

    def _is_ample(self, cfg: DictConfig) -> bool:
        """Return whether even a generous bound fits: an exact estimate takes half a minute of a busy processor.

        The bound has 50 values of each token and an attention map in each block, 4 values of 64 channels and of each
        class at each pixel, and 4 of each weight.
        """
        backbone = self.backbone
        if not isinstance(backbone.dim, int):
            return False
        pixels, scale = math.prod(cfg.resolution.crop), cfg.resolution.scale
        tokens = pixels * (scale / backbone.patch_size) ** 2
        blocks = backbone.depth * tokens * (50 * backbone.dim + max(1, backbone.dim / 64) * tokens)
        weights = sum(parameter.numel() for parameter in backbone.parameters())
        samples = math.ceil(cfg.data.batch_size / self.ranks)
        values = 4 * weights + samples * (blocks + 4 * pixels * (64 + cfg.data.num_classes))
        return 4 * values < _AMPLE * free_bytes(self.engine.device) / self.ranks  # bytes of float32

    def _need(self, cfg: DictConfig) -> tuple[Fitting | None, float]:
        """Return what a step needs, and the bytes that are free; None where that is not known."""
        kind, free = self.engine.device.type, free_bytes(self.engine.device) / self.ranks
        if kind not in KINDS or math.isinf(free) or cfg.engine.sharding != "none":
            return None, free
        target = Target(kind, round(free), bf16=self.engine.half, world=cfg.engine.devices)
        return Fitting(cfg, target, may_change_model="adapter" not in self.given), free
