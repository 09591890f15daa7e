"""evaluation/inspect.py: what the pages show is what the model computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from evaluation.inspect import (
    attention_weights,
    byte_tokens,
    describe_tokens,
    expert_routing,
    logit_lens,
    next_token_logits,
    sampling_probabilities,
)
from inference.options import SamplingParams
from inference.sampling import BatchedSamplingParams, sample_next
from model.LMConfig import preset
from model.model import Transformer
from model.rope import apply_rope, rope_tables
from model.tokenizer import BOS_ID, encode_text, load_tokenizer

TOKENIZER = load_tokenizer()
IDS = [BOS_ID, 300, 17, 4000, 17, 255, 6000, 9]


def make(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        preset("toy", dim=32, n_layers=3, n_heads=4, n_kv_heads=2, initializer_range=0.3, **fields)
    ).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make()


@pytest.fixture(scope="module")
def mixture() -> Transformer:
    return make(use_moe=True, n_routed_experts=4, num_experts_per_tok=2)


def test_tokens_are_the_bytes_of_the_text():
    text = "Hello, 你好 𠮷😀\n<s>"
    tokens = describe_tokens(TOKENIZER, [BOS_ID, *encode_text(TOKENIZER, text)])
    assert (tokens[0].text, tokens[0].raw) == ("<s>", b"")
    assert b"".join(token.raw for token in tokens[1:]).decode() == text
    assert all(token.text == token.raw.decode(errors="backslashreplace") for token in tokens[1:])
    assert any(token.text.startswith("\\xf0") for token in tokens)  # a part of a rare character
    assert [token.raw for token in byte_tokens("aé")] == [b"a", b"\xc3", b"\xa9"]
    assert [(token.id, token.text) for token in byte_tokens("aé")][:2] == [(97, "a"), (0xC3, "\\xc3")]


def test_next_token_is_that_of_the_last_position(model):
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, -1]
    torch.testing.assert_close(next_token_logits(model, IDS), expected)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.0),
        dict(temperature=1.0),
        dict(temperature=0.7, top_p=0.8),
        dict(temperature=1.5, top_k=5, min_p=0.2),
    ],
)
def test_sampling_probabilities_are_those_of_the_sampler(settings):
    """Uniform numbers in equal steps draw each token in proportion to its probability."""
    sampling, n = SamplingParams(**settings), 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2
    uniform = (torch.arange(n) + 0.5) / n
    drawn = sample_next(logits.expand(n, -1), BatchedSamplingParams([sampling] * n), uniform)
    p = sampling_probabilities(logits, sampling)
    assert float(p.sum()) == pytest.approx(1)
    torch.testing.assert_close(p, drawn.bincount(minlength=12) / n, atol=2 / n, rtol=0)


def test_attention_is_that_of_the_formula(model):
    """softmax(q k / sqrt(d)) of the first layer, each key-value head read by two query heads."""
    weights = attention_weights(model, IDS)
    assert weights.shape == (3, 4, len(IDS), len(IDS))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, len(IDS)))
    assert not weights.triu(1).any()
    with torch.no_grad():
        outputs = model(torch.tensor([IDS]), output_attentions=True).attentions
        x = model.layers[0].attention_norm(model.tok_embeddings(torch.tensor([IDS])))
        layer, config = model.layers[0].attention, model.config
        rope = rope_tables(torch.arange(len(IDS))[None], config.head_dim, config.rope_theta)
        q, k = (apply_rope(w(x).unflatten(-1, (-1, config.head_dim)), *rope) for w in (layer.wq, layer.wk))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / config.head_dim**0.5
        mask = torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril()
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, torch.cat(outputs))
    torch.testing.assert_close(weights[:1], expected)


def test_the_last_row_of_the_lens_is_the_prediction_and_the_first_is_the_embedding(model):
    lens = logit_lens(model, IDS, k=4)
    assert lens.ids.shape == lens.probabilities.shape == (4, len(IDS), 4)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
        first = model.output(model.norm(model.tok_embeddings(torch.tensor(IDS))))
    for row, expected in ((-1, logits.softmax(-1)), (0, first.softmax(-1))):
        top = expected.topk(4)
        assert torch.equal(lens.ids[row], top.indices)
        torch.testing.assert_close(lens.probabilities[row], top.values)
        torch.testing.assert_close(lens.final[row], expected.gather(-1, logits.argmax(-1, keepdim=True))[:, 0])


def test_the_lens_reads_each_layer_as_if_it_were_the_last(model):
    """A model without its last layer predicts what the lens shows after the layer before."""
    lens = logit_lens(model, IDS, k=3)
    shorter = make()
    del shorter.layers[-1]
    with torch.no_grad():
        top = shorter(torch.tensor([IDS])).logits[0].softmax(-1).topk(3)
    assert torch.equal(lens.ids[-2], top.indices)
    torch.testing.assert_close(lens.probabilities[-2], top.values)


def test_experts_are_those_of_the_router(mixture):
    routing = expert_routing(mixture, IDS)
    assert routing.experts.shape == routing.weights.shape == (3, len(IDS), 2)
    with torch.no_grad():
        expected = mixture(torch.tensor([IDS]), labels=torch.tensor([IDS])).expert_load
        x = mixture.tok_embeddings(torch.tensor([IDS]))
        layer = mixture.layers[0]
        positions = mixture._attention_metadata(x, None, None, None, None, None)
        hidden = layer.ffn_norm(x + layer.attention(layer.attention_norm(x), positions))
        top = F.linear(hidden[0], layer.feed_forward.gate.weight).softmax(-1).topk(2)
    assert torch.equal(routing.load.float(), expected)
    assert torch.equal(routing.experts[0], top.indices)
    torch.testing.assert_close(routing.weights[0], top.values / top.values.sum(-1, keepdim=True))
    assert not any(layer.feed_forward.gate._forward_hooks for layer in mixture.layers)


def test_a_dense_model_has_no_experts(model):
    with pytest.raises(UserError, match="no experts"):
        expert_routing(model, IDS)
