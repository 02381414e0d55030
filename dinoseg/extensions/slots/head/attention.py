"""Slot attention: slots compete for tokens, and each is updated from the tokens it won."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoseg.extensions.slots.head.predictor import check_heads
from dinoseg.extensions.slots.head.transformer import NUM_HEADS, zero_biases
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import at_least_float32
from dinoseg.utils.ranges import NotNegative, Positive

SlotInit = Literal["gaussian", "clusters", "learned"]
_EPSILON = 1e-6  # avoids 0 / 0 for a slot that won no token
_EVAL_SEED = 0  # seed of the initial slots in eval mode
_CLUSTER_SCALE = 1.5  # scale of initial cluster logits: 1.5 sqrt(D) for a token's own slot, less for others
_CLUSTER_STD = 0.13  # standard deviation of the noise added to the tokens that initialise clusters
Groups = Literal["off", "initial", "always"]
TimeDecoder = Literal["none", "linear", "attention"]


def slot_weights(queries: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the assignment of tokens to slots (B, S, N): a softmax over the slots of the scaled dot products.

    Args:
        queries: of the slots (B, S, D).
        keys: of the tokens (B, N, D).
        allowed: which tokens each slot may attend to (B, S, N), bool, True = may. Tokens without a slot get zeros.
    """
    scaled = queries / math.sqrt(queries.shape[-1])  # before the product, to avoid overflow in half precision
    logits = at_least_float32(scaled @ keys.mT)  # (B, S, N)
    if allowed is None:
        # Eq. 1 of the paper. A transformer's softmax runs over the tokens; over the slots, they compete for each token.
        return logits.softmax(dim=1)
    # finite minimum instead of -inf: avoids 0 / 0 for tokens without any allowed slot
    masked = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return masked.softmax(dim=1).masked_fill(~allowed, 0)


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al., arXiv 2006.15055) with initial slots sampled from one learned Gaussian.

    The variants of VideoSAUR and SlotContrast (martius-lab/slotcontrast, slotcontrast/modules/groupers.py) are
    `norm_state`, `weight_floor`, `reference_init`, an initial standard deviation, and one parameter per slot.

    A GRU cell and a residual MLP update the slots; gradients pass through all iterations. Slots stay in float32 under
    autocast, since they are passed from frame to frame. Queries and keys are initialised to a variance of one, as in
    the paper's code. Torch's default gives a third: logits nine times smaller, which keep slots alike for longer.

    Args:
        in_dim: width of the tokens.
        slot_dim: D.
        hidden_dim: hidden width of the MLP; None: no MLP.
        num_groups: more than one adds a learned offset of mean and log-variance for each group.
        variance_as_std: use exp(log-variance) as the standard deviation itself, not its square.
        slot_init: initial slots: `gaussian` samples; `learned`, one parameter for each of `num_slots`; or `clusters`,
            samples plus a learned projection of mutually distant tokens (`distant_tokens`). For `clusters`, the weights
            are initialised as a soft k-means: slots, keys and values share one projection of tokens, and a slot becomes
            the mean of itself and of the tokens it won. Slots thus differ from the first step on, instead of being
            alike for hundreds of steps.
        num_slots: S, needed for `learned`.
        initial_std: standard deviation of the Gaussian before training, whose mean is then 0, or of the learned slots.
            None: a random mean and log-variance (Xavier initialisation), or 1 / sqrt(D) for learned slots. Groups add
            their offsets to it; `clusters` does not take it.
        norm_state: pass the layer-normed slots to the GRU cell as its state, not the slots themselves.
        weight_floor: number added to the weights of a slot before they are divided by their sum over the tokens.
        reference_init: initialise queries and keys as torch does by default, and the biases of the MLP to 0.
    """

    def __init__(
        self,
        in_dim: int,
        slot_dim: int,
        hidden_dim: int | None,
        *,
        num_groups: int = 1,
        variance_as_std: bool = False,
        slot_init: SlotInit = "gaussian",
        num_slots: int = 1,
        initial_std: Positive | None = None,
        norm_state: bool = False,
        weight_floor: NotNegative = 0.0,
        reference_init: bool = False,
    ) -> None:
        super().__init__()
        if slot_init == "clusters" and initial_std is not None:
            raise UserError(
                f"initial_std={initial_std} has no effect with slot_init=clusters, whose noise is fixed. Set "
                "initial_std=null, or slot_init=gaussian."
            )
        self.exponent = 1.0 if variance_as_std else 0.5
        self.norm_tokens = nn.LayerNorm(in_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_state, self.weight_floor = norm_state, weight_floor
        self.learned_slots: nn.Parameter | None = None  # learned slots (1, S, D)
        if slot_init == "learned":
            self.learned_slots = nn.Parameter(torch.randn(1, num_slots, slot_dim) * (initial_std or slot_dim**-0.5))
        else:
            self.mean = _gaussian_part(1, slot_dim)
            self.log_variance = _gaussian_part(1, slot_dim)
            if initial_std is not None:
                nn.init.zeros_(self.mean)
                nn.init.constant_(self.log_variance, math.log(initial_std) / self.exponent)
        is_grouped = num_groups > 1 and slot_init != "learned"
        self.group_mean = _gaussian_part(num_groups, slot_dim) if is_grouped else None
        self.group_log_variance = _gaussian_part(num_groups, slot_dim) if is_grouped else None
        self.query = nn.Linear(slot_dim, slot_dim, bias=False)
        self.key = nn.Linear(in_dim, slot_dim, bias=False)
        for projection in () if reference_init else (self.query, self.key):
            nn.init.kaiming_uniform_(projection.weight, nonlinearity="linear")
        self.value = nn.Linear(in_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.norm_mlp = None if hidden_dim is None else nn.LayerNorm(slot_dim)
        self.mlp: nn.Sequential | None = None
        if hidden_dim is not None:
            self.mlp = nn.Sequential(nn.Linear(slot_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, slot_dim))
            if reference_init:
                zero_biases(self.mlp)
        self.cluster_init = nn.Linear(in_dim, slot_dim) if slot_init == "clusters" else None
        if self.cluster_init is not None:
            self._init_as_clusters(self.cluster_init)

    @torch.no_grad()
    def _init_as_clusters(self, cluster_init: nn.Linear) -> None:
        # one space for slots, keys and values: the dot product of slot and token is then their similarity
        for projection in (self.value, cluster_init):
            projection.weight.copy_(self.key.weight)
        nn.init.eye_(self.query.weight).mul_(_CLUSTER_SCALE)
        # only noise: what tells the slots apart is the tokens that `initial_slots` adds
        nn.init.zeros_(self.mean)
        nn.init.constant_(self.log_variance, math.log(_CLUSTER_STD) / self.exponent)
        # candidate gate
        input_weight, hidden_weight = (weight.chunk(3)[2] for weight in (self.gru.weight_ih, self.gru.weight_hh))
        nn.init.eye_(input_weight)
        last = [] if self.mlp is None else list(self.mlp[-1].parameters())
        biases = (bias.chunk(3)[2] for bias in (self.gru.bias_ih, self.gru.bias_hh))
        for parameter in (hidden_weight, *biases, cluster_init.bias, *last):
            nn.init.zeros_(parameter)

    def initial_slots(self, tokens: Tensor, sizes: Sequence[int], allowed: Tensor | None = None) -> Tensor:
        """Return the initial slots (B, S, D), with `sizes` slots per group.

        In train mode, noise is sampled from torch's global generator. In eval mode it is the same for every clip and
        call.

        Args:
            tokens: (B, N, in_dim).
            sizes: slots in each group.
            allowed: which tokens each slot may attend to (B, S, N), bool, True = may.

        Raises:
            UserError: another number of slots than the learned ones.
        """
        sampled = self._sample(len(tokens), sizes)
        if self.cluster_init is None:
            return sampled
        normed = self.norm_tokens(tokens)
        chosen = distant_tokens(normed, sum(sizes), allowed, random_first=self.training)
        return sampled + self.cluster_init(normed.take_along_dim(chosen[..., None], dim=1))

    def _sample(self, batch: int, sizes: Sequence[int]) -> Tensor:
        if self.learned_slots is not None:
            if sum(sizes) != self.learned_slots.shape[1]:
                raise UserError(
                    f"slot_init=learned of the slot head has {self.learned_slots.shape[1]} slots with one parameter "
                    f"each, but {sum(sizes)} slots are needed. Set slots=free, or train with slot_init=gaussian, which "
                    "supports any number of slots."
                )
            return self.learned_slots.expand(batch, -1, -1)
        mean: Tensor = self.mean  # (1, 1, D)
        log_variance: Tensor = self.log_variance
        if self.group_mean is not None and self.group_log_variance is not None:
            group = [number for number, size in enumerate(sizes) for _ in range(size)]
            mean = mean + self.group_mean[:, group]  # (1, S, D)
            log_variance = log_variance + self.group_log_variance[:, group]
        # exp(log-variance / 2) is the standard deviation; DINOSAVi takes exp(log-variance), the exponent 1
        return mean + (self.exponent * log_variance).exp() * self._noise(batch, sum(sizes))

    def forward(
        self, tokens: Tensor, slots: Tensor, iterations: int, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the slots (B, S, D) after some iterations, and the last iteration's `slot_weights` (B, S, N).

        Args:
            tokens: (B, N, in_dim).
            slots: initial slots (B, S, D).
            iterations: at least 1.
            allowed: which tokens each slot may attend to (B, S, N), bool, True = may. Tokens without a slot have no
                effect; slots without tokens are updated with zeros.
        """
        tokens = self.norm_tokens(tokens)
        # computed once: only the queries change between iterations
        keys, values = self.key(tokens), self.value(tokens)
        weights = slots.new_zeros(())
        for _ in range(iterations):
            normed = self.norm_slots(slots)
            weights = slot_weights(self.query(normed), keys, allowed)
            # Eq. 2, a weighted mean of the values: a sum would grow with the number of tokens that a slot wins
            slots = self._update(normed if self.norm_state else slots, self._normalise(weights) @ values)
        return slots, weights

    def _normalise(self, weights: Tensor) -> Tensor:
        """Return the weights (B, S, N) divided by their sum over the tokens."""
        if self.weight_floor == 0:
            # as DINOSAVi, which adds 1e-6 to the sum
            return weights / (weights.sum(dim=2, keepdim=True) + _EPSILON)
        # as VideoSAUR and SlotContrast, which add 1e-8 to each weight
        positive = weights + self.weight_floor
        return positive / positive.sum(dim=2, keepdim=True)

    def _update(self, state: Tensor, updates: Tensor) -> Tensor:
        # half precision would round the state in each iteration of each frame that slots are carried through
        with torch.autocast(state.device.type, enabled=False):
            state = at_least_float32(state)
            slots = self.gru(at_least_float32(updates).flatten(0, 1), state.flatten(0, 1)).view_as(state)
        return slots if self.mlp is None or self.norm_mlp is None else slots + self.mlp(self.norm_mlp(slots))

    def _noise(self, batch: int, count: int) -> Tensor:
        shape = (count, self.mean.shape[-1])
        if self.training:
            return torch.randn(batch, *shape, device=self.mean.device, dtype=self.mean.dtype)
        if self.mean.is_meta:
            return self.mean.new_empty(batch, *shape)
        # sampled once on the CPU for all clips: masks depend neither on the device nor on the rest of the batch
        fixed = torch.randn(shape, generator=torch.Generator().manual_seed(_EVAL_SEED), device="cpu")
        return fixed.to(self.mean).expand(batch, -1, -1)


