"""Decoding: the one loop that turns a model and prompts into tokens and text, for every script and the server.

    for output in generate(model, [ids], SamplingParams(temperature=0.8, top_p=0.9, seed=1), tokenizer=tokenizer):
        print(output.text, end="", flush=True)

`BatchGenerator` decodes sequences together, which join and leave at any step; the functions below it are for everyday
use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from inference.backends import Backend
from inference.detokenizer import Detokenizer
from inference.kv_cache import KVCache
from inference.options import SamplingParams
from inference.sampling import BatchedSamplingParams, log_probabilities, sample_next
from model.model import Transformer
from model.rope import DynamicRopeScaling, RopeScaling
from model.tokenizer import EOS_ID


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One more token of one sequence.

    `key` says of which (in `generate`: the index of its prompt). `text` is the text that became certain with it, if
    there is a tokenizer. `finish` is None until its last token: "stop" if the model ended it (with the end token, which
    is in `token` then, or a stop string), "length" if it was cut off at max_new_tokens or the context length.
    `logprob` and `top_logprobs`, pairs (token, logprob) from the likeliest down, are there if `Sampling.logprobs` asks.
    """

    key: int
    token: int
    text: str = ""
    finish: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class _Row:
    """One sequence that is being decoded."""

    key: int
    sampling: SamplingParams
    tokens: list[int]  # of the prompt and the answer
    cached_len: int  # how many of them are in the cache: all but the newest
    stream: Detokenizer | None
    factor: float = 1.0  # of its rotary frequencies: see `model.rope.DynamicRopeScaling`
    num_generated: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        # Random numbers of its own: what a row draws does not depend on which rows there are.
        self.random = random.Random(self.sampling.seed)


