import copy

import pytest
import torch
import torch.nn.functional as F

from dinoseg.extensions.auto.fake_tensors import fake_tensor_mode
from dinoseg.models.backbones import attention
from dinoseg.models.backbones.attention import attend
from dinoseg.models.backbones.timm_backbone import TimmBackbone


def written_out(query, key, value, allowed, scale):
    """Softmax attention, row by row in float64; `allowed` (B, N, N), True = attend."""
    query = query.double()
    key = key.double()
    value = value.double()
    out = torch.zeros_like(query)
    for image in range(query.shape[0]):
        for head in range(query.shape[1]):
            for row in range(query.shape[2]):
                seen = allowed[image, row].nonzero()[:, 0]
                scores = scale * key[image, head, seen] @ query[image, head, row]
                weights = (scores - scores.max()).exp()
                out[image, head, row] = (weights / weights.sum()) @ value[image, head, seen]
    return out


def draw(rows, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [3 * torch.randn(2, 3, tokens, 5, generator=generator) for _ in range(3)]
    mask = torch.rand(2, 1, rows, tokens, generator=generator) > 0.6
    mask[..., 0] = True  # no row without anything to see
    return *parts, mask


@pytest.mark.parametrize(("rows", "tokens"), [(3, 11), (1, 2), (7, 7), (None, 11)])
def test_masked_attention_equals_attention_with_a_dense_mask(rows, tokens):
    *parts, mask = draw(rows or 1, tokens)
    dense = torch.ones(2, tokens, tokens, dtype=torch.bool)
    if rows:
        dense[:, :rows] = mask[:, 0]
    weight = torch.randn(2, 3, tokens, 5, dtype=torch.float64)
    found = []
    for function in (
        lambda q, k, v: attend(q, k, v, mask if rows else None, dropout=0.0, scale=0.3),
        lambda q, k, v: written_out(q, k, v, dense, 0.3),
    ):
        leaves = [part.double().requires_grad_() for part in parts]
        attended = function(*leaves)
        (attended * weight).sum().backward()
        found.append([attended, *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_dropout_reaches_masked_and_free_rows():
    query, key, value, mask = draw(3, 11)
    still = attend(query, key, value, mask, dropout=0.0, scale=0.4)
    torch.manual_seed(0)
    dropped = attend(query, key, value, mask, dropout=0.5, scale=0.4)
    changed = (dropped != still).flatten(3).any(-1).all(1)  # (B, N)
    assert changed[:, :3].any() and changed[:, 3:].any()


@pytest.mark.parametrize(
    ("scale", "held"), [(0.02, 2**22), (0.4, 2**22), (0.1, 2 * 200**2), (0.1, 3300), (0.02, 1), (0.4, 1)]
)
def test_attention_by_products_rounds_like_bfloat16(monkeypatch, scale, held):
    """Values and gradients against float64, from even attention to sharp one, by many heads or single rows at once."""
    monkeypatch.setattr(attention, "_HELD", held)

    def in_float64(query, key, value):
        return (scale * query @ key.mT).softmax(-1) @ value

    def in_bfloat16(query, key, value):
        return (scale * (query @ key.mT)).float().softmax(-1).bfloat16() @ value

    query, key, value, _ = draw(1, 200)
    weight = torch.randn(2, 3, 200, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for way in (in_float64, in_bfloat16, lambda *parts: attention.by_products(*parts, scale)):
        kind = torch.float64 if way is in_float64 else torch.bfloat16
        leaves = [part.bfloat16().to(kind).requires_grad_() for part in (query, key, value)]
        attended = way(*leaves)
        attended.backward(weight.to(kind))
        found.append([attended.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    for true, usual, mine in zip(*found, strict=True):
        assert (mine - true).norm() < 1.25 * (usual - true).norm()


def test_products_are_differentiated_once():
    leaves = [part.bfloat16().requires_grad_() for part in draw(1, 5)[:3]]
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(attention.by_products(*leaves, 0.1).sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize(
    ("faster", "dtype", "dropout", "learns", "taken"),
    [
        (True, torch.bfloat16, 0.0, True, True),
        (True, torch.bfloat16, 0.0, False, True),
        (True, torch.bfloat16, 0.5, True, False),
        (True, torch.float32, 0.0, False, False),
        (False, torch.bfloat16, 0.0, False, False),
    ],
)
def test_products_are_used_where_they_are_faster(products, set_faster, faster, dtype, dropout, learns, taken):
    set_faster(faster)
    query, key, value, _ = (part.to(dtype) for part in draw(1, 130))
    for rows in (130, 5):  # those of many rows alone
        attend(query[:, :, :rows], key.requires_grad_(learns), value, None, dropout=dropout, scale=1.0)
    assert len(products) == taken
    with torch.autocast("cpu", torch.bfloat16):  # in which torch casts what is still float32, as rotated queries are
        attend(query.float(), key, value, None, dropout=dropout, scale=1.0)
    assert len(products) == taken


def test_estimates_count_attention_as_one_operation(products):
    with fake_tensor_mode() as peak:
        query = torch.empty(1, 3, 4000, 8, dtype=torch.bfloat16, requires_grad=True)
        attend(query, query, query, None, dropout=0.0, scale=1.0).sum().backward()
    assert not products and peak.most < 8 * query.nbytes  # no matrix of all pairs


@pytest.fixture
def set_faster(monkeypatch):
    """Return a function that says whether products are faster on this processor, which is found out once."""
    return lambda faster: monkeypatch.setattr(attention, "_products_are_faster", lambda: faster)


@pytest.fixture
def products(monkeypatch, set_faster):
    """The shapes that were attended to by products, on whatever processor."""
    seen = []
    given = attention.by_products

    def spy(query, *others):
        seen.append(tuple(query.shape))
        return given(query, *others)

    monkeypatch.setattr(attention, "by_products", spy)
    set_faster(True)
    return seen


@pytest.fixture
def timm_backbone(products):
    return TimmBackbone("test_vit", "random", 16)


IMAGES = torch.rand(2, 3, 192, 192)  # 144 patches


def in_bfloat16(backbone):
    with torch.autocast("cpu", torch.bfloat16):
        return backbone(IMAGES)[0]


def test_timm_blocks_use_products_with_equal_gradients(products, timm_backbone, set_faster):
    products.clear()
    blocks = len(timm_backbone.blocks)
    in_bfloat16(timm_backbone).square().sum().backward()
    assert len(products) == blocks and {shape[0] for shape in products} == {2}
    found = {name: part.grad.clone() for name, part in timm_backbone.named_parameters() if part.grad is not None}
    in_bfloat16(copy.deepcopy(timm_backbone))
    assert len(products) == 2 * blocks
    timm_backbone(IMAGES)
    assert len(products) == 2 * blocks  # float32 is torch's own
    timm_backbone.zero_grad()
    set_faster(False)
    in_bfloat16(timm_backbone).square().sum().backward()
    assert len(products) == 2 * blocks
    for name, part in timm_backbone.named_parameters():
        if part.grad is not None:
            assert (found[name] - part.grad).norm() <= 0.05 * part.grad.norm() + 1e-6, name


def test_a_block_that_fails_leaves_torchs_attention_as_it_was(timm_backbone):
    with pytest.raises(RuntimeError):
        timm_backbone.blocks[0].attn(torch.rand(2, 144, 3))
    assert not modes()


@pytest.mark.parametrize(
    ("mask", "options", "taken"),
    [
        ((), {}, True),
        ((), {"attn_mask": None, "is_causal": False, "dropout_p": 0.0, "scale": None}, True),
        ((), {"scale": 0.3}, True),
        ((), {"is_causal": True}, False),
        ((), {"attn_mask": torch.ones(130, 130, dtype=torch.bool).tril()}, False),
        ((torch.ones(130, 130, dtype=torch.bool).tril(),), {}, False),
        ((), {"dropout_p": 0.5}, False),
    ],
)
def test_intercepted_attention_preserves_timm_options(products, mask, options, taken):
    parts = [(part / 3).bfloat16() for part in draw(1, 130)[:3]]
    torch.manual_seed(0)
    with attention._INTERCEPTED:
        found = F.scaled_dot_product_attention(*parts, *mask, **options)
    assert bool(products) == taken
    torch.manual_seed(0)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*parts, *mask, **options), atol=0.05, rtol=0.05)


def test_no_hook_is_installed_where_torch_is_as_fast(set_faster):
    set_faster(False)
    assert not any(module._forward_pre_hooks for module in TimmBackbone("test_vit", "random", 16).modules())


@pytest.mark.parametrize(
    ("of_query", "of_key", "of_value"),
    [
        ((2, 3, 130, 5), (2, 3, 130, 5), (2, 3, 130, 10)),  # differential attention
        ((2, 3, 130, 5), (2, 1, 130, 5), (2, 1, 130, 5)),  # heads that share keys and values
        ((2, 3, 130, 4, 5),) * 3,  # windows apart
    ],
)
def test_unsupported_attention_shapes_use_torch(products, of_query, of_key, of_value):
    parts = [torch.randn(shape).bfloat16() for shape in (of_query, of_key, of_value)]
    found = attend(*parts, None, dropout=0.0, scale=0.3)
    assert not products
    assert torch.equal(found, F.scaled_dot_product_attention(*parts, scale=0.3))


@pytest.mark.parametrize("keys", [7, 131])
def test_queries_see_any_number_of_keys_by_products(products, keys):
    query = draw(1, 130)[0].bfloat16()
    leaves = [part.bfloat16() for part in draw(1, keys, seed=1)[:2]]
    upstream = torch.randn(2, 130, 3, 5).bfloat16().transpose(1, 2)
    gradients = []
    for way in (attend, lambda *given, dropout, scale: F.scaled_dot_product_attention(*given[:3], scale=scale)):
        parts = [part.detach().requires_grad_() for part in (query, *leaves)]
        way(*parts, None, dropout=0.0, scale=0.1).backward(upstream)
        gradients.append([part.grad for part in parts])
    assert len(products) == 1
    for mine, torchs in zip(*gradients, strict=True):
        assert (mine - torchs).norm() < 0.02 * torchs.norm()


def modes():
    return torch.overrides._get_current_function_mode_stack()


def test_a_block_that_is_interrupted_is_forgotten_at_the_next(timm_backbone):
    def interrupt(*_):
        raise KeyboardInterrupt

    handle = timm_backbone.blocks[0].attn.proj.register_forward_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            timm_backbone(IMAGES)
    assert len(modes()) == 1
    handle.remove()
    timm_backbone(IMAGES)
    assert not modes()


def test_failing_hook_restores_the_function_modes(timm_backbone):
    def fail(*_):
        raise ValueError("before")

    class Other(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    timm_backbone.blocks[0].attn.register_forward_pre_hook(fail, prepend=True)
    with Other() as other:
        with pytest.raises(ValueError, match="before"):
            timm_backbone(IMAGES)
        assert modes() == [other]


def test_attention_may_be_called_by_keyword(timm_backbone):
    module = timm_backbone.blocks[0].attn
    tokens = torch.rand(2, 144, 64)
    during = []
    module.proj.register_forward_hook(lambda *_: during.append(len(modes())))
    assert torch.equal(module(x=tokens), module(tokens))
    assert during == [0, 1] and not modes()


def test_other_devices_are_not_intercepted(timm_backbone):
    during = []
    timm_backbone.blocks[0].attn.proj.register_forward_hook(lambda *_: during.append(len(modes())))
    timm_backbone(IMAGES)
    timm_backbone.to("meta")(IMAGES.to("meta"))
    assert during == [1, 0]
    attention._enter(timm_backbone, (IMAGES.to("meta"), IMAGES))  # the first says where a module works
    assert not modes()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # deprecated, but still in use
def test_graphs_hold_torchs_attention(products, timm_backbone):
    timm_backbone.eval()
    products.clear()
    module = timm_backbone.blocks[0].attn
    tokens = torch.rand(2, 144, 64)
    with torch.autocast("cpu", torch.bfloat16):
        traced = torch.jit.trace(module, tokens, check_trace=False)
        exported = torch.export.export(module, (tokens,))
    assert "aten::scaled_dot_product_attention" in str(traced.inlined_graph)
    assert "aten.scaled_dot_product_attention" in str(exported.graph)
    assert not products and not modes()
    block = timm_backbone.blocks[0]
    assert torch.equal(torch.fx.symbolic_trace(block)(tokens), block(tokens))  # by inputs that are no tensors


def test_functional_gradients_are_those_of_torchs_attention(products):
    query, key, value, _ = (part.bfloat16() for part in draw(1, 130))
    found = torch.func.grad(lambda part: attend(part, key, value, None, dropout=0.0, scale=0.1).sum())(query)
    leaf = query.requires_grad_()
    F.scaled_dot_product_attention(leaf, key, value, scale=0.1).sum().backward()
    assert torch.equal(found, leaf.grad) and not products


def test_products_are_taken_of_enough_rows_on_a_cpu(products):
    parts = [part.bfloat16() for part in draw(1, attention._FEWEST)[:3]]
    for query in (parts[0], parts[0][:, :, 1:]):
        attend(query, *parts[1:], None, dropout=0.0, scale=1.0)
    assert [shape[2] for shape in products] == [attention._FEWEST]
    attend(*(part.to("meta") for part in parts), None, dropout=0.0, scale=1.0)
    assert len(products) == 1


@pytest.mark.parametrize("odd", range(3))
def test_mixed_dtypes_use_the_attention_of_torch(products, odd):
    parts = [part.bfloat16() for part in draw(1, 130)[:3]]
    expected = F.scaled_dot_product_attention(*parts, scale=0.1)
    parts[odd] = parts[odd].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*parts, None, dropout=0.0, scale=0.1), expected)
    assert not products


@pytest.mark.parametrize(("bf16", "amx", "faster"), [(True, False, True), (True, True, False), (False, False, False)])
def test_products_are_chosen_by_cpu_features(monkeypatch, bf16, amx, faster):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert attention._products_are_faster.__wrapped__() == faster


@pytest.mark.parametrize(
    ("heads", "rows", "tokens", "held", "pieces"),
    [(6, 40, 10, 2400, 1), (6, 40, 10, 1100, 3), (6, 10, 40, 400, 6), (2, 41, 10, 100, 10)],
)
def test_pieces_fit_the_limit_and_share_memory(monkeypatch, heads, rows, tokens, held, pieces):
    monkeypatch.setattr(attention, "_HELD", held)
    query, key = torch.zeros(2, heads, rows, 4), torch.zeros(2, heads, tokens, 4)
    workspace = attention._Workspace(query, key)
    memory = {workspace.weights(query[part], key[all_rows], 0.1).data_ptr() for part, all_rows in workspace.pieces}
    for part, _ in workspace.pieces:
        query[part] += 1
        assert query[part][..., 0].numel() * tokens <= held
    assert len(workspace.pieces) == 2 * pieces and (query == 1).all() and len(memory) == 1  # which all pieces share
