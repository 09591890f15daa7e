"""The losses: those of other people's implementations, one sequence at a time and packed."""

from __future__ import annotations

import copy
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # trl must not ask a hub

import pytest
import torch
from datasets import Dataset
from tolerances import assert_gradients_close, log_probability_rounding, rounding, shape_of
from trl import DPOConfig, DPOTrainer

from data_pipeline.datasets import PackedRows
from data_pipeline.preferences import EncodedPair, PreferencePairs
from data_pipeline.tokenize_chats import encode_preference, tokenize_chat_data
from model.chat_format import render_chat
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer
from trainer.losses import compute_ref_logps, dpo_loss, next_token_loss, sequence_logps

CPU = torch.device("cpu")
SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=128)

DIALOGUES = [  # (prompt, chosen, rejected), of very different lengths
    (["2 + 2?"], "4", "It is five, as everybody knows who can count."),
    (["What is a river?"], "Water on its way to the sea: it runs downhill, and collects what it meets.", "No."),
    (["你好", "你好！", "中国的首都是哪里？"], "北京。", "上海。"),
    (["a", "b", "c", "d", "say </s> once"], "</s>", "<s>"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def messages(texts: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def encoded(tokenizer) -> list[EncodedPair]:
    return [
        EncodedPair(*encode_preference(tokenizer, messages(prompt), chosen, rejected, 128))
        for prompt, chosen, rejected in DIALOGUES
    ]


def make(seed: int = 0, **fields) -> Transformer:
    """Weights far from uniform predictions: a mistake must show."""
    torch.manual_seed(seed)
    return Transformer(LMConfig(**SHAPE | {"initializer_range": 0.15} | fields)).eval()


def moved(model: Transformer, distance: float = 0.02) -> Transformer:
    """A model some way from `model`, as after training."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += distance * torch.randn_like(parameter)
    return model


def with_reference(encoded, reference, tmp_path, batch_size: int = 3) -> PreferencePairs:
    pairs = PreferencePairs(encoded, "t")
    pairs.ref_logps = compute_ref_logps(reference, pairs, CPU, torch.float32, batch_size)
    return pairs


def margin_rounding(pairs: PreferencePairs, beta: float) -> float:
    """Return the rounding error of beta times the four log-probabilities of a pair."""
    longest = max(len(answer) for pair in pairs.pairs for answer in (pair.chosen, pair.rejected))
    return 4 * beta * log_probability_rounding(LMConfig(**SHAPE), longest)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- next-token loss


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_packed_sft_rows_cost_what_the_chats_cost_one_by_one(tokenizer, tmp_path, moe):
    """Loss and gradient of packed rows against plain cross entropy of each chat alone, over the assistant's tokens."""
    chats = [messages([*prompt, chosen]) for prompt, chosen, _ in DIALOGUES]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f'{{"messages": {m}}}\n'.replace("'", '"') for m in chats), encoding="utf-8")
    dataset = tokenize_chat_data([path], tokenizer, tmp_path / "cache", max_tokens=128)
    rows = PackedRows(dataset, torch.arange(len(dataset)).numpy(), 128, seed=0)
    batch = rows.batch(range(len(rows)))
    model = make(use_moe=moe)  # in evaluation mode the optimised sum holds no balance loss

    loss, n_targets, extras = next_token_loss(model, batch)
    loss.backward()
    packed = gradients(model)
    model.zero_grad()
    expected, count = torch.zeros(()), 0
    for chat in chats:
        ids, loss_mask = render_chat(tokenizer, chat)
        log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if loss_mask[t]:
                expected = expected - log_probs[t - 1, ids[t]]
                count += 1
    expected.backward()
    assert n_targets == count == batch.n_targets
    relative = rounding(**shape_of(model.config))
    assert loss.item() == pytest.approx(expected.item(), rel=relative)
    assert extras["loss"].item() == pytest.approx(expected.item(), rel=relative)
    n_tokens = batch.inputs["input_ids"].numel()
    assert_gradients_close(packed, gradients(model), rounding(**shape_of(model.config, n_tokens, backward=True)))


def test_the_balance_loss_is_in_the_sum_while_training_and_logged_apart():
    model = make(use_moe=True, aux_loss_alpha=0.5)
    ids = torch.randint(3, 6400, (2, 16))
    inputs = {"input_ids": ids, "labels": ids}

    class Batch:
        n_targets = 30

    Batch.inputs = inputs
    plain, _, extras = next_token_loss(model.eval(), Batch)
    relative = rounding(**shape_of(model.config, 32))
    assert plain.item() == pytest.approx(extras["loss"].item(), rel=relative)
    total, n, extras = next_token_loss(model.train(), Batch)
    assert n == 30 and extras["loss"].item() == pytest.approx(plain.item(), rel=relative)
    assert extras["balance_loss"].item() > 0.5 * 2 * 30 * 0.9
    assert total.item() == pytest.approx(extras["loss"].item() + extras["balance_loss"].item(), rel=rounding())


# ---- DPO


def test_packed_answers_have_the_probabilities_of_single_ones(encoded):
    model = make()
    batch = PreferencePairs(encoded, "t").batch(range(len(encoded)))
    with torch.no_grad():
        together, lengths = sequence_logps(model, batch.inputs)
        for i, (pair, answer) in enumerate((p, a) for p in encoded for a in (p.chosen, p.rejected)):
            ids = pair.prompt + answer
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(pair.prompt), len(ids))
            alone = sum(log_probs[t - 1, ids[t]].item() for t in places)
            assert together[i].item() == pytest.approx(alone, rel=rounding(**shape_of(model.config)))
            assert lengths[i] == len(answer)


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [("sigmoid", 0.0, math.log(2)), ("sigmoid", 0.2, math.log(2)), ("ipo", 0.0, 25.0)],
)
def test_before_the_first_step(encoded, tmp_path, kind, smoothing, expected):
    """Nothing moved yet: the loss is ln 2 (ipo: 1 / (2 beta)^2), whatever the batches of the reference were."""
    model = make()
    pairs = with_reference(encoded, model, tmp_path)
    loss, n, extras = dpo_loss(0.1, smoothing, kind)(model, pairs.batch([2, 0, 3, 1]))
    margin = margin_rounding(pairs, 0.1)
    slope = 1 if kind == "sigmoid" else 2 * expected**0.5 / 0.1  # of the loss in the margin
    assert n == 4 and loss.item() / 4 == pytest.approx(expected, abs=slope * margin)
    assert extras["margin"].item() == pytest.approx(0, abs=4 * margin)
    # In the same batch as the reference was computed in, it is exact to the last bit.
    pairs = with_reference(encoded, model, tmp_path / "same", batch_size=4)
    loss, _, extras = dpo_loss(0.1, smoothing, kind)(model, pairs.batch(range(4)))
    assert loss.item() == pytest.approx(4 * expected, rel=rounding())
    assert extras["margin"].item() == extras["accuracy"].item() == extras["kl_estimate"].item() == 0


