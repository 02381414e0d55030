"""What a pass through a model calls, and what its outputs depend on."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def uncalled_linears(module: nn.Module) -> Iterator[set[str]]:
    """Yield the names of the linear layers, from which each that is called within the block goes."""
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    uncalled = set(linears)
    hooks = [part.register_forward_hook(lambda *_, name=name: uncalled.discard(name)) for name, part in linears.items()]
    try:
        yield uncalled
    finally:
        for hook in hooks:
            hook.remove()


def unreached(module: nn.Module, outputs: Sequence[Tensor]) -> list[str]:
    """Return the names of the parameters that no output depends on, as autograd recorded it."""
    nodes = [part.grad_fn for part in outputs]
    seen = set(nodes)
    reached = set()
    while nodes:
        node: Any = nodes.pop()
        reached.add(getattr(node, "variable", None))
        fresh = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= fresh
        nodes += fresh
    return [name for name, parameter in module.named_parameters() if parameter not in reached]
