"""model/model.py: the published mathematics, packing, accumulation, caches, and Hugging Face around it.

The first part is an independent implementation of the mathematics: plain loops over a state dict, nothing of ours.
"""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_logits_close, gradient_rounding, rounding, shape_of
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from model.LMConfig import LMConfig, architecture_differences, preset
from model.model import Transformer, describe_parameters, parameter_counts
from model.weights import load_checkpoint

SMALL = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97, initializer_range=0.2)
KINDS = {
    "dense": {},
    "moe": dict(use_moe=True, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2),
    "moe_top1": dict(use_moe=True, n_routed_experts=3, n_shared_experts=0, num_experts_per_tok=1),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str = "dense", seed: int = 0, **fields) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(LMConfig(**(SMALL | KINDS[kind] | fields))).eval()
    with torch.no_grad():  # a norm weight of 1 everywhere would hide a norm that is left out
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def make_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer) -> torch.Tensor:
    """All gradients as one vector, which is then cleared; a parameter without one is an error."""
    vector = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return vector


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- the published mathematics, independently


def reference_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def reference_rope(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of one head."""
    out = x.clone()
    for i in range(0, len(x), 2):
        angle = position / theta ** (i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
        out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
    return out


def reference_mlp(x: torch.Tensor, state: dict, prefix: str) -> torch.Tensor:
    w1, w2, w3 = (state[f"{prefix}.{name}.weight"] for name in ("w1", "w2", "w3"))
    gate = w1 @ x
    return w2 @ (gate / (1 + torch.exp(-gate)) * (w3 @ x))


def reference_feed_forward(x: torch.Tensor, state: dict, prefix: str, top_k: int) -> torch.Tensor:
    if f"{prefix}.gate.weight" not in state:
        return reference_mlp(x, state, prefix)
    scores = state[f"{prefix}.gate.weight"] @ x
    probabilities = torch.exp(scores) / torch.exp(scores).sum()
    best = sorted(range(len(probabilities)), key=lambda e: -probabilities[e].item())[:top_k]
    total = sum(probabilities[e] for e in best) if top_k > 1 else 1.0
    out = sum(probabilities[e] / total * reference_mlp(x, state, f"{prefix}.experts.{e}") for e in best)
    if f"{prefix}.shared_experts.w1.weight" in state:
        out = out + reference_mlp(x, state, f"{prefix}.shared_experts")
    return out


def reference_logits(
    state: dict, ids: list[int], n_heads: int, n_kv_heads: int, top_k: int = 2, theta: float = 10000.0
) -> torch.Tensor:
    """Logits (time, vocabulary) of one sequence, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    n_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    stream = [state["tok_embeddings.weight"][i] for i in ids]
    head_dim = len(stream[0]) // n_heads
    for layer in range(n_layers):
        name = f"layers.{layer}"
        normed = [reference_norm(x, state[f"{name}.attention_norm.weight"]) for x in stream]
        q, k, v = (
            [(state[f"{name}.attention.{w}.weight"] @ x).view(-1, head_dim) for x in normed] for w in ("wq", "wk", "wv")
        )
        for t in range(len(ids)):
            q[t] = torch.stack([reference_rope(head, t, theta) for head in q[t]])
            k[t] = torch.stack([reference_rope(head, t, theta) for head in k[t]])
        for t in range(len(ids)):
            heads = []
            for h in range(n_heads):
                kv = h // (n_heads // n_kv_heads)
                scores = torch.stack([q[t][h] @ k[s][kv] for s in range(t + 1)]) / math.sqrt(head_dim)
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                heads.append(sum(weights[s] * v[s][kv] for s in range(t + 1)))
            stream[t] = stream[t] + state[f"{name}.attention.wo.weight"] @ torch.cat(heads)
        for t in range(len(ids)):
            normed = reference_norm(stream[t], state[f"{name}.ffn_norm.weight"])
            stream[t] = stream[t] + reference_feed_forward(normed, state, f"{name}.feed_forward", top_k)
    return torch.stack([state["output.weight"] @ reference_norm(x, state["norm.weight"]) for x in stream])


def published_shapes(
    dim: int, n_layers: int, kv_dim: int, hidden: int, vocab: int, experts: int = 0, shared: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file; `shared` is the width of the shared experts."""

    def mlp(prefix: str, width: int) -> dict:
        return {
            f"{prefix}.w1.weight": (width, dim),
            f"{prefix}.w2.weight": (dim, width),
            f"{prefix}.w3.weight": (width, dim),
        }

    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    for i in range(n_layers):
        layer = f"layers.{i}"
        for name, rows in [("wq", dim), ("wk", kv_dim), ("wv", kv_dim), ("wo", dim)]:
            shapes[f"{layer}.attention.{name}.weight"] = (rows, dim)
        shapes[f"{layer}.attention_norm.weight"] = shapes[f"{layer}.ffn_norm.weight"] = (dim,)
        if not experts:
            shapes |= mlp(f"{layer}.feed_forward", hidden)
            continue
        shapes[f"{layer}.feed_forward.gate.weight"] = (experts, dim)
        for expert in range(experts):
            shapes |= mlp(f"{layer}.feed_forward.experts.{expert}", hidden)
        if shared:
            shapes |= mlp(f"{layer}.feed_forward.shared_experts", shared)
    return shapes


def published_state(old: bool = False, n_heads: int = 16, theta: float = 1e4, **sizes) -> dict[str, torch.Tensor]:
    """Random weights as in a published file; `old` adds what training scripts of the time left in it."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in published_shapes(**sizes).items():
        scale, centre = (0.3, 1.0) if "norm" in name else (1.2 / math.sqrt(shape[-1]), 0.0)
        state[name] = torch.randn(shape, generator=generator) * scale + centre
    state["tok_embeddings.weight"] = state["output.weight"]
    if old:
        head_dim = sizes["dim"] // n_heads
        angles = torch.outer(torch.arange(32.0), theta ** -(torch.arange(0, head_dim, 2) / head_dim))
        state["pos_cis"] = torch.polar(torch.ones_like(angles), angles)
        for i in range(sizes["n_layers"]):
            state[f"layers.{i}.attention.mask"] = torch.full((1, 1, 32, 32), -torch.inf).triu(1)
        state = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("old", [False, True], ids=["plain", "old"])
@pytest.mark.parametrize("family", [(16, 8, 1e4), (8, 2, 1e6)], ids=["v1", "minimind2"])
@pytest.mark.parametrize("kind", ["dense", "moe", "moe_one_shared", "moe_no_shared"])
def test_published_file_gives_the_published_logits(tmp_path, kind, family, old):
    """MiniMind-v1, and MiniMind2 of February 2025: the same names, told apart by the width of the keys."""
    n_heads, n_kv_heads, theta = family
    sizes = dict(dim=96, n_layers=3, kv_dim=96 * n_kv_heads // n_heads, hidden=256, vocab=61)
    if kind != "dense":
        sizes |= dict(experts=4, shared={"moe": 512, "moe_one_shared": 256, "moe_no_shared": 0}[kind])
    state = published_state(old, n_heads, theta, **sizes)
    torch.save(state, tmp_path / "some_name.pth")
    checkpoint = load_checkpoint(tmp_path / "some_name.pth")
    found = checkpoint.config
    assert (found.n_heads, found.n_kv_heads, found.rope_theta) == (n_heads, n_kv_heads, theta)
    assert any("_orig_mod." in note for note in checkpoint.notes) == old
    assert any("pos_cis" in note and "4 tables" in note for note in checkpoint.notes) == old
    if "shared" in kind:
        expected = {"moe_one_shared": "1 shared", "moe_no_shared": "0 shared"}[kind]
        assert any(expected in note for note in checkpoint.notes)

    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(5))
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    plain = {name: tensor for name, tensor in plain.items() if "mask" not in name and name != "pos_cis"}
    expected = torch.stack([reference_logits(plain, row, n_heads, n_kv_heads, theta=theta) for row in ids.tolist()])
    logits = checkpoint.model(ids).logits
    assert expected.std() > 0.5  # the comparison is about something
    assert_logits_close(logits, expected, checkpoint.config)


@kinds
def test_own_model_computes_the_same_mathematics(kind):
    model = make(kind)
    ids = make_ids(1, 9)
    expected = reference_logits(model.state_dict(), ids[0].tolist(), 4, 2, top_k=model.config.num_experts_per_tok)
    assert_logits_close(model(ids).logits[0], expected, model.config)


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("minimind-v1-small", dict(dim=512, n_layers=8, kv_dim=256, hidden=1408, vocab=6400), "26.88M"),
        ("minimind-v1", dict(dim=768, n_layers=16, kv_dim=384, hidden=2048, vocab=6400), "108.75M"),
        (
            "minimind-v1-moe",
            dict(dim=512, n_layers=8, kv_dim=256, hidden=1408, vocab=6400, experts=4, shared=2816),
            "113.40M",
        ),
    ],
)
def test_presets_have_the_published_names_shapes_and_sizes(name, sizes, millions):
    with torch.device("meta"):
        model = Transformer(preset(name))
    published = published_shapes(**sizes)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == published
    counted = sum(math.prod(shape) for key, shape in published.items() if key != "output.weight")
    counts = parameter_counts(model)
    assert counts["total"] == counted == model.num_parameters()
    assert describe_parameters(model).startswith(f"{millions} parameters")
    assert sum(n for part, n in counts.items() if part not in ("total", "active")) == counted
    idle = 8 * 2 * 3 * 512 * 1408 if "moe" in name else 0  # layers, experts not chosen, matrices
    assert counts["active"] == counted - idle