def trl_trainer(policy, reference, tokenizer, folder, **settings) -> DPOTrainer:
    rows = [
        {
            "prompt": messages(prompt),
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in DIALOGUES[:3]  # the last one has a literal </s>, which trl takes for control
    ]
    config = DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_length=None, **settings
    )
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("kind", "smoothing", "theirs"),
    [
        ("sigmoid", 0.0, "sigmoid"),
        # trl's `sigmoid` has no smoothing; its `aot` sorts within the batch, and is conservative DPO for a batch of one.
        ("sigmoid", 0.2, "aot"),
        ("ipo", 0.0, "ipo"),
    ],
)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_loss_rewards_and_gradients_are_trls(tokenizer, encoded, tmp_path, kind, smoothing, theirs, moe):
    reference = make(use_moe=moe)
    policy = moved(reference)
    pairs = with_reference(encoded, reference, tmp_path)
    loss, n, extras = dpo_loss(0.3, smoothing, kind)(policy, pairs.batch(range(n_pairs := len(encoded))))
    (loss / n).backward()
    ours = gradients(policy)

    trainer = trl_trainer(
        copy.deepcopy(policy), copy.deepcopy(reference), tokenizer, tmp_path, beta=0.3, loss_type=[theirs],
        label_smoothing=smoothing,
    )  # fmt: skip
    # Both see the same tokens; the template of trl's ends with the line end after the last </s>, which is never learned.
    newline = render_chat(tokenizer, messages(["a"]))[0][-1]
    for row, pair in zip(trainer.train_dataset, encoded, strict=False):
        assert row["prompt_ids"] == pair.prompt
        assert row["chosen_ids"] == [*pair.chosen, newline]
        assert row["rejected_ids"] == [*pair.rejected, newline]
    model = trainer.model
    model.zero_grad()
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in encoded]
    total = 0.0
    size = 1 if theirs == "aot" else n_pairs
    for first in range(0, n_pairs, size):
        batch = trainer.data_collator(rows[first : first + size])
        part = trainer.compute_loss(model, batch) * size / n_pairs
        part.backward()
        total += part.item()
    margin = margin_rounding(pairs, 0.3)
    slope = 1 if theirs != "ipo" else 2 * total**0.5 / 0.3  # of the loss in the margin
    assert loss.item() / n == pytest.approx(total, abs=slope * margin)
    assert abs(total - math.log(2)) > 0.01, "the models are too close for the comparison to mean anything"
    logged = trainer._metrics["eval"]  # the models are in evaluation mode
    names = {"chosen": "chosen_reward", "rejected": "rejected_reward", "margins": "margin", "accuracies": "accuracy"}
    for name, own in names.items():
        values = logged[f"rewards/{name}"]
        assert extras[own].item() / n == pytest.approx(sum(values) / len(values), abs=margin), name
    # The gradient of a pair is weighted by the slope of the loss, which the margin moves.
    n_tokens = sum(len(p.prompt) + len(answer) for p in encoded for answer in (p.chosen, p.rejected))
    relative = rounding(**shape_of(model.config, n_tokens, backward=True)) + margin
    assert_gradients_close(ours, gradients(model), relative)


