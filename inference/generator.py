"""Decoding: the one loop that turns a model and prompts into tokens and text, for every script and the server.

    for output in generate(model, [ids], SamplingParams(temperature=0.8, top_p=0.9, seed=1), tokenizer=tokenizer):
        print(output.text, end="", flush=True)

`BatchGenerator` decodes sequences together, which join and leave at any step; `generate` is for everyday use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from inference.backends import Backend, TorchModel
from inference.detokenizer import Detokenizer
from inference.kernels.decode import NativeStep
from inference.kv_cache import KVCache, PrefixCache
from inference.options import SamplingParams
from inference.sampling import RowSampler, SampledRow, reported_log_probabilities
from model.model import Transformer
from model.rope import DynamicRopeScaling, RopeScaling
from model.tokenizer import EOS_ID
from model.vision import check_places, count_image_tokens


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One more token of one sequence.

    `key` identifies the sequence (in `generate`: the index of its prompt). `text` is the text that became certain with
    this token, if there is a tokenizer. `finish` is None until the last token: "stop" if the model ended the answer (with
    the end token, which is in `token` then, or a stop string), "length" if it was cut off at max_new_tokens or the context
    length. `logprob` and `top_logprobs`, pairs (token, logprob) from the most probable down, are set if
    `SamplingParams.logprobs` asks for them.
    """

    key: int
    token: int
    text: str = ""
    finish: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one prompt, as the argument `name` of the model.

    pixel_values: (images, 3, size, size), for a model with its own encoder; or else image_features: (images, tokens, width).
    """

    name: str
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def join(several: Sequence[Images | None]) -> Images | None:
        """Return the images of prompts that stand in a batch in this order; None: there are none."""
        given = [images for images in several if images is not None]
        return Images(given[0].name, torch.cat([images.values for images in given])) if given else None

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """Return them as keyword arguments of a model on a device."""
        return {self.name: self.values.to(device)}


class _Row(SampledRow):
    """A sequence that is being decoded."""

    def __init__(
        self,
        key: int,
        sampling: SamplingParams,
        prompt: Sequence[int],
        detokenizer: Detokenizer | None,
        images: Images | None,
    ) -> None:
        super().__init__(sampling)
        self.key, self.detokenizer, self.images = key, detokenizer, images
        self.tokens = list(prompt)  # of the prompt and the answer
        self.cached_len = len(prompt)  # how many of them are in the cache: all but the newest
        self.num_generated = 0


class BatchGenerator:
    """Continuous batching: sequences decoded together, one token each per step, that join and leave at any step.

    `add` lets sequences join; they leave when they end or at `cancel`. The last row then fills the gap.

    Longer contexts: with `model.dynamic_rope_scaling`, the positions of every row are scaled as its length requires. Up to
    the trained length they are those of training, whatever `max_len` is. When a row outgrows the length that its factor
    covers (the trained length, then its doubles), its keys and values are computed again, because all keys of a text must
    be rotated by the same frequencies.
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
            model: in evaluation mode; may be a peft model.
            rows: maximum number of sequences at a time.
            max_len: length of prompt and answer together, in tokens; None: the length the model was trained at. RoPE has no
                limit, but a model that never saw longer texts generates poor ones, unless it has a `dynamic_rope_scaling`.
            eos_id: the token that ends an answer; None: no token does.
            tokenizer: needed for text and for stop strings.
            backend: from `choose_backend(model)`; None: call the model itself.
        """
        if model.training:
            raise ValueError("the model is in training mode and would drop activations: call model.eval() first")
        if rows < 1:
            raise ValueError(f"a BatchGenerator needs at least 1 row, not {rows}")
        weight = model.tok_embeddings.weight
        self.model, self.eos_id, self.tokenizer = model, eos_id, tokenizer
        self.dynamic_rope_scaling: DynamicRopeScaling | None = model.dynamic_rope_scaling
        self.capacity, self.max_len, self.device = rows, max_len or model.config.max_seq_len, weight.device
        self.rows: list[_Row] = []
        if backend is not None and backend.config is not model.config:
            raise ValueError("`backend` was made from another model: call choose_backend(model)")
        self._cache = KVCache(model.config, rows, self.max_len, weight.device, weight.dtype)
        self.use_backend(backend)
        self.prefixes: PrefixCache | None = None  # if there is one, it gets every sequence that leaves
        self._sampler = RowSampler(rows, model.config.vocab_size, self.device)

    def use_backend(self, backend: Backend | None) -> None:
        """Decode with another backend from now on, such as one with newer weights; the cache stays. No row may be left."""
        if self.rows:
            raise ValueError(f"{len(self.rows)} sequences are still being decoded: their cache has the old weights")
        self.backend = backend
        self._backend = None if backend is None else backend.with_cache(self._cache.keys, self._cache.values)

    @property
    def free(self) -> int:
        """Return how many more sequences may join."""
        return self.capacity - len(self.rows)

    def check(self, prompt: Sequence[int], sampling: SamplingParams, images: Images | None = None) -> None:
        """Raise ValueError if this prompt cannot be decoded here, or has not as many places as images."""
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
        if (vision := self.model.config.vision) is not None:
            n_ids = len(vision.image_ids)
            check_places(count_image_tokens(prompt, vision.image_ids), len(images or ()), n_ids, n_ids)
        if any(not 0 <= token < vocab_size for token in sampling.logit_bias):
            raise ValueError(f"logit_bias has a token that the model does not know; it knows 0 to {vocab_size - 1}")

    @torch.inference_mode()
    def add(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        keys: Sequence[int],
        images: Sequence[Images | None] | None = None,
    ) -> list[TokenOutput]:
        """Let sequences join: prefill the cache with their prompts and return the first token of each.

        images: those of each prompt, for a vision-language model.

        Raises ValueError if there are too many or a prompt cannot be decoded; then none of them has joined.
        """
        if not prompts:
            return []
        if len(prompts) > self.free:
            raise ValueError(f"{len(prompts)} sequences cannot join: there is room for {self.free}")
        given = images or [None] * len(prompts)
        for prompt, sampling, shown in zip(prompts, samplings, given, strict=True):
            self.check(prompt, sampling, shown)
        first = len(self.rows)
        scaling = self.scaling_for([len(prompt) for prompt in prompts])
        seen = Images.join(given)
        # Of equal prompts that stand together, as when one question gets several answers, the first is read for all.
        distinct: list[Sequence[int]] = []
        source: list[int] = []  # of each prompt: its number among them
        for prompt in prompts:
            if seen is not None or not distinct or prompt != distinct[-1]:
                distinct.append(prompt)
            source.append(len(distinct) - 1)
        if isinstance(self._backend, NativeStep) and scaling is None and seen is None:
            logits = self._backend.prefill(distinct, first)
        else:
            logits = self._prefill(distinct, first, scaling, seen)
        if len(distinct) < len(prompts):
            for i in reversed(range(len(prompts))):  # from the end: no row is overwritten before it was copied
                self._cache.copy(first + i, self._cache, first + source[i], len(prompts[i]))
            logits = logits[torch.tensor(source, device=logits.device)]
        for prompt, sampling, key, shown in zip(prompts, samplings, keys, given, strict=True):
            self._append(prompt, sampling, key, shown)
        return self._sample(logits, first)

    @torch.inference_mode()
    def join(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        key: int,
        cache: KVCache,
        logits: Tensor,
        images: Images | None = None,
    ) -> list[TokenOutput]:
        """Let a sequence join whose prompt a `ChunkedPrefill` has read; return its first token.

        Args:
            cache: its row 0 holds the prompt.
            logits: (1, vocab), of the token after the prompt.
            images: those of the prompt.
        """
        first = len(self.rows)
        self._cache.copy(first, cache, 0, len(prompt))
        self._append(prompt, sampling, key, images)
        return self._sample(logits, first)

    def _append(self, prompt: Sequence[int], sampling: SamplingParams, key: int, images: Images | None = None) -> None:
        """Add the row of a sequence whose prompt is in the cache."""
        detokenizer = Detokenizer(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
        self._sampler.start(len(self.rows), sampling, prompt)
        self.rows.append(_Row(key, sampling, prompt, detokenizer, images))

    def _prefill(
        self, prompts: Sequence[Sequence[int]], first: int, scaling: RopeScaling | None, images: Images | None
    ) -> Tensor:
        """Fill the cache's rows from `first` on with prompts; return the logits (prompts, vocab) of the token after each."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        # Short prompts are padded on the right: causal attention never looks there, and the answer's keys and values
        # overwrite those slots of the cache before anything reads them.
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        self._cache.select(slice(first, first + len(prompts)), 0)
        ragged = min(lengths) < longest
        out = self.model(
            input_ids=ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            rope_scaling=scaling,
            **(images.arguments(self.device) if images is not None else {}),
        )
        if not ragged:
            return out.logits[:, -1]
        last = torch.tensor(lengths, device=self.device) - 1
        hidden = out.last_hidden_state[torch.arange(len(ids), device=self.device), last]
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Return one more token of every sequence."""
        if not self.rows:
            return []
        self._rescale()
        longest = max(row.cached_len for row in self.rows)
        scaling = self.scaling_for([row.cached_len + 1 for row in self.rows])
        tokens = torch.tensor([row.tokens[-1] for row in self.rows], device=self.device)
        positions = torch.tensor([row.cached_len for row in self.rows], device=self.device)
        if self._backend is not None and scaling is None:
            logits = self._backend(tokens, positions, longest)
        else:  # the backends know only the rotation of training
            logits = self._forward(tokens, positions, longest, scaling)
        for row in self.rows:
            row.cached_len += 1
        return self._sample(logits, 0)

    def _forward(self, tokens: Tensor, positions: Tensor, longest: int, scaling: RopeScaling | None) -> Tensor:
        """Run the newest tokens (rows,) through the model; return logits (rows, vocab)."""
        ragged = min(row.cached_len for row in self.rows) < longest
        mask = None
        if ragged:
            slots = torch.arange(longest + 1, device=self.device)
            mask = (slots <= positions[:, None])[:, None, None]  # (rows, 1, 1, longest + 1)
        self._cache.select(slice(0, len(self.rows)), longest, positions if ragged else None)
        out = self.model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None] if ragged else None,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            rope_scaling=scaling,
        )
        return out.logits[:, -1]

    def cancel(self, key: int) -> None:
        """Remove a sequence; nothing happens if it has already ended."""
        self._drop([i for i, row in enumerate(self.rows) if row.key == key])

    def scaling_for(self, lengths: Sequence[int]) -> RopeScaling | None:
        """Return the model's argument for texts of these lengths; None if all are computed as in training."""
        dynamic = self.dynamic_rope_scaling
        factors = [dynamic.factor(length) for length in lengths] if dynamic is not None else []
        if dynamic is None or all(factor == dynamic.trained_factor for factor in factors):
            return None
        return dynamic.scaling(torch.tensor(factors, device=self.device))

    def _rescale(self) -> None:
        """Compute the keys and values of those rows again whose next token needs a larger factor."""
        dynamic = self.dynamic_rope_scaling
        if dynamic is None:
            return
        for i, row in enumerate(self.rows):
            if dynamic.factor(row.cached_len + 1) != dynamic.factor(row.cached_len):
                scaling = self.scaling_for([row.cached_len + 1])
                self._prefill([row.tokens[: row.cached_len]], i, scaling, row.images)

    def _sample(self, logits: Tensor, first: int) -> list[TokenOutput]:
        """Choose the next tokens of the rows from `first` on, given their logits (rows, vocab)."""
        rows = self.rows[first:]
        tokens = self._sampler.sample(logits, rows, first)
        return self._outputs(tokens, first, reported_log_probabilities(logits, tokens, rows))

    def _outputs(self, tokens: Tensor, first: int, logprobs: dict[int, tuple[float, tuple]]) -> list[TokenOutput]:
        """Return the new tokens of the rows from `first` on with their text; remove rows that ended."""
        outputs: list[TokenOutput] = []
        ended: list[int] = []
        for i, (row, token) in enumerate(zip(self.rows[first:], tokens.tolist(), strict=True)):
            row.num_generated += 1
            row.tokens.append(token)
            text = row.detokenizer.add(token) if row.detokenizer is not None else ""
            finish = None
            if token == self.eos_id or (row.detokenizer is not None and row.detokenizer.stopped):
                finish = "stop"
            elif row.num_generated >= row.sampling.max_new_tokens or row.cached_len + 1 >= self.max_len:
                finish = "length"
            if row.matcher is not None and not row.matcher.consume_token(token):
                finish = "length"  # its grammar became too complex: what there is of the answer is not valid
            if finish:
                ended.append(first + i)
                if row.detokenizer is not None:
                    text += row.detokenizer.finish(complete=finish == "stop")
            outputs.append(TokenOutput(row.key, token, text, finish, *logprobs.get(i, ())))
        self._drop(ended)
        return outputs

    @torch.inference_mode()
    def _drop(self, ended: list[int]) -> None:
        """Remove rows (indices in ascending order); the last row fills each gap."""
        for i in reversed(ended):
            row, last = self.rows[i], len(self.rows) - 1
            # The tokens of two images are the same: a text with one is not shared.
            if self.prefixes is not None and row.images is None and self.scaling_for([row.cached_len]) is None:
                self.prefixes.store(row.tokens[: row.cached_len], self._cache, i)
            if i < last:
                self._cache.copy(i, self._cache, last, self.rows[last].cached_len)
                self.rows[i] = self.rows[last]
            self._sampler.remove(i, last)
            self.rows.pop()


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
    images: Sequence[Images | None] | None = None,
) -> Iterator[TokenOutput]:
    """Decode prompts of any number and lengths together; yield each token as soon as it is known.

    Each prompt gets the answer it would get alone, greedy or sampled with the same seed, up to the rounding of matrix
    products of another size.

    Args:
        prompts: token ids; `TokenOutput.key` is the index of a prompt.
        sampling: one for all prompts, or one for each.
        tokenizer, eos_id, max_len, backend: see `BatchGenerator`.
        max_rows: maximum number decoded at a time; the next one joins when one has ended.
        images: those of each prompt, for a vision-language model.

    Raises:
        ValueError: a prompt that is empty or too long, an unknown token. Raised by the call, not at the first token.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(samplings) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(samplings)} SamplingParams: give one for all or one for each"
        )
    if not prompts:
        return iter(())
    limit = max_len or model.config.max_seq_len
    needed = max(len(prompt) + own.max_new_tokens for prompt, own in zip(prompts, samplings, strict=True))
    rows = min(len(prompts), max_rows)
    if isinstance(backend, TorchModel) and backend.compiled:
        needed = limit  # CUDA graphs are recorded for every size of the cache
    generator = BatchGenerator(model, rows, min(limit, needed), eos_id=eos_id, tokenizer=tokenizer, backend=backend)
    for prompt, own, shown in zip(prompts, samplings, images or [None] * len(prompts), strict=True):
        generator.check(prompt, own, shown)
    return decode_all(generator, prompts, samplings, images)


def decode_all(
    generator: BatchGenerator,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[SamplingParams],
    images: Sequence[Images | None] | None = None,
) -> Iterator[TokenOutput]:
    """Decode prompts with a generator that has no rows; yield each token as soon as it is known."""
    joined = 0
    while joined < len(prompts) or generator.rows:
        if generator.free and joined < len(prompts):
            new = slice(joined, joined + generator.free)
            keys = range(len(prompts))[new]
            joined += len(keys)
            yield from generator.add(prompts[new], samplings[new], keys, images[new] if images else None)
        else:
            yield from generator.step()


def generate_text(
    model: Transformer, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], *args, **kwargs
) -> list[str]:
    """Return the text that continues each prompt. Arguments as for `generate`."""
    answers = [""] * len(prompts)
    for output in generate(model, prompts, *args, tokenizer=tokenizer, **kwargs):
        answers[output.key] += output.text
    return answers