def test_configuration_refuses_what_cannot_be_built():
    with pytest.raises(ValueError, match="dim=100 is not divisible by n_heads=16"):
        preset("toy", dim=100, n_heads=16)
    with pytest.raises(ValueError, match="(?s)n_heads=6 is not divisible by n_kv_heads=4.*dropout=1.5"):
        preset("toy", n_kv_heads=4, dropout=1.5)
    with pytest.raises(ValueError, match="head dimension 7"):
        LMConfig(dim=28, n_heads=4, n_kv_heads=2)
    with pytest.raises(ValueError, match="head_dim=9 must be even"):
        LMConfig(head_dim=9)
    with pytest.raises(ValueError, match="num_experts_per_tok=5"):
        LMConfig(use_moe=True, num_experts_per_tok=5)
    with pytest.raises(ValueError, match="known: minimind-v1-small"):
        preset("huge")
    with pytest.raises(ValueError, match="unknown model fields: depth"):
        preset("toy", depth=3)
    a, b = preset("toy"), preset("toy", n_layers=5, dropout=0.1)
    assert architecture_differences(a, b) == ["n_layers: 4 != 5"]


# ---- who sees whom


@kinds
@pytest.mark.parametrize("flash", [True, False])
def test_a_later_token_changes_no_earlier_logit(kind, flash):
    model = make(kind, flash_attn=flash)
    ids = make_ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 97
    before, after = model(ids).logits, model(changed).logits
    assert_logits_close(before[:, :7], after[:, :7], model.config)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4  # and every later one


