"""One step of decoding as a pure function of tokens, positions and cache, and the fast ways to run it.

`choose_backend` selects one: on a CPU with a C++ compiler the kernel of `inference.kernels.decode`; elsewhere, if asked for,
the function below through torch.compile (on a GPU with CUDA graphs). Pass it to `BatchGenerator(..., backend=...)`.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kernels.decode import KernelUnavailable, NativeModel
from inference.kernels.decode_weights import DecodeLayer, DecodeWeights
from inference.options import COMPILE
from model.model import Transformer
from model.rope import apply_rope
from model.vision import MODEL_CLASSES

VISIBLE = 64  # attention looks at a multiple of this many slots: one CUDA graph for each


def choose_backend(model: Transformer, compile: str = "auto", quantize: str = "none") -> Backend | None:
    """Return the fastest way to decode with a model, or None: then `BatchGenerator` calls the model itself.

    Args:
        model: the backend has a copy of its weights, which does not follow later changes.
        compile: "auto": where it takes seconds at most, which is on a CPU with a C++ compiler; "on": also by
            torch.compile, which takes about a minute; "off": neither.
        quantize: "int8" rounds the weights (half the memory of bfloat16; on a CPU that much faster), "none" does not.

    Raises ValueError for unknown values, or for a model whose weights cannot be converted (one with an adapter).
    """
    if compile not in COMPILE:
        raise ValueError(f"unknown value {compile!r} of compile; known: {', '.join(COMPILE)}")
    is_plain = type(model) in MODEL_CLASSES.values()
    on_cpu = model.tok_embeddings.weight.device.type == "cpu"
    optional = compile == "auto" and quantize == "none"  # asked for nothing: the model itself will do
    if (compile == "off" and quantize == "none") or (optional and not (on_cpu and is_plain)):
        return None
    if not is_plain:
        raise ValueError(
            "fast decoding is for a plain model, and this one has an adapter: merge it into the weights first"
        )
    weights = DecodeWeights(model, quantize)
    if compile != "off" and on_cpu:
        try:
            return NativeModel(weights)
        except KernelUnavailable as error:
            logging.getLogger("minimind").warning("decoding is slower than it could be: %s", error)
            if optional:
                return None
    return TorchModel(weights, compiled=compile == "on")


class TorchModel:
    """Decoding in PyTorch: `decode_step`, compiled or not."""

    def __init__(self, weights: DecodeWeights, compiled: bool) -> None:
        self.weights, self.config, self.compiled = weights, weights.config, compiled
        self.function = decode_step
        if compiled:
            cuda = weights.embedding.device.type == "cuda"
            self.function = torch.compile(decode_step, fullgraph=True, mode="reduce-overhead" if cuda else None)
            for tensor in weights.tensors():
                torch._dynamo.mark_static_address(tensor)  # or a CUDA graph would copy it each time

    def with_cache(self, keys: list[Tensor], values: list[Tensor]) -> TorchStep:
        """Return the decoding step on a cache: keys, values of each layer (rows, kv_heads, max_len, head_dim)."""
        return TorchStep(self, keys, values)


class TorchStep:
    """A step on a cache: the newest tokens of its first slots, at their positions -> logits of the next ones."""

    def __init__(self, model: TorchModel, keys: list[Tensor], values: list[Tensor]) -> None:
        self.model, self.keys, self.values = model, keys, values
        self.max_len = keys[0].shape[2]
        self.rope = model.weights.rope(self.max_len)
        self.slots = torch.arange(self.max_len, device=keys[0].device)
        if model.compiled:
            for tensor in (*keys, *values):
                torch._dynamo.mark_static_address(tensor)
                for dim in (0, 2):  # one graph for caches of every size
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
            for tensor in self.rope:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """tokens, positions (rows,), of which the largest is `longest` -> logits (rows, vocab)."""
        slots = self.slots[: min((longest // VISIBLE + 1) * VISIBLE, self.max_len)]
        if self.model.compiled:
            torch._dynamo.maybe_mark_dynamic(slots, 0)
            if len(tokens) > 1:
                for tensor in (tokens, positions):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.model.function(self.model.weights, self.rope, tokens, positions, slots, self.keys, self.values)


def decode_step(
    weights: DecodeWeights,
    rope: tuple[Tensor, Tensor],
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """Run one token of each row through the model.

    Args:
        rope: cosine and sine of every slot of the cache, (max_len, head_dim / 2) each.
        tokens, positions: (rows,), the newest token of each row and its position, where its key and value are stored.
        slots: 0, 1, ...: the part of the cache that attention reads, at least up to the largest position.
        keys, values: of each layer (cache rows, kv_heads, max_len, head_dim).

    Returns:
        (rows, vocab) logits.
    """
    config, rows = weights.config, len(tokens)
    cos, sin = (table[positions][:, None, None] for table in rope)  # (rows, 1, 1, head_dim / 2)
    mask = (slots <= positions[:, None])[:, None, None]  # (rows, 1, 1, slots)
    row = torch.arange(rows, device=tokens.device)[:, None]
    head = torch.arange(config.n_kv_heads, device=tokens.device)[None]
    x = weights.embedding[tokens]  # (rows, dim)
    for layer, layer_keys, layer_values in zip(weights.layers, keys, values, strict=True):
        qkv = layer.qkv(layer.attention_norm(x)).view(rows, 1, -1, config.head_dim)
        q, k, v = qkv.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        layer_keys.index_put_((row, head, positions[:, None]), k[:, 0])
        layer_values.index_put_((row, head, positions[:, None]), v[:, 0])
        past_k, past_v = layer_keys[:rows, :, : len(slots)], layer_values[:rows, :, : len(slots)]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), past_k, past_v, attn_mask=mask, enable_gqa=True)
        x = x + layer.wo(out.flatten(1))
        x = x + feed_forward(layer.ffn_norm(x), layer)
    return weights.output(weights.norm(x))


def feed_forward(x: Tensor, layer: DecodeLayer) -> Tensor:
    """x (rows, dim) -> (rows, dim). All experts compute all rows: the routing is not known when a CUDA graph is recorded."""
    out = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
    if layer.router is None:
        return out
    weights, chosen, probabilities = layer.router(x)
    mixing = torch.zeros_like(probabilities).scatter(1, chosen, weights).to(x.dtype)  # (rows, experts)
    for i, expert in enumerate(layer.routed):
        out = out + expert(x) * mixing[:, i : i + 1]
    return out


Backend = NativeModel | TorchModel
