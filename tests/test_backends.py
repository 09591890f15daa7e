"""inference/backends.py, kernels/: fast decoding computes what the model computes, whatever rows come and go."""

from __future__ import annotations

import pytest
import torch
from decoding import generate_ids
from test_generator import TOKENIZER, kinds, make, make_prompts, recompute
from tolerances import close_to, shape_of

from inference.backends import TorchModel, choose_backend
from inference.generator import BatchGenerator, generate
from inference.kernels import decode
from inference.kernels.decode import NativeModel, NativeStep
from inference.kernels.decode_weights import DecodeWeights, quantize_int8
from inference.kernels.loader import KernelUnavailable, load_library, zeros
from inference.kv_cache import KVCache
from inference.options import SamplingParams
from model.lora import add_adapter
from model.tokenizer import BOS_ID, encode_text

WAYS = {
    "native": lambda model, quantize="none": NativeModel(DecodeWeights(model, quantize)),
    "torch": lambda model, quantize="none": TorchModel(DecodeWeights(model, quantize), compiled=False),
}
ways = pytest.mark.parametrize("way", WAYS)
SHAPES = {
    "narrow": {},
    "odd": dict(dim=96, n_heads=6, n_kv_heads=2, hidden_dim=104),  # no multiples of 16; three heads share a key
    "wide heads": dict(dim=128, n_heads=2, n_kv_heads=1, hidden_dim=600),
    "normed heads": dict(n_heads=2, n_kv_heads=1, head_dim=80, qk_norm=True, tie_word_embeddings=False),
}


def logits_of(model, backend, prompts: list[list[int]], keep: bool = False) -> torch.Tensor:
    """The prompts through the cache: all but the last token read by the model or the kernel, the last by the step."""
    cache = KVCache(model.config, len(prompts), 64, dtype=model.dtype)
    step = backend.with_cache(cache.keys, cache.values)
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            if isinstance(step, NativeStep):
                step.prefill([prompt[:-1]], row)
            else:
                cache.select(slice(row, row + 1), 0)
                model(torch.tensor([prompt[:-1]]), past_key_values=cache)
        places = torch.tensor([len(prompt) - 1 for prompt in prompts])
        return step(torch.tensor([prompt[-1] for prompt in prompts]), places, int(places.max())).float()


@torch.inference_mode()
def plain_logits(model, prompts: list[list[int]]) -> torch.Tensor:
    return torch.stack([model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float() for prompt in prompts])


@ways
@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_models(way, kind, shape):
    model = make(kind, **SHAPES[shape])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    prompts = make_prompts(2, 33, 17, 5, 40, 8, 9)
    found, expected = logits_of(model, WAYS[way](model), prompts), plain_logits(model, prompts)
    torch.testing.assert_close(found, expected, **close_to(expected, **shape_of(model.config)))


@ways
@kinds
def test_bfloat16_is_close(way, kind):
    model = make(kind).bfloat16()
    prompts = make_prompts(4, 30, 11)
    wanted = plain_logits(make(kind).bfloat16().float(), prompts)  # the same weights, everything else exact
    own = (plain_logits(model, prompts) - wanted).abs().max()
    # A gate may send a token elsewhere when its numbers are rounded; that is no smaller in the model itself.
    assert (logits_of(model, WAYS[way](model), prompts) - wanted).abs().max() < max(2 * own, 0.05 * wanted.abs().max())


