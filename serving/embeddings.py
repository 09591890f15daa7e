"""/v1/embeddings: the mean of the final hidden states over a text, scaled to length 1."""

from __future__ import annotations

import base64

import numpy as np
import torch
import torch.nn.functional as F
from starlette.requests import Request
from starlette.responses import Response

from serving import protocol
from serving.endpoint import Endpoint
from serving.http import ApiError, cancel_on_disconnect, json_response


class EmbeddingEndpoint(Endpoint):
    async def create(self, body: protocol.EmbeddingRequest, request: Request) -> Response:
        self.check(body, request)
        if body.dimensions not in (None, self.model.dim):
            raise ApiError(400, f"dimensions can only be {self.model.dim}, the width of this model", "dimensions")
        texts = await self.encode_prompts(body.input, "input", self.prompt_limit(body))
        context = self.engine.max_len
        for i, text in enumerate(texts):
            if len(text) > context:
                message = f"text {i} of input has {len(text)} tokens, and the model's context is {context}"
                raise ApiError(400, message, "input", "context_length_exceeded")
        vectors = await cancel_on_disconnect(request.receive, self.engine.embed(texts))
        table = F.normalize(torch.stack(vectors), dim=-1).numpy().astype("<f4")  # (texts, dim)
        rows: list = table.astype(np.float64).round(8).tolist()
        if body.encoding_format == "base64":
            rows = [base64.b64encode(row.tobytes()).decode() for row in table]
        used = sum(map(len, texts))
        return json_response(
            {
                "object": "list",
                "model": self.model.name,
                "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )
