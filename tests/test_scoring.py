"""Scores of continuations: in batches and with shared beginnings exactly as one sequence at a time."""

import copy
import random

import pytest
import torch
from tolerances import close_to

from evaluation.scoring import MIN_SHARED, MultipleChoice, _groups, _sequences, draft_models, score, score_cascade
from inference.kernels.loader import KernelUnavailable
from model.LMConfig import preset
from model.model import Transformer

LONGEST = 256  # terms of a sum: the width of the feed-forward layer, or a prompt
DEPTH = 6 * 2 + 2  # operations one after another in two layers


def make_model(**fields) -> Transformer:
    torch.manual_seed(0)
    small = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=200, initializer_range=0.2)
    return Transformer(preset("toy", **(small | fields))).eval()


def make_items(n: int = 40) -> list[MultipleChoice]:
    """Half of them share a long beginning; options of one to four tokens."""
    dice = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [dice.randrange(200) for _ in range(length)]

    examples = tokens(MIN_SHARED + 10)
    return [
        MultipleChoice(
            (examples if i % 2 else []) + tokens(dice.randrange(1, 40)),
            [tokens(dice.choice([1, 1, 4])) for _ in range(4)],
        )
        for i in range(n)
    ]


@torch.inference_mode()
def by_hand(model, item: MultipleChoice) -> torch.Tensor:
    """One float64 pass for each option, the plain definition."""
    model, scores = copy.deepcopy(model).double(), []
    for option in item.options:
        logits = model(torch.tensor([item.prompt + option])).logits[0]
        before = range(len(item.prompt) - 1, len(item.prompt) + len(option) - 1)
        scores.append(logits.log_softmax(-1)[before, option].sum())
    return torch.stack(scores) / torch.tensor(item.lengths or [1.0])


def assert_rounding_apart(found: torch.Tensor, expected: torch.Tensor, larger: float = 1) -> None:
    """larger: how many times larger than usual the attention scores are, and so the effect of their rounding."""
    bounds = close_to(expected, terms=LONGEST, depth=DEPTH, dtype=torch.float32)
    bounds = {name: larger * bound for name, bound in bounds.items()}
    torch.testing.assert_close(found.double(), expected, **bounds)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_batches_and_groups_equal_one_at_a_time(moe, batch_tokens):
    model, items = make_model(use_moe=moe), make_items()
    items.append(MultipleChoice(items[0].prompt, [[5], [6, 7], [6, 8]], [1.0, 2.0, 3.0]))
    done = []
    scores = score(model, items, batch_tokens=batch_tokens, on_done=done.append)
    assert sum(done) == len(items)
    for item, found in zip(items, scores, strict=True):
        assert_rounding_apart(found, by_hand(model, item))


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
        assert_rounding_apart(found, by_hand(model, item))
    assert sum(done) == len(items)


def test_threads_change_nothing():
    model, items = make_model(), make_items()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = score(model, items, batch_tokens=300)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(alone, score(model, items, batch_tokens=300), strict=True))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_shared_beginnings_are_computed_once():
    items = make_items()
    sequences = [sequence for i, item in enumerate(items) for sequence in _sequences(i, item)]
    groups = _groups(sequences)
    assert sum(len(group.sequences) for group in groups) == len(sequences)
    for group in groups:
        beginnings = {tuple(one.tokens[: group.shared]) for one in group.sequences}
        assert len(beginnings) == 1 and (group.shared >= MIN_SHARED or len(group.sequences) == 1)
        assert all(position >= group.shared for one in group.sequences for _, _, position, _ in one.targets)
    read = sum(len(one.tokens) - group.shared for group in groups for one in group.sequences)
    read += sum(group.shared for group in groups)
    assert read < 0.6 * sum(len(one.tokens) for one in sequences)


def test_what_is_read_and_what_is_predicted():
    letters = _sequences(0, MultipleChoice([1, 2, 3], [[4], [5]]))
    assert [(one.tokens, one.targets) for one in letters] == [([1, 2, 3], [(0, 0, 2, 4), (0, 1, 2, 5)])]
    mixed = _sequences(7, MultipleChoice([1, 2], [[3, 4], [5], [6, 7, 8]]))
    assert [one.tokens for one in mixed] == [[1, 2, 3], [1, 2, 6, 7], [1, 2]]  # the last token need not be read
    assert mixed[1].targets == [(7, 2, 1, 6), (7, 2, 2, 7), (7, 2, 3, 8)]


