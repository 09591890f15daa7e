"""Distillation: the divergences, the loss, teachers of several kinds, and 7-distill.py as users run it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_gradients_close, gradient_rounding, log_probability_rounding
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize_chats import tokenize_chat_data
from export.huggingface import write_llama
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import TOKENIZER_DIR, load_tokenizer, tokenizer_hash
from model.weights_file import save_checkpoint
from trainer.distillation import (
    Questions,
    Teacher,
    answer_batch,
    cached_top_k,
    distillation_loss,
    open_teacher,
    predicted_targets,
)

CPU = torch.device("cpu")
SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is {i}, {i}."},
            ]
        }
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(chats, tokenizer, tmp_path_factory):
    dataset = tokenize_chat_data([chats], tokenizer, tmp_path_factory.mktemp("cache"), max_tokens=64)
    documents, _ = dataset.split(0)
    return PackedRows(dataset, documents, 64, seed=1)


def make(seed: int, **fields) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(LMConfig(**SHAPE | fields))


def by_documents(model, teacher, batch, alpha: float, temperature: float) -> torch.Tensor:
    """Return the loss, one document after another, each alone; after the models in float64."""
    total = torch.zeros((), dtype=torch.float64)
    boundaries = batch.inputs["cu_seqlens"].tolist()
    ids, labels = (batch.inputs[name].flatten() for name in ("input_ids", "labels"))
    for begin, end in zip(boundaries, boundaries[1:], strict=False):
        targets = labels[begin + 1 : end]
        learned = targets != -100
        if not learned.any():
            continue
        own, other = (m(ids[None, begin:end], use_cache=False).logits[0, :-1][learned] for m in (model, teacher))
        own, other = own.double(), other.double()
        total = total + alpha * F.cross_entropy(own, targets[learned], reduction="sum")
        p, q = (other / temperature).softmax(-1), (own / temperature).log_softmax(-1)
        total = total + (1 - alpha) * temperature**2 * (p * (p.log() - q)).sum()
    return total


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_loss_and_gradients_equal_those_of_single_documents(rows, moe):
    batch = rows.batch([0, 1])
    model = make(1, use_moe=moe, aux_loss_alpha=0.0).train()
    teacher = Teacher(make(2).eval(), "")
    loss, n_targets, sums = distillation_loss(0.3, 2.0, "forward", teacher, moe)(model, batch)
    assert n_targets == batch.n_targets > 10
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = by_documents(model, teacher.model, batch, 0.3, 2.0)
    rounding = log_probability_rounding(model.config, n_targets)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=rounding)
    expected.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients_close(found, theirs, gradient_rounding(model.config, n_targets))
    cross_entropy = model.eval()(**batch.inputs, num_items_in_batch=1).loss
    torch.testing.assert_close(sums["loss"], cross_entropy.detach(), rtol=0, atol=rounding)


def test_the_balance_loss_of_experts_keeps_its_weight(rows):
    batch = rows.batch([0])
    teacher = Teacher(make(2).eval(), "")

    def loss_of(aux_loss_alpha: float) -> torch.Tensor:
        model = make(1, use_moe=True, aux_loss_alpha=aux_loss_alpha).train()
        loss, _, sums = distillation_loss(0.0, 1.0, "reverse", teacher, use_moe=True)(model, batch)
        return loss.detach() - sums.get("balance_loss", 0)

    torch.testing.assert_close(loss_of(0.5), loss_of(0.0))


def test_a_student_that_is_the_teacher_has_nothing_to_learn(rows):
    batch, model = rows.batch([0]), make(1).train()
    for kind in ("forward", "reverse", "js"):
        loss, _, sums = distillation_loss(0.0, 1.5, kind, Teacher(make(1).eval(), ""))(model, batch)
        rounding = batch.n_targets * log_probability_rounding(model.config, 64)
        assert abs(float(sums["divergence"])) < rounding and abs(float(loss.detach())) < 1.5**2 * rounding, kind


class FewTokens(nn.Module):
    """A teacher with a vocabulary in which only the first tokens are possible."""

    def __init__(self, possible: int) -> None:
        super().__init__()
        self.possible = possible

    def forward(self, input_ids, position_ids, logits_to_keep, use_cache) -> SimpleNamespace:
        logits = torch.full((1, len(logits_to_keep), 6400), -60.0)
        logits[..., : self.possible] = torch.sin(
            torch.arange(self.possible) * (1 + input_ids[0, logits_to_keep])[:, None]
        )
        return SimpleNamespace(logits=logits)


def test_cached_probabilities_are_those_of_the_teacher(rows, tmp_path):
    teacher = Teacher(FewTokens(8), "few")
    arguments = (rows, teacher, 8, 2.0, tmp_path, CPU, torch.float32, 2)
    cached = cached_top_k(*arguments)
    assert len(cached) == len(rows) and cached.n_bytes == rows.n_bytes
    model = make(1)
    for kind in ("forward", "js"):
        for indices in ([0], [2, 0, 1]):  # in the order in which the rows are asked for
            live, _, _ = distillation_loss(0.5, 2.0, kind, teacher)(model, rows.batch(indices))
            from_disk, _, _ = distillation_loss(0.5, 2.0, kind)(model, cached.batch(indices))
            torch.testing.assert_close(from_disk, live, rtol=2e-3, atol=0)  # float16 on disk

    def never(**kwargs: object) -> None:
        raise AssertionError("the teacher was asked again")

    again = cached_top_k(rows, Teacher(never, "few"), *arguments[2:])  # type: ignore[arg-type]
    assert again.fingerprint == cached.fingerprint
    with pytest.raises(AssertionError, match="asked again"):  # at another temperature
        cached_top_k(rows, Teacher(never, "few"), 8, 1.0, *arguments[4:])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--top_k 6400"):
        cached_top_k(rows, teacher, 6400, *arguments[3:])


def test_teachers_of_every_kind_agree(tokenizer, tmp_path, rows):
    model = make(3, n_kv_heads=4).eval()
    save_checkpoint(tmp_path / "full_sft_32.pth", model, info={"tokenizer_hash": tokenizer_hash(tokenizer)})
    write_llama(tmp_path / "llama", model, TOKENIZER_DIR, torch.float32, {})
    batch = rows.batch([0])
    at = torch.tensor([5, 9])
    found = []
    for name in ("full_sft_32.pth", "llama"):
        teacher = open_teacher(tmp_path / name, tokenizer, TOKENIZER_DIR, CPU, torch.float32)
        found.append(teacher.logps(batch.inputs, at, 1.0))
        assert len(teacher.fingerprint) == 16 and not any(p.requires_grad for p in teacher.model.parameters())
    torch.testing.assert_close(*found, rtol=0, atol=log_probability_rounding(model.config, 64))


def test_other_causal_models_teach_if_they_separate_documents(tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=6400, n_embd=32, n_layer=1, n_head=2, initializer_range=0.5))
    other.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    teacher = open_teacher(tmp_path / "gpt2", tokenizer, TOKENIZER_DIR, CPU, torch.float32)
    assert isinstance(teacher.model, GPT2LMHeadModel)
    # Its weights are part of its fingerprint in the older format, too.
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    found = []
    for scale in (1, 2):
        weights = {name: tensor * scale for name, tensor in other.state_dict().items()}
        torch.save(weights, tmp_path / "gpt2" / "pytorch_model.bin")
        found.append(open_teacher(tmp_path / "gpt2", tokenizer, TOKENIZER_DIR, CPU, torch.float32).fingerprint)
    assert found[0] != found[1]
    (tmp_path / "gpt2" / "pytorch_model.bin").write_bytes(b"half")
    with pytest.raises(UserError, match="no model can be loaded from it"):
        open_teacher(tmp_path / "gpt2", tokenizer, TOKENIZER_DIR, CPU, torch.float32)
    other.save_pretrained(tmp_path / "gpt2")

    def one_document(self, *args, position_ids=None, forward=GPT2LMHeadModel.forward, **kwargs):
        positions = torch.arange(position_ids.shape[1])[None]
        return forward(self, *args, position_ids=positions, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", one_document)
    with pytest.raises(UserError, match="mixes documents"):
        open_teacher(tmp_path / "gpt2", tokenizer, TOKENIZER_DIR, CPU, torch.float32)


# ---- the script


QUICK = "--device cpu --dtype float32 --batch_size 2 --log_interval 1 --val_fraction 0.2 --val_interval 3".split()


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer, chats):
    folder = tmp_path_factory.mktemp("out")
    info = {"tokenizer_hash": tokenizer_hash(tokenizer)}
    save_checkpoint(folder / "full_sft_32.pth", make(0), info={"stage": "full_sft", **info})
    save_checkpoint(folder / "full_sft_64.pth", make(1, dim=64), info={"stage": "full_sft", **info})
    return folder


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "distill_32.metrics.jsonl").read_text().splitlines()]


def test_the_script(run_here, out, chats, tmp_path):
    def distill(*flags: object):
        return run_here("7-distill.py", *QUICK, "--out_dir", out, "--data_path", chats, *flags)

    student = ["--init_from", out / "full_sft_32.pth"]
    teach = ["--teacher", out / "full_sft_64.pth"]
    flags = [*student, *teach, "--alpha", 0, "--learning_rate", 3e-3]
    result = distill(*flags, "--max_steps", 12)
    assert result.returncode == 0, result.stderr
    assert "teacher:" in result.stdout and "now try: python 2-eval.py" in result.stdout
    lines = metrics(out)
    assert lines[-1]["divergence"] < lines[0]["divergence"] and lines[-1]["val_divergence"] < lines[2]["val_divergence"]
    live = torch.load(out / "distill_32.pth", weights_only=True)

    # Stopped and resumed: the same weights, to the bit.
    assert distill(*flags, "--max_steps", 12, "--save_interval", 6, "--overwrite").returncode == 0
    half = out / "distill_32.resume" / "step_00000006"
    assert half.is_dir(), sorted(half.parent.iterdir())
    result = distill("--resume", half, *teach)
    assert result.returncode == 0, result.stderr
    resumed = torch.load(out / "distill_32.pth", weights_only=True)
    assert all(torch.equal(live[name], resumed[name]) for name in live)
    result = distill("--resume", half, *teach, "--alpha", 0.5)
    assert result.returncode == 1 and "objective" in result.stderr, result.stderr

    # With the teacher's probabilities on disk: another run, and about the same losses.
    result = distill(*flags, "--max_steps", 2, "--top_k", 1000, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert metrics(out)[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
    assert 0 < metrics(out)[0]["divergence"] <= lines[0]["divergence"]  # what is merged cannot differ


def test_questions_end_with_the_header_of_the_last_answer(rows, tokenizer):
    questions = Questions(rows, 60)
    texts = {tokenizer.decode(questions.question(i)) for i in range(len(questions))}
    assert texts == {f"<s>user\nWhat is {i}?</s>\n<s>assistant\n" for i in range(40)}
    batch = answer_batch([(questions.question(0), [7, 8]), (questions.question(1), [9])])
    assert batch.n_targets == 3
    _, targets = predicted_targets(batch.inputs["labels"], 3)
    assert targets.tolist() == [7, 8, 9]


def test_a_student_learns_from_its_own_answers(run_here, out, chats):
    def distill(*flags: object):
        result = run_here("7-distill.py", *QUICK, "--out_dir", out, "--data_path", chats, *flags)
        assert result.returncode == 0, result.stderr
        return torch.load(out / "distill_32.pth", weights_only=True), metrics(out)

    flags = ["--init_from", out / "full_sft_32.pth", "--teacher", out / "full_sft_64.pth", "--on_policy", "--overwrite"]
    flags += ["--max_new_tokens", 6, "--max_steps", 8, "--save_interval", 4, "--learning_rate", 3e-3]
    whole, lines = distill(*flags)
    assert lines[-1]["divergence"] < lines[0]["divergence"] and "val_divergence" in lines[-1]
    resumed, again = distill(
        "--resume", out / "distill_32.resume" / "step_00000004", "--teacher", out / "full_sft_64.pth"
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [line["divergence"] for line in again] == [line["divergence"] for line in lines]


def test_bad_input(run_here, out, chats, tmp_path, tokenizer):
    def error(*flags: object, code: int = 1) -> str:
        result = run_here("7-distill.py", *QUICK, "--out_dir", out, "--data_path", chats, *flags)
        assert result.returncode == code, result.stderr
        return result.stderr

    assert "--teacher PATH is needed" in error(code=2)
    assert "no such file" in error("--teacher", out / "none.pth")
    same = out / "full_sft_64.pth"
    assert "--on_policy has none: leave --alpha out" in error("--on_policy", "--alpha", 0.5, "--top_k", 3, code=2)
    assert "--max_new_tokens 9 is for --on_policy" in error("--teacher", same, "--max_new_tokens", 9, code=2)
    assert "nothing to learn" in error("--teacher", same, "--init_from", same)
    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    assert "tokenizer" in error("--teacher", tmp_path / "gpt2", "--init_from", same)
