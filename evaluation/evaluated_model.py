"""A model that answers multiple-choice questions: MiniMinds and other causal models of transformers alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from evaluation.ceval import Question, answer_texts, chat_prompt, plain_prompt
from evaluation.scoring import BATCH_TOKENS, MultipleChoice, draft_models, score, score_cascade
from model.chat_format import CHAT_TEMPLATE, render_chat
from model.device import resolve_dtype
from model.tokenizer import BOS_ID, encode_text
from model.weights import dtype_name


@dataclass
class EvaluatedModel:
    """A model with its tokenizer.

    context: longest prompt in tokens.
    is_minimind: the tokenizer is MiniMind's, and text is encoded by `model.tokenizer`, where it never becomes a control
        token.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int
    is_minimind: bool = True

    def encode_prompt(self, prompt: str | list[dict]) -> tuple[list[int], int]:
        """Return the token ids of a prompt, and how many at its start are kept when it is cut from the left."""
        if self.is_minimind and isinstance(prompt, str):
            return [BOS_ID, *encode_text(self.tokenizer, prompt)], 1
        if self.is_minimind:
            ids, _ = render_chat(self.tokenizer, prompt, add_generation_prompt=True)
            return ids, 1 + len(encode_text(self.tokenizer, "user\n"))
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids, 0
        chat = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return chat["input_ids"], 0

    def encode_answer(self, prompt: str | list[dict], text: str) -> list[int]:
        """Return the token ids of `text` as a continuation of `prompt`."""
        if self.is_minimind:
            return encode_text(self.tokenizer, text)
        if isinstance(prompt, str):  # some tokenizers put a space before a text that stands alone
            before, both = self.tokenizer(prompt).input_ids, self.tokenizer(prompt + text).input_ids
            if both[: len(before)] == before and len(both) > len(before):
                return both[len(before) :]
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def to_multiple_choice(
        self, question: Question, examples: Sequence[Question], style: str, plain: bool
    ) -> tuple[MultipleChoice, int, bool]:
        """Encode one question so that it fits into the context.

        Returns also how many examples were left out for that, and whether the question itself was cut from the left.
        """
        texts = answer_texts(question, style)
        write = plain_prompt if plain else chat_prompt
        for dropped in range(len(examples) + 1):
            prompt = write(question, examples[dropped:], style)
            answers = [self.encode_answer(prompt, text) for text in texts]
            ids, n_kept = self.encode_prompt(prompt)
            room = max(1, self.context - max(map(len, answers)) + 1)
            if len(ids) <= room:
                break
        too_long = len(ids) > room
        if too_long:
            n_kept = min(n_kept, room - 1)
            ids = ids[:n_kept] + ids[len(ids) - (room - n_kept) :]
        lengths = [float(len(text.encode())) for text in texts] if style == "text" else None
        return MultipleChoice(ids, answers, lengths), dropped, too_long

    def score(self, items: list[MultipleChoice], dtype: str, batch_tokens: int | None) -> tuple[list[Tensor], dict]:
        """Score every item; return also, for the summary, the precision of the computation.

        dtype: "auto": answers of float32, computed in half precision first where that is fast; else one precision.
        """
        device = self.model.device
        half = resolve_dtype("auto", device)
        batch_tokens = batch_tokens or (BATCH_TOKENS if device.type == "cpu" else 16384)
        drafts = draft_models(self.model, half) if dtype == "auto" and half != torch.float32 else []
        with tqdm(total=len(items), desc="C-Eval", unit="question", disable=None, leave=False) as bar:
            if drafts:
                scores, counts = score_cascade(
                    [*drafts, self.model], items, batch_tokens=batch_tokens, on_done=bar.update
                )
                precision = {"dtype": f"{dtype_name(half)} and float32", "decided_in_float32": counts[-1]}
            else:
                scores = score(self.model, items, batch_tokens=batch_tokens, on_done=bar.update)
                precision = {"dtype": dtype_name(self.model.dtype)}
        broken = sum(not one.isfinite().all() for one in scores)
        if broken:
            raise UserError(f"{self.name}: probabilities of {broken} questions are not finite; try --dtype float32")
        return scores, precision


def open_transformers_folder(
    folder: Path, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool, plain: bool
) -> EvaluatedModel:
    """Open a folder that transformers can load: an export, or another model. Raises UserError if it cannot be used."""
    if not (folder / "config.json").is_file():
        raise UserError(f"--hf {folder}: no config.json in it; name a folder that transformers can load")
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device)
    except (ValueError, OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--hf {folder} cannot be loaded: {reason}. If it comes with code of its own that you have read and "
            "trust, add --trust_remote_code"
        ) from error
    if not plain and not tokenizer.chat_template:
        raise UserError(f"--hf {folder}: its tokenizer has no chat template; add --plain to ask in bare text")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"--hf {folder}: {len(tokenizer)} tokens in the tokenizer, {model.config.vocab_size} in the model"
        )
    special = tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"])
    is_minimind = tokenizer.chat_template == CHAT_TEMPLATE and special == [0, 1, 2]
    context = getattr(model.config, "max_position_embeddings", None) or 2048
    return EvaluatedModel(model.eval(), tokenizer, str(folder), context, is_minimind)
