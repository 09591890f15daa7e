"""A model that answers multiple-choice questions: MiniMinds and other causal models of transformers alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError, first_line
from common.files import ROOT
from evaluation.ceval import Question, answer_texts, chat_prompt, plain_prompt
from evaluation.options import EvaluatedModelOptions
from evaluation.scoring import BATCH_TOKENS, MultipleChoice, draft_models, score, score_cascade
from inference.model_finder import require_model
from inference.model_loader import open_model
from model.chat_format import CHAT_TEMPLATE, render_chat
from model.chat_style import chat_style
from model.device import resolve_device, resolve_dtype
from model.tokenizer import BOS_ID, encode_text, encode_texts
from model.weights_file import dtype_name


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

    def encode(self, prompt: str | list[dict], answers: list[str]) -> tuple[MultipleChoice, int]:
        """Return prompt and answers as they are tokenized together, and how many tokens a cut from the left keeps.

        One token may hold the end of the prompt and the start of an answer ("：A" does): it is compared as a whole, with
        all answers. In MiniMind's chat format an answer is encoded alone, in training as here.
        """
        lengths = [float(len(answer.encode())) for answer in answers]
        if self.is_minimind and not isinstance(prompt, str):
            ids, _ = render_chat(self.tokenizer, prompt, add_generation_prompt=True)
            n_header = len(chat_style(self.tokenizer).default_system) + 1 + len(encode_text(self.tokenizer, "user\n"))
            return MultipleChoice(ids, encode_texts(self.tokenizer, answers), lengths), n_header
        is_chat = not isinstance(prompt, str)
        if is_chat:
            prompt = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        texts = [prompt, *(prompt + answer for answer in answers)]
        if self.is_minimind:
            encoded = [[BOS_ID, *ids] for ids in encode_texts(self.tokenizer, texts)]
        else:
            encoded = self.tokenizer(texts, add_special_tokens=not is_chat).input_ids
        alone, *together = encoded
        shared = min(len(os.path.commonprefix(encoded)), min(map(len, together)) - 1)
        n_moved = len(self.tokenizer.decode(alone[shared:]).encode())  # bytes of the prompt that are scored, too
        item = MultipleChoice(
            alone[:shared], [ids[shared:] for ids in together], [n_moved + length for length in lengths]
        )
        return item, int(self.is_minimind)

    def to_multiple_choice(
        self, question: Question, examples: Sequence[Question], style: str, plain: bool
    ) -> tuple[MultipleChoice, int, bool]:
        """Encode one question so that it fits into the context.

        Returns also how many examples were left out for that, and whether the question itself was cut from the left.
        """
        write = plain_prompt if plain else chat_prompt
        for dropped in range(len(examples) + 1):
            item, n_kept = self.encode(write(question, examples[dropped:], style), answer_texts(question, style))
            cut = self.cut(item, n_kept)
            if cut is item:
                break
        return (
            MultipleChoice(cut.prompt, item.options, item.lengths if style == "text" else None),
            dropped,
            cut is not item,
        )

    def cut(self, item: MultipleChoice, n_kept: int) -> MultipleChoice:
        """Return `item` itself if it fits into the context, else without some tokens after the first `n_kept`."""
        ids, room = item.prompt, max(1, self.context - max(map(len, item.options)) + 1)
        if len(ids) <= room:
            return item
        n_kept = min(n_kept, room - 1)
        return replace(item, prompt=ids[:n_kept] + ids[len(ids) - (room - n_kept) :])

    def score(self, items: list[MultipleChoice], dtype: str, batch_tokens: int | None) -> tuple[list[Tensor], dict]:
        """Score every item; return also, for the summary, the precision of the computation.

        dtype: "auto": answers of float32, computed in half precision first where that is fast; else one precision.
        """
        device = self.model.device
        half = resolve_dtype("auto", device)
        batch_tokens = batch_tokens or (BATCH_TOKENS if device.type == "cpu" else 16384)
        drafts = draft_models(self.model, half) if dtype == "auto" and half != torch.float32 else []
        with tqdm(total=len(items), desc="scoring", unit="question", disable=None, leave=False) as bar:
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


def open_evaluated_model(options: EvaluatedModelOptions, dtype: torch.dtype, *, plain: bool) -> EvaluatedModel:
    """Open the model that the flags name, and print what has to be known about it. Raises UserError if it cannot be used.

    plain: it will be asked in bare text, so that it needs no chat template.
    """
    device = resolve_device(options.device)
    if options.hf is not None:
        trust = options.trust_remote_code
        model = open_transformers_folder(options.hf, device, dtype, trust_remote_code=trust, plain=plain)
    else:
        path = options.weights
        if path is None and options.lora is None:
            path = require_model(ROOT / "out", ["rlvr", "rl", "distill", "full_sft"], "3-full_sft.py")
        checkpoint, tokenizer = open_model(
            path, lora=options.lora, tokenizer=options.tokenizer, device=device, dtype=dtype
        )
        for note in checkpoint.notes:
            print(f"note: {note}")
        model = EvaluatedModel(checkpoint.model, tokenizer, str(checkpoint.path), checkpoint.config.max_seq_len)
    if options.max_seq_len is not None:
        if options.max_seq_len > model.context:
            print(f"note: trained at {model.context} tokens; --max_seq_len {options.max_seq_len} allows longer prompts")
        model.context = options.max_seq_len
    return model


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
        reason = first_line(error)
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
