"""How probable a model finds given continuations of a prompt: many questions at once, exactly as one at a time.

    items = [Item(prompt_ids, [[35], [36], [37], [38]])]           # the letters A, B, C, D as the next token
    score(model, items)[0].argmax()                                # 0: the model says A

**What is shared is computed once.** A question's options share its prompt, few-shot questions share their examples: the
common beginning of such a group goes through the model by itself, and its keys and values serve every member. Sequences
that share nothing form batches of about the same length, without a mask: in a causal model padding on the right is
seen by nobody on its left. On a CPU each thread has batches of its own, which beats several threads in one product.

**Half precision answers, float32 decides.** `score_cascade` lets a rough copy of the model score everything, and repeats
with a finer one, in the end with the model itself, what is too close to call; how close that is, it measures.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from inference.kernels.loader import KernelUnavailable
from inference.kernels.prefill import PrefillModel, PrefillWeights, Prefix
from model.model import Transformer

BATCH_TOKENS = 512  # positions in one batch; more is slower on a CPU, whose caches are small
MIN_SHARED = 24  # tokens that joining a group must save: the beginning is a pass of its own
SAFETY = 2.0  # a margin below so many times the largest error seen is decided in float32


@dataclass(frozen=True)
class MultipleChoice:
    """A prompt and its possible continuations, as token ids; none is empty.

    A continuation's score is its log-probability divided by its entry in `lengths` (None: by one).
    """

    prompt: list[int]
    options: list[list[int]]
    lengths: list[float] | None = None


@dataclass(frozen=True)
class _Sequence:
    """Tokens to be read, and what is predicted from them: (item, option, index of the token before, token)."""

    tokens: list[int]
    targets: list[tuple[int, int, int, int]]


@dataclass
class _Batch:
    """Sequences that go through the model together, all of which begin with `shared` tokens."""

    sequences: list[_Sequence]
    shared: int = 0


class PrefixCache:
    """A KV cache of one beginning, (1, kv_heads, past, head_dim) a layer, which any number of sequences go on from.

    The first pass fills it; after `close` it stays as it is.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length = 0

    def close(self) -> None:
        self.length = self.layers[0][0].shape[2]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if not self.length:
            self.layers.append((k, v))
            return k, v
        pairs = zip(self.layers[layer], (k, v), strict=True)
        k, v = (torch.cat([old.expand(len(new), -1, -1, -1), new], dim=2) for old, new in pairs)
        return k, v


