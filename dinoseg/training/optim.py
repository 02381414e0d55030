"""Parameter groups, learning rates as pure functions of the step, and a moving average of the weights."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinoseg.models.model import SegmentationModel, trained_names
from dinoseg.training.sharding import full_tensor, local_part
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import HighShare, LearningRate, LowShare, NotNegative, OpenShare, RateFactor, Share

logger = logging.getLogger(__name__)
_WITHOUT_DECAY = (  # kinds of modules with weights of several axes that scale or look up, and multiply no vector
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
LayerDecayRule = Literal["beit", "eomt", "eomt_joint"]
ScheduleKind = Literal["constant", "cosine", "poly", "exponential", "one_cycle"]
_MIN_PAST_WARMUP = 0.2  # share of the steps
_FUSED = ("cpu", "cuda", "mps")  # devices with fused AdamW kernels
_RISE = 0.1  # share of the training in which late groups ramp up to their rate


def parameter_groups(
    model: SegmentationModel,
    *,
    lr: float,
    weight_decay: float,
    backbone_lr: float | None = None,
    backbone_lr_scale: float = 1.0,
    layer_decay: float | None = None,
    layer_decay_rule: LayerDecayRule = "beit",
    weight_decay_on: Literal["matrices", "all"] = "matrices",
    freeze_backbone_until: float = 0.0,
) -> list[dict]:
    """Return optimizer groups in which every trainable parameter occurs exactly once.

    Weight decay applies to all parameters with `weight_decay_on="all"`, and with "matrices" to those of
    `weight_matrices`.

    Backbone parameters are trained at `backbone_lr` (`lr` if None) times `backbone_lr_scale`, all others at `lr`.
    `layer_decay` d multiplies the backbone's rates by a power of d, for block i (0-based) of n, and for parameters
    before the blocks:

    - `layer_decay_rule="beit"`: d^(n - i) and d^(n + 1) (BEiT, arXiv 2106.08254).
    - `layer_decay_rule="eomt"`: d^(n - 1 - i) and d^(n - 1) (tue-mps/eomt, training/lightning_module.py).
    - `layer_decay_rule="eomt_joint"`: the same, but 1 in the last blocks, which the head's queries join
      (`llrd_l2_enabled: False` there).

    n counts the blocks that are read, or the stages of a pyramid. The final norm is trained at the rate without decay.

    The modules that a head lists in `delayed_modules` start at its share of the training, the backbone at
    `freeze_backbone_until`.

    Returns:
        Groups in the model's order, with `params`, `names`, `lr`, `base_lr` and `weight_decay`. `frozen_until` is the
        share of the training before which they are not trained. `backbone` states whether they belong to the backbone,
        which has no gradients until then.
    """
    backbone_lr = lr if backbone_lr is None else backbone_lr
    of_backbone = {id(parameter) for parameter in model.backbone.parameters()}
    above = {} if layer_decay is None else _layers_above(model, layer_decay_rule)
    decayed = weight_matrices(model) if weight_decay_on == "matrices" else {*model.parameters()}
    delayed_start, parts = model.head.delayed_modules
    delayed = {id(parameter) for part in parts for parameter in part.parameters()}
    groups: dict[tuple[float, ...], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, backbone = lr, id(parameter) in of_backbone
        if backbone:
            rate = backbone_lr * backbone_lr_scale
            if layer_decay is not None:
                rate *= layer_decay ** above[id(parameter)]
        decay = weight_decay if parameter in decayed else 0.0
        frozen_until = freeze_backbone_until if backbone else delayed_start if id(parameter) in delayed else 0.0
        values = {"base_lr": rate, "weight_decay": decay, "frozen_until": frozen_until, "backbone": backbone}
        # parameters of equal values share a group: an optimizer launches its kernels group by group
        group = groups.setdefault((*values.values(),), {"params": [], "names": [], "lr": rate, **values})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def weight_matrices(model: SegmentationModel) -> set[nn.Parameter]:
    """Return the parameters that multiply features: weights of convolutions, linear layers, attention and GRUs.

    Such a parameter is called a weight, as in PyTorch, has two or more axes, and is not that of a norm or an embedding.
    Whatever has another name is none, whatever its axes: tokens, positions and tables of relative positions, scales of
    layers, of logits and of attention. Weights in `Backbone.undecayed` are left out, such as those that map relative
    positions to biases in Swin v2.
    """
    exempt = {parameter for name, parameter in model.backbone.named_parameters() if name in model.backbone.undecayed}
    matrices = {
        parameter
        for module in model.modules()
        if not isinstance(module, _WITHOUT_DECAY)
        for name, parameter in module.named_parameters(recurse=False)
        if "weight" in name and parameter.ndim >= 2
    }
    return matrices - exempt


def adamw(
    model: SegmentationModel,
    *,
    lr: LearningRate | None = None,
    head_lr: LearningRate | None = None,
    backbone_lr: LearningRate | None = None,
    weight_decay: NotNegative = 0.01,
    betas: tuple[LowShare, LowShare] = (0.9, 0.999),
    backbone_lr_scale: RateFactor = 1.0,
    layer_decay: HighShare | None = None,
    layer_decay_rule: LayerDecayRule = "beit",
    weight_decay_on: Literal["matrices", "all"] = "matrices",
    freeze_backbone_until: LowShare = 0.0,
) -> Optimizer:
    """Return an AdamW optimizer (Loshchilov and Hutter, arXiv 1711.05101) over `parameter_groups`.

    With `lr`, all trainable parameters use it. Without it, the head uses `head_lr` and the backbone `backbone_lr`.
    The backbone is trained from `freeze_backbone_until` on, a share of the training. Before that, the head is trained
    on features that do not change (Kumar et al., arXiv 2202.10054).

    Raises:
        UserError: no learning rate is set.
    """
    rate, backbone_rate = (head_lr, backbone_lr) if lr is None else (lr, None)
    if rate is None:
        raise UserError("optim.optimizer.lr is not set: give a learning rate, such as 1e-3.")
    groups = parameter_groups(
        model,
        lr=rate,
        backbone_lr=backbone_rate,
        weight_decay=weight_decay,
        backbone_lr_scale=backbone_lr_scale,
        layer_decay=layer_decay,
        layer_decay_rule=layer_decay_rule,
        weight_decay_on=weight_decay_on,
        freeze_backbone_until=freeze_backbone_until,
    )
    fused = all(parameter.device.type in _FUSED for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), fused=fused)


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], scale: Tensor) -> None:
    """Multiply the gradients of `parameters` by `scale` (), in one call per dtype."""
    for (gradients,) in _by_dtype(
        [local_part(parameter.grad)] for parameter in parameters if parameter.grad is not None
    ):
        first = gradients[0]
        torch._foreach_mul_(gradients, scale.to(first.dtype).to(first.device))  # MPS has no float64


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Clip the gradients of `parameters` to a norm of at most `max_norm`; return the norm before, ()."""
    return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


