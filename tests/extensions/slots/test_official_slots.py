"""Slot heads and losses of SlotContrast and VideoSAUR against their formulas, written out in float64 numpy."""

from functools import partial

import numpy as np
import pytest
import torch
from mistakes import refusals
from slot_formulas import gru, linear, norm, relu, softmax

from dinoseg.core.contracts import Backbone
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.extensions.slots.head.attention import SlotAttention
from dinoseg.extensions.slots.head.head import SlotHead
from dinoseg.extensions.slots.losses.feature_reconstruction import FeatureReconstruction
from dinoseg.extensions.slots.losses.slot_contrast import SlotContrast
from dinoseg.extensions.slots.losses.temporal_similarity import TemporalSimilarity
from dinoseg.losses.weighted_sum import WeightedSum

DIM = 6
COMMON = {
    **{"slot_dim": 8, "decoder_dim": 9, "iterations": 2, "first_iterations": 3, "token_mlp": True},
    **{"norm_state": True, "weight_floor": 1e-8, "reference_init": True, "predictor": "transformer"},
    **{"positions": "added", "output_norm": False, "mask_source": "alpha"},
}
SLOT_CONTRAST = COMMON | {"slot_init": "learned", "hidden_dim": 32}
VIDEOSAUR = COMMON | {
    **{"slot_init": "gaussian", "initial_std": 8**-0.5, "variance_as_std": True, "hidden_dim": None},
    **{"decoder": "slot_mixer", "similarity": True, "similarity_of": "keys"},
}
ONLY_SIMILARITY = VIDEOSAUR | {"reconstruct": False, "mixer_blocks": 2, "decoder_depth": 5}  # on MOVi
BOTH = VIDEOSAUR | {"mixer_blocks": 3, "decoder_depth": 4}  # on YouTube-VIS
TEMPERATURES = {"similarity": 0.075, "both": 0.25}


def block(x, memory, w, name):
    """Pre-norm attention and MLP; the logits are multiplied by the root of a head's width."""
    normed = norm(x, w, f"{name}.norm_attention")
    memory = normed if memory is None else memory
    q, k, v = (
        linear(part, w, f"{name}.attention.{which}")
        for part, which in ((normed, "query"), (memory, "key"), (memory, "value"))
    )
    heads = 4
    width = q.shape[-1] // heads
    seen = [
        softmax(q[..., part] @ np.swapaxes(k[..., part], -1, -2) * np.sqrt(width), -1) @ v[..., part]
        for part in (slice(h * width, (h + 1) * width) for h in range(heads))
    ]
    x = x + linear(np.concatenate(seen, -1), w, f"{name}.attention.out")
    inner = relu(linear(norm(x, w, f"{name}.norm_mlp"), w, f"{name}.mlp.0"))
    return x + linear(inner, w, f"{name}.mlp.2")


def correct(slots, tokens, w, iterations):
    name = "slot_attention"
    tokens = norm(tokens, w, f"{name}.norm_tokens")
    keys, values = linear(tokens, w, f"{name}.key"), linear(tokens, w, f"{name}.value")
    for _ in range(iterations):
        slots = norm(slots, w, f"{name}.norm_slots")
        logits = linear(slots, w, f"{name}.query") @ np.swapaxes(keys, -1, -2) * slots.shape[-1] ** -0.5
        weights = softmax(logits, 1) + 1e-8
        slots = gru(weights / weights.sum(-1, keepdims=True) @ values, slots, w, f"{name}.gru")
        if f"{name}.mlp.0.weight" in w:
            inner = relu(linear(norm(slots, w, f"{name}.norm_mlp"), w, f"{name}.mlp.0"))
            slots = slots + linear(inner, w, f"{name}.mlp.2")
    return slots


