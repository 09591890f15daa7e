"""Distillation: a student learns from the probabilities that a teacher gives to every next token.

A label names one token; a teacher also says which other tokens would have been almost as good (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common.errors import UserError, first_line
from common.files import cached_folder, checksum, explain_write_errors, read_json_or_empty, short_hash
from common.progress import Progress
from data_pipeline.datasets import Batch, PackedRows
from data_pipeline.packing import derive_seed
from data_pipeline.sequences import sequence_batch
from export.huggingface import CLASSES
from inference.generator import decode_all
from inference.model_loader import open_model
from inference.options import SamplingParams
from model.LMConfig import LMConfig
from model.model import describe_parameters
from model.tokenizer import EOS_ID, load_tokenizer, tokenizer_hash
from trainer.losses import LossFunction, token_sums
from trainer.rollouts import OnPolicyLoader


@dataclass(frozen=True)
class Teacher:
    """A model that is not trained. `fingerprint` changes with its weights, `architecture` with the computation."""

    model: nn.Module
    fingerprint: str
    architecture: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def logps(self, inputs: dict[str, Tensor], at: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (positions, vocabulary) of the tokens after the positions `at` of flattened rows."""
        logits = self.model(
            input_ids=inputs["input_ids"].view(1, -1),
            position_ids=inputs["position_ids"].view(1, -1),  # they restart: documents do not see each other
            logits_to_keep=at,
            use_cache=False,
        ).logits[0]
        return (logits.float() / temperature).log_softmax(-1)


def open_teacher(
    path: Path, tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path, device: torch.device, dtype: torch.dtype
) -> Teacher:
    """Return the teacher at `path`: a .pth file, an adapter, an exported folder, or a Hugging Face causal language model.

    Raises UserError if it cannot be read, or if its tokenizer is not the student's.
    """
    if not path.exists():
        raise UserError(f"--teacher {path}: no such file or folder")
    config = path / "config.json"
    kind = read_json_or_empty(config).get("model_type") if config.exists() else LMConfig.model_type
    if kind == LMConfig.model_type or kind in CLASSES:
        checkpoint, own_tokenizer = open_model(path, tokenizer=tokenizer_dir, device=device, dtype=dtype)
        model, fingerprint = checkpoint.model, checkpoint.fingerprint
        architecture = checkpoint.config.architecture()
        print(f"teacher: {path}, {describe_parameters(model)}")
    else:
        own_tokenizer, fingerprint, architecture = load_tokenizer(path), "", {}  # the JSON files are a part of the hash
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--teacher {path}: no model can be loaded from it: {first_line(error)}") from error
        nn.Module.to(model, device)
        print(f"teacher: {path}, a {kind} of {model.num_parameters() / 1e6:.2f}M parameters")
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.json")])
        fingerprint += "".join(f"{checksum(file):08x}" for file in files)
        fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    if tokenizer_hash(own_tokenizer) != tokenizer_hash(tokenizer):
        raise UserError(
            f"--teacher {path} has another tokenizer than the student: its probabilities are those of other tokens. Train "
            "the student with the teacher's tokenizer (--tokenizer)"
        )
    model.requires_grad_(False)
    teacher = Teacher(model, fingerprint, architecture)
    check_packing(teacher, path, device)
    return teacher


def check_packing(teacher: Teacher, path: Path, device: torch.device) -> None:
    """Raise UserError if, to the teacher, a document in a packed row depends on the one before it."""
    second = torch.tensor([[5, 6, 7, 8]], device=device)
    positions = torch.arange(4, device=device)[None]
    at = torch.tensor([3], device=device)
    alone = teacher.logps({"input_ids": second, "position_ids": positions}, at, 1.0)
    rows = {"input_ids": torch.cat([second.flip(1), second], 1), "position_ids": positions.repeat(1, 2)}
    packed = teacher.logps(rows, at + 4, 1.0)
    if (packed.exp() - alone.exp()).abs().max() > 0.05 or (packed - alone).abs().mean() > 0.1:
        raise UserError(
            f"--teacher {path}: in packed rows this model mixes documents with each other, so its probabilities would be "
            "wrong. Use one whose implementation in transformers restarts documents at position 0, as Llama's does"
        )


