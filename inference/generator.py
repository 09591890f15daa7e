"""Decoding: the one loop that turns a model and prompts into tokens and text, for every script and the server.

    for event in generate(model, [ids], Sampling(temperature=0.8, top_p=0.9, seed=1), tokenizer=tokenizer):
        print(event.text, end="", flush=True)

Parts, bottom up: `KVCache`, `SamplingParams` and `sample_next` (logits to a token), `Detokenizer` (tokens to text),
`BatchGenerator` (sequences decoded together, which join and leave at any step), and functions for everyday use.
"""

from __future__ import annotations

import codecs
import functools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from inference.backends import TorchModel
from inference.kernels.decode import NativeModel
from inference.kernels.loader import zeros
from model.LMConfig import LMConfig
from model.model import Transformer
from model.rope import DynamicRopeScaling, Scaling
from model.tokenizer import EOS_ID

# ---- keys and values


class KVCache:
    """Keys and values of several sequences, allocated once.

    A row keeps its token at position p in place p, whatever the other rows do. Nothing is padded on the left, so a row
    can join or leave without the others noticing.

    Used by itself it is like any cache: each call of the model appends to all rows. `select` says otherwise.
    """

    def __init__(
        self,
        config: LMConfig,
        rows: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (2, config.n_layers, rows, config.n_kv_heads, max_len, config.head_dim)
        # Zeros: places that a mask hides are still multiplied (by 0), and what lies in fresh memory may be NaN.
        self.keys, self.values = (list(cells) for cells in zeros(shape, dtype, device))
        self.max_len = max_len
        self.select(slice(0, rows), 0)

    def select(self, rows: slice, length: int, positions: Tensor | None = None) -> None:
        """Say what the next call of the model is about.

        Args:
            rows: those it computes.
            length: tokens that the longest of them has so far.
            positions: (rows,) where the one new token of each row goes, if they are not of the same length.
        """
        self.rows, self.length, self.positions = rows, length, positions

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store new k, v (rows, kv_heads, time, head_dim); return all so far, (rows, kv_heads, length, head_dim).

        Raises ValueError if they do not fit: it never grows.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} tokens per row, {end} are needed: make it larger")
        keys, values = self.keys[layer][self.rows, :, :end], self.values[layer][self.rows, :, :end]
        if len(keys) != len(k):
            raise ValueError(f"the KV cache was made for {len(keys)} rows, and {len(k)} came")
        if self.positions is None:
            keys[:, :, self.length :] = k
            values[:, :, self.length :] = v
        else:
            place = self.positions.view(-1, 1, 1, 1).expand_as(k)
            keys.scatter_(2, place, k)
            values.scatter_(2, place, v)
        if layer == len(self.keys) - 1:
            self.length = end
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        for cells in (*self.keys, *self.values):
            cells[target, :, :length] = cells[source, :, :length]


# ---- from logits to a token

MAX_LOGPROBS = 20  # alternatives that can be reported for each token: OpenAI's limit


