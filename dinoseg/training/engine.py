"""Devices, precision and ranks; the only module that imports accelerate."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.core.sizes import Size
from dinoseg.data.loader import count_workers
from dinoseg.models.model import SegmentationModel
from dinoseg.training.compiled import compile_blocks
from dinoseg.training.frozen_casts import cache_casts
from dinoseg.training.loss_scale import LossScale
from dinoseg.training.optim import clip_gradients, scale_gradients
from dinoseg.training.rendezvous import decode_message, encode_message, open_store, reach_ranks
from dinoseg.training.sharding import ForwardSync, shard
from dinoseg.utils.cores import check_devices
from dinoseg.utils.devices import choose_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import NAMES, compute_dtype, has_tf32
from dinoseg.utils.ranges import Count, Natural, Positive

logger = logging.getLogger(__name__)
T = TypeVar("T")
CACHES = ("auto", "off", "disk", "memory")
_STATES = ("PartialState", "AcceleratorState", "GradientState")  # of accelerate
_PIXELS, _IMAGES, _FRAMES = 2**21, 16, 4  # predicted at once on an accelerator: pixels, images, video frames


@contextmanager
def lent_accelerate() -> Iterator[None]:
    """Restore after the block what accelerate stores per process, such as the settings of a caller's `Accelerator`."""

    def shared_states() -> dict[str, dict[str, Any]]:
        state = sys.modules.get("accelerate.state")  # not imported: nothing is stored
        return {} if state is None else {name: getattr(state, name)._shared_state for name in _STATES}

    before = {name: dict(values) for name, values in shared_states().items()}
    try:
        yield
    finally:
        for name, values in shared_states().items():
            values.clear()
            values.update(before.get(name, {}))