class Schedule(Protocol):
    """Multiplier of the base learning rates as a function of the 0-based step and the number of steps."""

    def __call__(self, step: int, steps: int, backbone: bool = False, /) -> float:
        """Return the multiplier of the backbone's rates, or of all other rates."""
        ...


def schedule(
    kind: ScheduleKind = "cosine",
    *,
    warmup: NotNegative = 0,
    warmup_start: Share | None = None,
    warmup_decays: bool = False,
    backbone_warmup: NotNegative | None = None,
    power: NotNegative = 0.9,
    min_lr_ratio: Share = 0.0,
) -> Schedule:
    """Return `factor(step, steps, backbone)`, the multiplier of the learning rates at a 0-based step.

    In the warm-up of w steps, the factor rises linearly: f + (1 - f) step / w. After it, the factor falls from 1 to
    `min_lr_ratio` m, which would be reached at step = steps, as a function of p = (step - w) / (steps - w):

    - `constant`: 1.
    - `cosine`: m + (1 - m) (1 + cos(pi p)) / 2.
    - `poly`: m + (1 - m) (1 - p)^power.
    - `exponential`: m^p.
    - `one_cycle`: of DINOv3's linear probe (facebookresearch/dinov3, dinov3/eval/segmentation/schedulers.py). It lags
      by a step, s = max(0, step - 1). The warm-up at s is multiplied by 1 - s / steps. After it, the factor is that of
      `cosine` at p = (s + 1) / steps.

    Args:
        kind: shape of the decay.
        warmup: length w, as a share of the training (a float below 1) or a number of steps (an int).
        warmup_start: f, the factor of the first step; None: 1 / (w + 1).
        warmup_decays: let the decay start at step 0, with p = step / steps, and multiply the warm-up (open-mmlab/mmcv
            1.5, mmcv/runner/hooks/lr_updater.py). `one_cycle` is the same with and without it.
        backbone_warmup: length of a second warm-up, for the backbone, which follows the first (tue-mps/eomt,
            training/two_stage_warmup_poly_schedule.py). The backbone's factor is 0 before it and decays from its end
            on. None: the backbone has the same factor as the head.
        power: exponent of `poly`.
        min_lr_ratio: m, the final factor.

    Raises:
        UserError: a warm-up is a float of 1 or more, or `exponential` falls to 0.
    """
    for key, length in (("warmup", warmup), ("backbone_warmup", backbone_warmup)):
        if isinstance(length, float) and length >= 1:
            raise UserError(
                f"optim.schedule.{key}={length}: give a share of the steps from 0 to below 1, such as 0.1, or a whole "
                "number of steps."
            )
    if kind == "exponential" and min_lr_ratio == 0:
        raise UserError(
            "optim.schedule.min_lr_ratio=0: kind=exponential never reaches 0. Give the final share of the learning "
            "rate, a number above 0, such as 0.5."
        )

    def cosine(done: float) -> float:
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    decay = {
        "constant": lambda done: 1.0,
        "cosine": cosine,
        "poly": lambda done: min_lr_ratio + (1 - min_lr_ratio) * (1 - done) ** power,
        "exponential": lambda done: min_lr_ratio**done,
        "one_cycle": cosine,
    }[kind]
    lag = int(kind == "one_cycle")
    during_warmup = (lambda done: 1 - done) if lag else decay if warmup_decays else (lambda done: 1.0)

    def factor(step: int, steps: int, backbone: bool = False, /) -> float:
        # DINOv3's scheduler is not stepped after the first update, so that update i has the rate of max(0, i - 1)
        now, begin, end = max(0, step - lag), 0, _count_steps(warmup, steps)
        if backbone and backbone_warmup is not None:
            begin, end = end, end + _count_steps(backbone_warmup, steps)
        # the backbone waits until the warm-up of the head is over (tue-mps/eomt)
        if now < begin:
            return 0.0
        if now < end:
            # the default is (step + 1) / (w + 1) during the warm-up: no update is lost at a rate of 0
            first = 1 / (end - begin + 1) if warmup_start is None else warmup_start
            risen = first + (1 - first) * (now - begin) / (end - begin)
            return risen * during_warmup(now / steps)
        origin = 0 if lag or warmup_decays else end
        return decay((now + lag - origin) / max(1, steps - origin))

    return factor