@torch.no_grad()
def distant_tokens(tokens: Tensor, count: int, allowed: Tensor | None = None, *, random_first: bool = False) -> Tensor:
    """Return the indices (B, S) of mutually distant tokens: each is the farthest from all previous ones.

    This is farthest point sampling (Gonzalez, 1985) by Euclidean distance. The first token is the farthest from the
    mean of all tokens, or a random one with `random_first`.

    Args:
        tokens: (B, N, C).
        count: S.
        allowed: which tokens each slot may take (B, S, N), bool, True = may; a slot without any takes the first
            token.
        random_first: sample the first token from torch's global generator.
    """
    tokens = at_least_float32(tokens)
    mean = tokens.mean(1, keepdim=True)
    distance = torch.rand_like(tokens[..., 0]) if random_first else torch.cdist(tokens, mean).squeeze(2)  # (B, N)
    chosen = []
    for slot in range(count):
        candidates = distance if allowed is None else distance.masked_fill(~allowed[:, slot], -1.0)
        chosen.append(candidates.argmax(1, keepdim=True))
        # N distances for each slot: those to earlier tokens are in `distance`, and pairs of tokens would take N^2
        to_last = torch.cdist(tokens, tokens.take_along_dim(chosen[-1][..., None], dim=1)).squeeze(2)
        # the distance to the mean, or the random number, only chose the first token
        distance = to_last if slot == 0 else torch.minimum(distance, to_last)
    return torch.cat(chosen, dim=1)


