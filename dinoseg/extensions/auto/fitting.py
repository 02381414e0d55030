"""Search for changes that make a recipe fit into memory; the model and the samples of a step stay the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dinoseg.extensions.auto.parts import TrainingParts
from dinoseg.extensions.auto.step_bytes import LossBytes, StepBytes, step_bytes
from dinoseg.extensions.auto.target import Target
from dinoseg.runs.log_file import announce
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, format_override

Words = Mapping[str, Any]  # config keys and groups with their values
Recipe = Callable[[Words], TrainingParts]  # returns the parts of a training with these overrides


@dataclass(frozen=True)
class Change:
    """Config overrides that reduce memory, with a reason."""

    words: Words
    reason: str

    def __str__(self) -> str:
        return " ".join(f"{key}={format_override(value)}" for key, value in self.words.items())


@dataclass(frozen=True)
class Fit:
    """A recipe with changes, and the memory of a step."""

    parts: TrainingParts
    changes: tuple[Change, ...]
    words: Words  # of all changes
    step: StepBytes
    need: int


class FitSearch:
    """Search for the smallest change with which a recipe fits into memory; the samples per step stay the same.

    Args:
        recipe: returns the parts of the training with overrides.
        target: device and memory to fit.

    Attributes:
        as_it_is: the recipe without changes.
        smallest: the variant with the lowest memory among those tried.
    """

    def __init__(self, recipe: Recipe, target: Target) -> None:
        self.recipe = recipe
        self.target = target
        self._parts = recipe({})
        self._model = self._parts.outline()
        self._loss = LossBytes(self._parts, bf16=target.bf16, accelerator=target.kind != "cpu")
        self._bound = self._name_bound_parts()
        self.as_it_is = self.smallest = self._fit(())

    def find_fit(self) -> Fit | None:
        """Return the recipe with the smallest change that fits; None if none does."""
        if self.as_it_is.need <= self.target.memory:
            return self.as_it_is
        variants = list(self._checkpointing_changes())
        if not self._bound:
            return next(filter(None, map(self._largest, variants)), None)
        # the micro-batch size affects the result, so large micro-batches are worth the time of checkpointing
        best = None
        for changes in reversed(variants):
            fit = self._largest(changes)
            if fit is not None and (best is None or fit.parts.batch_size >= best.parts.batch_size):
                best = fit
            if best is not None and best.parts.batch_size == self._parts.batch_size:
                break  # no variant has larger ones: each estimate of a large backbone takes seconds
        return best

    def _largest(self, changes: tuple[Change, ...]) -> Fit | None:
        """Return the fit with the largest batch size; None if no batch size fits, or a part refuses the changes."""
        sizes = self._sizes() if changes else self._sizes()[1:]  # the recipe as it is does not fit
        if not sizes:
            return None
        try:
            least = self._fit((*changes, *self._micro_batches(sizes[-1])))
            self.smallest = min(self.smallest, least, key=lambda fit: fit.need)
            if least.need > self.target.memory:
                return None
            return self._enlarge(least, changes, sizes[:-1])
        except UserError:
            return None

    def _enlarge(self, least: Fit, changes: tuple[Change, ...], sizes: Sequence[int]) -> Fit:
        """Return the largest of `sizes` that fits, or `least`; memory grows with the size, so bisection finds it."""
        largest = least
        too_large = 0  # sizes before this index do not fit
        fitting = len(sizes)  # those from this one on fit
        while too_large < fitting:
            middle = (too_large + fitting) // 2
            fit = self._fit((*changes, *self._micro_batches(sizes[middle])))
            if fit.need <= self.target.memory:
                largest, fitting = fit, middle
            else:
                too_large = middle + 1
        return largest

    def _name_bound_parts(self) -> str:
        """Return the parts whose result depends on the micro-batch size, in words; "" if none does."""
        norms = (part for part in self._model.modules() if isinstance(part, _BatchNorm))
        bound = ["BatchNorm computes its statistics"] if any(norm.training for norm in norms) else []
        if self._parts.loss().sums_over_batch:
            bound.append(f"loss={self._parts.loss_name} computes its sums")
        return " and ".join(bound)

    def _checkpointing_changes(self) -> Iterator[tuple[Change, ...]]:
        """Yield no change, then activation checkpointing."""
        yield ()
        modules = {"backbone": self._model.backbone, "head": self._model.head}
        checkpointing = self._parts.checkpointing
        off = [name for name, part in modules.items() if checkpointing.get(name) is False and _is_trained(part)]
        if off:
            reason = "activations are recomputed in the backward pass: same results, about a third more time"
            yield (Change({f"{name}.checkpointing": True for name in off}, reason),)

    def _sizes(self) -> list[int]:
        """Return the batch sizes that divide the samples of a step, the largest first."""
        batch = self._parts.batch_size
        world_size = self.target.world_size
        least = world_size * self._model.head.min_batch_size
        sizes = [size for size in range(batch, 0, -1) if batch % size == 0 and size % world_size == 0]
        return [size for size in sizes if size >= least] or [batch]

    def _micro_batches(self, size: int) -> tuple[Change, ...]:
        if size == self._parts.batch_size:
            return ()
        samples = self._parts.batch_size * self._parts.accumulate
        reason = (
            f"micro-batches of {count_of(size, 'sample')}, {samples // size} per update: the effective batch size "
            f"stays {samples}. Random numbers (dropout, mask points) are sampled per micro-batch, from the same "
            "distribution"
        )
        if self._bound:
            reason += f". {self._bound} per micro-batch, so results differ slightly"
        return (Change({"data.batch_size": size, "trainer.accumulate": samples // size}, reason),)

    def _fit(self, changes: tuple[Change, ...]) -> Fit:
        announce(f"Estimating the memory {f'with {list_changes(changes)}' if changes else 'of the recipe'}")
        words = {key: value for change in changes for key, value in change.words.items()}
        parts = self.recipe(words) if changes else self._parts
        step = step_bytes(
            parts,
            self._loss,
            samples=parts.batch_size // self.target.world_size,
            accumulate=parts.accumulate,
            bf16=self.target.bf16,
            world_size=self.target.world_size,
        )
        return Fit(parts, changes, words, step, self.target.need(step))


def list_changes(changes: Sequence[Change]) -> str:
    """Return the overrides of changes as typed."""
    return " ".join(map(str, changes))


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