def decode_mlp(slots, w):
    positions = w["decoder.positions.table"].reshape(slots.shape[-1], -1).T  # (N, D)
    hidden = slots[:, :, None] + positions  # (B, S, N, D)
    for layer in range(3):
        hidden = relu(linear(hidden, w, f"decoder.layers.{layer}"))
    outputs = linear(hidden, w, "decoder.layers.3")
    masks = softmax(outputs[..., -1:], 1)
    return (outputs[..., :-1] * masks).sum(1), masks[..., 0]


def decode_mixer(slots, w, blocks, hidden_layers):
    positions = w["decoder.positions.table"].reshape(slots.shape[-1], -1).T
    cells = np.broadcast_to(positions, (len(slots), *positions.shape))
    memory = norm(slots, w, "decoder.norm_memory")
    for number in range(blocks):
        cells = block(cells, memory, w, f"decoder.blocks.{number}")
    q = linear(norm(cells, w, "decoder.norm_query"), w, "decoder.query")
    k = linear(norm(slots, w, "decoder.norm_key"), w, "decoder.key")
    masks = softmax(q @ np.swapaxes(k, -1, -2) * slots.shape[-1] ** -0.5, -1)  # (B, N, S)
    hidden = masks @ slots + positions
    for layer in range(hidden_layers):
        hidden = relu(linear(hidden, w, f"decoder.mlp.{2 * layer}"))
    return linear(hidden, w, "decoder.last"), np.swapaxes(masks, -1, -2)


def run(features, w, start, decode):
    """Return slots (B, T, S, D), decoder outputs (B, T, N, C) and masks (B, T, S, N) for features (B, T, N, C)."""
    slots = start
    found = []
    for time in range(features.shape[1]):
        tokens = norm(features[:, time], w, "token_mlp.0")
        tokens = linear(relu(linear(tokens, w, "token_mlp.1")), w, "token_mlp.3")
        slots = correct(slots, tokens, w, 3 if time == 0 else 2)
        found.append((slots, *decode(slots, w)))
        slots = block(slots, None, w, "predictor")
    return [np.stack(part, 1) for part in zip(*found, strict=True)]


def contrast(slots):
    """For each slot of the next frame, softmax over the slots of this frame in all videos."""
    slots = slots / np.linalg.norm(slots, axis=-1, keepdims=True)
    flat = np.concatenate(list(slots), axis=1)  # (T, B S, D)
    logits = flat[:-1] @ np.swapaxes(flat[1:], 1, 2) / 0.1
    return -np.log(np.diagonal(softmax(logits, 1), axis1=1, axis2=2)).mean()


def time_similarity(logits, keys, temperature):
    """Cross-entropy over the cells of the next frame; a cell without similar ones has a uniform target."""
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    similarity = keys[:, :-1] @ np.swapaxes(keys[:, 1:], -1, -2)  # (B, T - 1, N, N)
    similarity = np.where(similarity < 0, -np.inf, similarity) / temperature
    similarity = np.where(np.isinf(similarity).all(-1, keepdims=True), 0, similarity)
    return -(softmax(similarity, -1) * np.log(softmax(logits[:, :-1], -1))).sum(-1).mean()


DECODERS = {  # of MOVi: two blocks and four hidden layers; of YouTube-VIS: three of both
    **{"contrast": decode_mlp, "similarity": partial(decode_mixer, blocks=2, hidden_layers=4)},
    **{"both": partial(decode_mixer, blocks=3, hidden_layers=3)},
}


def loss_of(kind, features, keys, w, start):
    slots, outputs, _ = run(features, w, start, DECODERS[kind])
    if kind == "contrast":
        return ((outputs - features) ** 2).mean() + 0.5 * contrast(slots)
    if kind == "similarity":
        return 0.1 * time_similarity(outputs, keys, 0.075)
    dim = features.shape[-1]
    return ((outputs[..., :dim] - features) ** 2).mean() + 0.1 * time_similarity(outputs[..., dim:], keys, 0.25)