# ---- the loss


def divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return how much distributions differ, (positions,), from log-probabilities (positions, classes).

    forward: KL(teacher || student); the student covers everything that the teacher finds possible.
    reverse: KL(student || teacher); the student keeps to what the teacher finds probable (https://arxiv.org/abs/2306.08543).
    js: Jensen-Shannon, the mean of both to their mixture: between the two, at most ln 2 (https://arxiv.org/abs/2306.13649,
        equation 1 with beta 1/2).
    """
    if kind == "forward":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "reverse":
        return divergence(teacher, student, "forward")
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    return (divergence(mixture, teacher, "forward") + divergence(mixture, student, "forward")) / 2


def distillation_loss(
    alpha: float, temperature: float, kind: str, teacher: Teacher | None = None, use_moe: bool = False
) -> LossFunction:
    """Return alpha * CE + (1 - alpha) * T^2 * D(teacher, student), summed over targets.

    CE is the cross entropy of `next_token_loss`, D the divergence of both models' probabilities at temperature T: from
    logits divided by T. Its gradients shrink with 1 / T^2, which the factor makes up for (https://arxiv.org/abs/1503.02531,
    section 2). Logged are "loss", the cross entropy alone, to compare with training without a teacher, and "divergence".

    Args:
        teacher: None: the batches hold its `TopK` probabilities.
        use_moe: the student is a mixture of experts, whose balance loss is added.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        inputs = batch.inputs
        at, targets = predicted_targets(inputs["labels"], batch.n_targets)
        # The labels are for the balance loss, which only the model can compute; as a sum, because 1 is its divisor.
        given = {"labels": inputs["labels"].view(1, -1), "num_items_in_batch": 1} if use_moe else {}
        out = model(
            input_ids=inputs["input_ids"].view(1, -1),
            position_ids=inputs["position_ids"].view(1, -1),
            attention_mask=inputs["attention_mask"].view(1, -1),
            cu_seqlens=inputs["cu_seqlens"],
            logits_to_keep=at,
            use_cache=False,
            **given,
        )
        logits = out.logits[0].float()  # (targets, vocabulary)
        student = (logits / temperature).log_softmax(-1)
        if teacher is not None:
            reference = teacher.logps(inputs, at, temperature)
        else:
            ids = inputs["teacher_ids"].long()
            reference = _with_rest(inputs["teacher_logps"].float())
            student = torch.cat([student.gather(1, ids), _rest(student, ids)], dim=1)
        distance = divergence(student, reference, kind).sum()
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        sums = token_sums(model, batch, out) if use_moe else {"loss": cross_entropy.detach()}
        # Written so that what the model adds to the cross entropy, the balance loss, keeps its weight.
        alone = out.loss if use_moe else cross_entropy
        loss = alone + (1 - alpha) * (temperature**2 * distance - cross_entropy)
        return loss, batch.n_targets, sums | {"divergence": distance.detach()}

    return loss_fn


def predicted_targets(labels: Tensor, n_targets: int) -> tuple[Tensor, Tensor]:
    """Return the positions in flattened rows that predict a target, and the targets; (n_targets,) each, in order.

    The number comes from the batch: to count on a GPU would make the CPU wait for it.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    at = (targets == -100).to(torch.uint8).argsort(stable=True)[:n_targets]
    return at, targets[at]


def _with_rest(top: Tensor) -> Tensor:
    """Return log-probabilities (positions, k + 1): the last is that of all tokens that are not among the k."""
    rest = torch.log1p(-top.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([top, rest], dim=1)


def _rest(logps: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability (positions, 1) of all tokens except `ids` (positions, k)."""
    return logps.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)


