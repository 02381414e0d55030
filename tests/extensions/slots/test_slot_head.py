"""The slot head as a whole: clips in, segments and reconstructions out."""

import pytest
import torch
from counts import count
from mistakes import assert_refused

from dinoseg.config.nodes import instantiate
from dinoseg.core.contracts import Backbone
from dinoseg.extensions.slots.head.attention import Standardiser, allowed_cells
from dinoseg.extensions.slots.head.background import background_mask
from dinoseg.extensions.slots.head.head import SlotHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError

SMALL = {"slot_dim": 8, "hidden_dim": 12, "decoder_dim": 10, "num_slots": 3, "positions_grid": [3, 4]}
GROUPED = {"num_slots": [2, 3], "groups": "always"}
DIM = 6


def make_head(**kwargs):
    torch.manual_seed(0)
    return SlotHead(DIM, 1, **SMALL | kwargs).double()


def clip(frames=4, grid=(3, 4), batch=2):
    torch.manual_seed(5)
    return torch.randn(batch, frames, DIM, *grid).double()


class PixelMaps(Backbone):
    """Maps and class attention that are read off the pixels."""

    dim, patch_size, num_layers, has_class_attention = DIM, 8, 1, True

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(("maps", tuple(images.shape)))
        return [images[:, :1, ::8, ::8].repeat(1, DIM, 1, 1) * torch.arange(1, DIM + 1).view(-1, 1, 1)]

    def with_class_attention(self, images):
        maps = self(images)
        self.calls[-1] = ("attention", tuple(images.shape))
        return maps, images[:, :, ::8, ::8]


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ({"num_slots": [5, 5], "groups": "always"}, 1_024),
        ({"time_decoder": "linear"}, 65_792),
        ({"time_decoder": "linear", "steps": [0, 1]}, 2 * 65_792),
        ({"time_decoder": "attention", "steps": 3}, 4 * 263_168),
        ({"steps": 3}, 0),
        ({"positions": "linear"}, 2_759_041 - 2_764_225),
        ({"positions": "sine"}, -4 * 28 * 28),
        ({"predictor": "carry"}, -329_984),
        ({"predictor": "none", "first_iterations": 3}, -329_984),
        ({"similarity": True}, 784 * 1025),
        ({"num_slots": 30}, 0),
    ],
)
def test_parameter_counts_of_variants(keys, more):
    with torch.device("meta"):
        head = SlotHead(384, 1, **keys)
    assert count(head) == 4_279_745 + more


def test_the_config_gives_the_published_head(compose):
    cfg = compose("hparam=dinosavi_s256d", "data.root=.")
    with torch.device("meta"):
        head = instantiate(cfg.head, exclude=("layers", "lr", "scoring"))(in_dim=384, num_layers=1)
    assert type(head) is SlotHead and count(head) == 4_279_745 and list(cfg.backbone.layers) == [-1]


@pytest.mark.parametrize(("steps", "ahead"), [(0, [0]), (1, [0, 1]), ([1], [1]), ([0, 3], [0, 3]), ([2, 0], [2, 0])])
def test_frames_without_a_target_have_no_slots(steps, ahead):
    head = make_head(steps=steps, time_decoder="linear").train(steps != [0, 3])
    features = clip()
    outputs = head.follow(features)
    assert outputs.steps == ahead and outputs.features is features and outputs.similarity is None
    assert outputs.slots.shape == (2, 4 - max(ahead), 3, 8)
    assert len(outputs.reconstructions) == len(outputs.alphas) == len(ahead)


def test_a_predictor_that_no_frame_would_train_is_refused():
    for steps, frames in ((0, 1), ([0, 3], 4), ([2], 3)):
        words = (f"clips of {frames} frames have none", f"clips of {frames + 1} frames or more")
        assert_refused(lambda steps=steps, frames=frames: make_head(steps=steps).follow(clip(frames)), *words)
        make_head(steps=steps).eval().follow(clip(frames))
        make_head(steps=steps, predictor="carry").follow(clip(frames))


