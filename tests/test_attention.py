"""model/attention.py and model/rope.py: the kernels against their definition, packed rows, rotations."""

import math

import pytest
import torch
from tolerances import close_to, rounding

from model import attention as module
from model.attention import attention, cu_seqlens_from_positions, document_ids, packed_mask, varlen_attention
from model.rope import apply_rope, rope_tables

BOUNDS = [0, 1, 8, 20, 33, 40]  # two rows of 20 tokens


def qkv(batch: int, time: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(batch, time, heads, head_dim), (batch, time, kv_heads, head_dim), (batch, time, kv_heads, head_dim)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def results(q, k, v, out) -> list[torch.Tensor]:
    """The output and its gradients."""
    torch.manual_seed(1)
    (out * torch.randn(out.shape).to(out.dtype)).sum().backward()
    found = [out.detach(), *(x.grad for x in (q, k, v))]
    for x in (q, k, v):
        x.grad = None
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Outputs and gradients differ by rounding only: scores, softmax and the sum over the keys, forward and backward.

    Half precision rounds the results; the sums inside are made in float32.
    """
    terms = 32 if dtype == torch.float32 else 1  # head_dim or keys
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close_to(other, terms=terms, depth=6, dtype=dtype))


def by_hand(q, k, v, cu_seqlens) -> torch.Tensor:
    """Each token over the tokens before it in its document, one by one."""
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    rows = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        for t in range(start, end):
            heads = []
            for h in range(q.shape[2]):
                kv = h // (q.shape[2] // k.shape[2])
                keys, values = flat[1][start : t + 1, kv], flat[2][start : t + 1, kv]
                heads.append((keys @ flat[0][t, h] / q.shape[-1] ** 0.5).softmax(0) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows).view_as(q)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_is_its_definition(flash, kv_heads):
    q, k, v = qkv(2, 20, kv_heads=kv_heads)
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    got = results(q, k, v, varlen_attention(q, k, v, cu, flash=flash))
    assert_same(got, results(q, k, v, by_hand(q, k, v, BOUNDS)))


def test_empty_documents_are_passed_over():
    q, k, v = qkv(2, 20)
    with_empty = torch.tensor([0, 0, 1, 8, 20, 20, 33, 40, 40], dtype=torch.int32)
    out = varlen_attention(q, k, v, with_empty)
    torch.testing.assert_close(out, varlen_attention(q, k, v, torch.tensor(BOUNDS, dtype=torch.int32)))


def test_packed_attention_in_half_precision():
    q, k, v = qkv(2, 20, dtype=torch.bfloat16)
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    got = results(q, k, v, varlen_attention(q, k, v, cu))
    assert all(x.dtype == torch.bfloat16 for x in got)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = results(*exact, varlen_attention(*exact, cu, flash=False))
    assert_same([x.float() for x in got], expected, torch.bfloat16)


def test_packed_attention_is_a_proper_operator():
    q, k, v = (x.flatten(0, 1) for x in qkv(2, 20))
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.minimind.packed_attention_cpu.default, (q.detach(), k.detach(), v.detach(), cu),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("has_gqa", [True, False])
def test_grouped_keys_reach_a_kernel_that_knows_no_groups(has_gqa, monkeypatch):
    """torch 2.11's variable-length kernel has no enable_gqa: keys and values are repeated for it."""
    q, k, v = (x.detach() for x in qkv(2, 20))
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    options = {}

    def kernel(q, k, v, cu_q, cu_k, longest_q, longest_k, *, window_size, **more):
        assert (
            window_size == (-1, 0) and torch.equal(cu_q, cu) and torch.equal(cu_k, cu) and longest_q == longest_k == 20
        )
        assert has_gqa or q.shape == k.shape == v.shape
        options.update(more)
        return varlen_attention(*(x.unflatten(0, (2, 20)) for x in (q, k, v)), cu, flash=False).flatten(0, 1)

    expected = varlen_attention(q, k, v, cu, flash=False)
    monkeypatch.setattr(module, "_VARLEN_FLAGS", {"window_size": None} | ({"enable_gqa": None} if has_gqa else {}))
    monkeypatch.setattr(module, "varlen_attn", kernel)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = module._varlen_attention_cuda(*flat, cu, 20).view_as(q)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    assert options == ({"enable_gqa": True} if has_gqa else {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_on_a_gpu(dtype):
    q, k, v = (x.detach().cuda().requires_grad_() for x in qkv(2, 20, head_dim=32, dtype=dtype))
    cu = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    torch.manual_seed(1)
    weight = torch.randn(q.shape, device="cuda").to(dtype)
    found = []
    for flash in (True, False):
        out = varlen_attention(q, k, v, cu, flash=flash)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    assert_same(*([x.float() for x in some] for some in found), dtype)


@pytest.mark.parametrize("flash", [True, False])
def test_attend_with_masks_and_a_cache(flash):
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(2, 9))
    causal = attention(q, k, v, None, flash=flash)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for same in (mask, additive):
        assert_same([attention(q, k, v, same, flash=flash)], [causal])
    last = attention(q[:, :, -1:], k, v, None, flash=flash)  # one query sees every key
    assert_same([last], [causal[:, :, -1:]])


def test_dropout_of_attention_weights_keeps_the_mean():
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(1, 6))
    for flash in (True, False):
        dropped = torch.stack([attention(q, k, v, None, dropout=0.5, flash=flash) for _ in range(2000)])
        assert dropped.std(0)[..., 1:, :].min() > 0
        torch.testing.assert_close(dropped.mean(0), attention(q, k, v, None), atol=0.2, rtol=0)


def test_document_boundaries():
    cu = torch.tensor([0, 3, 6, 10, 12], dtype=torch.int32)
    assert document_ids(cu, 2, 6).tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 3, 3]]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    assert cu_seqlens_from_positions(positions).tolist() == cu.tolist()
    one_by_one = torch.zeros(1, 3, dtype=torch.long)
    assert cu_seqlens_from_positions(one_by_one).tolist() == [0, 1, 2, 3]
    mask = packed_mask(cu, 2, 6)
    assert mask.shape == (2, 1, 6, 6)
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1],
    ]  # fmt: skip


# ---- rope


def test_rope_rotates_interleaved_pairs():
    cos, sin = rope_tables(torch.tensor([[0, 3]]), head_dim=4, theta=100.0)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 2, 1, 4)
    out = apply_rope(x, cos, sin)
    assert out[0, 0, 0].tolist() == [1, 0, 0, 1]
    a, b = torch.tensor(3.0), torch.tensor(0.3)  # 3 / 100 ** (0 / 4), 3 / 100 ** (2 / 4)
    torch.testing.assert_close(out[0, 1, 0], torch.stack([a.cos(), a.sin(), -b.sin(), b.cos()]))


def test_rope_depends_on_distance_only_and_is_exact_far_out():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(query_at: int, key_at: int) -> float:
        tables = [rope_tables(torch.tensor([[position]]), 32, 10000.0) for position in (query_at, key_at)]
        return (apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum().item()

    size = float(q.norm() * k.norm())  # of an angle of 104 the rounding is 104 times as large
    assert score(7, 3) == pytest.approx(score(104, 100), abs=104 * rounding(terms=32) * size / math.sqrt(32))
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # bfloat16 has no 301
        cos, _ = rope_tables(torch.tensor([[300, 301]]), 32, 10000.0)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, :, 0, 0].double(), torch.tensor([300.0, 301.0]).double().cos(), atol=1e-5, rtol=0)
