"""/v1/chat/completions: answers in a conversation."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from common.errors import UserError
from inference.constraints import Constraint, answer_grammar
from inference.generator import TokenOutput
from model.chat_format import Message, PromptTooLong, message_text, render_chat, truncate_chat, with_images, with_tools
from model.chat_parser import THINK, AnswerParser, AnswerPart
from model.chat_style import chat_style
from serving import protocol
from serving.endpoint import Choice, Endpoint, ResponseBuilder, tokenize
from serving.http import ApiError, cancel_on_disconnect

BETWEEN = "\n\n\n"  # messages of one role that become one


class ChatEndpoint(Endpoint):
    format_field = "response_format"  # what errors call the field with the JSON schema
    strict_field = "tools.function.strict"

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
        tags, tools, thinking = chat_style(self.model.tokenizer).tags, offered_tools(body), thinking_switch(body)
        if not tags:  # how such a model writes its thinking is not known here
            messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
        if tools and not tags:
            raise ApiError(400, "the chat template of this model knows no tools", "tools")
        offered = with_tools(messages, tools)
        try:
            size = sum(len(message_text(message)) for message in offered)
        except RecursionError:
            raise ApiError(400, f"{param} or tools are nested too deeply", param) from None
        encode = functools.partial(self.prompt, keep=self.prompt_limit(body, limit), enable_thinking=thinking)
        optional = tools and body.tool_choice in (None, "auto") and not self.strict
        try:
            prompt = await tokenize(encode, offered, size, param)
            fits = len(prompt) < self.engine.max_len
        except ApiError as error:
            too_long = isinstance(error.__cause__, PromptTooLong)  # even with the last question alone
            if not (optional and too_long):
                raise
            fits = False
        if optional and not fits:
            # Open WebUI offers 12,000 tokens of tools in every chat: without them there is an answer.
            self.ignore(["tools"], request)
            tools = []
            prompt = await tokenize(encode, messages, size, param)
        limit = self.token_limit(len(prompt), limit, param, request)
        top = (body.top_logprobs or 0) if body.logprobs else None
        begun = self.model.tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK)
        constraint = await self.constraint(body, tags, tools, thinking, begun, request)
        samplings = [self.sampling_params(body, i, limit, top) for i in range(body.n or 1)]
        samplings = [dataclasses.replace(sampling, constraint=constraint) for sampling in samplings]
        choices = [ChatChoice(parser=AnswerParser(thinking=begun, calls=bool(tools))) for _ in samplings]
        built = builder(self.model, choices, len(prompt), body, top)
        images = None
        if reader is not None:
            reading = reader.read(body.messages, self.model.count_images(prompt))
            images = await cancel_on_disconnect(request.receive, reading)
        return await self.respond(built, [prompt] * len(samplings), samplings, body, request, images)

    def prompt(
        self, messages: list[Message], keep: int | None = None, enable_thinking: bool | None = None
    ) -> list[int]:
        """Return the token ids that training has seen before an answer, and those of an answer to be continued.

        Args:
            keep: leave out the oldest turns of a chat that has more tokens; None: none.
            enable_thinking: as in `render_chat`.
        """
        tokenizer, image_ids = self.model.tokenizer, self.model.image_ids
        if keep is not None:
            chat = truncate_chat(tokenizer, messages, keep, enable_thinking=enable_thinking, image_ids=image_ids)
            if chat.answer_cut:  # its end is what the model should continue
                raise PromptTooLong(f"the last question and its answer have more than {keep} tokens: shorten them")
            messages = chat.messages
        return render_chat(
            tokenizer,
            messages,
            add_generation_prompt=True,
            continue_final_message=True,
            enable_thinking=enable_thinking,
            image_ids=image_ids,
        )[0]

    async def constraint(
        self,
        body: protocol.ChatRequest,
        tags: dict[str, tuple[int, ...]],
        tools: list[dict[str, Any]],
        thinking: bool | None,
        begun: bool,
        request: Request,
    ) -> Constraint | None:
        """Return what the answer is held to: JSON (`response_format`), or calls where they are required or `strict`.

        Where tags are ordinary text, nothing tells the beginning of a call from other text: `strict` alone is ignored then.
        An answer that is JSON or calls thinks first only if the request asks for it, or if its thoughts have begun in the
        prompt (`begun`). Raises ApiError for a schema that is not supported.
        """
        schema, choice = response_schema(body, self.format_field), body.tool_choice
        required = choice == "required" or isinstance(choice, protocol.NamedTool)
        if not required and schema is None:
            if not any(tool.get("strict") for tool in tools):
                return None
            if len(tags["<tool_call>"]) > 1:
                self.ignore([self.strict_field], request)
                return None
        parallel = body.parallel_tool_calls is not False
        if isinstance(choice, protocol.NamedTool):  # as OpenAI, one call of that function
            tools, parallel = [tool for tool in tools if tool["name"] == choice.function.name], False
        if required:
            schema = None
        if begun and not tags:
            message = f"{self.format_field} and thinking do not go together with the chat template of this model"
            raise ApiError(400, message, self.format_field)
        may_think = bool(tags) and (begun or thinking or (thinking is None and not required and schema is None))
        param = "tools" if schema is None else self.format_field
        try:
            grammar = answer_grammar(
                tags, schema=schema, tools=tools, required=required, parallel=parallel, thinking=may_think, begun=begun
            )
            return await asyncio.to_thread(Constraint, self.model.tokenizer, grammar)
        except (UserError, RecursionError) as error:
            reason = str(error) if isinstance(error, UserError) else "it is nested too deeply"
            raise ApiError(400, f"the schema in {param} is not supported: {reason}", param) from None


def offered_tools(body: protocol.ChatRequest) -> list[dict[str, Any]]:
    """Return the functions that the model may call. Raises ApiError if `tool_choice` asks for one that is not there."""
    tools = [{name: value for name, value in tool.function if value is not None} for tool in body.tools or []]
    names = [tool["name"] for tool in tools]
    for i, tool in enumerate(tools):
        if tool["name"] in names[:i]:
            raise ApiError(400, f"tools has two functions named {tool['name']}", "tools")
        if tool.get("parameters", {}).get("type", "object") != "object":
            message = f"the parameters of {tool['name']} must be the JSON schema of an object"
            raise ApiError(400, message, f"tools[{i}].function.parameters")
    choice = body.tool_choice
    if isinstance(choice, protocol.NamedTool) and choice.function.name not in names:
        known = f"tools has {', '.join(names)}" if names else "tools is empty"
        raise ApiError(400, f"tool_choice names the function {choice.function.name!r}, and {known}", "tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is required, and tools is empty", "tool_choice")
    return [] if choice == "none" else tools


def response_schema(body: protocol.ChatRequest, param: str) -> dict[str, Any] | None:
    """Return the JSON schema that the content of the answer must match; None: it is any text."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "object"}
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise ApiError(400, f'{param} of type json_schema needs a "schema"', param)
    return asked.json_schema.schema_


