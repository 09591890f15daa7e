"""/v1/chat/completions: answers in a conversation."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from model.chat_format import render_chat
from serving import protocol
from serving.endpoint import Choice, Endpoint, ResponseBuilder, tokenize, unsupported
from serving.http import ApiError


class ChatEndpoint(Endpoint):
    async def create(self, body: protocol.ChatRequest, request: Request) -> Response:
        self.check(body)
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            message = "max_tokens and max_completion_tokens mean the same: set only one of them"
            raise ApiError(400, message, "max_tokens")
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        limit = getattr(body, param)
        if limit == 0:
            raise ApiError(400, f"{param} must be at least 1, or -1 for as much as fits", param)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        messages = [plain_message(i, message) for i, message in enumerate(body.messages)]
        size = sum(len(message["content"]) for message in messages)
        prompt = await tokenize(self.prompt, messages, size, "messages")
        limit = self.token_limit(len(prompt), limit, param, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        samplings = [self.sampling_params(body, i, limit, top) for i in range(body.n or 1)]
        builder = ChatBuilder(self.model, [Choice() for _ in samplings], len(prompt), body, top)
        return await self.respond(builder, [prompt] * len(samplings), samplings, body, request)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Return the token ids that training has seen before an answer, and those of an answer to be continued."""
        return render_chat(self.model.tokenizer, messages, add_generation_prompt=True, continue_final_message=True)[0]


def plain_message(index: int, message: protocol.Message) -> dict[str, str]:
    """Return a message as `render_chat` takes it. Raises ApiError for what is not text."""
    where = f"messages[{index}]"
    if message.role in ("tool", "function"):
        text = f"{where}: this model has no tools, so {message.role} messages are not accepted"
        raise ApiError(400, text, f"{where}.role")
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}, ""):
            raise unsupported(f"{where}.{name}")
    content = message.content
    if content is None:
        raise ApiError(400, f"{where}.content is missing: it must be a text", f"{where}.content")
    if not isinstance(content, str):
        texts = []
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                param = f"{where}.content[{i}]"
                text = f"{param} is of type {part.type!r}: this model reads only parts of type text"
                raise ApiError(400, text, param)
            texts.append(part.text)
        content = "".join(texts)
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


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