@dataclass(frozen=True)
class SamplingParams:
    """How the next tokens are chosen, and when to stop. The defaults are greedy: always the likeliest token.

    Args:
        max_new_tokens: end after so many tokens.
        temperature: divides the logits; below 1 bolder differences, above 1 flatter; 0 is greedy.
        top_k: choose among the k likeliest tokens only; 0 for no limit.
        top_p: choose among the likeliest tokens that together have at least this probability (nucleus sampling,
            https://arxiv.org/abs/1904.09751), counted after top_k; 1 for no limit.
        min_p: leave out tokens less likely than this share of the likeliest (https://arxiv.org/abs/2407.01082).
        repetition_penalty: makes all tokens of the prompt and the answer less likely: positive logits are divided by
            it, negative ones multiplied (https://arxiv.org/abs/1909.05858); 1 changes nothing.
        presence_penalty: subtracted from the logit of every token that the answer has already.
        frequency_penalty: the same, times how often the answer has it.
        seed: of the random choices; the same seed gives the same choices whatever else is decoded at that time. None:
            a new one each time.
        stop: end before any of these texts appears.
        logprobs: report the log-probability of each new token and of so many of the likeliest tokens, at most
            `MAX_LOGPROBS`; 0: of the new token only; None: report nothing. These are the model's own (log-softmax of
            its logits), before temperature, limits and penalties, as OpenAI-style servers report them: the same
            whatever the other fields say.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        errors = self.validate()
        if errors:
            raise ValueError("; ".join(errors))

    def validate(self) -> list[str]:
        """Everything that is wrong, each in words that name the flag."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"--max_new_tokens {self.max_new_tokens} must be at least 1")
        if self.top_k < 0:
            found.append(f"--top_k {self.top_k} must not be negative (0: no limit)")
        # Written so that NaN is refused too.
        if not 0 <= self.temperature < math.inf:
            found.append(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"--top_p {self.top_p} must be above 0 and at most 1 (1: no limit)")
        if not 0 <= self.min_p <= 1:
            found.append(f"--min_p {self.min_p} must be between 0 and 1 (0: no limit)")
        if not 0 < self.repetition_penalty < math.inf:
            found.append(f"--repetition_penalty {self.repetition_penalty} must be above 0 (1: none)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                found.append(f"--{name} {getattr(self, name)} must be a number (0: none)")
        if self.seed is not None and self.seed < 0:
            found.append(f"--seed {self.seed} must not be negative")
        if not all(isinstance(text, str) and text for text in self.stop):
            found.append("--stop must not be empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            found.append(f"--logprobs {self.logprobs} must be between 0 and {MAX_LOGPROBS}")
        return found

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def sorts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def kind(self) -> tuple:
        """Rows of the same kind run the same operations, with numbers of their own."""
        if self.greedy:
            return (True, self.penalises)
        return (False, self.penalises, self.top_k, self.sorts, self.top_p < 1)


class BatchedSamplingParams:
    """The numbers of several `SamplingParams`s of one kind, as columns (rows, 1) for `sample_next`."""

    def __init__(self, samplings: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        first = samplings[0]
        if any(sampling.kind() != first.kind() for sampling in samplings):
            raise ValueError("these Samplings are of different kinds: give each kind its own Knobs")
        self.greedy, self.penalises = first.greedy, first.penalises
        self.top_k, self.sorts, self.cuts = first.top_k, first.sorts, first.top_p < 1

        def column(name: str, floor: float = -math.inf) -> Tensor:
            return torch.tensor([[max(getattr(s, name), floor)] for s in samplings], dtype=torch.float32, device=device)

        if self.penalises:
            self.repetition = column("repetition_penalty")
            self.presence, self.frequency = column("presence_penalty"), column("frequency_penalty")
        if not self.greedy:
            self.temperature = column("temperature", floor=1e-6)  # smaller is greedy, and then 0 in float32
            self.top_p, self.min_p = column("top_p"), column("min_p")


def sample_next(
    logits: Tensor,
    knobs: BatchedSamplingParams,
    uniform: Tensor | None = None,
    counts: Tensor | None = None,
    in_prompt: Tensor | None = None,
) -> Tensor:
    """Choose the next token of each row; a pure function.

    Args:
        logits: (rows, vocab).
        knobs: of those rows.
        uniform: (rows,) random numbers in [0, 1), which decide; not needed if greedy.
        counts: (rows, vocab) float, how often the answer has each token; needed for penalties.
        in_prompt: (rows, vocab) bool, whether the prompt has it; needed for penalties.

    Returns:
        (rows,) token ids.
    """
    logits = logits.float()
    if knobs.penalises:
        present = counts > 0
        weaker = torch.where(logits > 0, logits / knobs.repetition, logits * knobs.repetition)
        logits = torch.where(in_prompt | present, weaker, logits)
        logits = logits - knobs.presence * present - knobs.frequency * counts
    if knobs.greedy:
        return logits.argmax(-1)
    # The largest becomes 0 first: divided by a small temperature nothing then overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / knobs.temperature
    ids = None
    if knobs.top_k:
        logits, ids = logits.topk(min(knobs.top_k, logits.shape[-1]))
    elif knobs.sorts:
        logits, ids = logits.sort(descending=True, stable=True)
    p = logits.softmax(-1)  # from the likeliest down, if sorted
    if knobs.cuts:
        before = p.cumsum(-1) - p  # exactly 0 for the likeliest, which therefore stays
        p = p.masked_fill(before >= knobs.top_p, 0)
    if knobs.sorts:
        p = p.masked_fill(p < knobs.min_p * p[:, :1], 0)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even if rounding says otherwise, so that there is a token whose share reaches beyond it.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    choice = torch.searchsorted(cumulative, target, right=True)
    if ids is None:
        return choice.squeeze(1)
    choice = torch.minimum(choice, (p > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, choice).squeeze(1)


def log_probabilities(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the model itself makes of tokens and of the likeliest ones; a pure function.

    Args:
        logits: (rows, vocab), as they come from the model.
        tokens: (rows,) ids.
        k: how many of the likeliest.

    Returns:
        natural logarithms of the probabilities of `tokens` (rows,) and of the likeliest (rows, k), from the likeliest
        down, and the ids of those (rows, k). Equally likely tokens come in the order of their ids, whatever k is, so
        that a greedy choice is the first.
    """
    logits = logits.float().log_softmax(-1)
    chosen = logits.gather(-1, tokens[:, None]).squeeze(1)
    if k == 0:
        none = tokens.new_zeros(len(tokens), 0)
        return chosen, none.float(), none
    values, ids = logits.sort(descending=True, stable=True)
    return chosen, values[:, :k], ids[:, :k]


# ---- from tokens to text


class Detokenizer:
    """The text of one answer, piece by piece as its tokens come.

    A token of a byte-level vocabulary is a few bytes, not always whole characters: bytes wait until their character is
    complete. Text that could be the beginning of a stop string waits until it is clear that it is not. All pieces
    together are the tokenizer's own decoding (up to a stop string). Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Iterable[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        if type(self._backend.decoder).__name__ != "ByteLevel":
            raise ValueError("this tokenizer is not a byte-level BPE: its text cannot be streamed; use another one")
        self._special = frozenset(tokenizer.all_special_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._waiting = ""  # complete characters that may begin a stop string
        self.stopped = False  # a stop string came; the text has ended before it

    def add(self, token: int) -> str:
        """The text that is certain now, often "" or one character."""
        if self.stopped or token in self._special:
            return ""
        text = self._utf8.decode(token_bytes(self._backend.id_to_token(token)))
        return self._until_stop(text) if self._stop else text

    def finish(self, *, complete: bool = True) -> str:
        """The rest of the text.

        complete: False if the answer was cut off: half of a character at its end is then left out. If the model itself
            ended there, it is invalid, and shown as U+FFFD.
        """
        if self.stopped:
            return ""
        rest = self._utf8.decode(b"", final=True) if complete else ""
        text, self._waiting = self._waiting + rest, ""
        return text

    def _until_stop(self, text: str) -> str:
        text = self._waiting + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:size]):
                    held = size
                    break
        clear = len(text) - held
        self._waiting = text[clear:]
        return text[:clear]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as one visible character (GPT-2's table); this is the way back."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(token: str | None) -> bytes:
    """The bytes a token stands for; none for an id that is not in the vocabulary."""
    if token is None:
        return b""
    table = _byte_of_character()
    try:
        return bytes([table[character] for character in token])
    except KeyError:  # added as text, not spelled in bytes
        return token.encode("utf-8")


# ---- decoding


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
    stored: int  # how many of them are in the cache: all but the newest
    stream: Detokenizer | None
    factor: float = 1.0  # of its rotary frequencies: see `model.rope.Extension`
    made: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        # Random numbers of its own: what a row draws does not depend on which rows there are.
        self.random = random.Random(self.sampling.seed)


class BatchGenerator:
    """Sequences decoded together, one token each per step. They join (`add`) and leave (`cancel`, or by ending) at will.

    Rows that ended cost nothing: the last row takes their place.

    Longer contexts: with `model.extension`, every row is computed as its length asks for. Up to the trained length that
    is as in training, whatever `max_len` is. A row that outgrows what its factor covers (the trained length, then its
    doubles) has its keys and values computed anew once, because all keys of a text must be rotated in one way.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        max_len: int | None = None,
        *,
        eos_id: int | None = EOS_ID,
        tokenizer: PreTrainedTokenizerFast | None = None,
        fast: NativeModel | TorchModel | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode; a peft model will do.
            rows: how many sequences at most at a time.
            max_len: prompt and answer together, in tokens; None: what the model was trained at. RoPE has no limit, but a
                model that never saw longer texts writes badly there, unless it has an `extension`.
            eos_id: the token that ends an answer; None: nothing does.
            tokenizer: to get text, and to have stop strings.
            fast: what `decode_step.fast_model` made of the model; None: call the model itself.
        """
        if model.training:
            raise ValueError("the model is in training mode and would drop activations: call model.eval() first")
        if rows < 1:
            raise ValueError(f"a decoder needs at least 1 row, not {rows}")
        weight = model.get_input_embeddings().weight
        self.model, self.eos_id, self.tokenizer = model, eos_id, tokenizer
        self.extension: DynamicRopeScaling | None = model.extension
        self.capacity, self.max_len, self.device = rows, max_len or model.config.max_seq_len, weight.device
        self.rows: list[_Row] = []
        if fast is not None and fast.config is not model.config:
            raise ValueError("`fast` was made of another model: call fast_model(model)")
        self._cache = KVCache(model.config, rows, self.max_len, weight.device, weight.dtype)
        self._fast = None if fast is None else fast.bind(self._cache.keys, self._cache.values)
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
        if self._fast is not None and self._fast.reads_prompts and scaling is None:
            logits = self._fast.read(prompts, first)
        else:
            logits = self._read(prompts, first, scaling)

        for prompt, sampling, key, factor in zip(prompts, samplings, keys, factors, strict=True):
            stream = Detokenizer(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
            if sampling.penalises:
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

    def _read(self, prompts: Sequence[Sequence[int]], first: int, scaling: Scaling | None) -> Tensor:
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
        longest = max(row.stored for row in self.rows)
        scaling = self._scaling([row.factor for row in self.rows])
        if self._fast is not None and scaling is None:
            logits = self._fast(self._tokens, self._positions, longest)
        else:  # what is fast knows only the rotation of training
            logits = self._forward(longest, scaling)
        for row in self.rows:
            row.stored += 1
        if self._groups is None:
            self._groups = self._group(range(len(self.rows)))
        self._tokens = self._sample(logits, self._groups, 0)
        self._positions = self._positions + 1
        return self._events(self._tokens, 0, self._log_probabilities(logits, self._tokens, 0))

    def _forward(self, longest: int, scaling: Scaling | None) -> Tensor:
        """The newest tokens through the model; (rows, vocab) logits."""
        positions = mask = None
        if min(row.stored for row in self.rows) < longest:
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
        return self.extension.factor(length) if self.extension is not None else 1.0

    def _scaling(self, factors: list[float]) -> Scaling | None:
        """What the model has to know about rows with these factors; None if all are computed as in training."""
        if self.extension is None or all(factor == self.extension.trained_factor for factor in factors):
            return None
        return self.extension.scaling(torch.tensor(factors, device=self.device))

    def _rescale(self) -> None:
        """Compute anew what the cache holds of rows whose next token is one too many for their factor."""
        if self.extension is None:
            return
        for i, row in enumerate(self.rows):
            factor = self._factor(row.stored + 1)
            if factor != row.factor:
                row.factor = factor
                self._cache.select(slice(i, i + 1), 0)
                self.model(
                    input_ids=torch.tensor([row.tokens[: row.stored]], device=self.device),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                    rope_scaling=self._scaling([factor]),
                )

    def _group(self, indices: range) -> list[tuple[list[int], Tensor | None, BatchedSamplingParams]]:
        """Rows by kind of sampling: (indices, the same as a tensor or None for all of `indices`, knobs)."""
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
        for members, index, knobs in groups:
            uniform = counts = in_prompt = None
            if not knobs.greedy:
                uniform = torch.tensor([self.rows[i].random.random() for i in members], device=self.device)
            if knobs.penalises:
                which = slice(members[0], members[-1] + 1) if index is None else index
                counts, in_prompt = self._counts[which], self._in_prompt[which]
            chosen = sample_next(logits if index is None else logits[index - first], knobs, uniform, counts, in_prompt)
            if knobs.penalises:
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
            row.made += 1
            row.tokens.append(token)
            text = row.stream.add(token) if row.stream is not None else ""
            finish = None
            if token == self.eos_id or (row.stream is not None and row.stream.stopped):
                finish = "stop"
            elif row.made >= row.sampling.max_new_tokens or row.stored + 1 >= self.max_len:
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
                self._cache.move(last, i, self.rows[last].stored)
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
    fast: NativeModel | TorchModel | None = None,
) -> Iterator[TokenOutput]:
    """Decode prompts of any number and lengths together; events come as soon as their tokens do.

    Each prompt gets what it would get alone: exactly when greedy in float32 (up to the rounding of matrix products of
    another size), and when sampled with the same seed.

    Args:
        prompts: token ids; an event's `key` is the index of its prompt.
        sampling: one for all, or one for each.
        tokenizer, eos_id, max_len, fast: see `BatchGenerator`.
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
    decoder = BatchGenerator(model, rows, min(limit, needed), eos_id=eos_id, tokenizer=tokenizer, fast=fast)
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
