"""From logits to tokens: sampling parameters of a batch, the choice of the next tokens, log-probabilities.

`RowSampler` chooses the next tokens of rows that are decoded together and sampled each in its own way; what it calls are
pure functions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from inference.constraints import blocked_tokens
from inference.options import SamplingParams


class BatchedSamplingParams:
    """The numbers of several `SamplingParams` of one kind, as columns (rows, 1) for `sample_next`."""

    def __init__(self, samplings: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        first = samplings[0]
        if any(sampling.kind() != first.kind() for sampling in samplings):
            raise ValueError("rows of different kinds cannot be sampled together: the first one would decide for all")
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


# ---- rows that are sampled each in its own way


class SampledRow:
    """Hold what chooses the tokens of one row.

    Each row has its own random numbers: what it draws does not depend on the other rows.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling, self.kind, self.random = sampling, sampling.kind(), random.Random(sampling.seed)
        constraint = sampling.constraint
        self.matcher = constraint.matcher() if constraint is not None else None  # where its answer is in the grammar


class RowSampler:
    """Choose the next tokens of the rows of a batch: those of one kind together."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._params: dict[tuple, BatchedSamplingParams] = {}  # of groups of rows, until a row leaves
        # For penalties: how often the answer of each row has each token, and which tokens its prompt has.
        self._counts = torch.zeros(rows, vocab_size, device=device)
        self._in_prompt = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def start(self, row: int, sampling: SamplingParams, prompt: Sequence[int]) -> None:
        """Begin a row of the batch anew."""
        if sampling.has_penalties:
            self._counts[row] = 0
            self._in_prompt[row] = False
            self._in_prompt[row, torch.tensor(prompt, device=self.device)] = True

    def remove(self, row: int, last: int) -> None:
        """Forget a row; the last one fills its gap."""
        if row < last:
            self._counts[row], self._in_prompt[row] = self._counts[last], self._in_prompt[last]
        self._params.clear()

    def sample(self, logits: Tensor, rows: Sequence[SampledRow], first: int) -> Tensor:
        """Return the next tokens of the last rows of the batch, (rows,) token ids.

        Args:
            logits: (rows, vocab).
            rows: those of the batch from `first` on.
        """
        kinds: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            kinds.setdefault(row.kind, []).append(i)
        logits = restrict(logits, rows)
        if len(kinds) == 1:  # as a rule: nothing has to be picked and put back
            return self._sample_kind(logits, rows, [*range(len(rows))], slice(None), first)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        for members in kinds.values():
            index = torch.tensor(members, device=self.device)
            tokens[index] = self._sample_kind(logits[index], rows, members, index, first)
        return tokens

    def _sample_kind(
        self, logits: Tensor, rows: Sequence[SampledRow], members: list[int], index: slice | Tensor, first: int
    ) -> Tensor:
        """Choose the next tokens of rows with the same kind of sampling, counted from `first` on: `members`, or `index`."""
        part, chosen = slice(first, first + len(rows)), [rows[i] for i in members]
        key = (chosen[0].kind, part.start, part.stop)
        if key not in self._params:
            self._params[key] = BatchedSamplingParams([row.sampling for row in chosen], self.device)
        params = self._params[key]
        uniform = counts = in_prompt = None
        if not params.greedy:
            uniform = torch.tensor([row.random.random() for row in chosen], device=self.device)
        if params.has_penalties:
            counts, in_prompt = self._counts[part][index], self._in_prompt[part][index]
        tokens = sample_next(logits, params, uniform, counts, in_prompt)
        if params.has_penalties:
            self._counts[torch.tensor(members, device=self.device) + first, tokens] += 1
        return tokens


def restrict(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """Return logits (rows, vocab) with the biases of the rows, and -inf for what their grammars do not allow."""
    biased = [i for i, row in enumerate(rows) if row.sampling.logit_bias]
    if biased:
        logits = logits.float().clone()
    for i in biased:
        bias = rows[i].sampling.logit_bias
        logits[i, [*bias]] += torch.tensor([*bias.values()], device=logits.device)
    held = next((row.sampling.constraint for row in rows if row.matcher is not None), None)
    if held is not None:
        blocked = blocked_tokens([row.matcher for row in rows], held.vocab_size, logits.shape[1])
        logits = logits.masked_fill(blocked.to(logits.device), -torch.inf)
    return logits


def reported_log_probabilities(
    logits: Tensor, tokens: Tensor, rows: Sequence[SampledRow]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Return `logprob` and `top_logprobs` of those rows that ask for them, by index; compute nothing if none does.

    Args:
        logits: (rows, vocab), the model's own.
        tokens: (rows,) the chosen ones.
    """
    wanted = {i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None}
    if not wanted:
        return {}
    if len(wanted) < len(rows):
        index = torch.tensor(list(wanted), device=logits.device)
        logits, tokens = logits[index], tokens[index]
    chosen, values, ids = (part.tolist() for part in log_probabilities(logits, tokens, max(wanted.values())))
    return {
        i: (chosen[n], tuple(zip(ids[n][:limit], values[n][:limit], strict=True)))
        for n, (i, limit) in enumerate(wanted.items())
    }
