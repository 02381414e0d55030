"""Compilation of a backbone's blocks for the first shape seen twice in a row, and their inference as a CUDA graph."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_PASSES_BEFORE_CAPTURE = 3  # the second one compiles the blocks


def compile_blocks(backbone: Backbone) -> None:
    """Compile each block for the first shape of tokens that occurs twice in a row; other shapes run uncompiled.

    Nothing is compiled twice: other sizes, as in a validation or a last batch, are not worth the wait. If torch cannot
    compile here, blocks run uncompiled, and a warning is logged once. The last block also runs uncompiled when its
    attention is requested, which compiled code does not expose. On CUDA, passes without gradients become a CUDA graph.

    Raises:
        UserError: the backbone is a pyramid, whose stages are not blocks.
    """
    if backbone.is_pyramid:
        raise UserError("engine.compile=true supports vision transformers only. Leave it out for a pyramid.")
    state = _State()
    once = None
    for block in backbone.blocks:
        vars(block)["forward"] = once = _Once(block.forward, state)
    if once is not None:
        replayed = _CudaGraph(backbone)
        vars(backbone)["forward"] = replayed
        for watched in (backbone.with_class_attention, backbone.with_keys):
            uncompiled = partial(once.run_plain, watched)
            vars(backbone)[watched.__name__] = partial(replayed.run_plain, uncompiled)


class _State:
    """State shared by the blocks of a backbone."""

    failed = False


class _Replacement:
    """Replacement of a module's `forward` that can be suspended."""

    _rests = False

    def run_plain(self, call: Callable[[Tensor], T], images: Tensor) -> T:
        """Return the result of `call` on images, with the module's own `forward`, which calls all hooks."""
        self._rests = True
        try:
            return call(images)
        finally:
            self._rests = False


class _Once(_Replacement):
    """A block's `forward`, compiled for one shape and type of tokens, with or without gradients and mask."""

    def __init__(self, plain: Callable[..., Any], state: _State) -> None:
        self._plain, self._state = plain, state
        self._compiled = torch.compile(plain, dynamic=False)
        self._last: tuple[Any, ...] = ()
        self._chosen: tuple[Any, ...] = ()

    def __call__(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = [name for name, value in kwargs.items() if value is not None]  # a mask is given until it is annealed
        seen = (tokens.shape, tokens.dtype, torch.is_grad_enabled(), given)
        # checkpointing repeats a block in the backward pass, where it has to run as in the forward pass
        if torch._C._current_graph_task_id() == -1:
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


class _CudaGraph(_Replacement):
    """A backbone's `forward` in eval mode without gradients, replayed as one CUDA graph for repeated shapes.

    A fast GPU waits for the CPU to launch several hundred kernels in a pass. A graph is one launch.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._plain = backbone, backbone.forward
        self._key: tuple[Any, ...] = ()
        self._passes = 0  # with this key
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images = torch.empty(0)
        self._maps: list[Tensor] = []
        self._failed = False

    def __call__(self, images: Tensor) -> list[Tensor]:
        training = self._backbone.training or torch.is_grad_enabled()
        if not images.is_cuda or training or self._rests or self._failed or torch.cuda.is_current_stream_capturing():
            return self._plain(images)
        key = self._state(images)
        if key != self._key:
            self._key, self._passes = key, 0
            self._graph, self._maps = None, []  # frees their memory
        self._passes += 1
        if self._passes <= _PASSES_BEFORE_CAPTURE:
            return self._plain(images)
        if self._graph is None:
            try:
                self._capture(images)
            except RuntimeError as error:  # a backbone that waits for the device, or too little memory
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                logger.warning("engine.compile=true: no CUDA graph (%s); continuing without it.", reason)
                self._failed = True
                return self._plain(images)
        else:
            self._images.copy_(images)
        cast("torch.cuda.CUDAGraph", self._graph).replay()
        return [part.clone() for part in self._maps]  # the next replay overwrites them

    def _state(self, images: Tensor) -> tuple[Any, ...]:
        """Return what a graph depends on: shape, precision, and where the weights are, which it reads again."""
        where = [tensor.data_ptr() for tensor in (*self._backbone.parameters(), *self._backbone.buffers())]
        precision = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        return images.shape, images.dtype, images.device, precision, torch.is_inference_mode_enabled(), *where

    def _capture(self, images: Tensor) -> None:
        self._images = images.clone()
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # autocast must not cache casts: replays would read the weights of the capture
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._plain(self._images)  # kernels choose their workspaces outside the graph
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # a thread that pins the next batch must not invalidate the capture
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._maps = self._plain(self._images)
        self._graph = graph  # only a complete one, whatever ends the capture
