"""A CUDA device that is none: tensors say that they are on it, a CPU computes them, and what would wait is counted.

Values are real, so a step takes the path that it takes on CUDA and gives the numbers of a CPU. Autograd, autocast (that
of a CPU) and fused optimizers run as ever. Memory, streams and kernels are not there, nor what CUDA alone refuses.
`pretended_mps.py` makes it an MPS device, with what that refuses.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import dinoseg
from dinoseg.losses.fused import Fused
from dinoseg.training.engine import Engine
from dinoseg.utils.precision import compute_dtype

aten = torch.ops.aten
CUDA, MPS = torch.device("cuda", 0), torch.device("mps", 0)
_PACKAGE = str(Path(dinoseg.__file__).parent)
_SIZES = {  # what cannot go on before the size of its result is known
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
_READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class MixedDevices(AssertionError):
    """An operation was given tensors of two devices."""


class Pretended(Tensor):
    """A tensor that says it is on the pretended device; `memory` is its memory, on the CPU."""

    memory: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor) -> "Pretended":
        """Wrap a tensor of the CPU, whose memory is shared."""
        assert not isinstance(real, Pretended)
        made = Tensor._make_subclass(cls, real.detach(), real.requires_grad)
        made.memory = real.detach()
        return made

    device = property(lambda self: _place.device)  # type: ignore[assignment]
    is_cuda = property(lambda self: _place.device is CUDA)  # type: ignore[assignment]
    is_mps = property(lambda self: _place.device is MPS)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU, after a look at where the operands are and whether CUDA would be waited for."""
        kwargs = kwargs or {}
        _look(func.overloadpacket, args, kwargs)
        _place.check(func, args, kwargs)
        found = func(*_map_tensors(_real, args), **_map_tensors(_real, kwargs))
        returns = func._schema.returns
        if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return kwargs.get("out", args[0] if args else None)
        _map_tensors(_place.hold, found)
        return _map_tensors(_pretend, found)

    def __repr__(self, **_: Any) -> str:
        """Return what its memory says."""
        return f"Pretended({self.memory})"


class Place:
    """The pretended device, and what it refuses: nothing on CUDA."""

    device = CUDA

    def check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse an operator or its arguments."""

    def hold(self, value: Tensor) -> Tensor:
        """Refuse a tensor that the device cannot hold."""
        return value

    def copy(self, source: Tensor, dtype: torch.dtype, asynchronous: bool) -> None:
        """Refuse a copy between host and device."""


_place = Place()


class Waits:
    """How often the device is waited for, by kind and place ("losses/mask_classification.py match")."""

    def __init__(self) -> None:
        self._found: Counter[tuple[str, str]] = Counter()
        self.launched = 0

    def add(self, kind: str) -> None:
        """Count a wait of the innermost function of the package that is running, or of the tests."""
        frame: Any = sys._getframe(1)
        # a comprehension has a frame of its own in some versions of Python
        while frame and (not frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_name.startswith("<")):
            frame = frame.f_back
        place = "tests"
        if frame is not None:
            file = Path(frame.f_code.co_filename).relative_to(_PACKAGE).as_posix()
            place = f"{file} {frame.f_code.co_name}"
        self._found[place, kind] += 1

    def take(self) -> dict[str, int]:
        """Return what was counted since the last time."""
        found, self._found = {f"{place}: {kind}": n for (place, kind), n in sorted(self._found.items())}, Counter()
        return found


_waits = Waits()


def _real(value: Tensor) -> Tensor:
    return value.memory if isinstance(value, Pretended) else value


def _pretend(value: Tensor) -> Tensor:
    return value if isinstance(value, Pretended) else Pretended(value)


_map_tensors = partial(tree_map_only, Tensor)  # arguments, or what came of them, with each tensor replaced


def _look(name: Any, args: Any, kwargs: Any) -> None:
    """Count what waits, and refuse what mixes devices."""
    _waits.launched += 1
    if name in _READS:
        _waits.add("read")
    if name in _SIZES and not (name is aten.repeat_interleave and kwargs.get("output_size") is not None):
        _waits.add(f"size of {name.__name__}")
    joins = name in (aten.cat, aten.stack)
    if joins and torch._C._current_graph_task_id() != -1:
        return  # where a gradient is missing, autograd makes zeros where C++ takes the tensors to be: on the CPU
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    # elsewhere than in joins, a scalar of the host serves
    on_host = [each for each in tensors if type(each) is not Pretended and (each.ndim or joins)]
    if name in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        indices = [index for index in args[1] if index is not None]
        chosen = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        filled = name is not aten.index and len(indices) == 1 and args[2].numel() == 1
        if chosen and not filled:
            _waits.add("size of a mask's choice")
        for index in indices:
            if not isinstance(index, Pretended):
                _waits.add("index from the host")
        # a number of Python becomes a tensor of the host, and is copied unless it fills a mask's choice
        if name is not aten.index and not (chosen and filled) and not isinstance(args[2], Pretended):
            _waits.add("copy to the device")
        on_host = [t for t in on_host if all(t is not index for index in indices)]
    if name is aten.copy_ and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
        asynchronous = len(args) > 2 and args[2] or kwargs.get("non_blocking")
        _transfer(args[1], args[0], bool(asynchronous))
        on_host = []
    if on_host:
        raise MixedDevices(f"{name}: {[tuple(tensor.shape) for tensor in on_host]} on the CPU beside tensors on CUDA")


def _transfer(source: Tensor, target: Tensor | None, asynchronous: bool) -> None:
    """Count a copy between host and device that is waited for: of memory that is not pinned, or that is not to wait."""
    if isinstance(source, Pretended):
        if not (asynchronous and target is not None and is_pinned(target)):
            _waits.add("copy to the host")
    elif not (asynchronous and is_pinned(source)):
        _waits.add("copy to the device")


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a tensor of the host was made in pinned memory."""
    return getattr(tensor, "_pinned", False)