@pytest.mark.parametrize("predictor", ["savi", "carry", "none"])
@pytest.mark.parametrize(("groups", "grid"), [("off", (3, 4)), ("always", (5, 3)), ("initial", (3, 4))])
def test_frame_by_frame_is_the_same_as_the_clip(predictor, groups, grid):
    keys = {"num_slots": [2, 1]} if groups != "off" else {}
    head = make_head(groups=groups, predictor=predictor, steps=[1, 0], iterations=2, first_iterations=3, **keys).eval()
    features = clip(5, grid)
    background = torch.rand(2, 5, *grid) > 0.4 if groups != "off" else None
    outputs = head.follow(features, background)
    slots = None
    for time in range(4):
        masked = groups == "always" or (groups == "initial" and time == 0)
        slots, attention = head.step(
            features[:, time], slots, allowed_cells(background[:, time], head.sizes) if masked else None
        )
        torch.testing.assert_close(slots, outputs.slots[:, time])
        torch.testing.assert_close(attention, outputs.attention[:, time])
        for index in range(2):
            reconstruction, alpha = head.decode(slots, grid, index)
            torch.testing.assert_close(reconstruction, outputs.reconstructions[index][:, time])
            torch.testing.assert_close(alpha, outputs.alphas[index][:, time])


def test_iterations_and_predictor_are_where_they_belong():
    head = make_head(iterations=2, first_iterations=4).eval()
    features = clip(3)
    tokens = [features[:, time].flatten(2).mT for time in range(3)]
    slots, _ = head.slot_attention(tokens[0], head.slot_attention.initial_slots(tokens[0], [3]), 4)
    for time in (1, 2):
        slots, weights = head.slot_attention(tokens[time], head.predictor(slots), 2)
    outputs = head.follow(features)
    torch.testing.assert_close(outputs.slots[:, 2], slots)
    torch.testing.assert_close(outputs.attention[:, 2].flatten(2), weights)
    drawn = make_head(predictor="none").eval()
    together, alone = drawn.follow(features).slots, drawn.follow(features[:, 2:]).slots
    torch.testing.assert_close(together[:, 2:], alone)  # frames know nothing of one another


def test_reconstructions_are_normed_decodings_of_predicted_slots():
    head = make_head(steps=[0, 2], time_decoder="linear").eval()
    features = clip()
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2), head.norm.bias.uniform_(-1, 1)
    outputs = head.follow(features)
    for index in range(2):
        ahead = head.time_decoders[index](outputs.slots[:, 1])
        raw = head.decoder(ahead, (3, 4)).features
        mean = raw.mean(1, keepdim=True)
        variance = raw.var(1, keepdim=True, correction=0)
        expected = (raw - mean) / (variance + 1e-5).sqrt() * head.norm.weight.view(-1, 1, 1)
        expected = expected + head.norm.bias.view(-1, 1, 1)
        torch.testing.assert_close(outputs.reconstructions[index][:, 1], expected)


def test_slots_see_and_give_back_standardised_channels():
    torch.manual_seed(2)
    scale, shift = torch.rand(DIM, 1, 1).double() * 9 + 0.1, torch.randn(DIM, 1, 1).double() * 5
    seen = clip()
    features = clip() * scale + shift
    head = make_head(standardise=True).eval()
    plain = make_head().eval()
    plain.load_state_dict(head.state_dict(), strict=False)
    with torch.no_grad():
        head.standardiser.running_mean.copy_(shift.flatten())
        head.standardiser.running_var.copy_(scale.flatten().square() - head.standardiser.eps)
    ours = head.follow(features)
    theirs = plain.follow(seen)
    torch.testing.assert_close(ours.attention, theirs.attention)
    torch.testing.assert_close(ours.features, seen)
    torch.testing.assert_close(ours.reconstructions[0], theirs.reconstructions[0])
    slots, _ = head.step(features[:, 0])
    torch.testing.assert_close(slots, ours.slots[:, 0])


def test_a_single_cell_has_no_variance_to_train_on():
    head = make_head(standardise=True, num_slots=1, predictor="none")
    cell = clip(1, (1, 1), 1)
    words = ("standardise=true ", "computes mean and variance over the cells of a batch")
    assert_refused(lambda: head.train().follow(cell), *words)
    assert head.standardiser.running_var.isfinite().all() and head.eval().follow(cell).slots.isfinite().all()