# ---- what the teacher says, on disk


class TopK:
    """Rows with the teacher's k most probable tokens for each target, computed once and kept in the cache.

    The rest of the vocabulary counts as one more token. That takes 4 bytes * k for a target on disk, and no teacher in
    training.

    Args:
        rows: what is trained on.
        folder: with `ids.bin` (targets, k) uint16, `logps.bin` (targets, k) float16 and `first.npy` (rows + 1,).

    Raises OSError or ValueError if they are not there, or not complete.
    """

    def __init__(self, rows: PackedRows, folder: Path, k: int) -> None:
        self.rows, self.n_bytes, self.documents = rows, rows.n_bytes, rows.documents
        self.fingerprint = f"{rows.fingerprint}-{folder.name}"
        self.first = np.load(folder / "first.npy")
        shape = (int(self.first[-1]), k)
        if len(self.first) != len(rows) + 1 or (folder / "ids.bin").stat().st_size != 2 * shape[0] * k:
            raise ValueError(f"{folder} is not complete")
        self.ids = np.memmap(folder / "ids.bin", np.uint16, "r", shape=shape)
        self.logps = np.memmap(folder / "logps.bin", np.float16, "r", shape=shape)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return rows as `PackedRows.batch` does, and teacher_ids and teacher_logps, (targets, k)."""
        batch = self.rows.batch(indices)
        parts = [slice(self.first[row], self.first[row + 1]) for row in indices]
        extra = {
            "teacher_ids": torch.from_numpy(np.concatenate([self.ids[part] for part in parts]).astype(np.int32)),
            "teacher_logps": torch.from_numpy(np.concatenate([self.logps[part] for part in parts])),
        }
        return dataclasses.replace(batch, inputs=batch.inputs | extra)


def cached_top_k(
    rows: PackedRows, teacher: Teacher, k: int, temperature: float, cache_dir: Path, device: torch.device,
    dtype: torch.dtype, batch_size: int,
) -> TopK:  # fmt: skip
    """Return `rows` with the teacher's `k` most probable tokens, from the cache or computed now.

    temperature: that of the loss: what is kept are the probabilities at this temperature.
    """
    origin = [rows.fingerprint, teacher.fingerprint, teacher.architecture, k, temperature, str(dtype)]
    folder = cache_dir / f"teacher-{short_hash(origin)}"
    if k >= (n_tokens := rows.dataset.info["vocab_size"]):
        raise UserError(f"--top_k {k}: there are {n_tokens} tokens; leave it out to use the probabilities of all")

    def read(folder: Path) -> TopK | None:
        with contextlib.suppress(OSError, ValueError, EOFError):
            return TopK(rows, folder, k)
        return None

    def build(tmp: Path) -> None:
        labels = [rows.batch([row]).n_targets for row in range(len(rows))]
        first = np.concatenate([[0], np.cumsum(labels)])
        size = 4 * k * int(first[-1]) / 1e6
        print(f"the teacher's {k} most probable tokens of {first[-1]:,} targets: {size:,.0f} MB in {folder}")
        np.save(tmp / "first.npy", first)
        with (
            (tmp / "ids.bin").open("wb") as ids,
            (tmp / "logps.bin").open("wb") as logps,
            Progress("teacher", len(rows), "rows") as progress,
        ):
            for begin in range(0, len(rows), batch_size):
                some = range(begin, min(begin + batch_size, len(rows)))
                batch = rows.batch(some).to(device)
                at, _ = predicted_targets(batch.inputs["labels"], batch.n_targets)
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    top = teacher.logps(batch.inputs, at, temperature).topk(k)
                ids.write(top.indices.cpu().numpy().astype(np.uint16).tobytes())
                logps.write(top.values.cpu().numpy().astype(np.float16).tobytes())
                progress.update(len(some))

    with explain_write_errors(cache_dir, "another --cache_dir"):
        return cached_folder(folder, read, build, "asking the teacher")[0]


# ---- the student's own answers


class Questions:
    """The questions of dialogues as a data set for the loop; the batches come from `AnswerLoader`.

    The question is everything before the last answer; one that leaves no room for an answer is left out.

    Args:
        rows: of dialogues.
        max_tokens: of a question.

    Raises UserError if all are longer.
    """

    def __init__(self, rows: PackedRows, max_tokens: int) -> None:
        if max_tokens < 1:
            raise UserError(
                "--max_new_tokens leaves nothing of --max_seq_len for the question: lower the one or raise the other"
            )
        self.dataset, self.numbers = rows.dataset, np.unique(rows.packing.document)
        self.fingerprint = f"{rows.fingerprint}-questions-{max_tokens}"
        n_all = len(self.numbers)
        self.numbers = self.numbers[[len(self.question(i)) <= max_tokens for i in range(n_all)]]
        if not len(self.numbers):
            raise UserError(
                f"none of the {n_all:,} questions has at most {max_tokens} tokens, which --max_new_tokens leaves of "
                "--max_seq_len: lower the one or raise the other"
            )
        print(f"{len(self.numbers):,} of {n_all:,} questions leave room to answer")

    def __len__(self) -> int:
        return len(self.numbers)

    def documents(self, indices: Sequence[int]) -> list[int]:
        return sorted(int(self.numbers[i]) for i in indices)

    def question(self, index: int) -> list[int]:
        """Return the tokens up to the header of the last answer."""
        document, dataset = self.numbers[index], self.dataset
        assert dataset.loss_mask is not None
        end = int(dataset.offsets[document + 1])
        begin = end - int(dataset.lengths[document])
        learned = dataset.loss_mask[begin:end].astype(bool)
        answer = int(np.flatnonzero(learned & ~np.concatenate([[False], learned[:-1]]))[-1])
        return dataset.tokens[begin : begin + answer].tolist()

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return empty answers, for passes that count for nothing."""
        return answer_batch([(self.question(i), [EOS_ID]) for i in indices])


