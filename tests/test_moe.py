"""model/moe.py: routing, the balance loss, and the fast path against the plain one."""

import pytest
import torch
from tolerances import close_to
from torch import nn

from model.LMConfig import LMConfig
from model.moe import FeedForward, MoEFeedForward, balance_loss

SIZES = dict(dim=32, n_heads=4, n_kv_heads=2, vocab_size=50, n_layers=1, use_moe=True)


def make(**fields) -> MoEFeedForward:
    torch.manual_seed(0)
    moe = MoEFeedForward(LMConfig(**(SIZES | fields)))
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.2)
    return moe


def plain(moe: MoEFeedForward, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Token by token: what the layer is meant to compute. x (tokens, dim)."""
    rows = []
    for token, is_valid in zip(x, valid, strict=True):
        out = torch.zeros_like(token)
        if is_valid:
            probabilities = (moe.gate.weight @ token).softmax(-1)
            best = probabilities.argsort(descending=True)[: moe.gate.top_k]
            total = probabilities[best].sum() if len(best) > 1 and moe.gate.renormalise else 1.0
            for expert in best.tolist():
                out = out + probabilities[expert] / total * moe.experts[expert](token)
        if moe.shared_experts is not None:
            out = out + moe.shared_experts(token)
        rows.append(out)
    return torch.stack(rows)


def use_path(moe: MoEFeedForward, monkeypatch, grouped: bool) -> None:
    monkeypatch.setattr(moe, "_can_group", lambda x: grouped)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("fields", [
    {}, dict(num_experts_per_tok=1, n_shared_experts=0), dict(num_experts_per_tok=4), dict(norm_topk_prob=False),
])  # fmt: skip
def test_both_paths_compute_the_definition(fields, grouped, monkeypatch):
    moe = make(**fields).train()
    use_path(moe, monkeypatch, grouped)
    x = torch.randn(3, 20, 32, requires_grad=True)
    valid = torch.rand(3, 20) > 0.3
    out, (_, chosen) = moe(x, valid)
    out.square().sum().backward()
    got = [x.grad, *(p.grad for p in moe.parameters())]
    x.grad = None
    moe.zero_grad()

    expected = plain(moe, x.flatten(0, 1), valid.flatten()).view_as(x)
    # One after the other: the router, two matrix products, the sum of the experts.
    torch.testing.assert_close(out, expected, **close_to(expected, terms=moe.experts[0].w1.out_features, depth=4))
    expected.square().sum().backward()
    for found, gradient in zip(got, [x.grad, *(p.grad for p in moe.parameters())], strict=True):
        torch.testing.assert_close(found, gradient, **close_to(gradient, terms=x.numel(), depth=12))
    assert (chosen[~valid.flatten()] == 4).all() and (chosen[valid.flatten()] < 4).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_without_tokens_get_a_zero_gradient_not_none(grouped, monkeypatch):
    moe = make(num_experts_per_tok=1).train()
    use_path(moe, monkeypatch, grouped)
    x = torch.rand(2, 16, 32)
    with torch.no_grad():
        moe.gate.weight[2] = 10.0  # everything goes to expert 2
    out, (_, chosen) = moe(x)
    assert (chosen == 2).all()
    out.sum().backward()
    for i, expert in enumerate(moe.experts):
        for parameter in expert.parameters():
            assert parameter.grad.isfinite().all()
            assert bool(parameter.grad.abs().sum() > 0) == (i == 2)


@pytest.mark.parametrize("grouped", [False, True])
def test_padding_alone_and_garbage_in_padding_do_no_harm(grouped, monkeypatch):
    moe = make(n_shared_experts=0).train()
    use_path(moe, monkeypatch, grouped)
    x = torch.randn(2, 24, 32, requires_grad=True)
    out, _ = moe(x, torch.zeros(2, 24, dtype=torch.bool))
    out.sum().backward()
    assert out.abs().max() == 0 and x.grad.abs().max() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in moe.parameters())


def test_training_path_equals_evaluation_path():
    moe = make()
    x = torch.randn(2, 200, 32)
    assert moe.train()._can_group(x.flatten(0, 1)) and not moe.eval()._can_group(x.flatten(0, 1))
    expected = moe.eval()(x)[0]
    bound = dict(terms=moe.experts[0].w1.out_features, depth=4)
    torch.testing.assert_close(moe.train()(x)[0], expected, **close_to(expected, **bound))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained, (p, chosen) = moe.train()(x)
        evaluated, (q, also_chosen) = moe.eval()(x)
    assert p.dtype == torch.float32 and torch.equal(p, q) and torch.equal(chosen, also_chosen)
    torch.testing.assert_close(trained, evaluated, **close_to(evaluated, depth=4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dim", [96, 100, 90])
def test_sizes_that_the_kernel_cannot_take_train(hidden_dim, dtype):
    """Its rows must be multiples of 16 bytes: 100 numbers of bfloat16 are not."""
    moe, x = make(hidden_dim=hidden_dim).train(), torch.randn(2, 200, 32)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert moe._can_group(x.flatten(0, 1)) == (hidden_dim * dtype.itemsize % 16 == 0)
        out = moe(x)[0]
        torch.testing.assert_close(out, moe.eval()(x)[0], **close_to(out, terms=2 * hidden_dim, depth=4, dtype=dtype))
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())


def test_the_fast_path_steps_aside_for_changed_experts():
    x = torch.randn(400, 32)
    assert make().train()._can_group(x)
    assert not make(dropout=0.1).train()._can_group(x)

    class Wrapped(nn.Linear):
        pass

    moe = make().train()
    moe.experts[3].w2 = Wrapped(moe.experts[3].w2.in_features, 32, bias=False)
    assert not moe._can_group(x)
    for change in (
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: setattr(linear, "forward", linear.forward),  # as accelerate's offload does
    ):
        moe = make().train()
        change(moe.experts[0].w1)
        assert not moe._can_group(x)


def test_top1_gate_learns_from_the_output_alone():
    for fields in (dict(num_experts_per_tok=1), dict(num_experts_per_tok=1, norm_topk_prob=True, n_shared_experts=0)):
        moe = make(**fields)
        moe(torch.randn(2, 10, 32))[0].square().sum().backward()
        assert moe.gate.weight.grad.abs().max() > 1e-3


def test_gate_weights_sum_to_one():
    gate = make().gate
    weights, experts, probabilities = gate(torch.randn(50, 32))
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(50))
    assert (experts[:, 0] != experts[:, 1]).all()


def test_shared_experts_are_one_mlp_of_their_joint_width():
    assert make(n_shared_experts=3, hidden_dim=64).shared_experts.w1.weight.shape == (192, 32)
    assert make(n_shared_experts=0).shared_experts is None
    assert isinstance(make(n_shared_experts=1).shared_experts, FeedForward)


# ---- balance loss


def balance_by_hand(probabilities, chosen, document, n_documents) -> list[float]:
    experts, top_k = probabilities.shape[1], chosen.shape[1]
    losses = []
    for d in range(n_documents):
        tokens = [t for t in range(len(document)) if document[t] == d and chosen[t, 0] < experts]
        loss = 0.0
        for e in range(experts):
            picked = sum(int((chosen[t] == e).sum()) for t in tokens)
            mean = sum(probabilities[t, e].item() for t in tokens) / max(len(tokens), 1)
            loss += picked * experts / (max(len(tokens), 1) * top_k) * mean
        losses.append(loss)
    return losses


def test_balance_loss_is_its_formula_for_every_document():
    torch.manual_seed(0)
    probabilities = torch.randn(30, 4).softmax(-1)
    chosen = probabilities.topk(2).indices
    document = torch.tensor([0] * 5 + [1] * 17 + [2] * 8)
    chosen[20:25] = 4  # padding, at the end of one document and the start of the next
    loss = balance_loss(probabilities, chosen, document, 4)
    torch.testing.assert_close(loss, torch.tensor(balance_by_hand(probabilities, chosen, document, 4)))
    assert loss[3] == 0  # a document without a token
    even = torch.full((8, 4), 0.25)
    choices = torch.arange(16).view(8, 2) % 4
    torch.testing.assert_close(balance_loss(even, choices, torch.zeros(8, dtype=torch.long), 1), torch.ones(1))
    skewed = torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 8)
    one_sided = balance_loss(skewed, torch.tensor([[0, 1]] * 8), torch.zeros(8, dtype=torch.long), 1)
    assert one_sided > 1.9
