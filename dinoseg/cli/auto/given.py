"""Filter for choices that typed overrides replace, directly or through keys that imply them."""

from collections.abc import Iterable
from dataclasses import replace

from dinoseg.autotune.rules import RecipeChoice

_STAND_FOR = {  # keys that also imply others
    "loss.weights": ("loss",),
    "loss.criterion.factors.dice": ("loss", "loss.criterion", "loss.criterion.factors"),
    "optim.optimizer.head_lr": ("optim.optimizer.lr", "head.lr"),
    "optim.optimizer.backbone_lr": ("optim.optimizer.lr", "adapter.lr"),
    "trainer.steps": ("trainer.epochs",),
    "trainer.max_minutes": ("trainer.steps", "trainer.epochs"),
    "trainer.val_every": ("trainer.steps", "trainer.epochs"),
}


def drop_typed(choices: Iterable[RecipeChoice], given: frozenset[str]) -> tuple[list[RecipeChoice], list[str]]:
    """Return the choices without typed keys or keys implied by typed ones, and the sorted list of those typed keys."""
    left, taken = [], set[str]()
    for choice in choices:
        typed = {key: given & {key, *_STAND_FOR.get(key, ())} for key in choice.words}
        taken |= set[str]().union(*typed.values())
        words = {key: value for key, value in choice.words.items() if not typed[key]}
        if words:
            left.append(replace(choice, words=words))
    return left, sorted(taken)
