"""/v1/completions: continuations of texts, and the scores of a prompt (which lm-eval asks for)."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from serving import protocol
from serving.endpoint import Choice, Endpoint, ResponseBuilder
from serving.http import ApiError, cancel_on_disconnect
from serving.scoring import Scores

MAX_SCORED = 32_768  # tokens of a request whose log-probabilities are returned


class CompletionEndpoint(Endpoint):
    async def create(self, body: protocol.CompletionRequest, request: Request) -> Response:
        self.check(body, request)
        n = body.n or 1
        if body.best_of not in (None, n):
            raise ApiError(400, "best_of must equal n: answers are not ranked", "best_of")
        prompts = await self.encode_prompts(body.prompt, "prompt", self.prompt_limit(body, body.max_tokens))
        if len(prompts) * n > protocol.MAX_INPUTS:
            message = f"the request asks for {len(prompts) * n} answers; the limit is {protocol.MAX_INPUTS}"
            raise ApiError(400, message, "prompt")
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))  # the header has its limit, the smallest
        limits = [
            self.token_limit(len(prompt), body.max_tokens, "prompt", request if i == longest else None)
            for i, prompt in enumerate(prompts)
        ]
        scores: list[Scores] | list[None] = [None] * len(prompts)
        if body.echo and body.logprobs is not None:
            most = max(MAX_SCORED, self.engine.max_len)
            if (n_tokens := sum(map(len, prompts))) > most:
                message = f"the prompts have {n_tokens} tokens; at most {most} are scored in one request"
                raise ApiError(400, message, "prompt")
            scores = await cancel_on_disconnect(request.receive, self.engine.score(prompts, body.logprobs))
        choices, samplings, continued = [], [], []
        for prompt, limit, score in zip(prompts, limits, scores, strict=True):
            for i in range(n):
                choices.append(Choice())
                if body.echo:
                    choices[-1].echo(self.model, prompt, score)
                if limit:
                    samplings.append(self.sampling_params(body, i, limit, body.logprobs))
                    continued.append(prompt)
                else:
                    choices[-1].finish = "length"
        builder = CompletionBuilder(self.model, choices, sum(map(len, prompts)), body, body.logprobs)
        return await self.respond(builder, continued, samplings, body, request)


class CompletionBuilder(ResponseBuilder):
    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def whole_choice(self, index: int, choice: Choice) -> dict:
        return {"index": index, "text": choice.text, "logprobs": self.logprobs(choice), "finish_reason": choice.finish}

    def chunk_choices(self, index: int, choice: Choice, first: bool) -> list[dict]:
        return [self.whole_choice(index, choice)] if choice.text or choice.tokens or choice.finish else []

    def logprobs(self, choice: Choice) -> dict | None:
        """Return the older form: parallel lists, and {token: logprob} of the most probable ones and the chosen one."""
        if self.top_logprobs is None:
            return None
        name = self.model.token_name
        tops = []
        for token in choice.tokens:
            top = {name(other): logprob for other, logprob in token.top[: self.top_logprobs]}
            tops.append(None if token.logprob is None else top | {name(token.id): token.logprob})
        return {
            "tokens": [name(token.id) for token in choice.tokens],
            "token_logprobs": [token.logprob for token in choice.tokens],
            "top_logprobs": tops if self.top_logprobs else None,
            "text_offset": [token.offset for token in choice.tokens],
        }
