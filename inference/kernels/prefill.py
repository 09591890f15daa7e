"""Prefill whole texts with a dense MiniMind on a CPU: convert the weights for `prefill_kernel.cpp` and call it.

    weights = PrefillWeights(model)
    quick = PrefillModel(weights)                 # products in bfloat16: off by about 0.01 in a logit, ten times as fast
    quick.logits([[1, 5, 7], [1, 5]], [(0, 2)])   # (1, vocab): what comes after the first text
    PrefillModel(weights, parts=2)                # numbers are the sum of two of bfloat16: off by about 0.0001

`evaluation.scoring` uses both, and checks them.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kernels.loader import KernelUnavailable, Memory, load_library
from model.model import Transformer
from model.rope import rope_tables

LANES, PAIR, MAX_HEAD = 16, 32, 128


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("qkv", "wo", "w13", "w2", "q_norm", "k_norm")]


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("embedding", "cos", "sin")],
        ("layers", ctypes.POINTER(_Layer)), ("output", ctypes.c_void_p),
        *[(name, ctypes.c_int32) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden", "vocab")],
        ("eps", ctypes.c_float),
    ]  # fmt: skip


def load_kernel(*flags: str) -> ctypes.CDLL:
    """Return the compiled library; compile it first if necessary. Raises KernelUnavailable."""
    kernel = load_library("prefill", *flags)
    kernel.matrix_unit.restype = ctypes.c_char_p
    kernel.kv_size.restype = ctypes.c_size_t
    kernel.kv_size.argtypes = [ctypes.POINTER(_Model), ctypes.c_int, ctypes.c_int]
    kernel.prefill.argtypes = [
        ctypes.POINTER(_Model), ctypes.c_int,
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    return kernel


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a common beginning of several texts, of all layers, in the layout of the kernel."""

    length: int
    parts: int
    kv: Tensor


