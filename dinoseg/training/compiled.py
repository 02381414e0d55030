"""Compilation of a backbone's blocks, and of a head's copies of them, for the first shape seen twice in a row."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import Backbone
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")


def compile_blocks(backbone: Backbone, copies: Sequence[nn.Module] = ()) -> None:
    """Compile each block for the first shape of tokens that occurs twice in a row; other shapes run uncompiled.

    The same holds for `copies`, a head's copies of blocks.

    Nothing is compiled twice: other sizes, as in a validation or a last batch, are not worth the wait. If torch cannot
    compile here, blocks run uncompiled, and a warning is logged once. The last block also runs uncompiled when its
    attention is requested, which compiled code does not expose.

    Raises:
        UserError: the backbone is a pyramid, whose stages are not blocks.
    """
    if backbone.is_pyramid:
        raise UserError("engine.compile=true supports vision transformers only. Leave it out for a pyramid.")
    state, once = _State(), None
    for block in (*copies, *backbone.blocks):
        vars(block)["forward"] = once = _Once(block.forward, state)
    if once is not None:
        for watched in (backbone.with_class_attention, backbone.with_keys):
            vars(backbone)[watched.__name__] = partial(once.resting, watched)


class _State:
    """State shared by the blocks of a backbone."""

    failed = False


class _Once:
    """A block's `forward`, compiled for one shape and type of tokens, with or without gradients and mask."""

    def __init__(self, plain: Callable[..., Any], state: _State) -> None:
        self._plain, self._state = plain, state
        self._compiled = torch.compile(plain, dynamic=False)
        self._last: tuple[Any, ...] = ()
        self._chosen: tuple[Any, ...] = ()
        self._rests = False

    def resting(self, call: Callable[[Tensor], T], images: Tensor) -> T:
        """Return the result of `call` on images, with this block uncompiled."""
        self._rests = True
        try:
            return call(images)
        finally:
            self._rests = False

    def __call__(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = (tokens.shape, tokens.dtype, torch.is_grad_enabled(), kwargs.get("attention_mask") is None)
        if seen == self._last:
            self._chosen = self._chosen or seen
        self._last = seen
        if seen != self._chosen or self._rests or self._state.failed or torch.compiler.is_exporting():
            return self._plain(tokens, *args, **kwargs)
        try:
            return self._compiled(tokens, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning(
                "engine.compile=true: torch cannot compile here (%s); continuing without compilation.", reason
            )
            self._state.failed = True
            return self._plain(tokens, *args, **kwargs)