def _mark_pinned(tensor: Tensor) -> Tensor:
    tensor._pinned = True  # type: ignore[attr-defined]
    return tensor


class _Placing(TorchFunctionMode):
    """Makes tensors on the pretended device where Python asks for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = args[0] if args and isinstance(args[0], Tensor) else None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _move(func, own, args[1:], kwargs)
        if func is Tensor.pin_memory:
            return own if is_pinned(own) else _mark_pinned(own.clone())
        if func is Tensor.is_pinned:
            return is_pinned(args[0])
        if func is Tensor.tolist and isinstance(own, Pretended):
            _waits.add("read")
            return own.memory.tolist()
        if func is Tensor.numpy and isinstance(own, Pretended):
            raise TypeError(f"can't convert {_place.device} device type tensor to numpy. Use Tensor.cpu() first.")
        new = isinstance(own, Pretended) and func in (Tensor.new_tensor,)
        asked = kwargs.get("device")
        on_cuda = new if asked is None else torch.device(asked).type == _place.device.type
        if func in (Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full) and asked is None:
            on_cuda = False  # its dispatcher does it
        if on_cuda:
            kwargs.pop("device", None)
            if func in _FROM_DATA:
                _waits.add("copy to the device")
            return _map_tensors(_pretend, _map_tensors(_place.hold, func(*_map_tensors(_real, args), **kwargs)))
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        return _mark_pinned(made) if pinned else made


def _move(func: Any, own: Tensor, args: Any, kwargs: Any) -> Tensor:
    if func is Tensor.to:
        copied = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, asynchronous, _ = torch._C._nn._parse_to(*args, **kwargs)
    else:
        copied = False
        dtype = None
        asynchronous = kwargs.get("non_blocking", False)
        device = torch.device("cuda" if func is Tensor.cuda else "cpu")
    here = isinstance(own, Pretended)
    if device is None or (device.type == _place.device.type) == here:
        return Tensor.to(own, dtype=dtype or own.dtype, copy=copied)
    assert not (torch.is_grad_enabled() and own.requires_grad and not own.is_leaf), "a graph over two devices"
    _transfer(own, None, asynchronous)
    _place.copy(own, dtype or own.dtype, asynchronous)
    real = _real(own).detach().to(dtype=dtype or own.dtype, copy=True)
    return real if here else Pretended(real)


class _Event:
    """Of a stream: waiting for it is a wait unless work was launched after it."""

    def record(self, stream: Any = None) -> None:
        """Mark the work so far."""
        self._launched = _waits.launched

    def synchronize(self) -> None:
        """Wait for the marked work."""
        if _waits.launched - self._launched < 50:
            _waits.add("work just launched")


class _Accelerator:
    """What the engine asks accelerate for, on one device."""

    device = property(lambda self: _place.device)
    num_processes, process_index = 1, 0

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def prepare(self, model: nn.Module) -> nn.Module:
        forward = model.forward

        def in_autocast(*args: Any, **kwargs: Any) -> Any:
            with self.autocast():
                return forward(*args, **kwargs)

        model.forward = in_autocast
        return model

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert isinstance(tensor, Pretended), "what is summed over ranks is on the device"
        return tensor

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def wait_for_everyone(self) -> None:
        pass


def on_cuda(model: nn.Module) -> nn.Module:
    """Move a model to the pretended device."""
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Pretended(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Pretended(_place.hold(buffer))
    return model


def pretended_engine(*, precision: str = "fp32", eval_batch_size: int | str = 1) -> Engine:
    """Return an engine on the pretended device, alone."""
    engine = Engine.__new__(Engine)
    engine.dtype = compute_dtype(precision, _place.device)
    engine.accelerator = _Accelerator(engine.dtype)
    engine.tf32, engine.workers, engine.eval_batch_size = False, 0, eval_batch_size
    engine.sharded, engine.compile, engine._forward_sync = False, False, None
    return engine


@contextmanager
def pretended_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[Waits]:
    """Let CUDA be there, as far as Python can see, of a compute capability: before 8.0 it lacks bfloat16."""
    patches = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "get_device_capability": lambda *_: capability,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "Event": _Event,
        "mem_get_info": lambda *_: (2**34, 2**35),
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_: torch.zeros(0),  # a seed and an offset, which the host keeps
        "set_rng_state": lambda *_: None,
    }
    with ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield stack.enter_context(pretended_device(Place()))


@contextmanager
def pretended_device(place: Place) -> Iterator[Waits]:
    """Let tensors be on a device, as far as Python can see; `torch.cuda` or `torch.mps` is patched by the caller."""
    autocast = torch.autocast.__init__
    group = torch._C._group_tensors_by_device_and_dtype  # the device below is the CPU

    def of_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == place.device.type else device_type, *args, **kwargs)

    def by_device(lists: Any, *args: Any) -> dict:
        where = place.device if isinstance(lists[0][0], Pretended) else torch.device("cpu")
        return {(where, kind): found for (_, kind), found in group(lists, *args).items()}

    stream = SimpleNamespace(is_capturing=lambda: False)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys.modules[__name__], "_place", place))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda *_: stream))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", of_cpu))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", by_device))
        stack.enter_context(mock.patch.object(Fused, "takes", lambda *_: False))  # there is nothing to launch it on
        stack.enter_context(_Placing())
        _waits.take()
        yield _waits
