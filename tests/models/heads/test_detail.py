import pytest
import torch
import torch.nn.functional as F
from tiny_parts import tiny_vit

from dinoseg.core.geometry import pad_to_multiple, to_unit_range
from dinoseg.core.shapes import Batch
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel


def small(in_dim=3, num_layers=1, patch_size=8, **options):
    torch.manual_seed(2)
    return DetailHead(in_dim, num_layers, 3, patch_size, **{"fine": 4, "width": 8, "linear_skip": True, **options})


def pass_through_head(patch_size, **options):
    """Return a head that averages the first colour over 2 x 2 px (class 0) or 4 x 4 px (class 1), and adds a token."""
    head = small(1, 1, patch_size, fine=12, width=49, blocks=0, **options).double().eval()
    for name, parameter in head.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for layer in (1, 2):
        head.stem[layer][0].weight.data[:, :, 1, 1] = torch.eye(12, dtype=torch.float64)
    head.refine.weight.data[0, :4, 1, 1] = 0.25
    head.project.weight.data[48] = 1
    head.fuse[0][0].weight.data[:49, 49:, 0, 0] = torch.eye(49, dtype=torch.float64)
    head.fuse[0][0].weight.data[48, 48] = 1
    head.classify.weight.data[:2, 48] = 1
    for place in range(4):  # 2 px apart in a cell of 4 px
        row, column = divmod(place, 2)
        for channel in range(12):
            head.merge[0][0].weight.data[12 * place + channel, channel, 1 + row, 1 + column] = 1
        head.classify.weight.data[1, 12 * place : 12 * place + 4] = 1 / 16
    for part in head.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eps = 0.0
    return head


