"""/v1/embeddings: the mean of the final hidden states over a text, scaled to length 1."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import torch
import torch.nn.functional as F
from starlette.requests import Request
from starlette.responses import Response

from serving import protocol
from serving.endpoint import Endpoint
from serving.http import ApiError, cancel_on_disconnect, to_json


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
        used = sum(map(len, texts))
        head = to_json({
            "object": "list", "model": self.model.name, "usage": {"prompt_tokens": used, "total_tokens": used}
        })  # fmt: skip
        data = await asyncio.to_thread(_entries, table, body.encoding_format == "base64")
        return Response(b'%s,"data":[%s]}' % (head[:-1], data), media_type="application/json")


def _entries(table: np.ndarray, as_base64: bool) -> bytes:
    """Return the rows of a table as JSON, encoded one by one: other threads do not run while the library encodes."""
    rows = (
        base64.b64encode(row.tobytes()).decode() if as_base64 else row.astype(np.float64).round(8).tolist()
        for row in table
    )
    return b",".join(to_json({"object": "embedding", "index": i, "embedding": row}) for i, row in enumerate(rows))