def test_unlike_slots_begin_at_cells_that_their_group_may_see():
    head = make_head(**GROUPED, slot_init="clusters").eval()
    features = clip(1)
    background = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    background[..., 0] = True
    tokens = features[:, 0].flatten(2).mT
    allowed = allowed_cells(background[:, 0], head.sizes).flatten(2)
    begun = head.slot_attention.initial_slots(tokens, head.sizes, allowed)
    assert not begun.equal(head.slot_attention.initial_slots(tokens, head.sizes))
    expected, _ = head.slot_attention(tokens, begun, head.first_iterations, allowed)
    torch.testing.assert_close(head.follow(features, background).slots[:, 0], expected)


@pytest.mark.parametrize("slot_init", ["gaussian", "clusters"])
def test_positions_weigh_as_much_as_contents_for_cluster_slots(slot_init):
    torch.manual_seed(0)
    place = SlotHead(400, 1, **SMALL, slot_init=slot_init, token_positions=True).token_positions
    spread = place.weight.std().item()
    shift = place.bias.abs().max().item()
    assert (1.4 < spread < 1.6 and shift == 0) if slot_init == "clusters" else (spread < 0.5 and shift > 0)


def test_decoder_trains_alone_in_the_first_share_of_training():
    head = make_head(decoder_first=0.2, token_positions=True)
    begin, parts = head.delayed_modules
    late = {id(parameter) for part in parts for parameter in part.parameters()}
    names = {name.split(".")[0] for name, parameter in head.named_parameters() if id(parameter) in late}
    assert begin == 0.2 and names == {"slot_attention", "token_positions", "predictor"}
    assert len(make_head(predictor="none").delayed_modules[1]) == 1


def test_slots_are_independent_per_frame_early_in_training():
    head = make_head(independent_until=0.4, first_iterations=3).train()
    features = clip()
    head.set_progress(39, 100)
    torch.manual_seed(1)
    outputs = head.follow(features)
    assert not outputs.carried
    torch.manual_seed(1)
    for time in range(4):
        slots, _ = head.step(features[:, time])
        torch.testing.assert_close(slots, outputs.slots[:, time])
    outputs.reconstructions[0].sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters() if parameter.dim())
    head.set_progress(40, 100)
    assert head.follow(features).carried
    head.set_progress(0, 100)
    head.eval()
    assert head.follow(features).carried and not make_head(predictor="none").eval().follow(features).carried


def test_groups_see_only_their_side():
    head = make_head(**GROUPED)
    features = clip()
    assert head.sizes == [2, 3] and head.num_slots == 5
    background = torch.rand(2, 4, 3, 4) > 0.5
    background[0, 0], background[1, 0] = True, False  # one side is empty
    allowed = allowed_cells(background[:, 1], head.sizes)
    assert allowed.shape == (2, 5, 3, 4)
    assert all(torch.equal(allowed[:, slot], background[:, 1]) for slot in (0, 1))
    assert all(torch.equal(allowed[:, slot], ~background[:, 1]) for slot in (2, 3, 4))
    outputs = head.follow(features, background)
    for time in range(4):
        of_background = outputs.attention[:, time, :2].sum(1)
        of_foreground = outputs.attention[:, time, 2:].sum(1)
        torch.testing.assert_close(of_background, background[:, time].double())
        torch.testing.assert_close(of_foreground, (~background[:, time]).double())
    first = make_head(**GROUPED | {"groups": "initial"}).follow(features, background).attention
    torch.testing.assert_close(first[:, 0, :2].sum(1), background[:, 0].double())
    assert (first[:, 1:] > 0).all()
    assert all(torch.isfinite(part).all() for part in (outputs.slots, *outputs.reconstructions))


def test_similarity_is_predicted_only_for_its_grid():
    head = make_head(similarity=True, steps=[1, 0]).train()
    outputs = head.follow(clip())
    assert outputs.similarity.shape == (2, 3, 12, 3, 4)
    expected = head.decoder(outputs.slots[:, 1], (3, 4), similarity=True).similarity
    torch.testing.assert_close(outputs.similarity[:, 1], expected)
    with pytest.raises(UserError, match=r"similarity=true .*predicts 3 x 4 .* have 5 x 4\."):
        head.follow(clip(grid=(5, 4)))
    image = clip(1, (5, 4))
    assert head.eval().follow(image).similarity is None  # an image has no next frame
    slots, attention = head.step(image[:, 0])
    assert head.masks(slots, attention, (5, 4)).shape == (2, 3, 5, 4)


