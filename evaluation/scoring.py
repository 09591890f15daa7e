"""Score given continuations of a prompt by their log-probability: many questions at once, exactly as one at a time.

    items = [MultipleChoice(prompt_ids, [[35], [36], [37], [38]])]  # the letters A, B, C, D as the next token
    score(model, items)[0].argmax()                                 # 0: the model answers A

**Shared beginnings are computed once.** The options of a question share its prompt, few-shot questions share their
examples. The common prefix of such a group is one forward pass, whose keys and values serve every member. Sequences that
share nothing form batches of similar length, without a mask: in a causal model no token attends to the padding on its
right. On a CPU each thread has its own batches, which is faster than several threads in one matrix product.

**Half precision computes, float32 decides.** In `score_cascade` a fast draft of the model scores everything. What is too
close to call is scored again by a more precise draft and in the end by the model itself; the errors of the drafts are
measured on a sample.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from inference.kernels.loader import KernelUnavailable
from inference.kernels.prefill import PrefillModel, PrefillWeights, Prefix
from model.model import Transformer

BATCH_TOKENS = 512  # positions in one batch; more is slower on a CPU, whose caches are small
MIN_SHARED = 24  # tokens that joining a group must save, because the prefix costs an extra forward pass
SAFETY = 2.0  # a margin below SAFETY * the largest error measured is decided in float32

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer, (1, kv_heads, past, head_dim)


@dataclass(frozen=True)
class MultipleChoice:
    """A prompt and its possible continuations, as token ids; none is empty.

    The score of a continuation is its log-probability, divided by its entry in `lengths` if there are any.
    """

    prompt: list[int]
    options: list[list[int]]
    lengths: list[float] | None = None


class _Target(NamedTuple):
    """A token whose log-probability is needed, and the index of the token before it, which predicts it."""

    item: int
    option: int
    position: int
    token: int


@dataclass(frozen=True)
class _Sequence:
    """Tokens that go through the model, and the targets predicted from them."""

    tokens: list[int]
    targets: list[_Target]


@dataclass
class _Batch:
    """Sequences that go through the model together; all begin with the same `shared` tokens."""

    sequences: list[_Sequence]
    shared: int = 0


def score(
    model: PreTrainedModel | PrefillModel,
    items: list[MultipleChoice],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Return the scores of the options of every item: a list of (options,) float32 tensors on the CPU.

    Args:
        model: a MiniMind, or any causal model of transformers (their caches differ, so they share no prefixes).
        batch_tokens: positions per batch, padding included.
        on_done: called after each batch with the number of items that it completed.

    Raises ValueError for an empty prompt or continuation.
    """
    for i, item in enumerate(items):
        if not item.prompt or not item.options or not all(item.options):
            raise ValueError(f"item {i} has an empty prompt or continuation: there is nothing to score")
    results = [torch.zeros(len(item.options)) for item in items]
    pending = [sum(len(option) for option in item.options) for item in items]  # targets to come
    sequences = [sequence for i, item in enumerate(items) for sequence in _sequences(i, item)]
    is_minimind = isinstance(model, (Transformer, PrefillModel))
    batches = list(_batches(sequences, batch_tokens, share=is_minimind))
    for batch, values in _run(model, batches, batch_tokens, threads=is_minimind):
        done = 0
        for target, value in zip(_targets(batch.sequences), values, strict=True):
            results[target.item][target.option] += value
            pending[target.item] -= 1
            done += pending[target.item] == 0
        if on_done is not None:
            on_done(done)
    return [
        result if item.lengths is None else result / torch.tensor(item.lengths)
        for result, item in zip(results, items, strict=True)
    ]