class Engine:
    """Device and precision of one rank, and its communication with the other ranks.

    Args:
        device: auto, cuda, mps or cpu.
        precision: auto, bf16, fp16 or fp32, see `compute_dtype`. bf16 and fp16 use autocast; weights stay float32.
            fp16 scales losses (`LossScale`), and is meant for GPUs without bfloat16.
        workers: data-loading processes per rank; auto: see `count_workers`.
        eval_batch_size: images of one size predicted at once when scoring, per rank; auto: see `images_at_once`.
        devices: number of ranks that were requested; 1 accepts any number.
        sharding: none: each rank holds all weights; fsdp: each rank holds a shard of each weight (several ranks).
        cache: whether outputs of the model's frozen part are cached: auto, off, disk or memory, see `feature_cache`.
        rendezvous_timeout: seconds that ranks wait for one another at the start.
        rank_timeout: seconds that a rank waits for the others during the run before it considers them stuck.
        compile: whether torch compiles the backbone's blocks, see `compile_blocks`.
        tf32: whether float32 matrix products are computed in TF32 (10 bits of mantissa), on GPUs from Ampere on.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "auto",
        workers: Natural | Literal["auto"] = "auto",
        eval_batch_size: Count | Literal["auto"] = "auto",
        devices: Count = 1,
        sharding: Literal["none", "fsdp"] = "none",
        cache: Literal["auto", "off", "disk", "memory"] = "auto",
        rendezvous_timeout: Positive = 300.0,
        rank_timeout: Positive = 1800.0,
        compile: bool = False,
        tf32: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import GradScalerKwargs

        chosen = choose_device(device)
        check_devices(devices)
        self.dtype = compute_dtype(precision, chosen)
        # accelerate stores these per process, which sweeps and tests share between engines
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        if not torch.distributed.is_initialized():
            PartialState._reset_state()
        self.tf32 = tf32 and has_tf32(chosen)
        if tf32 and not self.tf32:
            logger.warning("engine.tf32=true has no effect: this device (%s) has no TF32.", chosen.type)
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        if os.environ.get("WORLD_SIZE", "1") != "1" or torch.distributed.is_initialized():
            join_process_group(chosen, rendezvous_timeout, rank_timeout)
        self.accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision=NAMES[self.dtype] if self.half else "no",
            device_placement=True,
            kwargs_handlers=[GradScalerKwargs(enabled=False)],  # `LossScale` scales, without a device sync
        )
        self.cache = cache
        if sharding != "none" and self.world_size == 1:
            raise UserError(
                f"engine.sharding={sharding}: sharding needs several ranks, but there is only one. Set "
                "engine.devices=N, or leave engine.sharding out."
            )
        self.sharded = sharding != "none"
        if compile and self.sharded:
            raise UserError(f"engine.compile=true with engine.sharding={sharding}: leave one of them out.")
        self.compile = compile
        self._forward_sync: ForwardSync | None = None  # of the placed model, if it is sharded
        self.workers = count_workers(chosen.type) if isinstance(workers, str) else workers
        self.eval_batch_size = eval_batch_size

    @property
    def precision(self) -> str:
        """Return the name of the compute precision: bf16, fp16 or fp32."""
        return NAMES[self.dtype]

    @property
    def half(self) -> bool:
        """Return whether autocast computes in 16 bits, bfloat16 or float16."""
        return self.dtype != torch.float32

    @property
    def device(self) -> torch.device:
        """Return the device of this rank."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Return the index of this process among all processes, from 0."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes files and prints."""
        return self.rank == 0

    def place(self, model: SegmentationModel) -> SegmentationModel:
        """Move a model, or this rank's shard of it, to the device; create the optimizer afterwards.

        Raises:
            UserError: the weights cannot be sharded.
        """
        if not self.sharded:
            model = model.to(self.device)
            if self.compile:
                compile_blocks(model.backbone)
            return model
        model = shard(self._sync_batch_norm(model), self.device, self.world_size)
        self._forward_sync = ForwardSync(model, self.device)
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap a placed model for training; with several ranks, gradients are averaged over them.

        Its forward pass runs under autocast in the precision of the engine, which accelerate adds.
        On several CUDA devices, BatchNorm computes its statistics over all of them. Elsewhere each rank uses its own
        images, and rank 0's running means are scored and saved. Under autocast, frozen weights are cast once instead of
        in every pass, unless the model is sharded or compiled.
        """
        if self.half and not (self.sharded or self.compile):
            cache_casts(model)
        if self.sharded:
            return self.accelerator.prepare_model(model, evaluation_mode=True)  # FSDP averages gradients itself
        return self.accelerator.prepare(self._sync_batch_norm(model))

    def _sync_batch_norm(self, model: Any) -> Any:
        several = self.world_size > 1 and self.device.type == "cuda"
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Broadcast rank 0's buffers (running means) to all ranks, as they are saved."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def images_at_once(self, size: Size | None = None) -> int:
        """Return how many images of `size` (H, W), or frames of a video, are predicted at once when scoring.

        A number in `eval_batch_size` is returned as such. With auto, it is 1 on a CPU, where larger batches are no
        faster. On an accelerator, images together have at most the pixels of a full-HD image and number at most 16;
        frames number 4. A larger image forms a batch of its own, so that batching never causes an image to be cut.
        """
        if not isinstance(self.eval_batch_size, str):
            return self.eval_batch_size
        if self.device.type == "cpu":
            return 1
        return _FRAMES if size is None else max(1, min(_IMAGES, _PIXELS // math.prod(size)))

    def seed(self, seed: int, step: int) -> None:
        """Make the random draws of a step (dropout) a function of seed, step and rank, not of previous draws."""
        torch.manual_seed(hash((seed, step, self.rank)) % 2**63)

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context for a forward pass outside training."""
        return self.accelerator.autocast()

    def loss_scale(self) -> LossScale | None:
        """Return a new loss scale in float16; None in other precisions, which need none."""
        return LossScale() if self.dtype == torch.float16 else None

    def backward(self, loss: Tensor, scale: LossScale | None = None, weight: Tensor | None = None) -> None:
        """Accumulate the gradients of the loss, multiplied by `scale` if there is one.

        `weight` is the divisor of the loss on this rank, to which a new scale adapts.
        """
        if scale is not None and weight is not None and not scale.started:
            scale.begin(self.total(weight).item(), self.device)
        self.accelerator.backward(loss if scale is None else loss * scale.value)

    def sync(self, model: nn.Module, is_last: bool) -> AbstractContextManager:
        """Return a context that defers gradient synchronisation until the last micro-batch of a step.

        It is a no-op for sharded weights, whose gradients are reduced to each rank's shard in every pass.
        """
        if is_last or self.world_size == 1 or self.sharded:
            return nullcontext()
        return self.accelerator.no_sync(model)

    def total(self, *values: Tensor | float) -> Tensor:
        """Return the sums of n scalars over the ranks, (n,) float32 on the device."""
        there = [v if isinstance(v, Tensor) else torch.full((), v, device=self.device) for v in values]
        return self.sum(torch.stack([value.detach().float().to(self.device) for value in there]))

    def updates_asynchronously(self, optimizer: Optimizer) -> bool:
        """Return whether `optimizer_step` updates, or not, on the device, so that metrics can be read later."""
        on_device = self.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        return on_device and not self.sharded  # untested with sharded weights

    def optimizer_step(
        self,
        optimizer: Optimizer,
        total: Tensor,
        weight: Tensor,
        *,
        clip: float | None,
        previous_norm: Tensor | None = None,
        loss_scale: LossScale | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update the weights by the mean loss of a step: scale and clip the gradients, update, clear.

        Nothing is updated if the mean, the gradient norm or `previous_norm` is not finite. If only the gradient
        overflows under a loss scale, the step is skipped, and the norm is 0.

        Args:
            optimizer: its parameters hold the gradients of `total`, averaged over the ranks.
            total: sum of losses over all ranks, ().
            weight: divisor of the total, (); 0: the step has no labels.
            clip: maximum gradient norm, or None.
            previous_norm: gradient norm () of the previous step, if it may not have been read yet.
            loss_scale: factor of the losses that the gradients are divided by; it is updated.

        Returns:
            The mean, and the gradient norm before clipping, NaN where the mean is not finite: () float64.
        """
        on_device = self.updates_asynchronously(optimizer)
        if not on_device:
            total, weight = total.cpu(), weight.cpu()  # before float64, which MPS lacks
        total, weight = total.double(), weight.double()
        mean = torch.where(weight != 0, total / weight, 0.0)
        # DDP has averaged the gradients over the ranks, and the loss is a sum over all of them
        factor = torch.where(weight != 0, self.world_size / weight, 0.0)
        if loss_scale is not None:
            factor = factor / loss_scale.value.to(factor.device).to(factor.dtype)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # before clipping, whose limit holds for the mean loss
        scale_gradients(parameters, factor)
        norm = clip_gradients(parameters, clip)
        norm = norm.to(mean.device).to(mean.dtype)  # moved before it is cast: MPS has no float64
        finite = mean.isfinite() & norm.isfinite()
        if loss_scale is not None:
            norm = loss_scale.skip_overflow(mean, norm)
        if previous_norm is not None:
            finite = finite & previous_norm.isfinite()
        if on_device:
            vars(optimizer).update(grad_scale=None, found_inf=(~finite).float())  # interface of torch's GradScaler
        # on a device the kernel itself skips the update (`found_inf`), so the host does not wait for `finite`
        if on_device or finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean, norm.where(mean.isfinite(), math.nan)

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the values of all ranks in one list, in the order of the ranks.

        Args:
            values: what `encode_message` accepts.
        """
        self._join()
        if self.world_size == 1:
            return values
        own = torch.frombuffer(bytearray(encode_message(values)), dtype=torch.uint8).to(self.device)
        sizes = self._gather_tensors(torch.tensor([len(own)], device=self.device))
        # collective operations need equal shapes
        padded = nn.functional.pad(own, (0, int(max(sizes)) - len(own)))
        contents = [content[:size] for content, size in zip(self._gather_tensors(padded), sizes, strict=True)]
        return [value for content in contents for value in decode_message(content.cpu().numpy().tobytes())]

    def _gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which have the same shape."""
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(tensors, tensor)
        return tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; integers are summed exactly."""
        self._join()
        return self.accelerator.reduce(tensor, reduction="sum")

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; `encode_message` has to accept it."""
        return self.gather([value] if self.is_main else [])[0]

    def run_on_rank0(self, by: Callable[[], T]) -> T:
        """Call `by` on rank 0 only, and return its result on every rank."""
        return self.broadcast(by() if self.is_main else None)

    def wait(self) -> None:
        """Wait until every rank has called this method."""
        self._join()
        self.accelerator.wait_for_everyone()

    def _join(self) -> None:
        if self._forward_sync is not None:
            self._forward_sync.join()

    def close(self) -> None:
        """Destroy the process group, if there is one."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


_ALIKE = r"(?s)Grad strides do not match bucket view strides.*grad\.sizes\(\) = \[(1,|\d+, \d+, 1, 1\])"


def join_process_group(device: torch.device, seconds: float, at_work: float) -> None:
    """Join the process group that the environment describes (`WORLD_SIZE`, `MASTER_ADDR` ...), or stay in a joined one.

    Args:
        device: device type of the ranks, which selects the backend (NCCL or Gloo).
        seconds: timeout of the rendezvous.
        at_work: timeout of later collective operations in seconds, after which torch ends the waiting ranks.

    Raises:
        UserError: rank 0 cannot be reached, other ranks do not join, or several ranks are to use MPS.
    """
    distributed = torch.distributed
    if device.type == "mps":
        world_size = os.environ.get("WORLD_SIZE", "1")
        raise UserError(
            f"engine.devices={world_size}: torch trains on MPS in a single process only. Set engine.devices=1, or "
            "engine.device=cpu to train in several processes on the processor."
        )
    if distributed.is_initialized():
        return
    # its functions' defaults are the group at the time of its import: transformers would import it later and so hold
    # the group, whose threads then run while the interpreter exits and may abort it
    import_module("torch.distributed.nn.functional")
    # harmless DDP warnings: tokens (1, N, C) prepended to a rank's only sample have a slice of its gradient as theirs,
    # and 1 x 1 convolutions have contiguous channels in either memory layout
    warnings.filterwarnings("ignore", _ALIKE)
    patience = timedelta(seconds=at_work)
    store, number, ranks = open_store(seconds)
    store.set_timeout(patience)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with reach_ranks(seconds):
        distributed.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=patience)
