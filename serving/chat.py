"""/v1/chat/completions: answers in a conversation."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from model.chat_format import Message, chat_style, message_text, render_chat, truncate_chat, with_images
from serving import protocol
from serving.endpoint import Choice, Endpoint, ResponseBuilder, tokenize
from serving.http import ApiError

BETWEEN = "\n\n\n"  # messages of one role that become one


class ChatEndpoint(Endpoint):
    async def create(self, body: protocol.ChatRequest, request: Request) -> Response:
        self.check(body, request)
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            message = "max_tokens and max_completion_tokens mean the same: set only one of them"
            raise ApiError(400, message, "max_tokens")
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        if getattr(body, param) == 0:
            raise ApiError(400, f"{param} must be at least 1, or -1 for as much as fits", param)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return await self.answer(body, request, ChatBuilder, "messages")

    async def answer(
        self, body: protocol.ChatRequest, request: Request, builder: Callable[..., ResponseBuilder], param: str
    ) -> Response:
        """Answer a chat in the form that `builder` knows; `param`: what a prompt that is too long is called in an error."""
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        reader = self.model.images
        plain = [
            plain_message(message, f"messages[{i}]", reader is not None) for i, message in enumerate(body.messages)
        ]
        messages = arrange(plain)
        if not chat_style(self.model.tokenizer).tags:  # how such a model writes its thinking is not known here
            messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
        size = sum(len(message_text(message)) for message in messages)
        encode = functools.partial(self.prompt, keep=self.prompt_limit(body, limit))
        prompt = await tokenize(encode, messages, size, param)
        limit = self.token_limit(len(prompt), limit, param, request)
        top = (body.top_logprobs or 0) if body.logprobs else None
        samplings = [self.sampling_params(body, i, limit, top) for i in range(body.n or 1)]
        built = builder(self.model, [Choice() for _ in samplings], len(prompt), body, top)
        images = None if reader is None else await reader.read(body.messages, self.model.count_images(prompt))
        return await self.respond(built, [prompt] * len(samplings), samplings, body, request, images)

    def prompt(self, messages: list[Message], keep: int | None = None) -> list[int]:
        """Return the token ids that training has seen before an answer, and those of an answer to be continued.

        keep: leave out the oldest turns of a chat that has more tokens; None: none.
        """
        tokenizer, image_ids = self.model.tokenizer, self.model.image_ids
        if keep is not None:
            messages = truncate_chat(tokenizer, messages, keep, image_ids=image_ids).messages
        return render_chat(
            tokenizer, messages, add_generation_prompt=True, continue_final_message=True, image_ids=image_ids
        )[0]


def plain_message(message: protocol.Message, param: str, sees: bool = False) -> Message:
    """Return a message as model/chat_format.py has it.

    param: its name in an error; sees: questions may have images, for which `IMAGE` stands.
    """
    content = message.content
    if content is None and not message.tool_calls:
        raise ApiError(400, f"{param}.content must be a text: this message has no tool_calls", f"{param}.content")
    parts = content if isinstance(content, list) else []
    text = content if isinstance(content, str) else "".join(p.text for p in parts if isinstance(p, protocol.TextPart))
    if n_images := sum(not isinstance(part, protocol.TextPart) for part in parts):
        reason = (
            "only messages of the user may have images" if sees else "this model does not see images, it reads text"
        )
        if not sees or message.role != "user":
            raise ApiError(400, f"{param}.content has an image: {reason}", f"{param}.content")
    if sees:
        text = with_images(text, n_images)
    plain: Message = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.reasoning_content and message.role == "assistant":
        plain["reasoning_content"] = message.reasoning_content
    calls = []
    for i, call in enumerate(message.tool_calls or []):
        name = f"{param}.tool_calls[{i}].function.arguments"
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(400, f"{name} must be a JSON object: {call.function.arguments:.80}", name)
        calls.append({"name": call.function.name, "arguments": arguments})
    return plain | ({"tool_calls": calls} if calls else {})


def arrange(messages: list[Message]) -> list[Message]:
    """Return a chat in the order that the model knows: one system message, then user and assistant in turn.

    System messages move to the front, consecutive messages of one role become one, with two blank lines between them (except
    those of tools), and where a question is missing (a chat begins with an answer, or is only a system message) an empty one
    takes its place.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    no_question: Message = {"role": "user", "content": ""}
    if not turns or turns[0]["role"] == "assistant":
        turns.insert(0, no_question)
    if messages[-1]["role"] == "system" and turns[-1]["role"] == "assistant":
        turns.append(no_question)  # the system asks for another answer, not for more of the last one
    arranged: list[Message] = []
    for message in system + turns:
        last = arranged[-1] if arranged else {}
        if message["role"] == "tool" or message["role"] != last.get("role"):
            arranged.append(message)
            continue
        calls = [*last.get("tool_calls", []), *message.get("tool_calls", [])]
        joined = last["content"] + BETWEEN + message["content"]
        arranged[-1] = message | last | {"content": joined} | ({"tool_calls": calls} if calls else {})
    return arranged


class ChatBuilder(ResponseBuilder):
    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole_choice(self, index: int, choice: Choice) -> dict:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self.logprobs(choice),
            "finish_reason": choice.finish,
        }

    def chunk_choices(self, index: int, choice: Choice, first: bool) -> list[dict]:
        parts: list[tuple[dict, dict | None, str | None]] = []
        if first:
            parts.append(({"role": "assistant", "content": "", "refusal": None}, None, None))
        if choice.text or choice.tokens:
            parts.append(({"content": choice.text}, self.logprobs(choice), None))
        if choice.finish is not None:
            parts.append(({}, None, choice.finish))
        return [
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            for delta, logprobs, finish in parts
        ]

    def logprobs(self, choice: Choice) -> dict | None:
        if self.top_logprobs is None:
            return None
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(*other) for other in token.top[: self.top_logprobs]]}
            for token in choice.tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict:
        spelled = self.model.token_bytes(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}