def test_masks_come_from_the_configured_source():
    features = clip()
    for steps, own in ((1, 0), ([1, 0], 1), ([2, 1], 0)):
        head = make_head(steps=steps, mask_source="alpha", time_decoder="linear").eval()
        outputs = head.follow(features)
        masks = head.masks(outputs.slots[:, 1], outputs.attention[:, 1], (3, 4))
        torch.testing.assert_close(masks, outputs.alphas[own][:, 1])
        torch.testing.assert_close(head.predict(outputs, (3, 4), (1.0, 1.0)), outputs.alphas[own].flatten(0, 1))
        head.mask_source = "attention"
        assert torch.equal(head.masks(outputs.slots[:, 1], outputs.attention[:, 1], (3, 4)), outputs.attention[:, 1])
        pixels = head.predict(outputs, (23, 31), (23 / 24, 31 / 32))
        assert pixels.shape == (2 * outputs.slots.shape[1], 3, 23, 31)
        torch.testing.assert_close(pixels.sum(1), torch.ones_like(pixels[:, 0]))


def test_slots_are_random_in_training_only():
    head = make_head().train()
    features = clip()
    assert not torch.equal(head.follow(features).slots, head.follow(features).slots)
    first = head.eval().follow(features).slots
    assert torch.equal(head.follow(features).slots, first)
    torch.testing.assert_close(head.follow(features[1:]).slots, first[1:])


def test_it_runs_on_clips_and_on_images():
    backbone = PixelMaps()
    for keys, kind in (({}, "maps"), (GROUPED, "attention")):
        head = SlotHead(DIM, 1, **SMALL | keys).eval()
        head.check_backbone(backbone)
        backbone.calls.clear()
        pixels = torch.rand(2, 3, 3, 24, 32)
        outputs = head.run(backbone, pixels)
        assert backbone.calls == [(kind, (6, 3, 24, 32))]
        assert outputs.attention.shape == (2, 3, head.num_slots, 3, 4)
        torch.testing.assert_close(outputs.features[1, 2], backbone(pixels[1, 2:])[0][0])
        image = head.run(backbone, pixels[:, 0])
        assert image.slots.shape == (2, 1, head.num_slots, 8)
        torch.testing.assert_close(image.attention, outputs.attention[:, :1])
        if keys:
            background = background_mask(pixels[:, 0, :, ::8, ::8])
            torch.testing.assert_close(outputs.attention[:, 0, :2].sum(1), background.float())


def test_a_segmenter_gives_soft_masks_of_images(tiny_backbone):
    torch.manual_seed(0)
    head = SlotHead(24, 1, **SMALL | {"steps": [0, 1], "mask_source": "alpha"})
    model = SegmentationModel(tiny_backbone().requires_grad_(False), head).eval()
    prediction = model(torch.randint(0, 255, (2, 3, 30, 45), dtype=torch.uint8))
    scores = prediction.scores()
    assert scores.shape == (2, 3, 30, 45) and prediction.mixture
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 30, 45))
    assert torch.isfinite(prediction.logits()).all()


def test_half_precision_stays_close_to_float32():
    options = {"steps": 1, "time_decoder": "attention", "iterations": 2, **GROUPED}
    head = make_head(**options).float()
    features = clip().float()
    background = torch.rand(2, 4, 3, 4) > 0.5
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head.train().follow(features, background)
        sum(part.float().square().mean() for part in outputs.reconstructions).backward()
        coarse = head.eval().follow(features, background)
    assert outputs.slots.dtype == outputs.attention.dtype == outputs.alphas[0].dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
    exact = head.follow(features, background)
    torch.testing.assert_close(coarse.attention, exact.attention, atol=0.1, rtol=0.1)
    torch.testing.assert_close(coarse.reconstructions[1].float(), exact.reconstructions[1], atol=0.2, rtol=0.2)