def _count_steps(length: float, steps: int) -> int:
    """Return a length in steps, which is given as a share of them (a float) or in steps (an int)."""
    return length if isinstance(length, int) else round(length * steps)


def warn_of_long_warmup(steps: int, warmup: float, backbone_warmup: float = 0) -> None:
    """Warn if the warm-ups, which follow each other, leave less than a fifth of the steps at the full rate.

    Each is a share of the steps (a float) or a number of them (an int).
    """
    length = _count_steps(warmup, steps) + _count_steps(backbone_warmup, steps)
    if steps - length < _MIN_PAST_WARMUP * steps:
        logger.warning(
            "The learning rate rises for %d steps of a training of %d. Set optim.schedule.%s to a share of the length, "
            "such as 0.1, or more trainer.steps.",
            length,
            steps,
            "backbone_warmup" if backbone_warmup else "warmup",
        )


def set_learning_rates(optimizer: Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """Set each group's rate to its base rate times the schedule's factor, and return the highest rate.

    Groups of the head that start late ramp up linearly to their rate. Their moments include all steps before; moments
    of their own first steps alone would make updates several times too large.

    Args:
        optimizer: over `parameter_groups`.
        schedule: which may warm up the groups of the backbone after the others.
        step: 0-based number of the step.
        steps: length of the training.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * schedule(step, steps, group["backbone"])
        if group["frozen_until"] and not group["backbone"]:
            group["lr"] *= min(1.0, max(0.0, (step / steps - group["frozen_until"]) / _RISE))
    return max(group["lr"] for group in optimizer.param_groups)


class MovingAverage:
    """Exponential moving average of the trainable weights and of the floating-point buffers that training changes."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: OpenShare) -> None:
        self.decay = decay
        self.live = dict(named)
        self.average = {name: value.detach().clone() for name, value in self.live.items()}

    def decay_at(self, step: int) -> float:
        """Return the decay after a 0-based step: at most (1 + step) / (10 + step).

        This bound lowers the decay in the first steps; otherwise the initial weights would stay in the average long.
        """
        # the bound of TensorFlow's ExponentialMovingAverage (`num_updates`)
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the live weights by 1 - `decay_at(step)`."""
        share = 1 - self.decay_at(step)
        for averages, values in self._pairs():
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, values, share)
            else:
                torch._foreach_copy_(averages, values)

    @contextmanager
    def use_average(self) -> Iterator[None]:
        """Swap the average into the model within the block, and restore the weights however it ends."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # one tensor at a time: a copy of all weights may not fit into memory
        for averages, values in self._pairs():
            for average, value in zip(averages, values, strict=True):
                trained = value.clone()
                value.copy_(average)
                average.copy_(trained)

    def _pairs(self) -> Iterator[tuple[list[Tensor], ...]]:
        """Yield the averages and the live tensors of each dtype."""
        return _by_dtype([local_part(self.average[name]), local_part(value)] for name, value in self.live.items())


def build_ema(model: SegmentationModel, decay: float | None) -> MovingAverage | None:
    """Return a moving average of the tensors of a model that training changes; None without a decay."""
    return MovingAverage(tensors_of(model, trained_names(model)), decay) if decay else None


def _by_dtype(rows: Iterable[Sequence[Tensor]]) -> Iterator[tuple[list[Tensor], ...]]:
    """Group rows by the dtype of their first tensor and yield each group's columns; fused kernels need one dtype."""
    groups: dict[torch.dtype, list[Sequence[Tensor]]] = {}
    for row in rows:
        groups.setdefault(row[0].dtype, []).append(row)
    yield from (tuple(map(list, zip(*group, strict=True))) for group in groups.values())


def tensors_of(model: nn.Module, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's live tensors of these names, in the order of its state dict."""
    yield from ((name, value) for name, value in model.state_dict(keep_vars=True).items() if name in names)


def _layers_above(model: SegmentationModel, rule: LayerDecayRule) -> dict[int, int]:
    """Return the number of layers between a backbone parameter and the head, by parameter ID, as a rule counts them."""
    backbone, blocks = model.backbone, list(model.backbone.blocks)
    # the head is a layer above the last block, and what lies before the blocks one below the first
    extra = int(rule == "beit")
    joint = len(blocks) - model.head.joint_blocks if rule == "eomt_joint" else len(blocks)
    above = {id(parameter): max(0, len(blocks) - 1 + 2 * extra) for parameter in backbone.parameters()}
    for number, block in enumerate(blocks):
        layers = len(blocks) - 1 - number + extra if number < joint else 0
        above |= {id(parameter): layers for parameter in block.parameters()}
    last = [] if backbone.norm is None else backbone.norm.parameters()
    return above | {id(parameter): 0 for parameter in last}