class PrefillWeights:
    """A dense model's weights laid out for the kernel: a copy, which does not follow later changes of the model."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, kernel: ctypes.CDLL | None = None) -> None:
        """
        Raises KernelUnavailable: no kernel, or none for this model.

        Args:
            kernel: from `load_kernel`; None: the one for this CPU.
        """
        self.config = config = model.config
        if config.use_moe:
            raise KernelUnavailable("the kernel is for dense models")
        size, q_width = config.head_dim, config.n_heads * config.head_dim
        if (
            size % LANES
            or size > MAX_HEAD
            or config.dim % PAIR
            or q_width % PAIR
            or 2 * config.n_kv_heads * size % PAIR
        ):
            raise KernelUnavailable(
                f"the kernel has no tiles for {config.dim} features in {config.n_heads} heads of {size}"
            )
        self.kernel = kernel or load_kernel()
        unit = self.kernel.matrix_unit()
        if unit is None:
            raise KernelUnavailable("the system does not let this process use the CPU's matrix unit")
        self.unit = unit.decode()
        self._memory = Memory()  # what the struct points to
        self._layers = (_Layer * config.n_layers)(*[self._layer(block) for block in model.layers])
        embedding, output = model.tok_embeddings.weight.float(), model.output.weight.float()
        self.struct = _Model(
            embedding=self._memory.keep(embedding), layers=self._layers,
            output=self._tiles(output * model.norm.weight.float()), dim=config.dim, n_layers=config.n_layers,
            n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, head_dim=size,
            hidden=_up(config.hidden_dim), vocab=_up(config.vocab_size), eps=config.norm_eps,
        )  # fmt: skip

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Return (length, head_dim) each: cos twice for each pair, and -sin, sin."""
        config = self.config
        cos, sin = rope_tables(torch.arange(length)[None], config.head_dim, config.rope_theta, config.scaling)
        return cos[0, :, 0].repeat_interleave(2, -1), torch.stack([-sin, sin], -1)[0, :, 0].flatten(1)

    def _layer(self, block: Any) -> _Layer:
        attention, mlp = block.attention, block.feed_forward
        q, k, v = (linear.weight.float() for linear in (attention.wq, attention.wk, attention.wv))
        root = self.config.head_dim**0.5
        norms: tuple[int | None, int | None] = (None, None)
        if attention.q_norm is None:
            q = q / root
        else:
            keep = self._memory.keep
            norms = keep(attention.q_norm.weight.float() / root), keep(attention.k_norm.weight.float())
        qkv = torch.cat([q, k, v]) * block.attention_norm.weight.float()
        w1, w3 = (_padded(linear.weight.float() * block.ffn_norm.weight.float()) for linear in (mlp.w1, mlp.w3))
        w13 = torch.stack([w1.unflatten(0, (-1, LANES)), w3.unflatten(0, (-1, LANES))], 1).flatten(0, 2)
        w2 = _padded(mlp.w2.weight.float().T).T
        weights = (qkv, attention.wo.weight.float(), w13, w2)
        return _Layer(*[self._tiles(weight) for weight in weights], *norms)

    def _tiles(self, weight: Tensor) -> int:
        """(outputs, inputs) -> the address of its tiles, as prefill_kernel.cpp describes them, for both parts."""
        weight = _padded(weight)
        high = weight.bfloat16()
        pairs = torch.stack([high, (weight - high).bfloat16()]).view(torch.int32)  # (2, outputs, inputs / 2)
        return self._memory.keep(pairs.view(2, len(weight) // LANES, LANES, -1, LANES).permute(0, 1, 3, 4, 2))


class PrefillModel:
    """These weights with a precision: every operand is one bfloat16 number, or the sum of two (`parts`)."""

    device = torch.device("cpu")

    def __init__(self, weights: PrefillWeights, parts: int = 1) -> None:
        self.weights, self.parts, self.config = weights, parts, weights.config

    def read(self, tokens: list[int]) -> Prefix:
        """Compute the keys and values of a beginning that texts continue."""
        size = self.weights.kernel.kv_size(self.weights.struct, self.parts, len(tokens))
        kv = torch.empty(self.config.n_layers * size, dtype=torch.bfloat16)
        self._run([tokens], None, kv, torch.empty(0, dtype=torch.int64), None)
        return Prefix(len(tokens), self.parts, kv)

    def logits(self, texts: list[list[int]], positions: list[tuple[int, int]], past: Prefix | None = None) -> Tensor:
        """Return the logits of the next token after some of the tokens.

        Args:
            texts: token ids, without padding; all of them continue `past`.
            positions: (index of the text, index of the token).

        Returns:
            (positions, vocab) float32

        Raises IndexError for tokens that are not in the vocabulary and positions that are not in the texts, ValueError for a
        text without tokens and a `past` of another precision.
        """
        if not all(0 <= text < len(texts) and 0 <= token < len(texts[text]) for text, token in positions):
            raise IndexError("a position is in none of the texts")
        if past is not None and past.parts != self.parts:
            raise ValueError(f"a beginning in {past.parts} parts cannot be continued in {self.parts}")
        starts = [0, *itertools.accumulate(map(len, texts))]
        rows = torch.tensor([starts[text] + token for text, token in positions])
        logits = torch.empty(_up(len(positions)), self.weights.struct.vocab)
        self._run(texts, past, None, rows, logits)
        return logits[: len(positions), : self.config.vocab_size]

    def _run(
        self, texts: list[list[int]], past: Prefix | None, kept: Tensor | None, rows: Tensor, logits: Tensor | None
    ) -> None:
        tokens, lengths = torch.tensor([token for text in texts for token in text]), torch.tensor([*map(len, texts)])
        if not lengths.numel() or not lengths.all():
            raise ValueError("there is a text without tokens")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise IndexError(f"a token is not in the vocabulary of {self.config.vocab_size:,}")
        n_past = past.length if past else 0
        cos, sin = self.weights.rope(n_past + max(map(len, texts)))
        struct = _Model.from_buffer_copy(self.weights.struct)
        struct.cos, struct.sin = cos.data_ptr(), sin.data_ptr()
        failed = self.weights.kernel.prefill(
            struct, self.parts, len(texts), lengths.data_ptr(), tokens.data_ptr(), n_past,
            past.kv.data_ptr() if past else None, None if kept is None else kept.data_ptr(),
            len(rows), rows.data_ptr(), None if logits is None else logits.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"not enough memory for a pass over {len(tokens):,} tokens")


def _up(n: int) -> int:
    return -(-n // PAIR) * PAIR


def _padded(weight: Tensor) -> Tensor:
    """Append rows of zeros, up to a multiple of 32."""
    return F.pad(weight, (0, 0, 0, -len(weight) % PAIR)).contiguous()
