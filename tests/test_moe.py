"""model/moe.py: routing, the balance loss, and the fast path against the plain one."""

import pytest
import torch
from tolerances import close_to, shape_of
from torch import nn

from bench.throughput import MaskedExperts, original_model
from model.LMConfig import LMConfig
from model.model import Transformer
from model.moe import FeedForward, MoEFeedForward, balance_loss
from trainer.losses import expert_shares
from trainer.optim import make_optimizers

SIZES = dict(dim=32, n_heads=4, n_kv_heads=2, vocab_size=50, n_layers=1, use_moe=True)


def make(**fields) -> MoEFeedForward:
    torch.manual_seed(0)
    moe = MoEFeedForward(LMConfig(**(SIZES | fields)))
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.2)
    return moe


BIASED = dict(router_bias_rate=0.01)


def plain(moe: MoEFeedForward, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Token by token: what the layer is meant to compute. x (tokens, dim)."""
    rows = []
    for token, is_valid in zip(x, valid, strict=True):
        out = torch.zeros_like(token)
        if is_valid:
            probabilities = (moe.gate.weight @ token).softmax(-1)
            scores = probabilities if moe.gate.bias is None else probabilities + moe.gate.bias
            best = scores.argsort(descending=True)[: moe.gate.top_k]
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
    BIASED,
])  # fmt: skip
def test_both_paths_compute_the_definition(fields, grouped, monkeypatch):
    moe = make(**fields).train()
    use_path(moe, monkeypatch, grouped)
    x = torch.randn(3, 20, 32, requires_grad=True)
    valid = torch.rand(3, 20) > 0.3
    out, routing = moe(x, valid)
    out.square().sum().backward()
    got = [x.grad, *(p.grad for p in moe.parameters())]
    chosen = routing.chosen
    x.grad = None
    moe.zero_grad()

    expected = plain(moe, x.flatten(0, 1), valid.flatten()).view_as(x)
    # One after the other: the router, two matrix products, the sum of the experts.
    torch.testing.assert_close(out, expected, **close_to(expected, terms=moe.experts[0].w1.out_features, depth=4))
    expected.square().sum().backward()
    if moe.gate.bias is not None:  # it chooses and does not weigh; its gradient comes from `bias_loss`
        assert moe.gate.bias.grad is None
        moe.gate.bias.grad = torch.zeros(4)
    for found, gradient in zip(got, [x.grad, *(p.grad for p in moe.parameters())], strict=True):
        torch.testing.assert_close(found, gradient, **close_to(gradient, terms=x.numel(), depth=12))
    assert (chosen[~valid.flatten()] == 4).all() and (chosen[valid.flatten()] < 4).all()
    assert routing.load.tolist() == [(chosen == i).sum() for i in range(4)]


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_without_tokens_get_a_zero_gradient_not_none(grouped, monkeypatch):
    moe = make(num_experts_per_tok=1).train()
    use_path(moe, monkeypatch, grouped)
    x = torch.rand(2, 16, 32)
    with torch.no_grad():
        moe.gate.weight[2] = 10.0  # everything goes to expert 2
    out, routing = moe(x)
    assert (routing.chosen == 2).all() and routing.load.tolist() == [0, 0, 32, 0]
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
        trained, a = moe.train()(x)
        evaluated, b = moe.eval()(x)
    assert a.probabilities.dtype == torch.float32 and torch.equal(a.probabilities, b.probabilities)
    assert torch.equal(a.chosen, b.chosen)
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


# ---- balancing by bias


def tiny_model(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(LMConfig(**(SIZES | BIASED | fields))).train()


def test_a_bias_has_the_gradient_of_the_load_and_the_loss_does_not_change():
    model, plain_model = tiny_model(aux_loss_alpha=0.0), tiny_model(aux_loss_alpha=0.0, router_bias_rate=0.0)
    ids = torch.randint(0, 50, (4, 16))
    out, plain_out = (m(ids, labels=ids) for m in (model, plain_model))
    assert out.loss == plain_out.loss and torch.equal(out.expert_load, plain_out.expert_load)
    out.loss.backward()
    bias, load = model.layers[0].feed_forward.gate.bias, out.expert_load[0]
    assert torch.equal(bias.grad.sign(), (load - load.mean()).sign()) and load.sum() == 4 * 16 * 2
    plain_out.loss.backward()
    others = {name: p.grad for name, p in model.named_parameters() if not name.endswith("gate.bias")}
    assert all(torch.equal(gradient, plain_model.get_parameter(name).grad) for name, gradient in others.items())
    # It must not count in the norm of all gradients, which is clipped.
    assert bias.grad.norm() < 1e-5 * torch.cat([gradient.flatten() for gradient in others.values()]).norm()
    # Two micro-batches add up.
    whole = bias.grad.clone()
    model.zero_grad()
    for half in ids.split(2):
        model(half, labels=half, num_items_in_batch=4 * 15).loss.backward()
    torch.testing.assert_close(bias.grad, whole)


def test_a_bias_without_experts_is_an_error():
    with pytest.raises(ValueError, match="router_bias_rate=0.1 is for a mixture of experts"):
        LMConfig(**SIZES | dict(use_moe=False, router_bias_rate=0.1))


def test_biases_alone_balance_the_load():
    model = tiny_model(aux_loss_alpha=0.0, n_routed_experts=6, router_bias_rate=0.002)
    gate = model.layers[0].feed_forward.gate
    with torch.no_grad():
        gate.bias[:2] = 0.1  # every token goes to these two
    optimizers = make_optimizers(model, "adamw", 0.0)
    for group in optimizers[0].param_groups + optimizers[1].param_groups:
        group["lr"] = 0.0
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 50, (4, 64))
    uneven = []
    for _ in range(40):
        out = model(ids, labels=ids)
        out.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        uneven.append(expert_shares(out.expert_load)["expert_max_load"].item())
    assert uneven[0] == 3 and max(uneven[-5:]) < 1.25
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {
        "layers.0.feed_forward.gate.bias"
    }


def test_the_loop_that_the_benchmark_compares_with_computes_the_same():
    torch.manual_seed(0)
    loop = original_model(LMConfig(**SIZES)).train()
    assert type(loop.layers[0].feed_forward) is MaskedExperts
    model = Transformer(LMConfig(**SIZES)).train()
    model.load_state_dict(loop.state_dict())
    ids = torch.randint(0, 50, (4, 64))
    a, b = (m(ids).logits for m in (model, loop))
    torch.testing.assert_close(a, b, **close_to(b, **shape_of(model.config)))


def test_shares_of_the_experts():
    shares = expert_shares(torch.tensor([[30.0, 10.0], [0.0, 40.0]]))
    assert {name: float(value) for name, value in shares.items()} == {
        "expert_0_share": 0.375, "expert_1_share": 0.625, "expert_max_load": 2.0,
    }  # fmt: skip


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
