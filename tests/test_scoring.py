"""Scores of continuations: in batches and trees exactly as one sequence at a time."""

import copy
import random

import pytest
import torch

from model.LMConfig import preset
from model.model import Transformer
from model.scoring import MIN_SHARED, Item, _mask, _shared_trees, _Tree, score, score_quickly


def make_model(**fields) -> Transformer:
    torch.manual_seed(0)
    small = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=200, initializer_range=0.2)
    return Transformer(preset("toy", **(small | fields))).eval()


def make_items(n: int = 40) -> list[Item]:
    """Half of them share a long beginning; options of one to four tokens."""
    dice = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [dice.randrange(200) for _ in range(length)]

    examples = tokens(MIN_SHARED + 10)
    return [
        Item(
            (examples if i % 2 else []) + tokens(dice.randrange(1, 40)),
            [tokens(dice.choice([1, 1, 4])) for _ in range(4)],
        )
        for i in range(n)
    ]


@torch.inference_mode()
def by_hand(model, item: Item) -> torch.Tensor:
    """One pass for each option, the plain definition."""
    scores = []
    for option in item.options:
        logits = model(torch.tensor([item.prompt + option])).logits[0].float()
        before = range(len(item.prompt) - 1, len(item.prompt) + len(option) - 1)
        scores.append(logits.log_softmax(-1)[before, option].sum())
    return torch.stack(scores) / torch.tensor(item.lengths or [1.0])


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_batches_and_trees_equal_one_at_a_time(moe, batch_tokens):
    model, items = make_model(use_moe=moe), make_items()
    items.append(Item(items[0].prompt, [[5], [6, 7], [6, 8]], [1.0, 2.0, 3.0]))
    done = []
    scores = score(model, items, batch_tokens=batch_tokens, on_done=done.append)
    assert sum(done) == len(items)
    for item, found in zip(items, scores, strict=True):
        torch.testing.assert_close(found, by_hand(model, item), atol=2e-5, rtol=0)


def test_other_models_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    model, items = LlamaForCausalLM(config).eval(), make_items(12)
    done = []
    for item, found in zip(items, score(model, items, batch_tokens=300, on_done=done.append), strict=True):
        torch.testing.assert_close(found, by_hand(model, item), atol=2e-5, rtol=0)
    assert sum(done) == len(items)


def test_shared_beginnings_are_computed_once():
    items = make_items()
    trees = _shared_trees(items)
    together = [tree for tree in trees if len({target[0] for target in tree.targets}) > 1]
    assert together and len(trees) < len(items)
    assert sum(len(tree.tokens) for tree in trees) < 0.6 * sum(len(i.prompt) + len(i.options) for i in items)
    letters = _shared_trees([Item([1, 2, 3], [[4], [5]])])[0]
    assert letters.tokens == [1, 2, 3] and letters.is_chain  # an option's last token need not be read


def test_a_node_sees_its_ancestors_only():
    tree = _Tree()
    tree.add(0, Item([1, 2], [[3, 4], [5, 6]]))
    assert (tree.tokens, tree.parents, tree.positions) == ([1, 2, 3, 5], [-1, 0, 1, 1], [0, 1, 2, 2])
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert _mask([tree], 5)[0, 0].int().tolist() == sees


def test_half_precision_does_not_change_the_answers():
    model, items = make_model(), make_items(100)
    quick = copy.deepcopy(model).bfloat16()
    exact = score(model, items)
    scores, checked = score_quickly(model, quick, items)
    assert [int(s.argmax()) for s in scores] == [int(s.argmax()) for s in exact]
    assert 16 <= checked < len(items)  # some were decided in float32, and not all


def test_a_quick_model_that_is_wrong_is_overruled():
    """Error seen in the sample leads to all others being checked."""
    model, items = make_model(), make_items(60)
    broken = make_model(initializer_range=0.4)
    scores, checked = score_quickly(model, broken, items)
    assert checked == len(items)
    assert all(torch.equal(a.argmax(), b.argmax()) for a, b in zip(scores, score(model, items), strict=True))


@pytest.mark.parametrize("item", [Item([], [[1]]), Item([1], []), Item([1], [[2], []])])
def test_nothing_to_score_is_an_error(item):
    with pytest.raises(ValueError, match="item 0 has an empty prompt or continuation"):
        score(make_model(), [item])
