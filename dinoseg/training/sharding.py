"""Weights shared out over ranks (FSDP, arXiv 2304.11277): each keeps a part of every tensor and borrows the rest."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.models.model import Segmenter, quantised_names
from dinoseg.utils.errors import UserError


def shard(model: Segmenter, device: torch.device, world: int) -> Segmenter:
    """Keep this rank's part of each parameter on `device`; the other parts are borrowed block by block.

    Parameters become tensors of another kind, so this comes before an optimizer is made.

    Raises:
        UserError: its layers are quantised, or its head is one of slots.
    """
    if model.head.slots is not None:  # parts of it are asked frame by frame, beside the model's own pass
        raise UserError("engine.sharding=fsdp: the weights of slots cannot be shared out. Leave engine.sharding out.")
    if quantised_names(model):
        raise UserError(
            "engine.sharding=fsdp: the weights of 4-bit and 8-bit layers cannot be shared out. Take adapter=lora with "
            "backbone.dtype=bfloat16, or leave engine.sharding out."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second of imports, for this alone

    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world,)), "reshard_after_forward": True}
    blocks = model.backbone.blocks if not model.backbone.is_pyramid else ()  # stages that nothing calls as such
    for block in (*blocks, *model.head.own_blocks):
        fully_shard(block, **options)
    # one of all else, the head too, parts of which run past its `forward`; lent for one pass as the others are, or what
    # is written to the parts (a moving average) would not be seen
    fully_shard(model, **options)
    return model


def is_shared(model: nn.Module) -> bool:
    """Return whether this rank holds parts of a model, so that only all ranks together have it."""
    return any(map(_is_distributed, model.parameters()))


def whole(value: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks, which have to ask for it together."""
    shared: Any = value
    return shared.full_tensor() if _is_distributed(value) else value


def local_part(value: Tensor) -> Tensor:
    """Return this rank's shard of a distributed tensor, or a plain tensor detached from its graph."""
    shared: Any = value
    return shared.to_local() if _is_distributed(value) else value.detach()


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Return tensors by name, those that are shared out whole and on the CPU; none on a rank that does not keep them.

    One after the other, so that a device holds one whole tensor at a time.
    """
    held = {}
    for name, value in tensors:
        full = whole(value)
        if keep:
            held[name] = full.cpu() if full is not value else value
    return held


def parted(value: Tensor, held: Tensor) -> Tensor:
    """Return a whole tensor shared out as `held` is; every rank has all of it, so nothing is sent."""
    if not _is_distributed(held) or value.shape != held.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    shared: Any = held
    return distribute_tensor(value.to(held.device), shared.device_mesh, shared.placements, src_data_rank=None)


def _is_distributed(value: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing their module: there are none before it is imported."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class Lockstep:
    """Lets ranks predict unequal numbers of images: one that is done goes on lending its parts until all are.

    Each pass needs the parts of all ranks, so all have to make the same number of passes.

    Args:
        model: shared out by `shard`.
        device: of this rank.
    """

    def __init__(self, model: Segmenter, device: torch.device) -> None:
        self._model, self._device, self._lends = model, device, False
        model.register_forward_pre_hook(self._announce, prepend=True)  # before the pass borrows parts

    def _announce(self, model: nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled() and not self._lends:  # steps of a training are as many on each rank
            self._at_work(1)

    @torch.no_grad()
    def join(self) -> None:
        """Return when every rank has come here."""
        training, side = self._model.training, self._model.patch_size
        self._model.eval()
        self._lends = True
        while self._at_work(0):
            self._model(torch.zeros(1, 3, side, side, device=self._device))
        self._lends = False
        self._model.train(training)

    def _at_work(self, own: int) -> bool:
        number = torch.tensor(own, device=self._device)
        torch.distributed.all_reduce(number)
        return not self._lends or bool(number.item())