class Maps(Backbone):
    """Given maps and keys."""

    dim, patch_size, num_layers, has_class_attention = DIM, 1, 1, True

    def __init__(self, features, keys):
        super().__init__()
        self.features, self.keys = features, keys

    def forward(self, images):
        return [self.features.flatten(0, 1)]

    def with_keys(self, images):
        return self(images), self.keys.flatten(0, 1)


def criterion(kind):
    contrasts = {"reconstruction": FeatureReconstruction, "contrast": lambda: SlotContrast(softmax_over="previous")}
    similar = {"similarity": lambda: TemporalSimilarity(TEMPERATURES[kind], unmatched="uniform")}
    if kind == "contrast":
        return WeightedSum(contrasts, {"reconstruction": 1.0, "contrast": 0.5})
    if kind == "similarity":
        return WeightedSum(similar, {"similarity": 0.1})
    return WeightedSum({"reconstruction": FeatureReconstruction, **similar}, {"reconstruction": 1.0, "similarity": 0.1})


def to_tokens(tensor):
    return tensor.detach().flatten(3).transpose(2, 3).numpy()  # (B, T, N, C)


KINDS = {"contrast": SLOT_CONTRAST, "similarity": ONLY_SIMILARITY, "both": BOTH}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("seed", "grid", "batch", "frames", "count"),
    [pytest.param(0, (3, 5), 2, 4, 3, marks=pytest.mark.heavy), (1, (2, 3), 2, 3, 5)],
)
def test_loss_masks_and_gradients_of_a_step_equal_the_formula(kind, seed, grid, batch, frames, count):
    torch.manual_seed(seed)
    head = SlotHead(DIM, 1, num_slots=count, positions_grid=grid, **KINDS[kind]).double().train()
    for name, parameter in head.named_parameters():
        if name.endswith("bias") or "norm" in name:  # which start at 0 and 1, where mistakes would not show
            torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(batch, frames, DIM, *grid, dtype=torch.float64)
    keys = torch.randn(batch, frames, 4, *grid, dtype=torch.float64)
    keys[0, 0, :, 0, 0], keys[0, 1] = -3.0, keys[0, 1].abs()  # a cell without any similar one
    torch.manual_seed(seed)
    noise = torch.randn(batch, count, 8, dtype=torch.float64)

    torch.manual_seed(seed)
    outputs = head.run(Maps(features, keys), torch.zeros(batch, frames, 3, *grid))
    label = Batch(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, 1, dtype=torch.uint8), ["a"])
    value = criterion(kind)(Prediction(outputs, grid, (1.0, 1.0), head.predict), label)[0]
    value.backward()

    weights = {name: each.detach().numpy().copy() for name, each in head.state_dict().items()}

    def formula(w):
        if "slot_attention.learned_slots" in w:
            return np.repeat(w["slot_attention.learned_slots"], batch, 0)
        return w["slot_attention.mean"] + noise.numpy() * np.exp(w["slot_attention.log_variance"])

    def expected_loss(w):
        return loss_of(kind, to_tokens(features), to_tokens(keys), w, formula(w))

    assert value.item() == pytest.approx(expected_loss(weights), rel=1e-10)
    masks = run(to_tokens(features), weights, formula(weights), DECODERS[kind])[2]
    assert outputs.alphas[0].detach().flatten(3).numpy() == pytest.approx(masks, rel=1e-8, abs=1e-12)
    rng = np.random.default_rng(seed)
    step = 1e-6
    checked = 0
    for name, parameter in head.named_parameters():
        way = rng.standard_normal(parameter.shape)
        ends = [expected_loss(weights | {name: weights[name] + sign * step * way}) for sign in (1, -1)]
        gradient = 0.0 if parameter.grad is None else (parameter.grad.numpy() * way).sum()
        assert gradient == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-4, abs=2e-8), name
        checked += abs(gradient) > 1e-7
    assert checked > 25


