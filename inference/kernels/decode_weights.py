"""A model's weights in the layout of decoding: fused, optionally rounded to int8. `inference.backends` uses them.

`Transformer` keeps the weights as the files have them, for training and for other libraries. A step of decoding reads
every one of them for a single token of each sequence: fewer and larger matrices, and smaller numbers, make it faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.options import QUANTIZATIONS
from model.model import RMSNorm, Transformer
from model.moe import MoEFeedForward, Router
from model.rope import rope_tables


@dataclass
class Matrix:
    """A weight (outputs, inputs); int8 ones are to be multiplied by `scale` (outputs,)."""

    weight: Tensor
    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        if self.scale is None:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)

    def split(self, size: int) -> tuple[Matrix, Matrix]:
        """Return the first `size` outputs, and the others."""
        scales = (None, None) if self.scale is None else (self.scale[:size], self.scale[size:])
        return Matrix(self.weight[:size], scales[0]), Matrix(self.weight[size:], scales[1])


def quantize_int8(weight: Tensor) -> Matrix:
    """Round each output's weights to 255 steps between minus and plus its largest one (symmetric, per channel)."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return Matrix((weight / scale[:, None]).round().to(torch.int8), scale)


@dataclass
class SwiGLU:
    """w2(silu(w1 x) * w3 x), w1 and w3 as one matrix."""

    w13: Matrix
    w2: Matrix

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


@dataclass
class DecodeLayer:
    """The weights of a block. A dense one has only `shared`: the feed-forward that every token passes."""

    attention_norm: RMSNorm
    qkv: Matrix
    wo: Matrix
    ffn_norm: RMSNorm
    shared: SwiGLU | None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    router: Router | None = None
    routed: list[SwiGLU] = field(default_factory=list)


class DecodeWeights:
    """A model's weights laid out for decoding: a copy, which does not follow later changes of the model.

    int8 is for the matrices; norms, routers and the embedding (of which a step reads one row per sequence) stay.
    """

    def __init__(self, model: Transformer, quantize: str = "none") -> None:
        if quantize not in QUANTIZATIONS:
            raise ValueError(f"unknown quantization {quantize!r}; known: {', '.join(QUANTIZATIONS)}")
        self.config, self.quantize = model.config, quantize
        self.embedding = model.tok_embeddings.weight.detach()
        self.dtype = self.embedding.dtype
        self.norm = model.norm
        self.output = self._matrix(model.output.weight)
        self.layers = [self._layer(block) for block in model.layers]

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the positions 0 to `length` - 1, (length, head_dim / 2) each."""
        positions = torch.arange(length, device=self.embedding.device)[None]
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.scaling)
        return cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous()

    def _matrix(self, *weights: Tensor) -> Matrix:
        """Concatenate weights along their outputs, and round them if asked to."""
        weight = torch.cat([weight.detach() for weight in weights])
        return quantize_int8(weight) if self.quantize == "int8" else Matrix(weight)

    def _layer(self, block: Any) -> DecodeLayer:
        attention, feed_forward = block.attention, block.feed_forward
        router: Router | None = None
        routed: list[SwiGLU] = []
        shared = feed_forward
        if isinstance(feed_forward, MoEFeedForward):
            shared, router = feed_forward.shared_experts, feed_forward.gate
            routed = [self._swiglu(expert) for expert in feed_forward.experts]
        return DecodeLayer(
            attention_norm=block.attention_norm,
            qkv=self._matrix(attention.wq.weight, attention.wk.weight, attention.wv.weight),
            wo=self._matrix(attention.wo.weight),
            ffn_norm=block.ffn_norm,
            shared=None if shared is None else self._swiglu(shared),
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            router=router,
            routed=routed,
        )

    def _swiglu(self, mlp: Any) -> SwiGLU:
        return SwiGLU(self._matrix(mlp.w1.weight, mlp.w3.weight), self._matrix(mlp.w2.weight))

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [self.embedding, *_tensors([self.norm, self.output, *self.layers])]


def _tensors(part: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module, of one of the classes above, or of a list of them."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()
    elif isinstance(part, list):
        for item in part:
            yield from _tensors(item)
    elif part is not None:
        for attribute in fields(part):
            yield from _tensors(getattr(part, attribute.name))