@kinds
def test_flash_and_reference_attention_agree(kind):
    fast, slow = make(kind), make(kind, flash_attn=False)
    ids, mask = make_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :5] = 0
    cu = torch.tensor([0, 4, 17, 34, 40, 51], dtype=torch.int32)
    for inputs in [{}, dict(attention_mask=mask), dict(cu_seqlens=cu)]:
        results = []
        for model in (fast, slow):
            out = model(ids, labels=ids, **inputs)
            out.loss.backward()
            results.append((out.logits, gradients(model)))
        (logits, grad), (slow_logits, slow_grad) = results
        assert_logits_close(logits, slow_logits, fast.config)
        assert relative(grad, slow_grad) < gradient_rounding(fast.config, ids.numel())


def pack(lengths_of_rows: list[list[int]], seed: int = 1):
    """Rows of documents: ids, positions, cu_seqlens, labels, and (row, start, end) of each document."""
    time = sum(lengths_of_rows[0])
    ids = make_ids(len(lengths_of_rows), time, seed=seed)
    labels, spans, positions, bounds = ids.clone(), [], [], [0]
    for row, lengths in enumerate(lengths_of_rows):
        assert sum(lengths) == time
        start = 0
        for length in lengths:
            spans.append((row, start, start + length))
            labels[row, start] = -100
            bounds.append(bounds[-1] + length)
            start += length
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    return ids, torch.stack(positions), torch.tensor(bounds, dtype=torch.int32), labels, spans