def _gaussian_part(groups: int, dim: int) -> nn.Parameter:
    """Return a parameter (1, groups, dim), each row with the Xavier initialisation of shape (1, 1, dim)."""
    bound = math.sqrt(3 / dim)
    return nn.Parameter(torch.empty(1, groups, dim).uniform_(-bound, bound))


def check_enough_cells(num_slots: int, grid: tuple[int, int]) -> None:
    """Refuse more slots than cells in the grid."""
    cells = grid[0] * grid[1]
    if num_slots > cells:
        raise UserError(
            f"num_slots={num_slots} of the slot head exceeds the {grid[0]} x {grid[1]} = {cells} cells of a frame. Set "
            f"num_slots={cells} or fewer, or enlarge the frames."
        )


class Standardiser(nn.BatchNorm2d):
    """Standardise channels of features (B, C, h, w): by the batch in training, by running statistics in eval mode.

    The running statistics are the mean over all training batches with equal weight, since frozen features do not
    change during training. `momentum=None` of BatchNorm gives the same, but reads its batch counter in each step and
    so synchronises with the device; this class does not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False, momentum=None)

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardised features.

        Raises:
            UserError: a training batch has a single cell.
        """
        if not self.training:
            return super().forward(features)
        if features.numel() == self.num_features:
            raise UserError(
                "standardise=true of the slot head computes mean and variance over the cells of a batch, but this "
                "batch has a single cell. Give larger batches or crops, or set standardise=false."
            )
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and variance is not None and count is not None  # running stats are enabled
        with torch.no_grad():
            of_batch = torch.var_mean(at_least_float32(features), (0, 2, 3))
            count += 1
            for running, now in zip((variance, mean), of_batch, strict=True):
                running.lerp_(now.to(running.dtype), count.to(running.dtype).reciprocal())
        return F.batch_norm(features, None, None, training=True, eps=self.eps)


