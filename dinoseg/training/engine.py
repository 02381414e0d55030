"""Devices, precision and ranks: the only importer of accelerate."""

import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.core.sizes import Size
from dinoseg.data.enough_workers import warn_of_many
from dinoseg.models.model import Segmenter
from dinoseg.training.compiled import compile_blocks
from dinoseg.training.frozen_casts import keep_casts
from dinoseg.training.loss_scale import LossScale
from dinoseg.training.optim import scale_gradients
from dinoseg.training.sharding import Lockstep, shard, whole
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import NAMES, compute_dtype, has_tf32
from dinoseg.utils.ranges import Count, Natural, Positive

logger = logging.getLogger(__name__)
T = TypeVar("T")
SHARDINGS = ("none", "fsdp")
CACHES = ("auto", "off", "disk", "memory")
_PIXELS, _IMAGES, _FRAMES = 2**21, 16, 4  # predicted at once on an accelerator: of images, images, frames of a video


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of that name; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device is unknown or not on this machine.
    """
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in have.items() if there))
    if name not in have:
        raise UserError(
            f"engine.device={name} is unknown. Choose auto, cuda, mps or cpu; which of several CUDA devices is used is "
            f"said by CUDA_VISIBLE_DEVICES."
        )
    if not have[name]:
        there = ", ".join(kind for kind, there in have.items() if there)
        raise UserError(f"engine.device={name} is not available here. This machine has: {there}.")
    return torch.device(name)


class Engine:
    """One rank's device, precision and view of the others.

    Args:
        device: auto, cuda, mps or cpu.
        precision: auto, bf16, fp16 or fp32, see `compute_dtype`. bf16 and fp16 are autocast; weights stay float32.
            fp16 scales losses (`LossScale`), and is for GPUs without bfloat16.
        workers: processes that load data, per rank; auto: two, and more where they are waited for and bring more.
        eval_batch_size: images of one size predicted at once when scoring, per rank; auto: see `images_at_once`.
        devices: the number of ranks that were to be started from here.
        sharding: none, each rank has all weights; or fsdp, each has a part of each (several ranks).
        cache: whether what the frozen part of a model gives is kept: auto (where that pays), off, disk or memory.
        rendezvous_timeout: seconds that ranks wait for one another before they begin.
        rank_timeout: seconds that a rank waits for the others at work, before it takes them for stuck.
        compile: whether torch compiles the backbone's blocks and copies of them, see `compile_blocks`.
        tf32: whether products of float32 matrices are computed in TF32 (10 bits of mantissa), on GPUs from Ampere on.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "auto",
        workers: Natural | str = "auto",
        eval_batch_size: Count | str = "auto",
        devices: Count = 1,
        sharding: str = "none",
        cache: str = "auto",
        rendezvous_timeout: Positive = 300.0,
        rank_timeout: Positive = 1800.0,
        compile: bool = False,
        tf32: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import GradScalerKwargs

        chosen = choose_device(device)
        self.dtype = compute_dtype(precision, chosen)
        if isinstance(workers, str) and workers != "auto":
            raise UserError(f"engine.workers={workers} is unknown. Choose auto, or a number of processes.")
        if isinstance(eval_batch_size, str) and eval_batch_size != "auto":
            raise UserError(f"engine.eval_batch_size={eval_batch_size} is unknown. Choose auto, or a number of images.")
        if sharding not in SHARDINGS:
            raise UserError(f"engine.sharding={sharding} is unknown. Choose {' or '.join(SHARDINGS)}.")
        # accelerate keeps these between engines of one process (sweeps, tests): a new engine starts afresh
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        if not torch.distributed.is_initialized():
            PartialState._reset_state()
        self.tf32 = tf32 and has_tf32(chosen)
        if tf32 and not self.tf32:
            logger.warning("engine.tf32=true has no effect: this device (%s) has no TF32.", chosen.type)
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        meet(chosen, rendezvous_timeout, rank_timeout)
        self.accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision=NAMES[self.dtype] if self.half else "no",
            device_placement=True,
            kwargs_handlers=[GradScalerKwargs(enabled=False)],  # `LossScale` does it, without waiting for the device
        )
        if devices not in (1, self.world):
            raise UserError(f"engine.devices={devices}: this mode runs on {self.world}. Leave engine.devices out.")
        if cache not in CACHES:
            raise UserError(f"engine.cache={cache} is unknown. Choose one of {', '.join(CACHES)}.")
        self.cache = cache
        if sharding != "none" and self.world == 1:
            raise UserError(
                f"engine.sharding={sharding}: weights are shared out over several ranks, and this is the only one. "
                "Give engine.devices=N, or leave engine.sharding out."
            )
        self.sharded = sharding != "none"
        if compile and self.sharded:
            raise UserError(f"engine.compile=true with engine.sharding={sharding}: leave one of them out.")
        self.compile = compile
        self._lockstep: Lockstep | None = None  # of the model that was placed, if its weights are shared out
        self.workers = workers
        if self.is_main:
            warn_of_many(workers)
        self.eval_batch_size = eval_batch_size

    @property
    def precision(self) -> str:
        """What is computed in: bf16, fp16 or fp32."""
        return NAMES[self.dtype]

    @property
    def half(self) -> bool:
        """Whether autocast computes in 16 bits, bfloat16 or float16."""
        return self.dtype != torch.float32

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """This process's number among all, from 0."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def place(self, model: Segmenter) -> Segmenter:
        """Bring a model to the device, or this rank's part of it; an optimizer is made after that.

        Raises:
            UserError: its weights cannot be shared out.
        """
        if not self.sharded:
            model = model.to(self.device)
            if self.compile:
                compile_blocks(model.backbone, model.head.own_blocks)
            return model
        model = shard(self._synchronised(model), self.device, self.world)
        self._lockstep = Lockstep(model, self.device)
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make a model that was placed ready to train: with several ranks, gradients are averaged over them.

        On several CUDA devices, BatchNorm takes its statistics over all of them; elsewhere each rank takes those of its
        own images, and the first one's running means are scored and saved. Under autocast, frozen weights are cast
        once, and not in every pass.
        """
        if self.half and not (self.sharded or self.compile):
            keep_casts(model)
        if self.sharded:
            return self.accelerator.prepare_model(model, evaluation_mode=True)  # it averages its gradients itself
        return self.accelerator.prepare(self._synchronised(model))

    def _synchronised(self, model: Any) -> Any:
        several = self.world > 1 and self.device.type == "cuda"
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model

    def align(self, model: nn.Module) -> None:
        """Give every rank the first one's buffers (running means), as they are saved."""
        if self.world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def images_at_once(self, size: Size | None = None) -> int:
        """Return how many images of `size` (H, W), or frames of a video, are predicted at once when scoring.

        By itself it is one on a CPU, where more are no faster; elsewhere so many as together are of the pixels of an
        image of full HD, at most 16, and 4 frames. A larger image is one, so that none is cut for being of a batch.
        """
        if not isinstance(self.eval_batch_size, str):
            return self.eval_batch_size
        if self.device.type == "cpu":
            return 1
        return _FRAMES if size is None else max(1, min(_IMAGES, _PIXELS // math.prod(size)))

    def seed(self, seed: int, step: int) -> None:
        """Make the random draws of a step (dropout) a function of seed, step and rank, not of what came before."""
        torch.manual_seed(hash((seed, step, self.rank)) % 2**63)

    def autocast(self) -> AbstractContextManager:
        """Return the precision's context for a forward pass outside training."""
        return self.accelerator.autocast()

    def loss_scale(self) -> LossScale | None:
        """Return a scale for the losses of a model, which float16 alone needs."""
        return LossScale() if self.dtype == torch.float16 else None

    def backward(self, loss: Tensor, scale: LossScale | None = None) -> None:
        """Accumulate gradients, of `scale` times the loss."""
        self.accelerator.backward(loss if scale is None else loss * scale.value)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Keep gradients on their rank until the last micro-batch of a step; of shared weights, each keeps its part."""
        if last or self.world == 1 or self.sharded:
            return nullcontext()
        return self.accelerator.no_sync(model)

    def total(self, *values: Tensor | float) -> Tensor:
        """Return the sums of n scalars over the ranks, (n,) float32 on the device."""
        there = [v if isinstance(v, Tensor) else torch.full((), v, device=self.device) for v in values]
        return self.sum(torch.stack([value.detach().float().to(self.device) for value in there]))

    def updates_without_waiting(self, optimizer: Optimizer) -> bool:
        """Return whether `step` leaves it to the device whether it updates, so that its outcome can be read later."""
        late = self.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        return late and not self.sharded  # never tried with parts of weights

    def step(
        self,
        optimizer: Optimizer,
        total: Tensor,
        weight: Tensor,
        *,
        clip: float | None,
        before: Tensor | None = None,
        loss_scale: LossScale | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Go on by the mean of a step's losses: scale and clip the gradients, update, clear.

        Nothing is updated where the mean, the norm of the gradient or `before` is not finite. Where the gradient alone
        overflows under a loss scale, the step is skipped, and its norm is 0.

        Args:
            optimizer: whose gradients are those of `total`, as a mean over the ranks.
            total: sum of losses over all ranks, ().
            weight: what to divide it by, (); 0: there is nothing to learn.
            clip: highest norm of the gradient, or None.
            before: the norm of the last step, if it may not be known yet.
            loss_scale: by which the gradients are too large; it is updated.

        Returns:
            The mean, and the norm of the gradient before clipping, NaN where the mean is not finite: () float64.
        """
        late = self.updates_without_waiting(optimizer)
        if not late:
            total, weight = total.cpu(), weight.cpu()  # before float64, which MPS lacks
        total, weight = total.double(), weight.double()
        mean, scale = (torch.where(weight != 0, value / weight, 0.0) for value in (total, self.world))
        if loss_scale is not None:
            scale = scale / loss_scale.value.to(scale.device).to(scale.dtype)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scale_gradients(parameters, scale)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf")))
        norm = norm.to(mean.device).to(mean.dtype)  # one after the other: MPS has no float64
        finite = mean.isfinite() & norm.isfinite()
        skipped = torch.zeros_like(finite)
        if loss_scale is not None:
            skipped = loss_scale.overflows(mean, norm)
            loss_scale.update(skipped)
            norm = norm.masked_fill(skipped, 0.0)
        if before is not None:
            finite &= before.isfinite()
        if late:
            vars(optimizer).update(grad_scale=None, found_inf=(~finite).float())  # as torch's GradScaler tells it
        if late or finite:
            optimizer.step()
        if late or finite or skipped:
            optimizer.zero_grad(set_to_none=True)
        return mean, norm.where(mean.isfinite(), math.nan)

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the values of all ranks, one list after the other."""
        from accelerate.utils import gather_object

        self._join()
        return gather_object(values)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the exact sum over ranks (integers stay integers)."""
        self._join()
        return self.accelerator.reduce(tensor, reduction="sum")

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        from accelerate.utils import broadcast_object_list

        self._join()
        return broadcast_object_list([value])[0]

    def decided(self, by: Callable[[], T]) -> T:
        """Return what rank 0 alone finds, on every rank."""
        return self.share(by() if self.is_main else None)

    def wait(self) -> None:
        """Return when every rank has come here."""
        self._join()
        self.accelerator.wait_for_everyone()

    def _join(self) -> None:
        if self._lockstep is not None:
            self._lockstep.join()

    def close(self) -> None:
        """Leave the process group, where this engine is in one."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


_ALIKE = r"(?s)Grad strides do not match bucket view strides.*grad\.sizes\(\) = \[(1,|\d+, \d+, 1, 1\])"


def meet(device: torch.device, seconds: float, at_work: float) -> None:
    """Join the group of ranks that the environment names (`WORLD_SIZE`, `MASTER_ADDR` ...), if it names any.

    Args:
        device: what the ranks compute on, which decides how they talk.
        seconds: that they wait for one another.
        at_work: seconds that they wait for one another later; then torch ends those that wait.

    Raises:
        UserError: the first one cannot be reached, or some of the others do not come.
    """
    distributed, world = torch.distributed, os.environ.get("WORLD_SIZE", "1")
    if device.type == "mps" and (world != "1" or distributed.is_initialized()):
        raise UserError(
            f"engine.devices={world}: torch trains on MPS in one process alone. Give engine.devices=1, or "
            "engine.device=cpu to train in several processes on the processor."
        )
    if world == "1" or distributed.is_initialized():
        return
    # DDP's, of tokens (1, N, C) before a rank's only sample, to be part of a larger gradient costs nothing; and of
    # convolutions of a single pixel, whose channels lie one after another in either layout
    warnings.filterwarnings("ignore", _ALIKE)
    place, rank = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", os.environ.get("RANK")
    try:
        store, number, ranks = next(distributed.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        patience = timedelta(seconds=at_work)
        store.set_timeout(patience)
        # torchrun keeps its store when it starts ranks again, and with it addresses of those that are dead
        store = distributed.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=patience)
    except (distributed.DistError, ValueError) as error:  # ValueError: a variable that is missing or no number
        said = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(
            f"Rank {rank} of {world} did not meet the others at {place} within {seconds:g} s ({said}). Look whether "
            "all ranks were started, and whether MASTER_ADDR is the first one's machine, reached by that name and port "
            "from all others; slow starts get more time by engine.rendezvous_timeout."
        ) from error