class BatchGenerator:
    """Sequences decoded together, one token each per step. They join (`add`) and leave (`cancel`, or by ending) at will.

    Rows that ended cost nothing: the last row takes their place.

    Longer contexts: with `model.dynamic_rope_scaling`, every row is computed as its length asks for. Up to the trained
    length that is as in training, whatever `max_len` is. A row that outgrows what its factor covers (the trained length,
    then its doubles) has its keys and values computed anew once, because all keys of a text must be rotated in one way.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        max_len: int | None = None,
        *,
        eos_id: int | None = EOS_ID,
        tokenizer: PreTrainedTokenizerFast | None = None,
        backend: Backend | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode; a peft model will do.
            rows: how many sequences at most at a time.
            max_len: prompt and answer together, in tokens; None: what the model was trained at. RoPE has no limit, but a
                model that never saw longer texts writes badly there, unless it has an `dynamic_rope_scaling`.
            eos_id: the token that ends an answer; None: nothing does.
            tokenizer: to get text, and to have stop strings.
            backend: from `choose_backend(model)`; None: call the model itself.
        """
        if model.training:
            raise ValueError("the model is in training mode and would drop activations: call model.eval() first")
        if rows < 1:
            raise ValueError(f"a decoder needs at least 1 row, not {rows}")
        weight = model.get_input_embeddings().weight
        self.model, self.eos_id, self.tokenizer = model, eos_id, tokenizer
        self.dynamic_rope_scaling: DynamicRopeScaling | None = model.dynamic_rope_scaling
        self.capacity, self.max_len, self.device = rows, max_len or model.config.max_seq_len, weight.device
        self.rows: list[_Row] = []
        if backend is not None and backend.config is not model.config:
            raise ValueError("`backend` was made from another model: call choose_backend(model)")
        self._cache = KVCache(model.config, rows, self.max_len, weight.device, weight.dtype)
        self._backend = None if backend is None else backend.with_cache(self._cache.keys, self._cache.values)
        # One entry per row, as tensors: the newest token, its position, and what penalties have to know.
        self._tokens = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros(0, dtype=torch.int64, device=self.device)
        vocab_size = model.config.vocab_size
        self._counts = torch.zeros(rows, vocab_size, device=self.device)
        self._in_prompt = torch.zeros(rows, vocab_size, dtype=torch.bool, device=self.device)
        self._groups: list[tuple[list[int], Tensor | None, BatchedSamplingParams]] | None = None

    @property
    def free(self) -> int:
        """How many sequences may join."""
        return self.capacity - len(self.rows)

    def check(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Raise ValueError if this prompt cannot be decoded here."""
        vocab_size = self.model.config.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token, for example <s>")
        if len(prompt) >= self.max_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer within {self.max_len} "
                "(prompt and answer together)"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(f"the prompt has the token {wrong}, the model knows 0 to {vocab_size - 1}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")

    @torch.inference_mode()
    def add(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams], keys: Sequence[int]
    ) -> list[TokenOutput]:
        """Let sequences join: read their prompts and return the first token of each.

        Raises ValueError for more than fit in or a prompt that cannot be decoded; nothing has joined then.
        """
        if not prompts:
            return []
        if len(prompts) > self.free:
            raise ValueError(f"{len(prompts)} sequences want to join, and there is room for {self.free}")
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.check(prompt, sampling)
        first = len(self.rows)
        end = first + len(prompts)
        factors = [self._factor(len(prompt)) for prompt in prompts]
        scaling = self._scaling(factors)
        if self._backend is not None and self._backend.supports_prefill and scaling is None:
            logits = self._backend.prefill(prompts, first)
        else:
            logits = self._prefill(prompts, first, scaling)

        for prompt, sampling, key, factor in zip(prompts, samplings, keys, factors, strict=True):
            stream = Detokenizer(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
            if sampling.has_penalties:
                row = len(self.rows)
                self._counts[row] = 0
                self._in_prompt[row] = False
                self._in_prompt[row, torch.tensor(prompt, device=self.device)] = True
            self.rows.append(_Row(key, sampling, list(prompt), len(prompt), stream, factor))
        new = self._sample(logits, self._group(range(first, end)), first)
        self._tokens = torch.cat([self._tokens, new])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self._positions = torch.cat([self._positions, lengths])
        self._groups = None
        return self._events(new, first, self._log_probabilities(logits, new, first))

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int, scaling: RopeScaling | None) -> Tensor:
        """Put prompts into the rows of the cache from `first` on; (prompts, vocab) logits of what comes after each."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        # Short prompts are filled up on the right: causal attention never looks there, and the answer's keys and values
        # will take those places in the cache before anything does.
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        self._cache.select(slice(first, first + len(prompts)), 0)
        ragged = min(lengths) < longest
        out = self.model(
            input_ids=ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=ragged,
            rope_scaling=scaling,
        )
        if not ragged:
            return out.logits[:, -1]
        last = torch.tensor(lengths, device=self.device) - 1
        hidden = out.hidden_states[-1][torch.arange(len(ids), device=self.device), last]
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """One more token for every sequence."""
        if not self.rows:
            return []
        self._rescale()
        longest = max(row.cached_len for row in self.rows)
        scaling = self._scaling([row.factor for row in self.rows])
        if self._backend is not None and scaling is None:
            logits = self._backend(self._tokens, self._positions, longest)
        else:  # the backends know only the rotation of training
            logits = self._forward(longest, scaling)
        for row in self.rows:
            row.cached_len += 1
        if self._groups is None:
            self._groups = self._group(range(len(self.rows)))
        self._tokens = self._sample(logits, self._groups, 0)
        self._positions = self._positions + 1
        return self._events(self._tokens, 0, self._log_probabilities(logits, self._tokens, 0))

    def _forward(self, longest: int, scaling: RopeScaling | None) -> Tensor:
        """The newest tokens through the model; (rows, vocab) logits."""
        positions = mask = None
        if min(row.cached_len for row in self.rows) < longest:
            positions = self._positions
            places = torch.arange(longest + 1, device=self.device)
            mask = (places <= positions[:, None])[:, None, None]  # (rows, 1, 1, longest + 1)
        self._cache.select(slice(0, len(self.rows)), longest, positions)
        out = self.model(
            input_ids=self._tokens[:, None],
            position_ids=None if positions is None else positions[:, None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            rope_scaling=scaling,
        )
        return out.logits[:, -1]

    def cancel(self, key: int) -> None:
        """Let a sequence go; nothing happens if it is not there (any more)."""
        self._drop([i for i, row in enumerate(self.rows) if row.key == key])

    def _factor(self, length: int) -> float:
        """By which the rotary frequencies of a sequence of so many tokens are scaled."""
        return self.dynamic_rope_scaling.factor(length) if self.dynamic_rope_scaling is not None else 1.0

    def _scaling(self, factors: list[float]) -> RopeScaling | None:
        """What the model has to know about rows with these factors; None if all are computed as in training."""
        dynamic = self.dynamic_rope_scaling
        if dynamic is None or all(factor == dynamic.trained_factor for factor in factors):
            return None
        return dynamic.scaling(torch.tensor(factors, device=self.device))

    def _rescale(self) -> None:
        """Compute anew what the cache holds of rows whose next token is one too many for their factor."""
        if self.dynamic_rope_scaling is None:
            return
        for i, row in enumerate(self.rows):
            factor = self._factor(row.cached_len + 1)
            if factor != row.factor:
                row.factor = factor
                self._cache.select(slice(i, i + 1), 0)
                self.model(
                    input_ids=torch.tensor([row.tokens[: row.cached_len]], device=self.device),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                    rope_scaling=self._scaling([factor]),
                )

    def _group(self, indices: range) -> list[tuple[list[int], Tensor | None, BatchedSamplingParams]]:
        """Rows by kind of sampling: (indices, the same as a tensor or None for all of `indices`, params)."""
        kinds: dict[tuple, list[int]] = {}
        for i in indices:
            kinds.setdefault(self.rows[i].sampling.kind(), []).append(i)
        return [
            (
                members,
                torch.tensor(members, device=self.device) if len(kinds) > 1 else None,
                BatchedSamplingParams([self.rows[i].sampling for i in members], self.device),
            )
            for members in kinds.values()
        ]

    def _sample(
        self, logits: Tensor, groups: list[tuple[list[int], Tensor | None, BatchedSamplingParams]], first: int
    ) -> Tensor:
        """Next tokens of the rows from `first` on, whose logits (rows, vocab) these are."""
        tokens = None
        for members, index, params in groups:
            uniform = counts = in_prompt = None
            if not params.greedy:
                uniform = torch.tensor([self.rows[i].random.random() for i in members], device=self.device)
            if params.has_penalties:
                which = slice(members[0], members[-1] + 1) if index is None else index
                counts, in_prompt = self._counts[which], self._in_prompt[which]
            chosen = sample_next(logits if index is None else logits[index - first], params, uniform, counts, in_prompt)
            if params.has_penalties:
                rows = torch.arange(members[0], members[-1] + 1, device=self.device) if index is None else index
                self._counts[rows, chosen] += 1
            if index is None:
                return chosen
            tokens = torch.empty(len(logits), dtype=torch.int64, device=self.device) if tokens is None else tokens
            tokens[index - first] = chosen
        return tokens

    def _log_probabilities(self, logits: Tensor, tokens: Tensor, first: int) -> dict[int, tuple[float, tuple]]:
        """`logprob` and `top_logprobs` of those rows from `first` on that ask for them; nothing is computed if none does.

        Args:
            logits: (rows, vocab), the model's own.
            tokens: (rows,) what was chosen.
        """
        asking = [i for i in range(first, len(self.rows)) if self.rows[i].sampling.logprobs is not None]
        if not asking:
            return {}
        if len(asking) < len(tokens):
            index = torch.tensor(asking, device=self.device) - first
            logits, tokens = logits[index], tokens[index]
        limits = [self.rows[i].sampling.logprobs for i in asking]
        chosen, values, ids = (part.tolist() for part in log_probabilities(logits, tokens, max(limits)))
        return {
            i: (chosen[n], tuple(zip(ids[n][:limit], values[n][:limit], strict=True)))
            for n, (i, limit) in enumerate(zip(asking, limits, strict=True))
        }

    def _events(self, tokens: Tensor, first: int, logprobs: dict[int, tuple[float, tuple]]) -> list[TokenOutput]:
        """What the new tokens of the rows from `first` on mean; rows that ended with them leave."""
        events, ended = [], []
        for i, token in enumerate(tokens.tolist(), start=first):
            row = self.rows[i]
            row.num_generated += 1
            row.tokens.append(token)
            text = row.stream.add(token) if row.stream is not None else ""
            finish = None
            if token == self.eos_id or (row.stream is not None and row.stream.stopped):
                finish = "stop"
            elif row.num_generated >= row.sampling.max_new_tokens or row.cached_len + 1 >= self.max_len:
                finish = "length"
            if finish:
                ended.append(i)
                if row.stream is not None:
                    text += row.stream.finish(complete=finish == "stop")
            events.append(TokenOutput(row.key, token, text, finish, *logprobs.get(i, ())))
        self._drop(ended)
        return events

    @torch.inference_mode()
    def _drop(self, ended: list[int]) -> None:
        """Remove rows (indices in rising order); each gap is filled by the last row."""
        if not ended:
            return
        order = list(range(len(self.rows)))
        for i in reversed(ended):
            last = len(self.rows) - 1
            if i < last:
                self._cache.move(last, i, self.rows[last].cached_len)
                self._counts[i], self._in_prompt[i] = self._counts[last], self._in_prompt[last]
                self.rows[i], order[i] = self.rows[last], order[last]
            self.rows.pop()
            order.pop()
        kept = torch.tensor(order, dtype=torch.int64, device=self.device)
        self._tokens, self._positions, self._groups = self._tokens[kept], self._positions[kept], None


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    eos_id: int | None = EOS_ID,
    max_len: int | None = None,
    max_rows: int = 32,
    backend: Backend | None = None,
) -> Iterator[TokenOutput]:
    """Decode prompts of any number and lengths together; events come as soon as their tokens do.

    Each prompt gets what it would get alone: exactly when greedy in float32 (up to the rounding of matrix products of
    another size), and when sampled with the same seed.

    Args:
        prompts: token ids; an event's `key` is the index of its prompt.
        sampling: one for all, or one for each.
        tokenizer, eos_id, max_len, backend: see `BatchGenerator`.
        max_rows: decode so many at a time; the next begins when one has ended.

    Raises:
        ValueError: a prompt that is empty or too long, an unknown token. At once, not at the first event.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(samplings) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(samplings)} Samplings: give one for all or one for each")
    if not prompts:
        return iter(())
    limit = max_len or model.config.max_seq_len
    needed = max(len(prompt) + own.max_new_tokens for prompt, own in zip(prompts, samplings, strict=True))
    rows = min(len(prompts), max_rows)
    decoder = BatchGenerator(model, rows, min(limit, needed), eos_id=eos_id, tokenizer=tokenizer, backend=backend)
    for prompt, own in zip(prompts, samplings, strict=True):
        decoder.check(prompt, own)
    return _decode_all(decoder, prompts, samplings)


def _decode_all(
    decoder: BatchGenerator, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingParams]
) -> Iterator[TokenOutput]:
    joined = 0
    while joined < len(prompts) or decoder.rows:
        if decoder.free and joined < len(prompts):
            new = slice(joined, joined + decoder.free)
            keys = range(len(prompts))[new]
            joined += len(keys)
            yield from decoder.add(prompts[new], samplings[new], keys)
        else:
            yield from decoder.step()


def generate_ids(model: Transformer, prompts: Sequence[Sequence[int]], *args, **kwargs) -> list[list[int]]:
    """The new tokens of each prompt, without the end token. Arguments as for `generate`."""
    eos_id = kwargs.get("eos_id", EOS_ID)
    answers: list[list[int]] = [[] for _ in prompts]
    for event in generate(model, prompts, *args, **kwargs):
        if event.token != eos_id:
            answers[event.key].append(event.token)
    return answers


def generate_text(
    model: Transformer, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> list[str]:
    """The text that continues each prompt. Arguments as for `generate`."""
    answers = [""] * len(prompts)
    for event in generate(model, prompts, *args, tokenizer=tokenizer, **kwargs):
        answers[event.key] += event.text
    return answers


def ending(event: TokenOutput, sampling: SamplingParams, made: int, context: int) -> str:
    """Why an answer of `made` tokens was cut off, in words; "" if the model ended it."""
    if event.finish != "length":
        return ""
    if made >= sampling.max_new_tokens:
        return f" [cut off: --max_new_tokens {sampling.max_new_tokens}]"
    return f" [cut off: the context of {context} tokens is full; --max_seq_len gives more]"