def answer_batch(dialogues: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Return questions and their answers, as tokens, as one packed row: the inputs of `PackedRows.batch`."""
    batch = sequence_batch(
        [(question + answer, [False] * len(question) + [True] * len(answer)) for question, answer in dialogues]
    )
    x = batch.inputs
    labels = torch.full_like(x["input_ids"], -100)
    labels[0, x["predicts"] + 1] = x["targets"]
    inputs = {name: x[name] for name in ("input_ids", "position_ids", "cu_seqlens")}
    inputs |= {"labels": labels, "attention_mask": torch.ones_like(labels)}
    return dataclasses.replace(batch, inputs=inputs)


@dataclass
class AnswerLoader(OnPolicyLoader):
    """Batches of the student's own answers, for on-policy distillation (https://arxiv.org/abs/2306.13649).

    The student learns from what it writes itself, mistakes included: there, and not only in good texts, the teacher says
    what should come next. A step's answers depend on weights, seed and step: a resumed run repeats them.
    """

    data: Questions
    max_new_tokens: int = field(kw_only=True)

    def batches(self, step: int, size: int | None = None) -> list[Batch]:
        """Return the student's answers to this process's questions of a step."""
        size, mine = size or self.micro_batch, self.numbered(step)
        questions = [self.data.question(sample) for _, sample in mine]
        samplings = [
            SamplingParams(self.max_new_tokens, temperature=1.0, seed=derive_seed(self.schedule.seed, step, n))
            for n, _ in mine
        ]
        answers: list[list[int]] = [[] for _ in questions]
        for output in decode_all(self.generator(size), questions, samplings):
            self.heartbeat()
            answers[output.key].append(output.token)
        dialogues = list(zip(questions, answers, strict=True))
        found = [answer_batch(dialogues[i : i + size]) for i in range(0, len(dialogues), size)]
        return self.padded(found, step, size)
