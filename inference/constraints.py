"""Constrained decoding: answers that are held to JSON, to a schema, or to tool calls, by masks over the next token.

    grammar = answer_grammar(chat_style(tokenizer).tags, schema={"type": "object"})
    generate(model, [ids], SamplingParams(constraint=Constraint(tokenizer, grammar)))

llguidance (https://github.com/guidance-ai/llguidance) says which tokens may follow. It is imported when the first grammar is
compiled: whoever decodes without one does not need it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from inference.detokenizer import token_bytes
from model.tokenizer import BOS_ID, EOS_ID, encode_text

# JSON as `json.dumps` writes it, and so as training data have it. Optional white space would let a weak model write nothing
# else.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class Constraint:
    """A grammar for whole answers, compiled for a tokenizer. One object serves any number of answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, grammar: str) -> None:
        """
        Args:
            grammar: in llguidance's dialect of Lark, see `answer_grammar`.

        Raises UserError, which says why, for a grammar (such as a JSON schema in it) that is not supported.
        """
        import llguidance

        wrapped = _wrapped(tokenizer)
        self.vocab_size: int = wrapped.vocab_size
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, wrapped)
        if failed:
            raise UserError(_first_line(messages[0]))
        self._start = llguidance.LLMatcher(wrapped, grammar, log_level=0)

    def matcher(self) -> Any:
        """Return the state of a new answer, an `llguidance.LLMatcher`."""
        return self._start.deep_copy()


def blocked_tokens(matchers: Sequence[Any | None], vocab_size: int, n_logits: int) -> Tensor:
    """Return (answers, n_logits) bool: the tokens that may not come next in each answer.

    An answer that is complete may only end; so may one whose grammar became too complex (`is_error`).

    Args:
        matchers: None: the answer is free.
        vocab_size: that of the `Constraint`.
        n_logits: that of the model, which may have entries that its tokenizer does not have.
    """
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    allowed = allocate_token_bitmask(len(matchers), vocab_size)  # all are
    for i, matcher in enumerate(matchers):
        if matcher is not None:
            fill_next_token_bitmask(matcher, allowed, i)
    blocked = np.unpackbits((~allowed).view(np.uint8), axis=1, bitorder="little", count=vocab_size)
    if n_logits > vocab_size:
        held = np.array([[matcher is not None] for matcher in matchers], dtype=np.uint8)
        blocked = np.concatenate([blocked, held.repeat(n_logits - vocab_size, axis=1)], axis=1)
    return torch.from_numpy(blocked).view(torch.bool)


def answer_grammar(
    tags: dict[str, tuple[int, ...]],
    *,
    schema: dict[str, Any] | None = None,
    tools: Sequence[dict[str, Any]] = (),
    required: bool = False,
    parallel: bool = True,
    thinking: bool = False,
    begun: bool = False,
) -> str:
    """Return the grammar of an answer that is JSON, calls tools, or may do either.

    Args:
        tags: of the chat format, `ChatStyle.tags`.
        schema: JSON schema of the content; None: the content is any text.
        tools: functions that may be called, [{"name", "parameters": JSON schema}].
        required: the answer consists of calls.
        parallel: there may be several calls.
        thinking: the answer may begin with its thoughts.
        begun: it does, and their opening tag is the end of the prompt.
    """
    rules = []
    content = "json" if schema is not None else "TEXT"
    if schema is not None:
        rules.append(f"json: {_json_rule(schema)}")
    calls = "call+" if parallel else "call"
    if not tools:
        body = content
    elif required:
        body = calls
    else:
        body = f"({content} | {calls})" if schema is not None else f"TEXT ({calls})?"
    if tools:
        names = [f"function_{i}" for i in range(len(tools))]
        rules.append(f"call: {_tag(tags, '<tool_call>')} ({' | '.join(names)}) {_tag(tags, '</tool_call>')}")
        for name, tool in zip(names, tools, strict=True):
            begin = f'{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, "arguments": '
            parameters = {"type": "object"} | (tool.get("parameters") or NO_PARAMETERS)
            rules.append(f"{name}: {_literal(begin)} {_json_rule(parameters)} {_literal('}')}")
    if thinking and len(tags["</think>"]) == 1:
        rules.append(f"thoughts: TEXT {_tag(tags, '</think>')}")
    elif thinking:
        rules.append('thoughts[suffix="</think>"]: TEXT')
    start = f"thoughts {body}" if begun else f"({_tag(tags, '<think>')} thoughts)? {body}" if thinking else body
    text = "/(.|\\n)*/"
    if tools:  # spelled out letter by letter, the tag would be text to the grammar, and a call to the parser
        text += " & ~/(.|\\n)*<tool_call>(.|\\n)*/"
    return "\n".join(["%llguidance {}", f"start: {start}", *rules, f"TEXT: {text}"])


def _tag(tags: dict[str, tuple[int, ...]], tag: str) -> str:
    """Return a tag in a grammar: a control token by its id, or else its text."""
    ids = tags[tag]
    return f"<[{ids[0]}]>" if len(ids) == 1 else _literal(tag)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_rule(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps(without_other_properties(schema) | {"x-guidance": _LAYOUT}, ensure_ascii=False)


def without_other_properties(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a narrower schema: where it names the properties of an object and does not mention others, there are none.

    JSON Schema allows any others, which a small model would make up. A schema that combines the properties of several parts
    stays as it is, because there the properties of one part are the others of the next.
    """
    parts = [schema]
    for part in parts:  # grows meanwhile
        parts += _subschemas(part)
    if any("allOf" in part or ("properties" in part and not part.keys().isdisjoint(_COMBINED)) for part in parts):
        return schema
    narrower = copy.deepcopy(schema)
    parts = [narrower]
    for part in parts:
        parts += _subschemas(part)
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return narrower


_COMBINED = {"anyOf", "oneOf", "$ref", "patternProperties"}


def _subschemas(schema: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[Any] = []
    for name in ("properties", "$defs", "definitions"):
        found += schema[name].values() if isinstance(schema.get(name), dict) else []
    for name in ("anyOf", "oneOf", "prefixItems"):
        found += schema[name] if isinstance(schema.get(name), list) else []
    found += [schema.get("items"), schema.get("additionalProperties")]
    return [part for part in found if isinstance(part, dict)]


def _first_line(message: str) -> str:
    """Return the reason in an error of llguidance, without the grammar that it quotes."""
    line = message.strip().partition("\n")[0]
    return line.partition("failed to compile JSON schema: ")[2] or line


class _TextTokenizer:
    """A tokenizer as llguidance wants it: texts are texts, so that "</s>" in a schema is not the end token."""

    bos_token_id, eos_token_id = BOS_ID, EOS_ID

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = tokenizer.backend_tokenizer
        self.tokens = [token_bytes(backend.id_to_token(i)) for i in range(len(tokenizer))]
        self.special_token_ids = sorted(tokenizer.get_added_vocab().values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)


@functools.lru_cache(maxsize=1)  # what is kept keeps its tokenizer alive, and mostly there is one model at a time
def _wrapped(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the `llguidance.LLTokenizer` of a tokenizer; making one takes tens of milliseconds, so they are kept."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_TextTokenizer(tokenizer)))