@kinds
@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids", "both", "reference"])
def test_packed_equals_unpacked(kind, how):
    model = make(kind, flash_attn=how != "reference").train()
    ids, positions, cu, labels, spans = pack([[1, 9, 30], [40], [13, 13, 14]])
    inputs = {}
    if how != "position_ids":
        inputs["cu_seqlens"] = cu
    if how in ("position_ids", "both"):
        inputs["position_ids"] = positions
    out = model(ids, labels=labels, num_items_in_batch=1, **inputs)
    assert out.past_key_values is None
    out.loss.backward()
    packed_gradient = gradients(model)

    total = 0.0
    for row, start, end in spans:
        document = ids[row : row + 1, start:end]
        alone = model(document, labels=document, num_items_in_batch=1)
        assert_logits_close(out.logits[row : row + 1, start:end], alone.logits, model.config)
        total = total + alone.loss
    torch.testing.assert_close(out.loss, total)
    total.backward()
    assert relative(packed_gradient, gradients(model)) < gradient_rounding(model.config, ids.numel())


def test_packed_documents_and_caches_exclude_each_other():
    model = make()
    ids, positions, cu, *_ = pack([[4, 6]])
    for cache in (DynamicCache(config=model.config), model(ids).past_key_values):
        with pytest.raises(ValueError, match="packed documents cannot be kept in a KV cache"):
            model(ids, cu_seqlens=cu, past_key_values=cache)
    # With a cache, positions are just positions: it is filled, and nothing is taken for packed.
    cache = DynamicCache(config=model.config)
    model(ids, position_ids=positions, past_key_values=cache)
    assert cache.get_seq_length() == 10
    assert model(ids, cu_seqlens=cu, use_cache=True).past_key_values is None
    assert model(ids, position_ids=positions, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


# ---- loss


def ragged_batch(n: int, time: int, seed: int = 2):
    """Right-padded documents of different lengths: ids, mask, labels."""
    lengths = torch.randint(2, time + 1, (n, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(time)[None] < lengths).long()
    ids = make_ids(n, time, seed=seed) * mask
    return ids, mask, ids.masked_fill(mask == 0, -100)


@kinds
def test_loss_is_the_cross_entropy_of_the_logits(kind):
    model = make(kind)
    ids, mask, labels = ragged_batch(4, 11)
    labels[0, 1:3] = -100
    out = model(ids, attention_mask=mask, labels=labels)
    by_hand, n = 0.0, 0
    for row in range(4):
        for t in range(10):
            if labels[row, t + 1] != -100:
                by_hand -= out.logits[row, t].log_softmax(-1)[labels[row, t + 1]]
                n += 1
    torch.testing.assert_close(out.loss, by_hand / n)
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1, loss_only=True)
    assert summed.logits is None
    torch.testing.assert_close(summed.loss, by_hand)


def test_token_zero_is_a_target_like_any_other():
    model = make()
    ids = make_ids(1, 6)
    ids[0, 3] = 0
    without = ids.clone()
    without[0, 3] = -100
    difference = (
        model(ids, labels=ids, num_items_in_batch=1).loss - model(ids, labels=without, num_items_in_batch=1).loss
    )
    torch.testing.assert_close(difference, -model(ids).logits[0, 2].log_softmax(-1)[0])


@kinds
@pytest.mark.parametrize("packed", [False, True])
def test_accumulation_does_not_change_the_gradient(kind, packed):
    model = make(kind).train()
    ids, mask, labels = ragged_batch(32, 24)
    n_targets = int((labels[:, 1:] != -100).sum())

    def run(rows: slice) -> None:
        inputs = dict(attention_mask=mask[rows])
        if packed:  # a row is a document and its padding
            ends = mask[rows].sum(1) + torch.arange(len(mask[rows])) * 24
            starts = torch.arange(len(mask[rows]) + 1) * 24
            inputs["cu_seqlens"] = torch.cat([starts, ends]).unique().to(torch.int32)
        model(ids[rows], labels=labels[rows], num_items_in_batch=n_targets, loss_only=True, **inputs).loss.backward()

    run(slice(None))
    whole = gradients(model)
    for start in range(0, 32, 4):
        run(slice(start, start + 4))
    assert relative(gradients(model), whole) < gradient_rounding(model.config, ids.numel())


def test_balance_loss_is_optimised_while_training_and_weighted_by_targets():
    model = make("moe", aux_loss_alpha=0.5).train()
    ids, mask, labels = ragged_batch(5, 16)
    n = (labels[:, 1:] != -100).sum(1)
    out = model(ids, attention_mask=mask, labels=labels)
    language = model.eval()(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(language.aux_loss, out.aux_loss)  # there, but not in the loss of an evaluation
    torch.testing.assert_close(out.loss, language.loss + out.aux_loss)
    alone = [model(ids[i : i + 1, : n[i] + 1], labels=ids[i : i + 1, : n[i] + 1]).aux_loss for i in range(5)]
    torch.testing.assert_close(out.aux_loss, sum(a * k for a, k in zip(alone, n, strict=True)) / n.sum())
    assert out.aux_loss > 0.5 * model.config.n_layers  # alpha for each layer that were perfectly balanced
    (gate_gradient,) = torch.autograd.grad(out.aux_loss, model.layers[1].feed_forward.gate.weight, retain_graph=True)
    assert gate_gradient.abs().max() > 0
    assert make("moe", aux_loss_alpha=0.0).train()(ids, labels=labels).aux_loss is None
    assert make().train()(ids, labels=labels).aux_loss is None


@pytest.mark.parametrize("kind", ["moe", "moe_top1"])
def test_padding_is_not_routed_and_changes_nothing(kind):
    """Ten tokens of padding on either side, whatever they hold: the same loss, gradient and work for the experts."""
    model = make(kind, aux_loss_alpha=0.5).train()
    ids = make_ids(3, 12)
    results = []
    for left, right, filler in [(0, 0, 0), (10, 0, 5), (0, 10, 96), (400, 0, 3)]:  # 400: the grouped path
        padded = F.pad(ids, (left, right), value=filler)
        mask = F.pad(torch.ones_like(ids), (left, right))
        labels = F.pad(ids, (left, right), value=-100)
        labels[:, left] = -100
        routed = []
        hook = model.layers[0].feed_forward.register_forward_hook(
            lambda _module, _args, out, routed=routed: routed.append(
                int((out[1][1] < model.config.n_routed_experts).sum())
            )
        )
        loss = model(padded, attention_mask=mask, labels=labels).loss
        hook.remove()
        loss.backward()
        assert routed == [3 * 12 * model.config.num_experts_per_tok]
        results.append((loss.item(), gradients(model)))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=rounding(**shape_of(model.config)))
        assert relative(gradient, results[0][1]) < gradient_rounding(model.config, padded.numel())


@kinds
def test_training_computes_what_evaluation_computes(kind):
    model = make(kind)
    ids = make_ids(8, 64)
    evaluated = model(ids).logits
    assert_logits_close(model.train()(ids).logits, evaluated, model.config)


def test_gradient_reaches_every_parameter():
    for kind in KINDS:
        model = make(kind).train()
        ids = make_ids(4, 30)
        model(ids, labels=ids).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        assert model.output.weight is model.tok_embeddings.weight


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_nothing(kind, dropout, monkeypatch):
    monkeypatch.setattr("model.model.LOSS_CHUNK", 7)
    model = make(kind, dropout=dropout).train()
    ids, _, cu, labels, _ = pack([[5, 15], [20]])
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = {}
        hooks = [
            module.register_forward_hook(lambda module, args, _, calls=calls: calls.setdefault(module, []).append(args))
            for module in (model.layers[0].attention, model.output)
        ]
        torch.manual_seed(0)
        loss = model(ids, labels=labels, cu_seqlens=cu, loss_only=True).loss
        loss.backward()
        for hook in hooks:
            hook.remove()
        assert len(calls[model.layers[0].attention]) == 1 + checkpointing  # it is really computed twice
        assert {len(args[0]) for args in calls[model.output]} == ({7, 5} if checkpointing else {40})
        results.append((loss, gradients(model)))
    torch.testing.assert_close(*results)


@kinds
def test_dropout_is_for_training_only_and_keeps_documents_apart(kind):
    model = make(kind, dropout=0.3)
    plain = make(kind)
    ids, _, cu, *_ = pack([[8, 12], [20]])
    for inputs in [{}, dict(cu_seqlens=cu)]:
        model.eval()
        torch.testing.assert_close(model(ids, **inputs).logits, plain(ids, **inputs).logits)
        model.train()
        torch.manual_seed(0)
        first = model(ids, **inputs).logits
        assert (first - model(ids, **inputs).logits).abs().max() > 1e-2
    # The same seed would not do for an experiment with another document: experts draw in the order of their tokens.
    embedded = model.tok_embeddings(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, cu_seqlens=cu).logits[0, 8:].square().sum().backward()
    assert embedded.grad[0, :8].abs().max() == embedded.grad[1].abs().max() == 0
    assert embedded.grad[0, 8:].abs().amax(-1).min() > 0


# ---- caches


@kinds
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("chunks", [[1] * 14, [5, 1, 1, 4, 3], [13, 1]])
def test_cached_decoding_equals_recomputation(kind, chunks, flash):
    model = make(kind, flash_attn=flash)
    ids = make_ids(2, 14)
    whole = model(ids).logits
    cache, done = DynamicCache(config=model.config), 0
    for n in chunks:
        out = model(ids[:, done : done + n], past_key_values=cache)
        assert out.past_key_values is cache
        # Products of one row and of fourteen are rounded differently, how much depends on the CPU.
        assert_logits_close(out.logits, whole[:, done : done + n], model.config)
        done += n
        assert cache.get_seq_length() == done


@kinds
@pytest.mark.parametrize("own_positions", [False, True])
def test_cached_decoding_of_a_ragged_batch(kind, own_positions):
    """Rows padded on the left, as `generate` has them; the prompt in two chunks, then token by token."""
    model = make(kind)
    lengths, prompt, time = [3, 9, 6], 9, 14
    ids = make_ids(3, time)
    mask = torch.stack([(torch.arange(time) >= prompt - n).long() for n in lengths])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, logits = DynamicCache(config=model.config), []
    for start, end in [(0, 7), (7, 9), *((t, t + 1) for t in range(9, time))]:
        own = dict(position_ids=positions[:, start:end]) if own_positions else {}
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **own)
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    assert logits.isfinite().all()
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, prompt - n :]).logits[0]
        assert_logits_close(logits[row, prompt - n :], alone, model.config)


