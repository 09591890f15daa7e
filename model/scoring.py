"""How probable a model finds given continuations of a prompt: many questions at once, exactly as one at a time.

    items = [Item(prompt_ids, [[35], [36], [37], [38]])]           # the letters A, B, C, D as the next token
    score(model, items)[0].argmax()                                # 0: the model says A

**Nothing is computed twice.** A question's options share its prompt, few-shot questions share their examples: such
sequences are merged into a tree, in which a token sees its ancestors only, and one pass over the tree stands for all
of them. Trees of about the same size form a batch; those without branches need no mask, because in a causal model
padding on the right is seen by nobody on its left.

**Half precision answers, float32 decides.** `score_quickly` lets a half-precision copy of the model score everything,
and repeats in float32 what is too close to call; how close that is, it measures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .model import Transformer

BATCH_TOKENS = 1024  # positions in one batch; more is slower on a CPU, whose caches are small
TREE_TOKENS = 768  # a larger tree saves few tokens and makes every one look over a longer mask
MIN_SHARED = 48  # tokens that two prompts must share before the dense mask of a common tree pays off
SAFETY = 2.5  # a margin below so many times the largest error seen is decided in float32


@dataclass(frozen=True)
class Item:
    """A prompt and its possible continuations, as token ids; none is empty.

    A continuation's score is its log-probability divided by its entry in `lengths` (None: by one).
    """

    prompt: list[int]
    options: list[list[int]]
    lengths: list[float] | None = None


@dataclass
class _Tree:
    """Token sequences with their common beginnings merged: node i holds a token and follows its parent (-1: none)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)  # (item, option, node, its next token)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, index: int, item: Item) -> None:
        end = self._follow(-1, item.prompt)
        for i, option in enumerate(item.options):
            node = end
            for token, after in zip(option, [*option[1:], None], strict=True):
                self.targets.append((index, i, node, token))
                if after is not None:  # the last token of an option is predicted and need not be read
                    node = self._follow(node, [token])

    def _follow(self, node: int, tokens: list[int]) -> int:
        """Walk from `node` along `tokens`, growing where there is no path yet; the node at the end."""
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.positions.append(self.positions[node] + 1 if node >= 0 else 0)
            node = child
        return node

    @property
    def is_chain(self) -> bool:
        return all(parent == i - 1 for i, parent in enumerate(self.parents))


