"""From logits to tokens: sampling parameters of a batch, the choice of the next tokens, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.options import SamplingParams


class BatchedSamplingParams:
    """The numbers of several `SamplingParams` of one kind, as columns (rows, 1) for `sample_next`."""

    def __init__(self, samplings: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        first = samplings[0]
        self.greedy, self.has_penalties = first.greedy, first.has_penalties
        self.top_k, self.truncates, self.has_top_p = first.top_k, first.truncates, first.top_p < 1
        if self.has_penalties or not self.greedy:
            table = [
                (
                    max(s.temperature, 1e-6),
                    s.top_p,
                    s.min_p,
                    s.repetition_penalty,
                    s.presence_penalty,
                    s.frequency_penalty,
                )
                for s in samplings  # a smaller temperature is greedy, and then 0 in float32
            ]
            columns = torch.tensor(table, dtype=torch.float32, device=device).split(1, dim=1)
            self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = columns


def sample_next(
    logits: Tensor,
    params: BatchedSamplingParams,
    uniform: Tensor | None = None,
    counts: Tensor | None = None,
    in_prompt: Tensor | None = None,
) -> Tensor:
    """Return the next token of each row, (rows,) token ids; a pure function.

    Args:
        logits: (rows, vocab).
        params: of those rows.
        uniform: (rows,) random numbers in [0, 1) that decide; not needed if greedy.
        counts: (rows, vocab) float, how often the answer has each token; needed for penalties.
        in_prompt: (rows, vocab) bool, true for the tokens of the prompt; needed for penalties.
    """
    logits = logits.float()
    if params.has_penalties:
        assert counts is not None and in_prompt is not None
        present = counts > 0
        weaker = torch.where(logits > 0, logits / params.repetition, logits * params.repetition)
        logits = torch.where(in_prompt | present, weaker, logits)
        logits = logits - params.presence * present - params.frequency * counts
    if params.greedy:
        return logits.argmax(-1)
    assert uniform is not None
    p, ids = sampling_weights(logits, params)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that there is always a token whose share reaches beyond it.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    choice = torch.searchsorted(cumulative, target, right=True)
    if ids is None:
        return choice.squeeze(1)
    choice = torch.minimum(choice, (p > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, choice).squeeze(1)


def sampling_weights(logits: Tensor, params: BatchedSamplingParams) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities that temperature, top_k, top_p and min_p leave, not normalised; a pure function.

    Args:
        logits: (rows, vocab), float32.
        params: of those rows, which are not greedy.

    Returns:
        (rows, n) weights and (rows, n) the tokens they belong to, in descending order; None: all tokens in theirs.
    """
    # Shift the largest to 0 first: divided by a small temperature, nothing then overflows.
    logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    ids = None
    if params.top_k:
        logits, ids = logits.topk(min(params.top_k, logits.shape[-1]))
    elif params.truncates:
        logits, ids = logits.sort(descending=True, stable=True)
    p = logits.softmax(-1)  # in descending order, if there are ids
    if params.has_top_p:
        before = p.cumsum(-1) - p  # exactly 0 for the most probable token, which therefore stays
        p = p.masked_fill(before >= params.top_p, 0)
    if params.truncates:
        p = p.masked_fill(p < params.min_p * p[:, :1], 0)
    return p, ids


def log_probabilities(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the model's own log-probabilities of `tokens` and of the k most probable tokens; a pure function.

    Args:
        logits: (rows, vocab), as they come from the model.
        tokens: (rows,) ids.

    Returns:
        natural logarithms of the probabilities of `tokens` (rows,) and of the k most probable (rows, k) in descending
        order, and the ids of the latter (rows, k). Equally probable tokens come in the order of their ids, whatever k is,
        so that a greedy choice is the first.
    """
    logps = logits.float().log_softmax(-1)
    chosen = logps.gather(-1, tokens[:, None]).squeeze(1)
    if k == 0:
        none = tokens.new_zeros(len(tokens), 0)
        return chosen, none.float(), none
    values, ids = logps.sort(descending=True, stable=True)
    return chosen, values[:, :k], ids[:, :k]
