"""Changes to a recipe that make its steps fit into the free memory."""

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
    """The memory of a device, and the parts of the config that may change to fit it.

    Attributes:
        engine: of one device.
        given: keys and groups typed on the command line, which do not change.
        backbone: on the meta device; which of its parameters are trained does not matter.
        ranks: that share the memory, as ranks on a CPU do.
    """

    engine: Engine
    given: frozenset[str]
    backbone: Backbone
    ranks: int = 1

    def changes(self, cfg: DictConfig) -> list[Choice]:
        """Return the changes with which a step fits, as mode=plan reports them.

        Raises:
            OutOfMemory: no change suffices.
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
        """Return whether a step fits without changes; True if the need is unknown."""
        if self._is_ample(cfg):
            return True
        fitting, free = self._need(cfg)
        return fitting is None or fitting.as_it_is.need <= free

    def _is_ample(self, cfg: DictConfig) -> bool:
        """Return whether even a generous bound fits, since an exact estimate takes half a minute of CPU time.

        The bound counts float32 values: 50 per token and channel plus an attention map in each block, 4 per weight, and
        4 x (64 + classes) per pixel.
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
        """Return the memory of a step and the free bytes; None instead of the former if it cannot be estimated."""
        kind, free = self.engine.device.type, free_bytes(self.engine.device) / self.ranks
        if kind not in KINDS or math.isinf(free) or cfg.engine.sharding != "none":
            return None, free
        target = Target(kind, round(free), bf16=self.engine.half, world=cfg.engine.devices)
        return Fitting(cfg, target, may_change_model="adapter" not in self.given), free