def test_ipo_by_its_formula(encoded, tmp_path):
    """(mean r(chosen) - mean r(rejected) - 1 / (2 beta))^2, log-ratios averaged over an answer's tokens."""
    reference = make()
    policy = moved(reference)
    pairs = with_reference(encoded, reference, tmp_path)
    loss, _, _ = dpo_loss(0.3, kind="ipo")(policy, pairs.batch([1]))
    with torch.no_grad():
        means = []
        for answer in (encoded[1].chosen, encoded[1].rejected):
            ids = torch.tensor([encoded[1].prompt + answer])
            logs = [
                model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]) for model in (policy, reference)
            ]
            means.append((logs[0] - logs[1])[-len(answer) :].mean().item())
    distance = means[0] - means[1] - 1 / 0.6
    assert loss.item() == pytest.approx(distance**2, abs=2 * abs(distance) * margin_rounding(pairs, 1.0))


def test_the_pass_of_the_reference_is_not_silent(encoded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.losses.Progress.EVERY", 0.0)
    with_reference(encoded, make(), tmp_path, batch_size=3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" pairs")[0] for line in lines] == [
        f"reference model: {share} of 4" for share in ("75%", "100%")
    ]
    assert all(line.endswith(" left") for line in lines)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_margin_rises_on_a_toy_set(encoded, tmp_path, kind):
    policy = make(initializer_range=0.02)
    pairs = with_reference(encoded, policy, tmp_path)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    loss_fn, margins = dpo_loss(0.1, kind=kind), []
    for _ in range(12):
        loss, n, extras = loss_fn(policy, pairs.batch(range(4)))
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        margins.append(extras["margin"].item() / n)
    assert margins[0] == pytest.approx(0, abs=margin_rounding(pairs, 0.1))
    assert margins[-1] > margins[5] > margins[1] > 0
    assert extras["accuracy"].item() == 4