def test_logits_to_keep():
    model = make()
    ids = make_ids(2, 8)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    embedded = model(inputs_embeds=model.tok_embeddings(ids), output_hidden_states=True)
    torch.testing.assert_close(embedded.logits, whole)
    assert len(embedded.hidden_states) == model.config.n_layers + 1


# ---- Hugging Face


@kinds
def test_generate_equals_recomputation(kind):
    model = make(kind, eos_token_id=None)
    prompts = [make_ids(4, seed=7), make_ids(9, seed=8), make_ids(1, seed=9)]
    width = max(map(len, prompts))
    ids = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for row, prompt in enumerate(prompts):
        own = prompt[None]
        for _ in range(12):
            own = torch.cat([own, model(own).logits[:, -1:].argmax(-1)], dim=1)
        assert generated[row, width:].tolist() == own[0, len(prompt) :].tolist()
    assert len(set(generated[1, width:].tolist())) > 2


@kinds
def test_save_and_load_the_hugging_face_way(kind, tmp_path):
    model = make(kind, rope_theta=5000.0)
    model.save_pretrained(tmp_path)
    again, report = Transformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert again.output.weight is again.tok_embeddings.weight
    assert again.config.own_fields() == model.config.own_fields()
    ids = make_ids(2, 9)
    assert torch.equal(model(ids).logits, again(ids).logits)
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path)  # the class of this project, not the copy in the folder
    assert type(automatic) is Transformer and type(AutoConfig.from_pretrained(tmp_path)) is LMConfig
    assert torch.equal(model(ids).logits, automatic(ids).logits)


