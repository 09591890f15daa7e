"""inference/generator.py: cached and batched decoding is exact, every knob does what it says, text comes unbroken."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from decoding import generate_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import close_to, shape_of

from inference.backends import choose_backend
from inference.chunked_prefill import ChunkedPrefill
from inference.detokenizer import _BYTE_OF_CHARACTER, Detokenizer
from inference.generator import BatchGenerator, generate, generate_text
from inference.kv_cache import BLOCK, KVCache, PrefixCache
from inference.options import SamplingParams
from inference.sampling import BatchedSamplingParams, log_probabilities, sample_next
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import BOS_ID, EOS_ID, encode_text, load_tokenizer

VOCAB = 97
KINDS = {"dense": {}, "moe": dict(use_moe=True, n_routed_experts=4, n_shared_experts=2)}
kinds = pytest.mark.parametrize("kind", KINDS)
TOKENIZER = load_tokenizer()


def make(kind: str = "dense", vocab_size: int = VOCAB, **fields) -> Transformer:
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, initializer_range=0.2, max_seq_len=128)
    return Transformer(LMConfig(**(shape | KINDS[kind] | fields), vocab_size=vocab_size)).eval()


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def recompute(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding as plainly as possible: the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


# ---- exactness


@kinds
def test_greedy_is_full_recomputation_alone_and_in_a_ragged_batch(kind):
    model = make(kind)
    prompts = make_prompts(1, 17, 5, 5, 30)
    plain = [recompute(model, prompt, 24) for prompt in prompts]
    assert len({tuple(answer) for answer in plain}) == 5  # not the same trivial text for all
    greedy = SamplingParams(max_new_tokens=24)
    assert [generate_ids(model, [prompt], greedy, eos_id=None)[0] for prompt in prompts] == plain
    assert generate_ids(model, prompts, greedy, eos_id=None) == plain
    # More prompts than rows: they join while others are in the middle.
    assert generate_ids(model, prompts, greedy, eos_id=None, max_rows=2) == plain


@pytest.mark.parametrize("compile", ["off", "auto"])
def test_equal_prompts_are_read_once(monkeypatch, compile):
    """The answers are those of the prompts one by one, and behind rows that are already there."""
    model = make()
    a, b, c = make_prompts(9, 4, 21)
    prompts = [a, a, a, b, c, c, a]
    samplings = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed) for seed in range(7)]
    backend = choose_backend(model, compile)
    alone = [
        generate_ids(model, [p], s, eos_id=None, backend=backend)[0] for p, s in zip(prompts, samplings, strict=True)
    ]
    assert generate_ids(model, prompts, samplings, eos_id=None, max_rows=7, backend=backend) == alone
    generator = BatchGenerator(model, 8, eos_id=None)
    read = []
    monkeypatch.setattr(generator, "_prefill", lambda p, *args: read.append(len(p)) or torch.randn(len(p), VOCAB))
    generator.add([b], samplings[:1], [7])
    generator.add(prompts, samplings, range(7))
    assert read == [1, 4]


@kinds
def test_rows_that_end_and_join_do_not_disturb_the_others(kind):
    model = make(kind)
    prompts, lengths = make_prompts(9, 2, 14, 6, 3, 11), [3, 20, 1, 9, 14, 6]
    samplings = [SamplingParams(max_new_tokens=length) for length in lengths]
    plain = [recompute(model, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    for max_rows in (1, 3, 6):
        assert generate_ids(model, prompts, samplings, eos_id=None, max_rows=max_rows) == plain

    decoder, answers = BatchGenerator(model, 3, eos_id=None), {key: [] for key in range(6)}
    events = decoder.add(prompts[:2], [SamplingParams(max_new_tokens=50)] * 2, [0, 1])
    for step in range(12):
        for event in events:
            answers[event.key].append(event.token)
        events = []
        if step == 3:
            events = decoder.add(prompts[2:3], [SamplingParams(max_new_tokens=50)], [2])
        if step == 6:
            decoder.cancel(0)
            events = decoder.add(prompts[3:4], [SamplingParams(max_new_tokens=50)], [3])
            decoder.cancel(77)  # not there
        events = events + decoder.step()
    assert {row.key for row in decoder.rows} == {1, 2, 3}
    assert len(answers[0]) == 7 and len(answers[1]) >= 12 and len(answers[3]) >= 5
    for key in range(4):
        assert answers[key] == recompute(model, prompts[key], len(answers[key]))


@kinds
def test_logits_through_the_cache_in_chunks(kind):
    model, (ids,) = make(kind), make_prompts(20)
    ids = torch.tensor([ids, ids[::-1]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = KVCache(model.config, 2, 20)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 7), (7, 8), (8, 8 + 11), (19, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **close_to(whole, **shape_of(model.config)))
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="holds 20 tokens per row, 21 are needed"):
        model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="made for 2 rows, and the call has 1"):
        model(ids[:1, :1], past_key_values=KVCache(model.config, 2, 20))


def test_equals_transformers_generate():
    model, prompts = make(), make_prompts(8)
    theirs = model.generate(torch.tensor(prompts), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 8:]
    assert generate_ids(model, prompts, SamplingParams(max_new_tokens=20), eos_id=None) == [theirs.tolist()]
    theirs = model.generate(
        torch.tensor(prompts), max_new_tokens=20, do_sample=False, eos_token_id=None, repetition_penalty=1.7
    )[0, 8:]
    ours = generate_ids(model, prompts, SamplingParams(max_new_tokens=20, repetition_penalty=1.7), eos_id=None)
    assert ours == [theirs.tolist()] and len(set(ours[0])) > 15


def test_bfloat16_runs():
    model = make().bfloat16()
    answers = generate_ids(
        model, make_prompts(3, 9), SamplingParams(max_new_tokens=5, temperature=1, top_p=0.9), eos_id=None
    )
    assert [len(answer) for answer in answers] == [5, 5]


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="call model.eval"):
        generate(make().train(), [[1]])


# ---- prompts in parts, and shared beginnings


def readers(kind: str) -> Iterator[tuple[Transformer, BatchGenerator]]:
    """Yield a model with a generator, without and, if there is a C++ compiler, with the kernel."""
    model = make(kind)
    for backend in (None, choose_backend(model, "auto")):
        yield model, BatchGenerator(model, 3, eos_id=None, backend=backend)


def read(chunked: ChunkedPrefill, prompt: list[int], sizes: Sequence[int], shared: bool = False):
    """(tokens that were stored, hidden states, logits) of all parts."""
    stored, sizes, parts = chunked.start(prompt, shared), itertools.cycle(sizes), []
    while chunked.left:
        size = min(next(sizes), chunked.left)
        parts.append(chunked.prefill(size, logits_to_keep=size))
    return stored, *map(torch.cat, zip(*parts, strict=True))


def answer_of(
    generator: BatchGenerator, chunked: ChunkedPrefill, prompt: list[int], logits: torch.Tensor, n=8
) -> list[int]:
    outputs = generator.join(prompt, SamplingParams(max_new_tokens=n), 1, chunked.cache, logits[-1:])
    while generator.rows:
        outputs += generator.step()
    return [output.token for output in outputs]


@kinds
@pytest.mark.parametrize("sizes", [(1,), (3, 8), (100,)])
def test_prompts_read_in_parts(kind, sizes):
    (prompt,) = make_prompts(70)
    for model, generator in readers(kind):
        chunked = ChunkedPrefill(generator)
        for length in (70, 1, 33):
            _, hidden, logits = read(chunked, prompt[:length], sizes)
            with torch.no_grad():
                out = model(torch.tensor([prompt[:length]]), output_hidden_states=True)
            torch.testing.assert_close(logits, out.logits[0], **close_to(out.logits, **shape_of(model.config)))
            expected = out.hidden_states[-1][0]
            torch.testing.assert_close(hidden, expected, **close_to(expected, **shape_of(model.config)))
            assert answer_of(generator, chunked, prompt[:length], logits) == recompute(model, prompt[:length], 8)


@kinds
def test_a_prefix_cache_changes_no_answer(kind):
    first, other = make_prompts(70, 70)
    for model, generator in readers(kind):
        chunked, generator.prefixes = ChunkedPrefill(generator), PrefixCache(10**7)
        answer = recompute(model, first, 30)
        for prompt, expected in (
            (first, 0),
            (first, 64),
            (first[:64], 32),  # the last token is always read
            (first[:40] + other[:50], 32),
            (other[:1] + first, 0),  # the same tokens elsewhere
            (first[:32] + other[:50], 32),
            (first + answer + other[:5], 96),  # the next turn, when the answer is stored too
        ):
            stored, _, logits = read(chunked, prompt, (50,), shared=True)
            assert stored == expected
            kept = chunked.cache.kv[:, :, 0, :, : len(prompt)].clone()
            _, _, plain = read(chunked, prompt, (50,))
            if generator.backend is not None:  # the kernel sums every token's numbers in the same order in every batch
                assert torch.equal(logits, plain[stored:])
                assert torch.equal(kept, chunked.cache.kv[:, :, 0, :, : len(prompt)])
            n = 30 if prompt == first else 8
            assert answer_of(generator, chunked, prompt, logits, n) == recompute(model, prompt, n)


def test_a_prefix_cache_is_bounded_and_forgets_the_oldest():
    cache, texts = KVCache(make().config, 1, 128), make_prompts(96, 64, 32)
    block = cache.kv[:, :, 0, :, :BLOCK].nbytes
    prefixes = PrefixCache(4 * block)
    prefixes.store(texts[0], cache)
    assert prefixes.nbytes == 3 * block and prefixes.load(texts[0], cache) == 96
    prefixes.store(texts[1], cache)
    assert prefixes.nbytes == 4 * block
    assert prefixes.load(texts[0], cache) == 64 and prefixes.load(texts[1], cache) == 64  # the end went first
    prefixes.store(texts[2], cache)
    assert [prefixes.load(text, cache) for text in texts] == [32, 64, 32]
    PrefixCache(0).store(texts[0], cache)


def test_scaled_positions_are_read_in_parts_too():
    (prompt,) = make_prompts(60)
    model = make(max_seq_len=40)
    model.dynamic_rope_scaling = model.config.dynamic_rope_scaling("yarn", None, 64)
    generator = BatchGenerator(model, 1, 64, eos_id=None)
    chunked, generator.prefixes = ChunkedPrefill(generator), PrefixCache(10**7)
    for text, in_cache in (
        (prompt, 0),
        (prompt, 0),
        (prompt[:40], 0),
        (prompt[:40], 32),
    ):  # only unscaled ones are kept
        stored, _, logits = read(chunked, text, (7,), shared=True)
        with torch.no_grad():
            expected = model(torch.tensor([text]), rope_scaling=generator.scaling_for([len(text)])).logits[0, stored:]
        assert stored == in_cache
        torch.testing.assert_close(logits, expected, **close_to(expected, **shape_of(model.config)))


# ---- params


def draw(logits: list[float], n: int = 20_000, **fields) -> torch.Tensor:
    """Shares of the tokens among n draws."""
    rows = torch.tensor([logits]).expand(n, -1)
    uniform = (torch.arange(n) + 0.5) / n
    tokens = sample_next(rows, BatchedSamplingParams([SamplingParams(**{"temperature": 1.0, **fields})]), uniform)
    return torch.bincount(tokens, minlength=len(logits)) / n


def test_rows_of_different_kinds_are_not_sampled_as_the_first_one():
    sampled, greedy = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)
    for rows in ([sampled, greedy], [greedy, sampled], [sampled, SamplingParams(temperature=1.0, top_k=3)]):
        with pytest.raises(ValueError, match="rows of different kinds"):
            BatchedSamplingParams(rows)


P = [0.05, 0.4, 0.1, 0.25, 0.2]
LOGITS = [math.log(p) for p in P]


def test_shares_are_the_probabilities():
    torch.testing.assert_close(draw(LOGITS), torch.tensor(P), atol=1e-3, rtol=0)
    for temperature in (0.5, 2.0):
        powers = torch.tensor(P) ** (1 / temperature)
        shares = draw(LOGITS, temperature=temperature)
        torch.testing.assert_close(shares, powers / powers.sum(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (dict(top_k=3), [1, 3, 4]),
        (dict(top_k=100), [0, 1, 2, 3, 4]),
        (dict(top_p=0.39), [1]),
        (dict(top_p=0.64), [1, 3]),  # 0.4 + 0.25 reaches it
        (dict(top_p=0.66), [1, 3, 4]),  # the token that crosses stays
        (dict(top_p=1e-9), [1]),
        (dict(min_p=0.3), [1, 3, 4]),  # 0.12 of 1
        (dict(min_p=1.0), [1]),
        (dict(top_k=2, top_p=0.6), [1]),  # 0.4 / 0.65 is 0.615 already
        (dict(top_p=0.9, min_p=0.6), [1, 3]),
    ],
)
def test_what_is_left_to_choose_from(fields, kept):
    wanted = torch.tensor([p if i in kept else 0 for i, p in enumerate(P)])
    torch.testing.assert_close(draw(LOGITS, **fields), wanted / wanted.sum(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])  # 1.0: a random number that float32 rounds up
@pytest.mark.parametrize("fields", [{}, dict(top_k=2), dict(top_p=0.5), dict(min_p=0.5)])
def test_never_a_token_that_was_left_out(uniform, fields):
    logits = torch.tensor([[-torch.inf, 3.0, 3.0, -torch.inf, -torch.inf]])
    params = BatchedSamplingParams([SamplingParams(temperature=0.7, **fields)])
    assert sample_next(logits, params, torch.tensor([uniform])).item() in (1, 2)


def test_extreme_temperatures():
    logits = torch.tensor([[5.0, 9.0, -80.0]])
    for uniform in (0.0, 0.999):
        tiny = sample_next(logits, BatchedSamplingParams([SamplingParams(temperature=1e-45)]), torch.tensor([uniform]))
        assert tiny.item() == 1
    torch.testing.assert_close(draw([5.0, 9.0, -80.0], temperature=1e30), torch.ones(3) / 3, atol=1e-3, rtol=0)


def test_top_k_1_is_greedy_even_with_ties():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    greedy = sample_next(logits, BatchedSamplingParams([SamplingParams()]))
    assert (
        sample_next(logits, BatchedSamplingParams([SamplingParams(temperature=2.0, top_k=1)]), torch.tensor([0.9]))
        == greedy
    )
    model, prompts = make(), make_prompts(4)
    a = generate_ids(model, prompts, SamplingParams(max_new_tokens=16), eos_id=None)
    assert a == generate_ids(model, prompts, SamplingParams(max_new_tokens=16, temperature=1.5, top_k=1), eos_id=None)
    assert a == generate_ids(
        model, prompts, SamplingParams(max_new_tokens=16, temperature=1.5, top_p=1e-6), eos_id=None
    )


def test_penalties_as_defined():
    logits = torch.tensor([[2.0, -2.0, 1.5, -1.0]])
    counts = torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    in_prompt = torch.tensor([[False, True, True, False]])

    def best(logits=logits, **fields):
        return sample_next(logits, BatchedSamplingParams([SamplingParams(**fields)]), None, counts, in_prompt).item()

    assert best() == 0
    assert best(repetition_penalty=1.2) == 0  # 1.67 against 1.25: prompt and answer alike
    assert best(torch.tensor([[2.0, -2.0, 1.5, 1.4]]), repetition_penalty=2.0) == 3  # 1, -4, 0.75, 1.4
    assert best(torch.tensor([[-1.0, -1.1, -9.0, -1.9]]), repetition_penalty=2.0) == 3  # -2, -2.2, -18, -1.9
    assert best(presence_penalty=0.4) == 0 and best(presence_penalty=0.6) == 2  # the prompt does not count
    assert best(frequency_penalty=0.1) == 0 and best(frequency_penalty=0.2) == 2  # three times
    assert best(presence_penalty=0.3, frequency_penalty=0.1) == 2


def test_penalties_follow_each_row():
    """In a batch where rows end, join and move, each answer is as alone."""
    model, prompts = make(), make_prompts(9, 4, 6, 12, 3)
    fields = [
        dict(max_new_tokens=4, repetition_penalty=1.5),
        dict(max_new_tokens=25, presence_penalty=2.0),
        dict(max_new_tokens=30),
        dict(max_new_tokens=12, frequency_penalty=1.0, temperature=0.8, seed=3),
        dict(max_new_tokens=20, frequency_penalty=0.5, repetition_penalty=1.1),
    ]
    samplings = [SamplingParams(**each) for each in fields]
    alone = [generate_ids(model, [p], s, eos_id=None)[0] for p, s in zip(prompts, samplings, strict=True)]
    for max_rows in (2, 3, 5):
        assert generate_ids(model, prompts, samplings, eos_id=None, max_rows=max_rows) == alone


def test_seed():
    model, prompts = make(), make_prompts(5, 9, 5)
    sampling = SamplingParams(max_new_tokens=20, temperature=1.0, seed=7)
    first = generate_ids(model, prompts[:1], sampling, eos_id=None)
    assert generate_ids(model, prompts[:1], sampling, eos_id=None) == first
    assert generate_ids(model, prompts[:1], dataclasses.replace(sampling, seed=8), eos_id=None) != first
    unseeded = dataclasses.replace(sampling, seed=None)
    a, b = (generate_ids(model, prompts[:1], unseeded, eos_id=None) for _ in range(2))
    assert a != b
    # The same whatever else is decoded, and with whatever other params.
    others = [
        sampling,
        SamplingParams(max_new_tokens=9, temperature=2.0, top_p=0.5, seed=1),
        SamplingParams(max_new_tokens=30),
    ]
    assert generate_ids(model, prompts, others, eos_id=None)[:1] == first
    assert generate_ids(model, [prompts[0]] * 3, sampling, eos_id=None) == first * 3


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate_ids(make(), make_prompts(3), SamplingParams(max_new_tokens=3, temperature=1.0))
    torch.manual_seed(0)  # make() seeds as well
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_parameters_are_all_named():
    with pytest.raises(ValueError) as error:
        SamplingParams(
            max_new_tokens=0, temperature=math.nan, top_k=-1, top_p=0, min_p=1.1, repetition_penalty=0,
            presence_penalty=math.inf, frequency_penalty=math.nan, seed=-1, stop=("",), logprobs=21,
            logit_bias={5: math.nan},
        )  # fmt: skip
    for name in {field.name for field in dataclasses.fields(SamplingParams)} - {"constraint"}:
        assert f"--{name} " in str(error.value), name
    assert SamplingParams(stop="ab").stop == ("ab",)
    with pytest.raises(ValueError, match="--logprobs -1 must be between 0 and 20"):
        SamplingParams(logprobs=-1)


# ---- log-probabilities


@kinds
def test_logprobs_are_the_models_own(kind):
    """In a batch of rows that ask and rows that do not, and join late: against a forward pass without a cache."""
    model, prompts = make(kind), make_prompts(9, 4, 6, 12, 3)
    base = SamplingParams(max_new_tokens=12)
    samplings = [
        dataclasses.replace(base, logprobs=3),
        base,
        dataclasses.replace(base, logprobs=0, max_new_tokens=5),
        # What is reported is before all of these.
        dataclasses.replace(
            base, logprobs=20, temperature=1.7, top_k=9, top_p=0.9, min_p=0.01, seed=1, presence_penalty=1.0
        ),
        dataclasses.replace(base, logprobs=20, repetition_penalty=1.5),
    ]
    silent = [dataclasses.replace(sampling, logprobs=None) for sampling in samplings]
    for max_rows in (1, 2, 5):
        events = list(generate(model, prompts, samplings, eos_id=None, max_rows=max_rows))
        same = generate(model, prompts, silent, eos_id=None, max_rows=max_rows)
        assert [(event.key, event.token) for event in events] == [(event.key, event.token) for event in same]
        for key, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            own = [event for event in events if event.key == key]
            if sampling.logprobs is None:
                assert all(event.logprob is None and event.top_logprobs == () for event in own)
                continue
            tokens = [event.token for event in own]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            got = torch.tensor([event.logprob for event in own])
            close = close_to(expected, **shape_of(model.config))
            torch.testing.assert_close(got, expected[range(len(tokens)), tokens], **close)
            assert [len(event.top_logprobs) for event in own] == [sampling.logprobs] * len(tokens)
            for event, row in zip(own, expected, strict=True):
                ids, values = [i for i, _ in event.top_logprobs], [value for _, value in event.top_logprobs]
                best = row.topk(sampling.logprobs)
                assert ids == best.indices.tolist()
                torch.testing.assert_close(torch.tensor(values), best.values, **close)


def test_logprobs_of_ties_and_of_a_small_vocabulary():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0]], dtype=torch.bfloat16)
    greedy = sample_next(logits, BatchedSamplingParams([SamplingParams()]))
    for k in range(8):
        chosen, values, ids = log_probabilities(logits, greedy, k)
        assert ids.tolist() == [[1, 3, 4, 0, 2][:k]] and chosen.dtype == values.dtype == torch.float32
        assert k == 0 or chosen == values[0, 0]
    assert math.isclose(values.exp().sum().item(), 1, rel_tol=1e-6)


def test_logprobs_cost_nothing_where_nobody_asks(monkeypatch):
    def refuse(*args):
        raise AssertionError("computed")

    monkeypatch.setattr("inference.sampling.log_probabilities", refuse)
    generate_ids(make(), make_prompts(4, 7), SamplingParams(max_new_tokens=4))
    with pytest.raises(AssertionError, match="computed"):
        generate_ids(make(), make_prompts(4, 7), SamplingParams(max_new_tokens=4, logprobs=0))


# ---- where an answer ends


def test_finish_reasons():
    model, (prompt,) = make(), make_prompts(6)
    plain = recompute(model, prompt, 30)
    eos = next(token for token in plain if plain.index(token) >= 4)  # some token that first comes later
    at = plain.index(eos)
    events = list(generate(model, [prompt], SamplingParams(max_new_tokens=30), eos_id=eos))
    assert [event.token for event in events] == plain[: at + 1]
    assert [event.finish for event in events] == [None] * at + ["stop"]
    assert generate_ids(model, [prompt], SamplingParams(max_new_tokens=30), eos_id=eos) == [plain[:at]]

    events = list(generate(model, [prompt], SamplingParams(max_new_tokens=at), eos_id=eos))
    assert [event.finish for event in events] == [None] * (at - 1) + ["length"]
    events = list(generate(model, [prompt], SamplingParams(max_new_tokens=1), eos_id=None))
    assert [event.finish for event in events] == ["length"]


def test_context_length():
    model, (prompt,) = make(max_seq_len=16), make_prompts(6)
    plain = recompute(model, prompt, 30)
    events = list(generate(model, [prompt], SamplingParams(max_new_tokens=30), eos_id=None))
    assert [event.token for event in events] == plain[:10] and events[-1].finish == "length"  # the trained length
    assert generate_ids(model, [prompt], SamplingParams(max_new_tokens=30), eos_id=None, max_len=64) == [plain]
    with pytest.raises(ValueError, match="has 16 tokens, which leaves no room for an answer within 16"):
        generate(model, [[5] * 16])
    assert len(generate_ids(model, [[5] * 15], SamplingParams(max_new_tokens=30), eos_id=None)[0]) == 1


def test_prompts_that_cannot_be_decoded():
    model = make()
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, [[1], []])
    with pytest.raises(ValueError, match="has the token 97, the model knows 0 to 96"):
        generate(model, [[1, 97]])
    with pytest.raises(ValueError, match="2 prompts and 1 SamplingParams"):
        generate(model, [[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(model, [[1]], SamplingParams(stop=("a",)))
    assert list(generate(model, [])) == []
    decoder = BatchGenerator(model, 1)
    with pytest.raises(ValueError, match="2 sequences cannot join: there is room for 1"):
        decoder.add([[1], [2]], [SamplingParams()] * 2, [0, 1])
    assert not decoder.rows and decoder.step() == []


# ---- text


def stream(tokens: list[int], *stop: str, complete: bool = True) -> list[str]:
    text = Detokenizer(TOKENIZER, stop)
    return [*(text.add(token) for token in tokens), text.finish(complete=complete)]


token_ids = st.integers(0, len(TOKENIZER) - 1)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(token_ids, max_size=40), st.text(max_size=30).map(lambda s: encode_text(TOKENIZER, s))))
def test_pieces_add_up_to_the_tokenizers_decoding(tokens):
    pieces = stream(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_no_character_is_ever_broken(text):
    tokens = encode_text(TOKENIZER, text)
    pieces = stream(tokens)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        for n in range(len(tokens)):  # cut off anywhere
            part = "".join(stream(tokens[:n], complete=False))
            assert text.startswith(part) and "\ufffd" not in part


def test_text_comes_as_soon_as_it_is_complete():
    tokens = encode_text(TOKENIZER, "a𠜎b")
    assert len(tokens) > 3  # the rare character is several tokens
    pieces = stream(tokens)
    assert pieces[0] == "a" and pieces[-2] == "b" and pieces[-1] == ""
    assert pieces[1:-2] == [""] * (len(tokens) - 3) + ["𠜎"]
    assert stream(tokens[:-2])[-1] == "\ufffd"  # the model itself ended there: true, and shown
    assert stream([BOS_ID, *tokens, EOS_ID, 0])[1:-3] == pieces[:-1]  # special tokens have no text
    assert stream([10**6]) == ["", ""]


@settings(max_examples=300, deadline=None)
@given(st.text("ab好", max_size=20), st.lists(st.text("ab好", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_anywhere(text, stops):
    """One byte per token is the worst that can happen at token borders."""
    one_byte = {byte: TOKENIZER.convert_tokens_to_ids(char) for char, byte in _BYTE_OF_CHARACTER.items()}
    tokens = [one_byte[byte] for byte in text.encode()]
    out = Detokenizer(TOKENIZER, stops)
    pieces = []
    for token in tokens:
        pieces.append(out.add(token))
        if out.stopped:
            break
    pieces.append(out.finish())
    # The answer ends with the first stop string to be complete.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert "".join(pieces) == expected and out.stopped == bool(ends)


def test_a_vocabulary_of_another_kind_is_refused():
    class Wrong:
        backend_tokenizer = type("Backend", (), {"decoder": None})

    with pytest.raises(ValueError, match="not a byte-level BPE"):
        Detokenizer(Wrong())


@pytest.fixture(scope="module")
def writer() -> Transformer:
    """A model with the real vocabulary, and random weights."""
    return make(vocab_size=len(TOKENIZER))


def test_generated_text_with_a_stop_string(writer):
    prompt = [BOS_ID, *encode_text(TOKENIZER, "你好")]
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, seed=4)
    (whole,) = generate_text(writer, TOKENIZER, [prompt], sampling)
    (ids,) = generate_ids(writer, [prompt], sampling)
    assert TOKENIZER.decode(ids, skip_special_tokens=True).startswith(whole) and len(whole) > 20
    stop = whole[10:14]
    events = list(generate(writer, [prompt], dataclasses.replace(sampling, stop=(stop,)), tokenizer=TOKENIZER))
    assert "".join(event.text for event in events) == whole[: whole.find(stop)]
    assert events[-1].finish == "stop" and events[-1].token != EOS_ID and len(events) < 40
    # A stop string that begins but does not come is given out in the end.
    (again,) = generate_text(writer, TOKENIZER, [prompt], dataclasses.replace(sampling, stop=(whole[-1] + "never",)))
    assert again == whole


def test_an_answer_cut_off_in_the_middle_of_a_character(writer):
    sampling = SamplingParams(max_new_tokens=60, temperature=2.0, seed=1)
    (ids,) = generate_ids(writer, [[BOS_ID]], sampling, eos_id=None)
    halves = 0
    for n in range(1, 61):
        (text,) = generate_text(
            writer, TOKENIZER, [[BOS_ID]], dataclasses.replace(sampling, max_new_tokens=n), eos_id=None
        )
        assert text == "".join(stream(ids[:n], complete=False))
        halves += text != "".join(stream(ids[:n]))
    assert halves  # there were some