def slot_sizes(num_slots: int | Sequence[int], groups: str) -> list[int]:
    """Return the number of slots in each group; a single group if groups are off."""
    sizes = [num_slots] if isinstance(num_slots, int) else list(num_slots)
    given_text = str(sizes).replace(" ", "") if not isinstance(num_slots, int) else num_slots
    if min(sizes, default=0) < 1:
        raise UserError(f"num_slots={given_text}: give at least 1 slot; with groups, two such numbers.")
    if groups == "off" and not isinstance(num_slots, int):
        raise UserError(
            f"num_slots={given_text} with groups=off: without groups give one number, such as "
            f"num_slots={sum(sizes)}, or set groups=initial or always."
        )
    if groups != "off" and len(sizes) != 2:
        raise UserError(
            f"num_slots={given_text} with groups={groups}: give the numbers of background and of foreground "
            f"slots, such as num_slots=[5,5]."
        )
    return sizes


def allowed_cells(background: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return which cells each slot may attend to (B, S, h, w), bool, True = may.

    Args:
        background: background mask (B, h, w), bool.
        sizes: number of background and of foreground slots, in the order of the output.
    """
    cells = background[:, None]
    num_background, num_foreground = sizes
    return torch.cat([cells.expand(-1, num_background, -1, -1), ~cells.expand(-1, num_foreground, -1, -1)], dim=1)


def resolve_steps(steps: int | Sequence[int]) -> list[int]:
    """Return the offsets in frames: 0 to n for a number n, a list unchanged.

    Raises:
        UserError: no offset, a negative one, or a duplicate.
    """
    offsets = list(range(steps + 1)) if isinstance(steps, int) else list(steps)
    if not offsets or min(offsets) < 0 or len(set(offsets)) < len(offsets):
        raise UserError(
            f"steps={steps}: give the last frame to reconstruct, counted from the input frame (0 = only that "
            "frame), or a list of such numbers, 0 or more, each once."
        )
    return offsets


class SlotSelfAttention(nn.Module):
    """Self-attention of slots, without residual or norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, NUM_HEADS, batch_first=True)

    def forward(self, slots: Tensor) -> Tensor:
        """Return updated slots (B, S, D)."""
        return self.attention(slots, slots, slots, need_weights=False)[0]


def make_time_decoders(kind: TimeDecoder, dim: int, count: int) -> nn.ModuleList:
    """Return a module from slots (B, S, D) to slots for each of `count` steps.

    Raises:
        UserError: a width not divisible by the attention heads.
    """
    if kind == "attention":
        check_heads(dim, f"time_decoder={kind}")
        return nn.ModuleList(SlotSelfAttention(dim) for _ in range(count))
    return nn.ModuleList(nn.Linear(dim, dim) if kind == "linear" else nn.Identity() for _ in range(count))