def test_what_is_returned_follows_the_configuration():
    model, ids = make(), make_ids(2, 9)
    states = model(ids, output_hidden_states=True).hidden_states
    assert model(ids).hidden_states is None and len(states) == 3
    logits, *_ = model(ids, return_dict=False, use_cache=False)
    model.config.output_hidden_states, model.config.return_dict = True, False
    first, hidden, _ = model(ids, use_cache=False)
    assert torch.equal(first, logits) and torch.equal(hidden[-1], states[-1])
    assert model(ids, output_hidden_states=False, return_dict=True).hidden_states is None


@kinds
def test_attention_weights_come_from_the_reference_path(kind):
    model, (ids, positions, *_) = make(kind), pack([[5, 7], [12]])
    out = model(ids, output_attentions=True)
    assert model(ids).attentions is None and len(out.attentions) == model.config.n_layers
    assert_logits_close(out.logits, model(ids).logits, model.config)
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        assert weights.triu(1).abs().max() == 0 and weights.std() > 0.01
    packed = model(ids, position_ids=positions, output_attentions=True)
    assert packed.attentions[0][0, :, 5:, :5].abs().max() == 0  # of another document
    generated = model.generate(
        ids[:, :4],
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    assert [step[0].shape for step in generated.attentions] == [(2, 4, 4, 4), (2, 4, 1, 5), (2, 4, 1, 6)]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_recorded_once_for_all_lengths_and_positions(kind):
    """torch.compile without a break, torch.export, torch.jit.trace, for any length; whether rows are packed is not known."""
    model = make(kind, n_layers=1).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    example = dict(input_ids=make_ids(2, 6), position_ids=torch.arange(6).expand(2, 6).clone())
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)}
    shapes = dict(input_ids=sizes, position_ids=sizes, use_cache=None, return_dict=None)
    exported = torch.export.export(
        model, (), dict(**example, use_cache=False, return_dict=False), dynamic_shapes=shapes
    ).module()
    traced = torch.jit.trace(
        lambda *two: model(*two, use_cache=False).logits, (ids := make_ids(2, 6), torch.ones_like(ids))
    )
    for lengths in ([[5, 7], [12]], [[1, 2, 6]] * 3, [[17], [17]]):
        ids, positions, *_ = pack(lengths)
        expected = model(ids, position_ids=positions).logits
        inputs = dict(input_ids=ids, position_ids=positions, use_cache=False)
        assert_logits_close(compiled(**inputs).logits, expected, model.config)
        assert_logits_close(exported(**inputs, return_dict=False)[0], expected, model.config)
        assert_logits_close(traced(ids, torch.ones_like(ids)), model(ids).logits, model.config)


