"""From logits to tokens: sampling parameters of many rows, the choice of the next tokens, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inference.options import SamplingParams


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
