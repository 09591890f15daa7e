"""Decoding for tests: only the token ids of the answers."""

from __future__ import annotations

from collections.abc import Sequence

from inference.generator import generate
from model.model import Transformer
from model.tokenizer import EOS_ID


def generate_ids(model: Transformer, prompts: Sequence[Sequence[int]], *args, **kwargs) -> list[list[int]]:
    """Return the new tokens of each prompt, without the end token. Arguments as for `generate`."""
    eos_id = kwargs.get("eos_id", EOS_ID)
    answers: list[list[int]] = [[] for _ in prompts]
    for output in generate(model, prompts, *args, **kwargs):
        if output.token != eos_id:
            answers[output.key].append(output.token)
    return answers