def smooth_and_double(cells):
    kernel = torch.tensor([1, 2, 1], dtype=torch.float64) / 4
    smooth = F.conv2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), torch.outer(kernel, kernel)[None, None])
    return F.interpolate(smooth, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize(("patch_size", "grid"), [(2, (5, 7)), (6, (3, 2)), (8, (5, 7)), (14, (1, 1)), (16, (3, 2))])
def test_scores_are_aligned_with_pixels_and_tokens(patch_size, grid):
    head = pass_through_head(patch_size)
    pixels = torch.rand(2, 3, *(patch_size * side for side in grid), dtype=torch.float64)
    nothing = torch.zeros(2, 1, *grid, dtype=torch.float64)
    of_pixels = head.compute_scores([nothing], pixels)
    rows, columns = (patch_size * side // 2 for side in grid)
    squares = F.avg_pool2d(pad_to_multiple(pixels[:, :1], 4), 4)
    torch.testing.assert_close(of_pixels[:, :1], F.avg_pool2d(pixels[:, :1], 2), atol=1e-12, rtol=0)
    torch.testing.assert_close(of_pixels[:, 1:2], smooth_and_double(squares)[..., :rows, :columns], atol=1e-12, rtol=0)
    assert of_pixels.shape == (2, 3, rows, columns) and not of_pixels[:, 2].any()
    for axis, side in zip((-2, -1), grid, strict=True):
        ramp = torch.arange(side, dtype=torch.float64) + 0.5
        ramp = ramp.view(1, 1, *((-1, 1) if axis == -2 else (1, -1))).expand(2, 1, *grid)
        found = head.compute_scores([ramp], torch.zeros_like(pixels))[0, 0].movedim(axis, 0)[:, 0]
        cells = (torch.arange((len(found) + 1) // 2).double() + 0.5) * 4 / patch_size
        expected = smooth_and_double(cells.clamp(0.5, side - 0.5)[None, None, :, None])[0, 0, :, 0]
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-6, rtol=0)


@pytest.mark.parametrize("patch_size", [2, 6, 14])
def test_linear_skip_adds_token_scores_at_their_positions(patch_size):
    head = pass_through_head(patch_size)
    plain = pass_through_head(patch_size, linear_skip=False)
    head.linear_skip.weight.data[1] = 3
    head.linear_skip.bias.data[2] = 0.5
    pixels = torch.rand(1, 3, 3 * patch_size, 2 * patch_size).double()
    tokens = torch.randn(1, 1, 3, 2).double()
    added = head.compute_scores([tokens], pixels) - plain.compute_scores([tokens], pixels)
    places = [(torch.arange(side * patch_size // 2).double() + 0.5) * 2 / patch_size - 0.5 for side in (3, 2)]
    rows, columns = (place.clamp(0, side - 1) for place, side in zip(places, (3, 2), strict=True))
    low = rows.floor().clamp(max=1).long()
    tall = torch.lerp(tokens[0, 0, low], tokens[0, 0, low + 1], (rows - low)[:, None])
    torch.testing.assert_close(added[0, 1], 3 * torch.lerp(tall[:, :1], tall[:, 1:], columns[None]), atol=1e-6, rtol=0)
    assert not added[0, 0].any() and (added[0, 2] - 0.5).abs().max() < 1e-12
    assert "linear_skip.weight" in head.state_dict() and "linear_skip.weight" not in DetailHead(3, 1, 3, 8).state_dict()


@pytest.mark.parametrize(("size", "patch_size"), [((1, 1), 6), ((3, 2), 8), ((2, 17), 8), ((37, 51), 2)])
def test_an_image_of_any_size_is_scored_as_it_is_when_padded(size, patch_size):
    """Also one that is smaller than the stride."""
    backbone = RgbBackbone(patch_size, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    model = SegmentationModel(backbone, small(patch_size=patch_size)).eval()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8) / 255
    padding = (0, -size[1] % patch_size, 0, -size[0] % patch_size)
    padded = F.pad(images - 0.5, padding) + 0.5
    whole, scores = model(padded).outputs, model(images).outputs
    assert model(images).scores().shape == (2, 3, *size)
    assert scores.shape[-2:] == tuple(side // 2 for side in padded.shape[-2:])
    torch.testing.assert_close(scores, whole, atol=1e-5, rtol=1e-5)


def test_scores_of_a_uniform_image_have_no_grid():
    """Whatever the weights are, so that training cannot learn one."""
    head = small(patch_size=8).eval()
    scores = head.compute_scores([torch.ones(1, 3, 24, 24)], torch.full((1, 3, 192, 192), 0.5))
    inside = scores[..., 36:-36, 36:-36]  # out of reach of the padded border
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))


def test_maps_of_a_pyramid_meet_on_its_finest_grid():
    head = small([3, 4, 5], 3, 32).eval()
    maps = [torch.randn(2, 3 + level, *(side * 2 ** (2 - level) for side in (2, 3))) for level in range(3)]
    assert head.compute_scores(maps, torch.randn(2, 3, 64, 96)).shape == (2, 3, 32, 48)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (21, 2)])
def test_strips_along_rows_learn_as_a_convolution_does(size):
    """On a CPU they are turned where gradients are asked for."""
    torch.manual_seed(0)
    head = small(blocks=0).double()
    strips = head.merge[1]
    grid = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(grid)
    found = strips(grid)
    gradients = torch.autograd.grad(found, [grid, *strips.parameters()], upstream)
    along = F.conv2d(grid, strips.row.weight, padding=(0, 5), groups=8)
    expected = grid + F.relu(strips.norm(strips.near(grid) + along + strips.column(grid)))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    own = torch.autograd.grad(expected, [grid, *strips.parameters()], upstream)
    for gradient, known in zip(gradients, own, strict=True):
        torch.testing.assert_close(gradient, known, atol=1e-10, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(strips(grid), expected.detach(), atol=1e-12, rtol=0)


def test_strips_are_turned_in_training_alone(monkeypatch):
    """What a tracer sees of a head at rest is the same with gradients and without."""
    rows = []
    plain = torch.nn.Conv2d.forward
    head = small(blocks=1)
    maps = [torch.randn(2, 3, 2, 2)]
    pixels = torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(
        torch.nn.Conv2d,
        "forward",
        lambda conv, grid: plain(conv, (rows.append(conv) if conv.kernel_size == (1, 11) else None, grid)[1]),
    )
    found = []
    for training, learns in ((True, True), (True, False), (False, True), (False, False)):
        rows.clear()
        with torch.set_grad_enabled(learns):
            head.train(training).compute_scores(maps, pixels)
        found.append(len(rows))
    assert found == [0, 2, 2, 2]


def test_colours_are_jittered_in_training_alone():
    maps = [torch.randn(2, 3, 2, 2)]
    pixels = torch.randn(2, 3, 16, 16)
    head = small(jitter=0.5)
    assert torch.equal(head.eval().compute_scores(maps, pixels), head.compute_scores(maps, pixels))
    assert not torch.equal(head.train().compute_scores(maps, pixels), head.compute_scores(maps, pixels))
    seen = []
    head.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    head.compute_scores(maps, torch.zeros_like(pixels))
    assert len(seen[0].unique()) == 6  # a shift for each channel of each image
    steady = small(jitter=0.0).train()
    assert torch.equal(steady.compute_scores(maps, pixels), steady.compute_scores(maps, pixels))


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.uint8, lambda levels: levels % 256),
        (torch.uint16, lambda levels: levels * 54),
        (torch.uint16, lambda levels: levels % 255 * 257 + 1),  # next to levels of 8 bits
    ],
)
def test_cached_pixels_keep_all_levels(dtype, change):
    head = small(24, 2)
    backbone = tiny_vit((0, 1))
    images = to_unit_range(change(torch.arange(3 * 20 * 20).reshape(1, 3, 20, 20)).to(dtype))
    stored = head.forward_frozen(backbone, images)[-1]
    assert stored.dtype == dtype and torch.equal(to_unit_range(stored), images)


def test_detail_head_learns_lines_thinner_than_a_patch():
    def lines(seed):
        """Return noise with a line of 3 px at a random column, too thin for a patch of 16, and its masks."""
        draw = torch.Generator().manual_seed(seed)
        columns = torch.randint(0, 32, (8,), generator=draw)
        mask = ((torch.arange(32) - columns[:, None]).abs() <= 1)[:, None].expand(8, 32, 32).to(torch.uint8)
        image = torch.randint(0, 120, (8, 3, 32, 32), generator=draw, dtype=torch.uint8) + 120 * mask[:, None]
        return Batch(image, mask, list("abcdefgh"))

    seen, other = lines(0), lines(1)
    loss = CrossEntropy(torch.ones(3))
    found = {}
    for name, head in (("detail", small(patch_size=16, jitter=0.0)), ("linear", LinearHead(3, 1, 3))):
        model = SegmentationModel(RgbBackbone(16), head).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            value, _ = loss(model(seen.image), seen)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ids = model.eval()(other.image).class_ids() == 1
        line = other.mask == 1
        found[name] = ((ids & line).sum() / (ids | line).sum()).item()
    assert found["detail"] > 0.4 and found["linear"] < 0.3, found