def score(
    model: PreTrainedModel | PrefillModel,
    items: list[MultipleChoice],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """The score of every option of every item: a list of (options,) float32 tensors on the CPU.

    Args:
        model: a MiniMind, or any causal model of transformers (whose caches differ, so nothing is shared there).
        batch_tokens: positions per batch, padding included.
        on_done: called with the number of items after each batch.

    Raises ValueError for an empty prompt or continuation.
    """
    for i, item in enumerate(items):
        if not item.prompt or not item.options or not all(item.options):
            raise ValueError(f"item {i} has an empty prompt or continuation: there is nothing to score")
    results = [torch.zeros(len(item.options)) for item in items]
    left = [sum(len(option) for option in item.options) for item in items]  # targets to come
    sequences = [sequence for i, item in enumerate(items) for sequence in _sequences(i, item)]
    ours = isinstance(model, (Transformer, PrefillModel))
    batches = list(_batches(sequences, batch_tokens, share=ours))
    for batch, values in _run(model, batches, batch_tokens, threads=ours):
        done = 0
        for (index, option, _, _), value in zip(_targets(batch.sequences), values, strict=True):
            results[index][option] += value
            left[index] -= 1
            done += left[index] == 0
        if on_done is not None:
            on_done(done)
    return [
        result if item.lengths is None else result / torch.tensor(item.lengths)
        for result, item in zip(results, items, strict=True)
    ]


def draft_models(model: PreTrainedModel, dtype: torch.dtype) -> list[PreTrainedModel | PrefillModel]:
    """Quick half-precision copies of a model on its device, the quickest first, for `score_cascade`.

    Empty where half precision cannot be trusted to be nearly the same: rounding sends tokens to other experts now and
    then, a jump that no sample foretells.
    """
    if _routes_tokens(model):
        return []
    if isinstance(model, Transformer) and model.device.type == "cpu" and dtype == torch.bfloat16:
        try:
            weights = PrefillWeights(model)
            return [PrefillModel(weights, parts=1), PrefillModel(weights, parts=2)]
        except KernelUnavailable as error:
            logging.getLogger("minimind").warning("scoring is slower than it could be: %s", error)
    return [copy.deepcopy(model).to(dtype)]


def _routes_tokens(model: PreTrainedModel) -> bool:
    """Whether it has experts."""
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
    """`score` with the winners of the last of `models` and most of the work done by the first, a rough copy of it.

    Items evenly spaced are scored by every model. The most that a difference between two options moves from one model
    to the next is that step's error. Whatever was decided by less than `SAFETY` times the errors of all steps still to
    come is scored by the next model too, which may raise the error seen, and so on until nothing is left in doubt.

    Returns the scores, and how many items each model scored. No proof that all winners are the same: it would take one
    question with a rounding error `SAFETY` times as large as any that was measured.
    """
    scores = score(models[0], items, batch_tokens=batch_tokens, on_done=on_done)
    step_of = [0] * len(items)  # the model whose scores an item has
    errors = [0.0] * (len(models) - 1)  # from each model to the next

    def lift(chosen: list[int], step: int) -> None:
        """Let the next model score items that models[step] has scored."""
        found = score(models[step + 1], [items[i] for i in chosen], batch_tokens=batch_tokens)
        for i, finer in zip(chosen, found, strict=True):
            moved = finer - scores[i]
            errors[step] = max(errors[step], float(moved.max() - moved.min()))
            scores[i], step_of[i] = finer, step + 1

    n_sample = min(len(items), max(16, len(items) // 128))
    for step in range(len(errors)):
        lift([i * len(items) // n_sample for i in range(n_sample)], step)
    step = 0
    while step < len(errors):
        safe = SAFETY * sum(errors[step:])
        doubtful = [i for i, at in enumerate(step_of) if at == step and not _margin(scores[i]) > safe]  # NaN is, too
        if doubtful:
            lift(doubtful, step)
        step = 0 if doubtful else step + 1
    return scores, [sum(at >= step for at in step_of) for step in range(len(models))]


def _margin(scores: Tensor) -> float:
    """By how much the best option leads."""
    if len(scores) < 2:
        return float("inf")
    best, second = scores.topk(2).values.tolist()
    return best - second


def _sequences(index: int, item: MultipleChoice) -> list[_Sequence]:
    """One sequence for every option longer than a token; all options that are a token need only the prompt."""
    end = len(item.prompt) - 1  # an option's first token is predicted from here, its last one need not be read
    found = [
        _Sequence(item.prompt + option[:-1], [(index, i, end + j, token) for j, token in enumerate(option)])
        for i, option in enumerate(item.options)
        if len(option) > 1
    ]
    short = [(index, i, end, option[0]) for i, option in enumerate(item.options) if len(option) == 1]
    return [*found, _Sequence(item.prompt, short)] if short else found


def _targets(sequences: list[_Sequence]) -> list[tuple[int, int, int, int]]:
    return [target for sequence in sequences for target in sequence.targets]


def _batches(sequences: list[_Sequence], batch_tokens: int, share: bool) -> Iterator[_Batch]:
    """Groups with a common beginning, then the others by length, the largest first."""
    alone = []
    for group in _groups(sequences) if share else [_Batch([sequence]) for sequence in sequences]:
        if group.shared:
            yield group
        else:
            alone += group.sequences
    for start, stop in _chunks(alone, batch_tokens):
        yield _Batch(alone[start:stop])


def _chunks(sequences: list[_Sequence], batch_tokens: int, shared: int = 0) -> list[tuple[int, int]]:
    """Sort by length, the longest first (what does not fit in memory fails at once); where to cut into batches."""
    sequences.sort(key=lambda sequence: -len(sequence.tokens))
    bounds, start = [], 0
    while start < len(sequences):
        stop = start + max(1, batch_tokens // (len(sequences[start].tokens) - shared))
        bounds.append((start, min(stop, len(sequences))))
        start = stop
    return bounds


def _groups(sequences: list[_Sequence]) -> list[_Batch]:
    """Sequences that begin alike together, wherever that saves at least MIN_SHARED tokens."""
    groups: list[_Batch] = []
    before: list[int] = []
    for sequence in sorted(sequences, key=lambda one: one.tokens):  # equal beginnings become neighbours
        tokens = sequence.tokens
        limit = min(len(before), min(position for _, _, position, _ in sequence.targets))
        if groups:  # what is predicted from the beginning itself would be lost
            limit = min(limit, min(position for _, _, position, _ in groups[-1].sequences[-1].targets))
        common = next((n for n in range(limit) if tokens[n] != before[n]), limit)
        group = groups[-1] if groups else None
        shared = min(common, group.shared) if group and group.shared else common
        # Its beginning becomes shorter: every member so far has more to read by itself.
        lost = (len(group.sequences) - 1) * (group.shared - shared) if group and group.shared else 0
        if group and shared - lost >= MIN_SHARED:
            group.sequences.append(sequence)
            group.shared = shared
        else:
            groups.append(_Batch([sequence]))
        before = tokens
    return groups


def _run(model, batches: list[_Batch], batch_tokens: int, threads: bool) -> Iterator[tuple[_Batch, list[float]]]:
    """Every batch with the log-probabilities of its targets, as they are done."""
    n_threads = torch.get_num_threads()
    if not (threads and model.device.type == "cpu" and n_threads > 1 and len(batches) > 1):
        for batch in batches:
            yield batch, _log_probs(model, batch, batch_tokens)
        return
    # The number of threads in a product is a setting of the thread that asks for it.
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = {pool.submit(_log_probs, model, batch, batch_tokens): batch for batch in batches}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C need not wait for the rest
            torch.set_num_threads(n_threads)


@torch.inference_mode()
def _log_probs(model, batch: _Batch, batch_tokens: int) -> list[float]:
    """Log-probabilities of the targets of a batch, in the order of `_targets`."""
    prefix = None
    chunks = _chunks(batch.sequences, batch_tokens, batch.shared)  # also sorts them
    if batch.shared:
        prefix = _read(model, batch.sequences[0].tokens[: batch.shared])
    values: list[float] = []
    for start, stop in chunks:
        rows = [sequence.tokens[batch.shared :] for sequence in batch.sequences[start:stop]]
        wanted = [
            ((row, position - batch.shared), token)
            for row, sequence in enumerate(batch.sequences[start:stop])
            for _, _, position, token in sequence.targets
        ]
        places = sorted({place for place, _ in wanted})
        log_probs = F.log_softmax(_logits(model, rows, prefix, places), dim=-1)
        index = {place: i for i, place in enumerate(places)}
        values += log_probs[[index[place] for place, _ in wanted], [token for _, token in wanted]].tolist()
    return values


def _read(model, tokens: list[int]) -> PrefixCache | Prefix:
    """A beginning that sequences go on from."""
    if isinstance(model, PrefillModel):
        return model.read(tokens)
    prefix = PrefixCache()
    model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=prefix, logits_to_keep=1)
    prefix.close()
    return prefix


def _logits(model, rows: list[list[int]], prefix: PrefixCache | Prefix | None, places: list[tuple[int, int]]) -> Tensor:
    """(places, vocab) float32 logits after the tokens at `places`, (row, column) each."""
    if isinstance(model, PrefillModel):
        return model.logits(rows, places, prefix)
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.device)
    inputs = {"input_ids": ids, "use_cache": False} | ({} if prefix is None else {"past_key_values": prefix})
    # A model takes one list of columns for all rows.
    kept = sorted({column for _, column in places})
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=torch.tensor(kept, device=ids.device)).logits
    else:
        logits = model(**inputs).logits[:, kept]
    return logits[[row for row, _ in places], [kept.index(column) for _, column in places]].float()