def test_initial_weights_are_those_of_the_published_code():
    torch.manual_seed(0)
    head = SlotHead(64, 1, num_slots=50, positions_grid=[20, 20], **SLOT_CONTRAST | {"slot_dim": 64})
    assert head.slot_attention.learned_slots.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert head.decoder.positions.table.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert head.slot_attention.key.weight.std().item() == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.1)
    for layers in (head.token_mlp, head.slot_attention.mlp, head.decoder.layers):
        assert all(not layer.bias.any() for layer in layers if isinstance(layer, torch.nn.Linear))
    attention = head.predictor.attention
    assert attention.query.weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01)
    assert not attention.query.bias.any() and not attention.out.bias.any()
    mixer = SlotHead(64, 1, num_slots=5, positions_grid=[9, 9], **ONLY_SIMILARITY | {"slot_dim": 64})
    assert mixer.decoder.last.weight.shape == (81, 9)
    assert mixer.decoder.last.weight.abs().max().item() == pytest.approx((6 / 90) ** 0.5, rel=0.02)
    assert not mixer.slot_attention.mean.any()
    assert mixer.slot_attention.log_variance.exp().unique().tolist() == pytest.approx([8**-0.5])


@pytest.mark.parametrize("slot_init", ["gaussian", "learned"])
def test_an_initial_deviation_acts_on_groups_too(slot_init):
    spreads = []
    for std in (0.01, 1.0, 3.0):
        torch.manual_seed(0)
        slots = SlotAttention(
            5, 64, None, num_groups=2, slot_init=slot_init, num_slots=60, initial_std=std, variance_as_std=True
        )
        first = slots.initial_slots(torch.zeros(1, 4, 5), (30, 30)).detach().unflatten(1, (2, 30))  # (1, 2, 30, 64)
        spreads.append((first - first.mean(2, keepdim=True)).std().item())
    assert spreads == pytest.approx([0.01, 1.0, 3.0], rel=0.1)


def build(base=VIDEOSAUR, **options):
    return SlotHead(DIM, 1, **{"num_slots": 3, "positions_grid": [2, 3]} | base | options)


def compute_feature_loss():
    head = build(ONLY_SIMILARITY)
    outputs = head.follow(torch.randn(1, 2, DIM, 2, 3))
    FeatureReconstruction()(Prediction(outputs, (2, 3), (1.0, 1.0), head.predict), None)


test_message_names_value_and_remedy = refusals(
    {
        str(options): (partial(build, **options), *words)
        for options, *words in (
            ({"decoder_depth": 1}, "decoder_depth=1 ", "from 2 to 16"),
            ({"positions": "sine"}, "positions=sine with decoder=slot_mixer"),
            ({"slot_dim": 6}, "slot_dim=6 is not a multiple of 4"),
            ({"reconstruct": False, "similarity": False}, "leaves nothing to learn"),
            ({"reconstruct": False, "output_norm": True}, "Set output_norm=false"),
            ({"similarity": False}, "similarity_of=keys has no effect with similarity=false. Set similarity=true, or "),
            ({"slot_init": "clusters", "initial_std": 0.5}, "initial_std=0.5 has no effect with slot_init=clusters"),
            ({"groups": "always", "num_slots": [2, 2]}, "Set groups=off"),
        )
    }
    | {
        "four learned slots": (
            lambda: build(SLOT_CONTRAST).step(torch.zeros(1, DIM, 2, 3), sizes=[4]),
            *("slot_init=learned ", "has 3 slots with one parameter each, but 4"),
        ),
        "keys without attention": (
            lambda: build().check_backbone(Backbone()),
            "similarity_of=keys needs a plain vision transformer",
        ),
        "no reconstructions": (compute_feature_loss, "The head reconstructs no features", "reconstruct=true"),
        "softmax over all": (
            partial(SlotContrast, softmax_over="all"),
            "softmax_over=all is unknown. Choose one of next, previous",
        ),
        "unmatched as zero": (
            partial(TemporalSimilarity, unmatched="zero"),
            "unmatched=zero is unknown. Choose one of skip, uniform",
        ),
    }
)
