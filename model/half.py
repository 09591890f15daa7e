"""A dense MiniMind in bfloat16 for scoring on a CPU whose matrix unit (AMX) makes products cheap.

There the products of a pass take a tenth of their time in float32, and what stands between them - norms, rotations, the
softmax, activations - would take most of it. So this is the forward pass of `model.model` once more, with less between:
norm weights and the 1/sqrt(head_dim) of attention are folded into the matrices, q, k and v are one product, and the
softmax is exp and a division, without subtracting the largest score first. Only inference, only logits at chosen places.
It is an approximation (about 0.01 in a logit) that `model.scoring.score_quickly` checks; scores of attention beyond the
range of exp give NaN, which is noticed there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Transformer
from .rope import rope_tables

DTYPE = torch.bfloat16


class HalfModel:
    """The weights of a dense Transformer, rearranged. float32 between the layers, bfloat16 in every product."""

    device = torch.device("cpu")

    @torch.inference_mode()
    def __init__(self, model: Transformer) -> None:
        self.config = config = model.config
        if config.use_moe:
            raise ValueError("a mixture of experts is not scored in bfloat16: rounding sends tokens to other experts")
        self.embedding = model.tok_embeddings.weight.float()
        self.layers = []
        for block in model.layers:
            attention, mlp = block.attention, block.feed_forward
            q, k, v = (linear.weight.float() for linear in (attention.wq, attention.wk, attention.wv))
            qkv = torch.cat([q / config.head_dim**0.5, k, v]) * block.attention_norm.weight.float()
            w1, w3 = (linear.weight.float() * block.ffn_norm.weight.float() for linear in (mlp.w1, mlp.w3))
            weights = (qkv, attention.wo.weight, w1, w3, mlp.w2.weight)
            self.layers.append([weight.to(DTYPE) for weight in weights])
        self.output = (self.embedding * model.norm.weight.float()).to(DTYPE)

    def logits(self, ids: Tensor, cache, places: Tensor) -> Tensor:
        """Logits of the next token after some of the tokens.

        Args:
            ids: (batch, time), padded on the right.
            cache: None or a `model.scoring.SharedPrefix`, as for the float32 model.
            places: indices into the flattened ids.

        Returns:
            (places, vocab) float32
        """
        config = self.config
        n, time = ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + time)[None]
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, config.scaling)
        rotation = torch.complex(cos, sin)  # (1, time, 1, head_dim / 2)
        x = F.embedding(ids.flatten(), self.embedding)  # (tokens, dim)
        for i, (wqkv, wo, w1, w3, w2) in enumerate(self.layers):
            qkv = F.linear(self._norm(x), wqkv).view(n, time, -1, config.head_dim)
            attended = self._attend(qkv, rotation, cache, i)
            if i == len(self.layers) - 1:  # what the last layer makes of other tokens is seen by nobody
                x, attended = x[places], attended[places]
            x = x.add_(F.linear(attended, wo))
            y = self._norm(x)
            x = x.add_(F.linear(F.silu(F.linear(y, w1), inplace=True).mul_(F.linear(y, w3)), w2))
        return F.linear(self._norm(x), self.output).float()

    def _norm(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight, (tokens, dim) float32 -> bfloat16."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return (x * squares.div_(x.shape[-1]).add_(self.config.norm_eps).rsqrt_()).to(DTYPE)

    def _attend(self, qkv: Tensor, rotation: Tensor, cache, layer: int) -> Tensor:
        """(batch, time, heads + 2 kv_heads, head_dim) -> (tokens, dim) in bfloat16; causal, after the cache's prefix."""
        n, time, _, size = qkv.shape
        groups, heads = self.config.n_kv_heads, self.config.n_heads
        repeats = heads // groups
        pairs = torch.view_as_complex(qkv[:, :, : heads + groups].float().unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * rotation).flatten(-2)
        # Groups of heads come first, so that a prefix, which all sequences share, is one product for all of them.
        q = torch.empty(groups, n, repeats, time, size, dtype=DTYPE)
        q.copy_(qk[:, :, :heads].unflatten(2, (groups, -1)).permute(2, 0, 3, 1, 4))
        k = torch.empty(groups, n, time, size, dtype=DTYPE).copy_(qk[:, :, heads:].permute(2, 0, 1, 3))
        v = qkv[:, :, heads + groups :].permute(2, 0, 1, 3).contiguous()

        own_k, own_v = k.view(groups * n, time, size), v.view(groups * n, time, size)
        weights = torch.bmm(q.view(groups * n, -1, size), own_k.transpose(1, 2)).exp_()
        weights.view(groups * n, repeats, time, time).tril_()
        out = torch.bmm(weights, own_v)  # (groups * n, repeats * time, head_dim)
        total = weights.sum(-1, keepdim=True, dtype=torch.float32)
        if cache is not None:
            before = cache.before(layer)
            if before is None:
                cache.update(k.transpose(0, 1), v.transpose(0, 1), layer)
            else:
                past_k, past_v = (x[0] for x in before)  # (kv_heads, past, head_dim)
                weights = torch.bmm(q.view(groups, -1, size), past_k.transpose(1, 2)).exp_()
                out = out + torch.bmm(weights, past_v).view_as(out)
                total = total + weights.sum(-1, keepdim=True, dtype=torch.float32).view_as(total)
        out = (out / total).view(groups, n, repeats, time, size).permute(1, 3, 0, 2, 4)
        return torch.empty(out.shape, dtype=DTYPE).copy_(out).view(n * time, -1)
