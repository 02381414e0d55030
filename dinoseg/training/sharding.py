"""Sharding of weights over ranks (FSDP, arXiv 2304.11277): each stores a shard and gathers the rest when needed."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.core.contracts import require_classes
from dinoseg.models.model import SegmentationModel, quantised_names
from dinoseg.utils.errors import UserError


def shard(model: SegmentationModel, device: torch.device, world_size: int) -> SegmentationModel:
    """Keep this rank's shard of each parameter on `device`; the others are gathered block by block in each pass.

    Parameters become DTensors, so shard a model before its optimizer is created.

    Raises:
        UserError: the model has quantised layers, or a head without classes.
    """
    # such a head runs outside the model's `forward`, which gathers the shards
    require_classes(model.head, "engine.sharding=fsdp: the model")
    if quantised_names(model):
        raise UserError(
            "engine.sharding=fsdp: 4-bit and 8-bit layers cannot be sharded. Choose adapter=lora with "
            "backbone.dtype=bfloat16, or leave engine.sharding out."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world_size,)), "reshard_after_forward": True}
    blocks = model.backbone.blocks if not model.backbone.is_pyramid else ()  # its stages are not called as modules
    for block in blocks:
        fully_shard(block, **options)
    # one group for the rest, including the head, which also runs outside its `forward`; resharded after each pass
    # like the blocks, or writes to the shards (moving average) would have no effect
    fully_shard(model, **options)
    return model


def is_shared(model: nn.Module) -> bool:
    """Return whether the model's weights are sharded, so that only all ranks together hold it."""
    return any(map(_is_distributed, model.parameters()))


def full_tensor(value: Tensor) -> Tensor:
    """Return the full tensor of a sharded one; a collective operation, which all ranks have to call."""
    shared: Any = value
    return shared.full_tensor() if _is_distributed(value) else value


def local_part(value: Tensor) -> Tensor:
    """Return this rank's shard of a distributed tensor, or a plain tensor detached from its graph."""
    shared: Any = value
    return shared.to_local() if _is_distributed(value) else value.detach()


def gather_tensors(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Return tensors by name, sharded ones in full and on the CPU; an empty dict on ranks without `keep`.

    Tensors are gathered one after another, so that a device holds one full tensor at a time.
    """
    held = {}
    for name, value in tensors:
        full = full_tensor(value)
        if keep:
            held[name] = full.cpu() if full is not value else value
    return held


def shard_like(value: Tensor, held: Tensor) -> Tensor:
    """Return a full tensor sharded like `held`; every rank has all of it, so nothing is sent."""
    if not _is_distributed(held) or value.shape != held.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    shared: Any = held
    return distribute_tensor(value.to(held.device), shared.device_mesh, shared.placements, src_data_rank=None)


def _is_distributed(value: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing its module: before the import, none exist."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class ForwardSync:
    """Synchroniser of the ranks' forward passes when they predict unequal numbers of images.

    Each pass gathers shards from all ranks, so all ranks have to run the same number of passes. A rank that has
    finished runs dummy passes until all have.

    Args:
        model: sharded by `shard`.
        device: of this rank.
    """

    def __init__(self, model: SegmentationModel, device: torch.device) -> None:
        self._model, self._device, self._lends = model, device, False
        model.register_forward_pre_hook(self._announce, prepend=True)  # before the pass gathers shards

    def _announce(self, model: nn.Module, _: Any) -> None:
        if not torch.is_grad_enabled() and not self._lends:  # training steps are the same number on each rank
            self._at_work(1)

    @torch.no_grad()
    def join(self) -> None:
        """Run dummy passes until every rank has called this method."""
        training, side = self._model.training, self._model.patch_size
        self._model.eval()
        self._lends = True
        while self._at_work(0):
            self._model(torch.zeros(1, self._model.backbone.channels, side, side, device=self._device))
        self._lends = False
        self._model.train(training)

    def _at_work(self, value: int) -> bool:
        number = torch.tensor(value, device=self._device)
        torch.distributed.all_reduce(number)
        return not self._lends or bool(number.item())
