"""Changes to a recipe that make its steps fit into the free memory."""

import math
from dataclasses import dataclass

from dinoseg.autotune.fitting import FitSearch, Recipe
from dinoseg.autotune.rules import RecipeChoice
from dinoseg.autotune.target import KINDS, Target
from dinoseg.core.contracts import Backbone
from dinoseg.inference.memory import OutOfMemory, free_bytes
from dinoseg.training.engine import Engine
from dinoseg.training.parts import TrainingParts

_AMPLE = 0.5  # share of the free memory


@dataclass(frozen=True)
class Memory:
    """The memory of a device, and what may change in a recipe to fit it.

    Attributes:
        engine: of one device.
        given: keys and groups typed on the command line, which do not change.
        backbone: on the meta device; which of its parameters are trained does not matter.
        ranks: that share the memory, as ranks on a CPU do.
        devices: that share a batch.
    """

    engine: Engine
    given: frozenset[str]
    backbone: Backbone
    ranks: int = 1
    devices: int = 1

    def changes(self, recipe: Recipe) -> list[RecipeChoice]:
        """Return the changes with which a step fits, as mode=plan reports them.

        Raises:
            OutOfMemory: no change suffices.
        """
        if self._is_ample(recipe({})):
            return []
        search, free = self._search(recipe)
        if search is None or search.as_it_is.need <= free:
            return []
        found = search.found()
        if found is None:
            raise OutOfMemory(
                f"A training step needs at least {search.smallest.need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
                "are free. Choose a smaller resolution.crop, backbone or adapter."
            )
        changes = [change for change in found.changes if self.given.isdisjoint(change.words)]
        return [RecipeChoice(change.words, f"to fit {free / 2**30:.1f} GiB: {change.reason}") for change in changes]

    def suffices(self, recipe: Recipe) -> bool:
        """Return whether a step fits without changes; True if the need is unknown."""
        if self._is_ample(recipe({})):
            return True
        search, free = self._search(recipe)
        return search is None or search.as_it_is.need <= free

    def _is_ample(self, parts: TrainingParts) -> bool:
        """Return whether even a generous bound fits, since an exact estimate takes half a minute of CPU time.

        The bound counts float32 values: 50 per token and channel plus an attention map in each block, 4 per weight, and
        4 x (64 + classes) per pixel.
        """
        backbone = self.backbone
        if not isinstance(backbone.dim, int):
            return False
        pixels = math.prod(parts.crop)
        tokens = pixels * (parts.scale / backbone.patch_size) ** 2
        blocks = backbone.depth * tokens * (50 * backbone.dim + max(1, backbone.dim / 64) * tokens)
        weights = sum(parameter.numel() for parameter in backbone.parameters())
        samples = math.ceil(parts.batch_size / self.ranks)
        values = 4 * weights + samples * (blocks + 4 * pixels * (64 + parts.num_classes))
        return 4 * values < _AMPLE * free_bytes(self.engine.device) / self.ranks  # bytes of float32

    def _search(self, recipe: Recipe) -> tuple[FitSearch | None, float]:
        """Return the search for changes, and the free bytes; None if the memory of a step cannot be estimated."""
        kind, free = self.engine.device.type, free_bytes(self.engine.device) / self.ranks
        if kind not in KINDS or math.isinf(free) or self.engine.sharded:
            return None, free
        target = Target(kind, round(free), bf16=self.engine.half, world_size=self.devices)
        return FitSearch(recipe, target, may_change_model="adapter" not in self.given), free
