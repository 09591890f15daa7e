"""Texts that are scored or embedded: what is known of them while they are read in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.stream import Stream


@dataclass
class Scores:
    """Log-probabilities of the tokens of a text.

    Position t holds that of token t given those before it, so there is none for the first token.
    """

    logprobs: list[float | None]
    top: list[list[tuple[int, float]] | None]  # the most probable tokens at each position, most probable first


@dataclass(slots=True, eq=False)
class TextRequest:
    """The texts of one request to read: for their Scores with the `top` most probable tokens, or for embeddings (None)."""

    owner: Stream
    texts: Sequence[Sequence[int]]
    top: int | None
    taken: int = 0  # texts that were read, or are being read


class TextState:
    """A text that is being read, and what is known of its result."""

    def __init__(self, request: TextRequest) -> None:
        """Take the next text of a request."""
        self.owner, self.index, self.top = request.owner, request.taken, request.top
        self.tokens = request.texts[request.taken]
        request.taken += 1
        self.position = 0
        self.total: Tensor | None = None  # (dim,) sum of hidden states
        self.scores = Scores([None], [None])

    @torch.inference_mode()
    def add(self, hidden: Tensor, logits: Tensor) -> None:
        """Add the next tokens.

        Args:
            hidden: (tokens, dim).
            logits: (tokens, vocab) of the token after each; none for an embedding.
        """
        self.position += len(hidden)
        if self.top is None:
            total = hidden.float().sum(0)
            self.total = total if self.total is None else self.total + total
            return
        next_tokens = self.tokens[self.position - len(hidden) + 1 : self.position + 1]
        logprobs = logits[: len(next_tokens)].float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(next_tokens, dtype=torch.int64, device=logprobs.device)[:, None])
        values, ids = (part.tolist() for part in logprobs.topk(min(self.top, logprobs.shape[-1])))
        self.scores.logprobs += chosen[:, 0].tolist()
        self.scores.top += [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]

    @property
    def result(self) -> Scores | Tensor:
        return self.scores if self.total is None else (self.total / len(self.tokens)).cpu()