def draft_models(model: PreTrainedModel, dtype: torch.dtype) -> list[PreTrainedModel | PrefillModel]:
    """Return half-precision copies of a model on its device for `score_cascade`, the fastest first.

    Empty for a mixture of experts: rounding sometimes sends a token to another expert, a jump that no sample predicts.
    """
    if _is_moe(model):
        return []
    if isinstance(model, Transformer) and model.device.type == "cpu" and dtype == torch.bfloat16:
        try:
            weights = PrefillWeights(model)
            return [PrefillModel(weights, parts=1), PrefillModel(weights, parts=2)]
        except KernelUnavailable as error:
            logging.getLogger("minimind").warning("scoring is slower than it could be: %s", error)
    return [copy.deepcopy(model).to(dtype)]


def _is_moe(model: PreTrainedModel) -> bool:
    if hasattr(model.config, "use_moe"):
        return model.config.use_moe
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(model.config, name, None) or 0) > 1 for name in names)


def score_cascade(
    models: Sequence[PreTrainedModel | PrefillModel],
    items: list[MultipleChoice],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: Callable[[int], None] | None = None,
) -> tuple[list[Tensor], list[int]]:
    """Score with the first of `models` wherever that gives the winner of the last, which is the most precise.

    Evenly spaced items are scored by every model. The largest change of a difference between two options from one model
    to the next is the error of that step. An item decided by less than `SAFETY` times the errors of all remaining steps
    is scored by the next model too, which may raise the error, and so on until nothing is in doubt.

    Returns the scores, and how many items each model scored. This is no proof that all winners are the same: a question
    with a rounding error `SAFETY` times as large as any measured one may differ.
    """
    scores = score(models[0], items, batch_tokens=batch_tokens, on_done=on_done)
    step_of = [0] * len(items)  # index of the model whose scores an item has
    errors = [0.0] * (len(models) - 1)  # from each model to the next

    def refine(chosen: list[int], step: int) -> None:
        """Score items that models[step] has scored with the next model."""
        found = score(models[step + 1], [items[i] for i in chosen], batch_tokens=batch_tokens)
        for i, finer in zip(chosen, found, strict=True):
            moved = finer - scores[i]
            errors[step] = max(errors[step], float(moved.max() - moved.min()))
            scores[i], step_of[i] = finer, step + 1

    n_sample = min(len(items), max(16, len(items) // 128))
    for step in range(len(errors)):
        refine([i * len(items) // n_sample for i in range(n_sample)], step)
    step = 0
    while step < len(errors):
        safe = SAFETY * sum(errors[step:])
        doubtful = [i for i, at in enumerate(step_of) if at == step and not _margin(scores[i]) > safe]  # NaN is, too
        if doubtful:
            refine(doubtful, step)
        step = 0 if doubtful else step + 1
    return scores, [sum(at >= step for at in step_of) for step in range(len(models))]


def _margin(scores: Tensor) -> float:
    """Return how far the best option is ahead of the second."""
    if len(scores) < 2:
        return float("inf")
    best, second = scores.topk(2).values.tolist()
    return best - second


def _sequences(index: int, item: MultipleChoice) -> list[_Sequence]:
    """Return a sequence for every option longer than one token, and one, the prompt, for all options of one token."""
    end = len(item.prompt) - 1  # predicts an option's first token; the option's last token predicts nothing needed
    found = [
        _Sequence(item.prompt + option[:-1], [_Target(index, i, end + j, token) for j, token in enumerate(option)])
        for i, option in enumerate(item.options)
        if len(option) > 1
    ]
    short = [_Target(index, i, end, option[0]) for i, option in enumerate(item.options) if len(option) == 1]
    return [*found, _Sequence(item.prompt, short)] if short else found


def _targets(sequences: list[_Sequence]) -> list[_Target]:
    return [target for sequence in sequences for target in sequence.targets]


def _batches(sequences: list[_Sequence], batch_tokens: int, share: bool) -> Iterator[_Batch]:
    """Yield the groups with a shared prefix, then all other sequences by length, the longest first."""
    alone = []
    for group in _groups(sequences) if share else [_Batch([sequence]) for sequence in sequences]:
        if group.shared:
            yield group
        else:
            alone += group.sequences
    yield from map(_Batch, _chunks(alone, batch_tokens))


def _chunks(sequences: list[_Sequence], batch_tokens: int, shared: int = 0) -> Iterator[list[_Sequence]]:
    """Sort by length, the longest first (so that running out of memory shows at once); yield batches."""
    sequences.sort(key=lambda sequence: -len(sequence.tokens))
    start = 0
    while start < len(sequences):
        size = max(1, batch_tokens // (len(sequences[start].tokens) - shared))
        yield sequences[start : start + size]
        start += size


def _groups(sequences: list[_Sequence]) -> list[_Batch]:
    """Group sequences with a common prefix, wherever that saves at least MIN_SHARED tokens."""
    groups: list[_Batch] = []
    for sequence in sorted(sequences, key=lambda one: one.tokens):  # common prefixes become neighbours
        if groups:
            group, before = groups[-1], groups[-1].sequences[-1]
            # A target predicted from inside the prefix would be lost.
            limit = min(target.position for one in (before, sequence) for target in one.targets)
            common = next((n for n in range(limit) if sequence.tokens[n] != before.tokens[n]), limit)
            shared = min(common, group.shared or common)
            # A shorter prefix leaves more tokens to every member so far.
            lost = (len(group.sequences) - 1) * (group.shared - shared) if group.shared else 0
            if shared - lost >= MIN_SHARED:
                group.sequences.append(sequence)
                group.shared = shared
                continue
        groups.append(_Batch([sequence]))
    return groups


def _run(model: Any, batches: list[_Batch], batch_tokens: int, threads: bool) -> Iterator[tuple[_Batch, list[float]]]:
    """Yield every batch with the log-probabilities of its targets, as soon as it is computed."""
    n_threads = torch.get_num_threads()
    if not (threads and model.device.type == "cpu" and n_threads > 1 and len(batches) > 1):
        for batch in batches:
            yield batch, _log_probs(model, batch, batch_tokens)
        return
    # The number of threads of a matrix product is a setting of the calling thread.
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = {pool.submit(_log_probs, model, batch, batch_tokens): batch for batch in batches}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
            torch.set_num_threads(n_threads)


@torch.inference_mode()
def _log_probs(model: Any, batch: _Batch, batch_tokens: int) -> list[float]:
    """Return the log-probabilities of the targets of a batch, in the order of `_targets`."""
    prefix = _prefill(model, batch.sequences[0].tokens[: batch.shared]) if batch.shared else None
    values: list[float] = []
    for chunk in _chunks(batch.sequences, batch_tokens, batch.shared):  # which also sorts them
        rows = [sequence.tokens[batch.shared :] for sequence in chunk]
        wanted = [(row, target.position - batch.shared) for row, one in enumerate(chunk) for target in one.targets]
        positions = sorted(set(wanted))
        log_probs = F.log_softmax(_logits(model, rows, prefix, positions), dim=-1)  # (positions, vocab)
        index = {position: i for i, position in enumerate(positions)}
        tokens = [target.token for target in _targets(chunk)]
        values += log_probs[[index[position] for position in wanted], tokens].tolist()
    return values


def _prefill(model: Any, tokens: list[int]) -> KeysAndValues | Prefix:
    """Compute the keys and values of a prefix."""
    if isinstance(model, PrefillModel):
        return model.read(tokens)
    cache = DynamicCache()
    model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _logits(
    model: Any, rows: list[list[int]], prefix: KeysAndValues | Prefix | None, positions: list[tuple[int, int]]
) -> Tensor:
    """Return float32 logits (positions, vocab) predicted from the tokens at `positions`, (row, column) each."""
    if isinstance(model, PrefillModel):
        return model.logits(rows, positions, prefix)
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if prefix is not None:
        inputs["past_key_values"] = DynamicCache([[kv.expand(len(rows), -1, -1, -1) for kv in pair] for pair in prefix])
    kept = sorted({column for _, column in positions})  # a model takes one list of columns for all rows
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=torch.tensor(kept, device=ids.device)).logits
    else:
        logits = model(**inputs).logits[:, kept]
    return logits[[row for row, _ in positions], [kept.index(column) for _, column in positions]].float()