@ways
@kinds
def test_greedy_is_full_recomputation(way, kind):
    """Alone, ragged, with more prompts than rows, so that rows end, join and move."""
    model, prompts = make(kind), make_prompts(1, 17, 5, 5, 30, 3)
    lengths = [24, 3, 20, 9, 14, 1]
    plain = [recompute(model, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
    samplings = [SamplingParams(max_new_tokens=n) for n in lengths]
    backend = WAYS[way](model)
    for max_rows in (1, 2, 6):
        assert generate_ids(model, prompts, samplings, eos_id=None, max_rows=max_rows, backend=backend) == plain


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_no_row_depends_on_others_to_the_bit(kind, dtype, quantize):
    """Whatever is read and decoded beside it; else a near tie could be decided by who else is there."""
    model = make(kind, hidden_dim=1100).to(dtype)  # inputs of w2 in several slabs
    backend = WAYS["native"](model, quantize)
    prompts = make_prompts(3, 29, 8, 14, 14, 2, 21, 40, 5, 6, 7, 9, 11, 30, 31, 32, 33, 34, 20, 19, 18)
    alone = torch.cat([logits_of(model, backend, [prompt]) for prompt in prompts])
    for n in (2, 3, 4, 7, 8, 15, 16, 17, 21):
        assert torch.equal(logits_of(model, backend, prompts[:n]), alone[:n]), n
    # Prompts read together, and tokens one after another instead of as a prompt.
    cache = KVCache(model.config, 21, 64, dtype=dtype)
    step = backend.with_cache(cache.keys, cache.values)
    assert torch.equal(step.prefill(prompts, 0), alone)
    slow = [step(torch.tensor([token]), torch.tensor([place]), place) for place, token in enumerate(prompts[1])]
    assert torch.equal(slow[-1], alone[1:2])


def test_streams_are_the_same_in_any_company():
    model, prompts = make("moe").bfloat16(), make_prompts(9, 4, 6, 12, 3, 8)
    backend = WAYS["native"](model)
    fields = [
        dict(max_new_tokens=4, repetition_penalty=1.5),
        dict(max_new_tokens=25, presence_penalty=2.0),
        dict(max_new_tokens=30, temperature=1.0, top_k=20, seed=5),
        dict(max_new_tokens=12, frequency_penalty=1.0, temperature=0.8, seed=3),
        dict(max_new_tokens=20, temperature=1.5, top_p=0.9, seed=4),
        dict(max_new_tokens=20, temperature=0.9, min_p=0.1, seed=4),
    ]
    samplings = [SamplingParams(**each) for each in fields]
    alone = [
        generate_ids(model, [p], s, eos_id=None, backend=backend)[0] for p, s in zip(prompts, samplings, strict=True)
    ]
    for max_rows in (2, 3, 6):
        assert generate_ids(model, prompts, samplings, eos_id=None, max_rows=max_rows, backend=backend) == alone


def test_rows_beyond_what_one_call_takes(monkeypatch):
    monkeypatch.setattr(decode, "MAX_ROWS", 5)
    model, prompts = make(), make_prompts(12, 3, 5, 6, 1, 2, 9)
    assert generate_ids(
        model, prompts, SamplingParams(max_new_tokens=9), eos_id=None, backend=WAYS["native"](model)
    ) == [recompute(model, prompt, 9) for prompt in prompts]


@ways
def test_the_cache_full_and_stop_strings(way):
    model = make(vocab_size=len(TOKENIZER))
    backend, prompt = WAYS[way](model), [BOS_ID, *encode_text(TOKENIZER, "你好")]
    for sampling in (SamplingParams(max_new_tokens=500), SamplingParams(max_new_tokens=60, temperature=1.0, seed=4)):
        usual = dict(tokenizer=TOKENIZER, eos_id=None, max_len=32)
        plain = list(generate(model, [prompt], sampling, **usual))
        assert (
            list(generate(model, [prompt], sampling, backend=backend, **usual)) == plain
            and plain[-1].finish == "length"
        )
        stop = "".join(event.text for event in plain)[5:8]
        stopped = list(
            generate(model, [prompt], SamplingParams(**{**vars(sampling), "stop": (stop,)}), backend=backend, **usual)
        )
        assert stopped[-1].finish == "stop" and len(stopped) < len(plain)


@ways
@kinds
def test_int8(way, kind):
    """Close to the model, and exactly what a model with those weights computes."""
    model, prompts = make(kind), make_prompts(6, 20, 9)
    backend = WAYS[way](model, "int8")
    found = logits_of(model, backend, prompts)
    exact = plain_logits(model, prompts)
    rounded = make(kind)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.dim() == 2 and "gate" not in name and "embeddings" not in name:
                matrix = quantize_int8(weight)
                assert (matrix.weight.abs().amax(1) == 127).all()
                weight.copy_(matrix.weight * matrix.scale[:, None])
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()
    if way == "native" and kind == "dense":  # the tied embedding is rounded in one of its two places only
        rounded.output.weight = torch.nn.Parameter(rounded.tok_embeddings.weight.clone())
        matrix = quantize_int8(rounded.output.weight)
        rounded.output.weight.data.copy_(matrix.weight * matrix.scale[:, None])
        rounded.tok_embeddings.weight.data.copy_(model.tok_embeddings.weight)
        expected = plain_logits(rounded, prompts)
        torch.testing.assert_close(found, expected, **close_to(expected, **shape_of(model.config)))


@kinds
def test_compiled_is_exact_and_compiles_few_graphs(kind):
    """float32: the same tokens; one graph each for one or more rows of one or more slots, or as many as there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, prompts = make(kind, n_layers=1, max_seq_len=256), make_prompts(1, 60, 5, 124, 30, 3)
    backend = TorchModel(DecodeWeights(model), compiled=True)
    plain = [recompute(model, prompt, 12) for prompt in prompts]
    greedy = SamplingParams(max_new_tokens=12)
    for max_rows in (1, 2, 3, 6):
        assert generate_ids(model, prompts, greedy, eos_id=None, max_rows=max_rows, backend=backend) == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_routers_with_biases_take_the_way_through_pytorch(caplog):
    model = make("moe", router_bias_rate=0.01)
    for layer in model.layers:
        torch.nn.init.normal_(layer.feed_forward.gate.bias, std=0.3)
    assert choose_backend(model) is None and "the kernel does not support biases of routers" in caplog.text
    prompts = make_prompts(9, 4, 6)
    expected = plain_logits(model, prompts)
    found = logits_of(model, WAYS["torch"](model), prompts)
    torch.testing.assert_close(found, expected, **close_to(expected, **shape_of(model.config)))


# ---- which way


def test_what_is_chosen(monkeypatch, caplog):
    model = make()
    assert isinstance(choose_backend(model), NativeModel)
    assert choose_backend(model, compile="off") is None
    assert isinstance(choose_backend(model, compile="off", quantize="int8"), TorchModel)
    with pytest.raises(ValueError, match="unknown quantization 'int4'"):
        choose_backend(model, quantize="int4")
    with pytest.raises(ValueError, match="unknown value 'yes' of compile"):
        choose_backend(model, compile="yes")
    adapted = add_adapter(make(), rank=2, alpha=4.0, dropout=0.0).eval()
    assert choose_backend(adapted) is None
    with pytest.raises(ValueError, match="this one has an adapter: merge it"):
        choose_backend(adapted, quantize="int8")
    with pytest.raises(ValueError, match="made from another model"):
        BatchGenerator(make(), 1, backend=choose_backend(model))

    assert choose_backend(make(n_heads=8)) is None  # heads of 8: the kernel has none
    assert caplog.messages == [
        "decoding is slower than it could be: the kernel has no attention for a head dimension of 8"
    ]
    assert choose_backend(make().half()) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    try:
        with pytest.raises(KernelUnavailable, match="no C.. compiler .no-such-compiler"):
            load_library("decode")
        assert choose_backend(model) is None
        assert isinstance(choose_backend(model, compile="on"), TorchModel)
        assert isinstance(choose_backend(model, quantize="int8"), TorchModel)
    finally:
        load_library.cache_clear()


def test_the_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    try:
        times = []
        for _ in range(2):
            load_library("decode")
            load_library.cache_clear()
            (library,) = (tmp_path / "minimind").iterdir()  # and nothing half done beside it
            times.append(library.stat().st_mtime_ns)
        assert times[0] == times[1]
        library.unlink()
        (tmp_path / "minimind").rmdir()
        (tmp_path / "minimind").write_text("in the way")
        with pytest.raises(KernelUnavailable, match="cannot write to"):
            load_library("decode")

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr("pathlib.Path.home", no_home)  # a user of a container
        with pytest.raises(KernelUnavailable, match="set XDG_CACHE_HOME"):
            load_library("decode")
    finally:
        load_library.cache_clear()


def test_zeros_in_large_pages():
    cells = zeros((3, 1000, 1000), torch.bfloat16)
    assert cells.shape == (3, 1000, 1000) and not cells.any() and cells.is_contiguous()
    cells += 1
    assert cells.float().mean() == 1