@pytest.mark.parametrize(("lengths", "rate"), [([[5, 7], [3, 9]], 0.0), ([[50, 70], [30, 90]], 0.01)])
def test_a_compiled_training_step_has_the_same_loss_and_gradient(lengths, rate):
    """As one graph. With few tokens one expert after another computes, with many they do it in groups; documents keep
    their balance losses."""
    model = make("moe", n_layers=1, router_bias_rate=rate).train()
    ids, positions, cu, labels, _ = pack(lengths)
    inputs = dict(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
    inputs |= dict(cu_seqlens=cu) if rate else {}
    half = torch.autocast("cpu", torch.bfloat16, enabled=bool(rate))
    with half:
        out = model(**inputs)
    out.loss.backward()
    gradient = gradients(model)
    torch._dynamo.reset()
    with half:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")(**inputs)
    torch.testing.assert_close(compiled.loss, out.loss)
    torch.testing.assert_close(compiled.aux_loss, out.aux_loss)
    compiled.loss.backward()
    assert relative(gradients(model), gradient) < gradient_rounding(model.config, ids.numel())


@kinds
def test_a_static_cache(kind):
    """Its empty slots are not seen, with a mask for padding, with `generate`'s own, and without any."""
    model = make(kind, eos_token_id=None, max_seq_len=64)
    ids = make_ids(2, 14)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    for padding in (None, mask):
        cache, done = StaticCache(config=model.config, max_cache_len=20), 0
        for n in (5, 1, 1, 7):
            given = {} if padding is None else dict(attention_mask=padding[:, : done + n])
            logits = model(ids[:, done : done + n], past_key_values=cache, **given).logits
            whole = model(ids, **({} if padding is None else dict(attention_mask=padding))).logits
            real = mask[:, done : done + n].bool() if padding is not None else torch.ones(2, n, dtype=torch.bool)
            assert_logits_close(logits[real], whole[:, done : done + n][real], model.config)
            done += n
    settings = dict(attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(ids, **settings, cache_implementation="static"), model.generate(ids, **settings))


@kinds
def test_continuous_batching(kind):
    """`generate_batch` answers as `generate` does, with more requests than it can run at once, read in pieces."""
    model = make(kind, eos_token_id=None, initializer_range=0.3)
    prompts = [make_ids(1, length, seed=length) for length in (3, 20, 1, 7)]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=2, block_size=32, max_batch_tokens=16)
    outputs = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts], generation_config=settings, continuous_batching_config=pages
    )
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        mask = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=mask, generation_config=settings)[0, prompt.shape[1] :]
        assert output.error is None and output.generated_tokens == alone.tolist()