def test_rough_copies(monkeypatch, caplog):
    model, items = make_model(initializer_range=0.1), make_items()
    rough, finer = draft_models(model, torch.bfloat16)
    assert (rough.parts, finer.parts) == (1, 2)
    exact = torch.cat(score(model, items))
    lengths = torch.tensor([float(len(option)) for item in items for option in item.options])
    for draft in (rough, finer):  # every operand is the sum of `parts` numbers of bfloat16
        unit = (torch.finfo(torch.bfloat16).eps / 2) ** draft.parts
        difference = (torch.cat(score(draft, items)) - exact).abs() / lengths
        assert difference.max() < 4 * unit * DEPTH**0.5 * exact.std()
    (half,) = draft_models(model, torch.float16)
    assert isinstance(half, Transformer) and half.dtype == torch.float16 and model.dtype == torch.float32
    assert draft_models(make_model(use_moe=True), torch.bfloat16) == []

    def no_kernel(model):
        raise KernelUnavailable("no compiler")

    assert not caplog.records
    monkeypatch.setattr("evaluation.scoring.PrefillWeights", no_kernel)
    (half,) = draft_models(model, torch.bfloat16)
    assert isinstance(half, Transformer) and half.dtype == torch.bfloat16
    assert "slower than it could be: no compiler" in caplog.text


def test_scores_out_of_range_are_decided_in_float32():
    """Attention scores beyond exp's range are NaN in the quick passes, and right in the end."""
    model, items = make_model(), make_items(30)
    for block in model.layers:
        block.attention.wq.weight.data *= 1000
    scores, counts = score_cascade([*draft_models(model, torch.bfloat16), model], items)
    assert counts == [30, 30, 30]
    for found, item in zip(scores, items, strict=True):
        assert_rounding_apart(found, by_hand(model, item), larger=1000)


def test_half_precision_does_not_change_the_answers():
    model, items = make_model(), make_items(100)
    exact = score(model, items)
    scores, (first, again, third) = score_cascade([*draft_models(model, torch.bfloat16), model], items)
    assert [int(s.argmax()) for s in scores] == [int(s.argmax()) for s in exact]
    assert first == 100 and 16 <= third <= again < 100  # some were scored again, and not all


@pytest.mark.parametrize("wrong", [[0], [1], [0, 1]])
def test_a_rough_model_that_is_wrong_is_overruled(wrong):
    """Error seen in the sample leads to all others being checked, at whichever step it comes in; in both, too."""
    model, items = make_model(), make_items(60)
    models = [*draft_models(model, torch.bfloat16), model]
    for i in wrong:
        models[i] = make_model(initializer_range=0.4)
    scores, counts = score_cascade(models, items)
    assert counts == ([60, 60, counts[2]] if wrong == [0] else [60, 60, 60])
    assert (counts[2] < 60) == (wrong == [0])
    assert all(torch.equal(a.argmax(), b.argmax()) for a, b in zip(scores, score(model, items), strict=True))


def test_an_error_that_no_doubtful_item_shows_is_seen():
    """The last step's sample is of all items: here both rough models agree wherever they are sure, and are wrong."""
    model, items = make_model(), make_items(100)
    exact = score(model, items)

    class Told:
        """A model that knows the scores of each item; asked through `score`, which is replaced."""

        def __init__(self, scores):
            self.scores = {id(item): one for item, one in zip(items, scores, strict=True)}

    wrong = [one + torch.tensor([0.0, 30.0, 0.0, 0.0]) for one in exact]
    wrong[::10] = exact[::10]
    models = [Told(wrong), Told(wrong), Told(exact)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.scoring.score", lambda model, items, **_: [model.scores[id(item)] for item in items])
        scores, counts = score_cascade(models, items)
    assert [int(s.argmax()) for s in scores] == [int(s.argmax()) for s in exact] and counts[2] == 100


def test_one_model_is_the_answer():
    model, items = make_model(), make_items(5)
    scores, counts = score_cascade([model], items)
    assert counts == [5] and all(torch.equal(a, b) for a, b in zip(scores, score(model, items), strict=True))


@pytest.mark.parametrize("item", [MultipleChoice([], [[1]]), MultipleChoice([1], []), MultipleChoice([1], [[2], []])])
def test_nothing_to_score_is_an_error(item):
    with pytest.raises(ValueError, match="item 0 has an empty prompt or continuation"):
        score(make_model(), [item])