def thinking_switch(body: protocol.ChatRequest) -> bool | None:
    """Return whether the answer is to begin with thinking; None: as the model likes, which may never have learned to."""
    given = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs is not None else None
    return False if given is None and body.reasoning_effort in ("none", "minimal") else given


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
        joined = BETWEEN.join(filter(None, (last["content"], message["content"])))
        arranged[-1] = message | last | {"content": joined} | ({"tool_calls": calls} if calls else {})
    return arranged


@dataclass(slots=True)
class ChatChoice(Choice):
    """An answer that may have thinking and calls beside its content."""

    parser: AnswerParser = field(default_factory=AnswerParser)
    found: list[AnswerPart] = field(default_factory=list)  # not yet sent
    n_calls: int = 0  # so far
    n_thinking: int = 0  # tokens of the thoughts


class ChatBuilder(ResponseBuilder):
    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    choices: list[ChatChoice]
    body: protocol.ChatRequest

    def parts(self, choice: ChatChoice) -> list[AnswerPart]:
        """Return what is new in the fields of an answer, each part once."""
        found, choice.found = choice.found, []
        kept = []
        for name, new in found:
            if name == "tool_calls":
                if choice.n_calls and self.body.parallel_tool_calls is False:
                    continue
                choice.n_calls += 1
            if new:
                kept.append((name, new))
        return kept

    def usage(self) -> dict[str, Any]:
        thinking = sum(choice.n_thinking for choice in self.choices)
        return super().usage() | {"completion_tokens_details": {"reasoning_tokens": thinking}}

    def _add(self, outputs: list[tuple[int, TokenOutput]]) -> list[int]:
        for index, output in outputs:
            choice = self.choices[index]
            choice.found += choice.parser.add(output.text)
            choice.n_thinking += choice.parser.thinking
            if output.finish is not None:
                choice.found += choice.parser.finish()
        return super()._add(outputs)

    def finish_reason(self, choice: ChatChoice) -> str | None:
        return "tool_calls" if choice.n_calls and choice.finish == "stop" else choice.finish

    def whole_choice(self, index: int, choice: ChatChoice) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        for name, new in self.parts(choice):
            if name == "tool_calls":
                message.setdefault(name, []).append(call_object(new))
            else:
                message[name] = message.get(name, "") + new
        if choice.n_calls and not message["content"]:
            message["content"] = None
        finish = self.finish_reason(choice)
        return {"index": index, "message": message, "logprobs": self.logprobs(choice), "finish_reason": finish}

    def chunk_choices(self, index: int, choice: ChatChoice, first: bool) -> list[dict]:
        deltas: list[dict] = [{"role": "assistant", "content": "", "refusal": None}] if first else []
        n_calls = choice.n_calls
        for name, new in self.parts(choice):
            if name == "tool_calls":  # as OpenAI streams it: what is called, and then its arguments
                call = {"index": n_calls} | call_object(new)
                arguments = {"arguments": call["function"]["arguments"]}
                call["function"] = call["function"] | {"arguments": ""}
                deltas.append({"tool_calls": [call]})
                deltas.append({"tool_calls": [{"index": n_calls, "function": arguments}]})
                n_calls += 1
            else:
                deltas.append({name: new})
        if choice.tokens and not deltas:  # their text waits until it is clear what it is
            deltas.append({"content": ""})
        entries = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if choice.tokens:
            entries[0]["logprobs"] = self.logprobs(choice)
        if choice.finish is not None:
            finish = self.finish_reason(choice)
            entries.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": finish})
        return entries

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


def call_object(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call as OpenAI writes it: the arguments are a text."""
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }
