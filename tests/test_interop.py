"""The trainers of other libraries, unmodified, on our model and tokenizer: two steps each."""

from __future__ import annotations

import copy
import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need a hub

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tolerances import log_probability_rounding
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer
from trainer.distillation import divergence

kinds = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
CHATS = [
    [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]
    for i in range(8)
]
COMMON = dict(
    max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[],
    save_strategy="no", logging_steps=1, disable_tqdm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def make(moe: bool) -> Transformer:
    torch.manual_seed(0)
    return Transformer(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, use_moe=moe))


def train(trainer) -> list[dict]:
    """Two steps; the logged ones, after a look at whether every trainable weight moved and stayed finite."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert torch.isfinite(parameter).all() and not torch.equal(parameter, before[name]), name
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    return logs


@pytest.mark.parametrize("moe, packing", [(False, False), (True, True)], ids=["dense-padded", "moe-packed"])
def test_trl_sft_trainer(tokenizer, tmp_path, moe, packing):
    trainer = SFTTrainer(
        model=make(moe),
        args=SFTConfig(output_dir=str(tmp_path), packing=packing, max_length=64, **COMMON),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in CHATS]),
        processing_class=tokenizer,
    )
    logs = train(trainer)
    assert logs[0]["loss"] == pytest.approx(math.log(6400), rel=0.1) and logs[1]["loss"] < logs[0]["loss"]


@kinds
def test_trl_sft_trainer_with_lora(tokenizer, tmp_path, moe):
    model = make(moe)
    before = copy.deepcopy(model.state_dict())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_length=64, **COMMON),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in CHATS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["wq", "wk", "wv", "wo"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    base = trainer.model.unload().state_dict()
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in before)


@kinds
def test_trl_dpo_trainer(tokenizer, tmp_path, moe):
    rows = [
        {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "No idea."}]}
        for chat in CHATS
    ]
    model = make(moe)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    logs = train(trainer)
    margin = 4 * trainer.args.beta * log_probability_rounding(model.config, 16)  # of four short answers
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=margin)
    assert logs[1]["rewards/margins"] > 0 and logs[1]["loss"] < logs[0]["loss"]


@kinds
@pytest.mark.parametrize("method", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_peft_prompts_are_trained(method, moe):
    """Embeddings, or keys and values, in front of the text; their sizes are read from the configuration."""
    model = get_peft_model(make(moe), method(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids = torch.randint(0, 6400, (2, 20), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    answer = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert answer.shape[0] == 2


def padded(tokenizer, chats) -> dict[str, torch.Tensor]:
    batch = tokenizer.apply_chat_template(chats, return_tensors="pt", padding=True, return_dict=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


@kinds
def test_transformers_trainer_trains_and_evaluates(tokenizer, tmp_path, moe):
    rows = [{name: value[i] for name, value in padded(tokenizer, CHATS).items()} for i in range(len(CHATS))]
    trainer = Trainer(model=make(moe), args=TrainingArguments(str(tmp_path), **COMMON), train_dataset=rows)
    logs = train(trainer)
    assert logs[1]["loss"] < logs[0]["loss"]
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (8, len(rows[0]["input_ids"]), 6400)  # logits, and nothing else
    assert predictions.metrics["test_loss"] < math.log(6400)


@kinds
def test_accelerate(tokenizer, moe):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make(moe)
    loader = torch.utils.data.DataLoader(CHATS * 2, batch_size=4, collate_fn=lambda chats: padded(tokenizer, chats))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, steps = [], 0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += accelerator.sync_gradients
            optimizer.zero_grad()
        losses.append(loss.item())
    assert steps == 2 and losses[-1] < losses[0] - 0.1
    assert accelerator.unwrap_model(model).state_dict().keys() == make(moe).state_dict().keys()


@kinds
def test_the_loss_of_offloaded_weights(moe):
    """The weights lie on the device meta, and come to the CPU only while their module is called."""
    ids = torch.randint(0, 6400, (8, 40))
    expected = make(moe).train()(ids, labels=ids).loss
    offloaded = cpu_offload(make(moe).train(), execution_device=torch.device("cpu"))
    for loss_only in (False, True):
        torch.testing.assert_close(offloaded(ids, labels=ids, loss_only=loss_only).loss, expected)


@pytest.mark.parametrize("loss_only", [False, True])
def test_lora_on_the_output_is_trained_by_the_loss(loss_only):
    model = get_peft_model(make(False), LoraConfig(r=4, target_modules=["output"], init_lora_weights=False)).train()
    ids = torch.randint(0, 6400, (2, 20))
    out = model(input_ids=ids, labels=ids, loss_only=loss_only)
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    if not loss_only:
        logits = out.logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@pytest.mark.parametrize("kind, beta", [("forward", 0), ("reverse", 1), ("js", 0.5)])
def test_divergences_are_those_of_trl(kind, beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 30, 50, dtype=torch.float64) * 3
    expected = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=2.0, reduction="sum"
    )
    ours = divergence((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), kind).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
