"""Read prompts and texts in parts, so that a long one delays running answers by a part at a time.

chunked = ChunkedPrefill(generator)
chunked.start(prompt)
while chunked.left > 1:
    chunked.prefill(min(chunked.left - 1, 64))
_, logits = chunked.prefill(1, logits_to_keep=1)
generator.join(prompt, SamplingParams(), key, chunked.cache, logits)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.generator import BatchGenerator, Images
from inference.kernels.decode import NativeModel
from inference.kv_cache import KVCache
from model.vision import VisionLanguageModel


class ChunkedPrefill:
    """Read one text after the other into a cache of its own, as a `BatchGenerator` would read it."""

    def __init__(self, generator: BatchGenerator) -> None:
        weight = generator.model.tok_embeddings.weight
        self.generator, self.model, self.device = generator, generator.model, generator.device
        self.cache = KVCache(self.model.config, 1, generator.max_len, weight.device, weight.dtype)
        native, cache = generator.backend, self.cache
        self._kernel = native.with_cache(cache.keys, cache.values) if isinstance(native, NativeModel) else None
        # One pass over many short texts is faster than many passes, except with the kernel, which needs no large matrices.
        self.can_batch = self._kernel is None and generator.dynamic_rope_scaling is None
        self.start(())

    def start(self, tokens: Sequence[int], shared: bool = False, images: Images | None = None) -> int:
        """Begin a text of at most `max_len` tokens; return how many of them need no reading.

        Args:
            shared: take what the generator's `prefixes` have of its beginning, and store it there.
            images: those of the text; then nothing is shared, because the tokens of all images are the same.
        """
        self.tokens, self.position = tokens, 0
        self._images = images
        self._embeddings: Tensor | None = None
        shared = shared and images is None
        self._scaling = self.generator.scaling_for([len(tokens)])
        # Keys of other angles are of no use to other texts.
        self._prefixes = self.generator.prefixes if shared and self._scaling is None else None
        if self._prefixes is not None:
            # The last token is always read: its logits say what comes next.
            self.position = self._prefixes.load(tokens[:-1], self.cache)
        return self.position

    @property
    def left(self) -> int:
        """Return how many tokens are to be read."""
        return len(self.tokens) - self.position

    @torch.inference_mode()
    def prefill(self, n: int, logits_to_keep: int = 0) -> tuple[Tensor, Tensor]:
        """Read the next `n` tokens.

        Returns:
            (n, dim) their final hidden states, and (logits_to_keep, vocab) the logits of the token after each of the last.
        """
        start = self.position
        tokens = self.tokens[start : start + n]
        if self._images is not None and self._embeddings is None:
            self._embeddings = self._embed(self._images)
        if self._kernel is not None and self._scaling is None and self._embeddings is None:
            hidden, logits = self._kernel.read(tokens, start, logits_to_keep)
        else:
            self.cache.select(slice(0, 1), start)
            given = torch.tensor([tokens], device=self.device) if self._embeddings is None else None
            out = self.model(
                input_ids=given,
                inputs_embeds=None if self._embeddings is None else self._embeddings[:, start : start + n],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=max(logits_to_keep, 1),  # 0 would be all
                rope_scaling=self._scaling,
            )
            hidden, logits = out.last_hidden_state[0], out.logits[0, len(out.logits[0]) - logits_to_keep :]
        self.position += n
        if self._prefixes is not None and not self.left:
            self._prefixes.store(self.tokens, self.cache)
        return hidden, logits

    def _embed(self, images: Images) -> Tensor:
        """Return the embeddings (1, time, dim) of the whole text, with the features of its images in their places."""
        assert isinstance(self.model, VisionLanguageModel)
        given = images.arguments(self.device)
        features = self.model.encode(given.get("pixel_values"), given.get("image_features"))
        assert features is not None
        return self.model.embed(torch.tensor([self.tokens], device=self.device), features)

    @torch.inference_mode()
    def prefill_batch(self, texts: Sequence[Sequence[int]], logits: bool) -> list[tuple[Tensor, Tensor]]:
        """Read whole texts in one pass, if `can_batch`. Return for each what `prefill` returns, with all or no logits."""
        lengths = [len(text) for text in texts]
        # Padded on the right, where causal attention never looks.
        ids = torch.tensor([[*text, *[0] * (max(lengths) - len(text))] for text in texts], device=self.device)
        out = self.model(input_ids=ids, use_cache=False, logits_to_keep=0 if logits else 1)
        rows = zip(out.last_hidden_state, out.logits, lengths, strict=True)
        return [(hidden[:length], found[: length if logits else 0]) for hidden, found, length in rows]