def test_more_slots_than_cells_are_refused():
    head = make_head(num_slots=13)
    words = ("num_slots=13 ", " 3 x 4 = 12 cells", "num_slots=12 or fewer")
    assert_refused(lambda: head.follow(clip()), *words)
    assert_refused(lambda: head.step(clip()[:, 0]), *words)
    assert make_head(num_slots=12).follow(clip()).slots.shape == (2, 4, 12, 8)


def test_short_clip_is_refused_but_an_image_is_segmented():
    head = make_head(steps=2)
    assert_refused(lambda: head.follow(clip(2)), "steps=[0, 1, 2] ", " clips have 2. Give clips of 3")
    assert_refused(lambda: head.follow(clip(1)), "clips have 1. Give clips of 3")
    head.eval()
    assert head.follow(clip(1)).attention.shape == (2, 1, 3, 3, 4)
    assert_refused(lambda: head.follow(clip(2)), "clips have 2")


def test_other_numbers_of_slots_than_trained_are_accepted():
    features = clip()
    for keys, sizes in (({}, [5]), (GROUPED, [1, 4]), ({"predictor": "none"}, [2])):
        head = make_head(**keys).eval()
        allowed = torch.ones(2, sum(sizes), 3, 4, dtype=torch.bool)
        allowed[:, 0, :2] = False
        slots, attention = head.step(features[:, 0], None, allowed, sizes)
        assert slots.shape == (2, sum(sizes), 8) and attention[:, 0, :2].eq(0).all()
        slots, attention = head.step(features[:, 1], slots, None, sizes)
        assert slots.shape == (2, sum(sizes), 8) and head.decode(slots, (3, 4))[1].shape == attention.shape
        other = make_head(**keys | {"num_slots": sizes if keys == GROUPED else sizes[0]}).eval()
        torch.testing.assert_close(
            other.step(features[:, 0], None, allowed)[0], head.step(features[:, 0], None, allowed, sizes)[0]
        )


def test_token_positions_are_added_to_the_attention_input_only():
    head = make_head(token_positions=True).eval()
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 4), indexing="ij")
    code = torch.einsum("ck,khw->chw", head.token_positions.weight, torch.stack([rows, columns]).double())
    code = code + head.token_positions.bias[:, None, None]
    plain = make_head().eval()
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if "token_positions" not in name})
    features = clip(1)
    outputs = head.follow(features)
    torch.testing.assert_close(outputs.attention, plain.follow(features + code).attention)
    torch.testing.assert_close(outputs.features, features)  # what is to be reconstructed stays as it is


def test_channels_are_standardised_as_batch_norm_does_it():
    torch.manual_seed(0)
    ours = Standardiser(5).double()
    theirs = torch.nn.BatchNorm2d(5, affine=False, momentum=None).double()
    scale = torch.tensor([0.0, 1e-3, 1e-2, 1.0, 1e3]).double()[:, None, None]  # some as small as what is added
    for _ in range(3):
        features = torch.randn(2, 5, 3, 4).double() * scale + 7
        torch.testing.assert_close(ours(features), theirs(features))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))
    half = (torch.randn(2, 5, 16, 16) * 3 + 400).half()
    standard = Standardiser(5).train()
    standard(half)  # is counted in float32
    torch.testing.assert_close(standard.running_var, half.float().var((0, 2, 3)))
    torch.testing.assert_close(standard.running_mean, half.float().mean((0, 2, 3)))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"predictor": "carry", "positions": "linear"},
        {"predictor": "none", "iterations": 3},
        {"steps": 2, "time_decoder": "attention", **GROUPED},
        {"steps": [1], "time_decoder": "linear", "similarity": True},
    ],
)
def test_gradients_reach_everything_with_checkpointing_too(keys):
    gradients = []
    for checkpointing in (False, True):
        head = make_head(checkpointing=checkpointing, **keys).train()
        features = clip()
        background = torch.rand(2, 4, 3, 4) > 0.5 if head.groups != "off" else None
        torch.manual_seed(1)
        outputs = head.follow(features, background)
        parts = [*outputs.reconstructions, *([outputs.similarity] if keys.get("similarity") else [])]
        sum((part - 1).square().mean() for part in parts).backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        gradients.append([parameter.grad for parameter in head.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