def score(
    model: PreTrainedModel,
    items: list[Item],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """The score of every option of every item: a list of (options,) float32 tensors on the CPU.

    Args:
        model: a MiniMind, or any causal model of transformers (whose masks differ, so nothing is shared there).
        batch_tokens: positions per batch, padding included.
        on_done: called with the number of items after each batch.

    Raises ValueError for an empty prompt or continuation.
    """
    for i, item in enumerate(items):
        if not item.prompt or not item.options or not all(item.options):
            raise ValueError(f"item {i} has an empty prompt or continuation: there is nothing to score")
    results = [torch.zeros(len(item.options)) for item in items]
    left = [len(item.options) for item in items]  # a foreign model sees each option in a tree of its own
    trees = _shared_trees(items) if isinstance(model, Transformer) else _separate_trees(items)
    with torch.inference_mode():
        for batch in _batches(trees, batch_tokens):
            done = 0
            for tree, values in zip(batch, _forward(model, batch), strict=True):
                finished = set()
                for (index, option, _, _), value in zip(tree.targets, values, strict=True):
                    results[index][option] += value
                    finished.add((index, option))
                for index, _ in finished:
                    left[index] -= 1
                    done += left[index] == 0
            if on_done is not None:
                on_done(done)
    return [
        result if item.lengths is None else result / torch.tensor(item.lengths)
        for result, item in zip(results, items, strict=True)
    ]


def score_quickly(
    model: PreTrainedModel,
    quick: PreTrainedModel,
    items: list[Item],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_done: Callable[[int], None] | None = None,
) -> tuple[list[Tensor], int]:
    """`score` with the winners of `model` and most of the work done by `quick`, the same model in half precision.

    Some items, evenly spaced, are scored by both. The most that a difference between two options moved is the error
    seen so far; whatever was decided by less than `SAFETY` times that is scored by `model` too, which may raise the
    error seen, and so on until nothing is left in doubt.

    Returns the scores, and how many items `model` scored. No proof that all winners are the same: it would take one
    question with a rounding error `SAFETY` times as large as any that was measured.
    """
    scores = score(quick, items, batch_tokens=batch_tokens, on_done=on_done)
    n_sample = min(len(items), max(16, len(items) // 32))
    doubtful = sorted({i * len(items) // n_sample for i in range(n_sample)})
    checked: set[int] = set()
    error = 0.0
    while doubtful:
        for i, exact in zip(
            doubtful, score(model, [items[i] for i in doubtful], batch_tokens=batch_tokens), strict=True
        ):
            moved = exact - scores[i]
            error = max(error, float(moved.max() - moved.min()))
            scores[i] = exact
        checked.update(doubtful)
        doubtful = [i for i, s in enumerate(scores) if i not in checked and _margin(s) <= SAFETY * error]
    return scores, len(checked)


def _margin(scores: Tensor) -> float:
    """By how much the best option leads."""
    if len(scores) < 2:
        return float("inf")
    best, second = scores.topk(2).values.tolist()
    return best - second


def _shared_trees(items: list[Item]) -> list[_Tree]:
    """Items whose prompts begin alike in common trees, the others each in its own."""
    order = sorted(range(len(items)), key=lambda i: items[i].prompt)  # equal beginnings become neighbours
    trees: list[_Tree] = []
    before: list[int] = []
    for i in order:
        item = items[i]
        shared = next((n for n, (a, b) in enumerate(zip(before, item.prompt, strict=False)) if a != b), None)
        shared = min(len(before), len(item.prompt)) if shared is None else shared
        new = len(item.prompt) - shared + sum(len(option) - 1 for option in item.options)
        if shared < MIN_SHARED or len(trees[-1].tokens) + new > TREE_TOKENS:
            trees.append(_Tree())
        trees[-1].add(i, item)
        before = item.prompt
    return trees


def _separate_trees(items: list[Item]) -> list[_Tree]:
    """No branches: one sequence for every option longer than a token, one for all options that are a token."""
    trees = []
    for i, item in enumerate(items):
        short = _Tree()
        for option, tokens in enumerate(item.options):
            tree = short if len(tokens) == 1 else _Tree()
            single = _Tree()
            single.add(i, Item(item.prompt, [tokens]))
            tree.tokens, tree.parents, tree.positions = single.tokens, single.parents, single.positions
            tree.targets += [(i, option, node, token) for _, _, node, token in single.targets]
            if tree is not short:
                trees.append(tree)
        if short.tokens:
            trees.append(short)
    return trees


def _batches(trees: list[_Tree], batch_tokens: int) -> list[list[_Tree]]:
    """Trees of about the same size together, the largest first: what does not fit in memory fails at once."""
    batches: list[list[_Tree]] = []
    # Chains come apart from branching trees, because a batch with one of those needs a mask.
    for tree in sorted(trees, key=lambda tree: (tree.is_chain, -len(tree.tokens))):
        current = batches[-1] if batches else []
        fits = current and (len(current) + 1) * len(current[0].tokens) <= batch_tokens
        if fits and current[0].is_chain == tree.is_chain:
            current.append(tree)
        else:
            batches.append([tree])
    return batches


def _forward(model: PreTrainedModel, trees: list[_Tree]) -> list[list[float]]:
    """Log-probabilities of each tree's targets."""
    device = model.device
    length = len(trees[0].tokens)  # the largest comes first
    ids = torch.tensor([tree.tokens + [0] * (length - len(tree.tokens)) for tree in trees])  # (batch, time)
    inputs = {"input_ids": ids.to(device), "use_cache": False}
    if not all(tree.is_chain for tree in trees):
        positions = torch.tensor([tree.positions + [0] * (length - len(tree.tokens)) for tree in trees])
        inputs |= {"position_ids": positions.to(device), "attention_mask": _mask(trees, length).to(device)}

    # Logits only where something is predicted: at these columns, for all rows because a model takes one list of them.
    columns = sorted({node for tree in trees for _, _, node, _ in tree.targets})
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=torch.tensor(columns, device=device)).logits
    else:
        logits = model(**inputs).logits[:, columns]
    column = {node: i for i, node in enumerate(columns)}
    nodes = list(dict.fromkeys((row, node) for row, tree in enumerate(trees) for _, _, node, _ in tree.targets))
    place = {node: i for i, node in enumerate(nodes)}
    picked = logits[[row for row, _ in nodes], [column[node] for _, node in nodes]]  # (nodes, vocab)
    log_probs = F.log_softmax(picked.float(), dim=-1)
    targets = [(place[row, node], token) for row, tree in enumerate(trees) for _, _, node, token in tree.targets]
    values = iter(log_probs[[i for i, _ in targets], [token for _, token in targets]].tolist())
    return [[next(values) for _ in tree.targets] for tree in trees]


def _mask(trees: list[_Tree], length: int) -> Tensor:
    """(batch, 1, time, time) bool, True where a node may look: itself and its ancestors. Padding sees itself."""
    mask = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    rows = mask.numpy()  # the same memory; row by row it is much faster there
    for row, tree in zip(rows, trees, strict=True):
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                row[node] |= row[parent]
    return mask[:, None]