def test_sizes_under_the_names_of_hugging_face():
    config = LMConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3)
    assert (config.dim, config.n_heads, config.n_kv_heads, config.n_layers) == (96, 6, 2, 3)
    assert (config.head_dim, config.hidden_dim) == (16, 256)  # computed from them
    stored = config.to_dict()
    assert (stored["hidden_size"], stored["num_hidden_layers"], stored["num_attention_heads"]) == (96, 3, 6)
    assert LMConfig.from_dict(stored).own_fields() == config.own_fields()
    for dim in (48, 512):  # our own name decides, also with the default value
        assert LMConfig.from_dict(stored | {"dim": dim, "head_dim": None, "n_heads": 4}).dim == dim


@kinds
def test_lora_trains_an_adapter_and_nothing_else(kind):
    model = make(kind)
    ids = make_ids(16, 24)  # more than 256 tokens: adapters on experts must not be passed over by the grouped path
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B.default.weight"):
            assert parameter.abs().max() > 0, name
    adapted.eval()
    with_adapter = adapted(input_ids=ids).logits
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=ids).logits, make(kind)(ids).logits)
    merged = adapted.merge_and_unload()
    assert_logits_close(merged(ids).logits, with_adapter, merged.config)
    assert merged.state_dict().keys() == before.keys()


def test_half_precision_stays_close_to_full():
    model = make("moe")
    ids, _, cu, labels, _ = pack([[5, 15], [20]])
    exact = model(ids, labels=labels, cu_seqlens=cu).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(ids, labels=labels, cu_seqlens=cu).loss
    rounded = model.to(torch.bfloat16)(ids, labels=labels, cu_seqlens=cu).loss
    assert autocast.dtype == rounded.dtype == torch.float32
    assert abs(autocast - exact) < 0.05 and abs(rounded - exact) < 0.05


def test_initial_loss_is_that_of_guessing():
    torch.manual_seed(0)
    config = preset("toy")
    model = Transformer(config)
    ids = torch.randint(0, config.vocab_size, (2, 64))
    assert abs(model(ids, labels=ids).loss - math.log(config.vocab_size)) < 0.1
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if "norm" not in name}
    for name, value in std.items():
        small = name.endswith(("wo.weight", "w2.weight"))
        assert value == pytest.approx(0.02 / math.sqrt(2 * config.n_layers) if small else 0.02, rel=0.05), name
