"""The decoding step in C++ for CPUs: convert the weights for `decode_kernel.cpp` and call it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kernels.decode_weights import DecodeLayer, DecodeWeights, Matrix, SwiGLU
from inference.kernels.loader import KernelUnavailable, Memory, load_library

LANES = 16
MAX_ROWS = 256
MAX_LAYERS = 146  # 7 phases each and 2 more, of 1,024
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


# ---- the structs of decode_kernel.cpp


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scale", ctypes.c_void_p)] + [
        (name, ctypes.c_int32) for name in ("kind", "blocks", "inputs", "unused")
    ]


class _Experts(ctypes.Structure):
    _fields_ = [("w1", _Matrix), ("w3", _Matrix), ("w2", _Matrix)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")],
        ("qkv", _Matrix), ("wo", _Matrix),
        ("gate", ctypes.c_void_p), ("routed", ctypes.POINTER(_Experts)), ("shared", _Experts),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("embedding", "norm", "cos", "sin")],
        ("layers", ctypes.POINTER(_Layer)), ("output", _Matrix),
        *[(name, ctypes.c_int32) for name in (
            "embedding_kind", "cache_kind", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "max_len",
            "n_routed", "top_k", "renormalise",
        )],
        ("eps", ctypes.c_float), ("scratch", ctypes.c_void_p),
    ]  # fmt: skip


# ---- the library


def load_kernel() -> ctypes.CDLL:
    """Return the compiled library; compile it first if necessary. Raises KernelUnavailable."""
    kernel = load_library("decode")
    kernel.scratch_floats.restype = ctypes.c_size_t
    kernel.scratch_floats.argtypes = [ctypes.POINTER(_Model), ctypes.c_int, ctypes.c_int]
    kernel.decode_step.restype = None
    kernel.decode_step.argtypes = [
        ctypes.POINTER(_Model), ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
    ]  # fmt: skip
    return kernel


class NativeModel:
    """A model's weights laid out for the kernel: a copy, which does not follow later changes of the model."""

    def __init__(self, weights: DecodeWeights) -> None:
        """Raises KernelUnavailable: no kernel, or none for this model."""
        config = weights.config
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise KernelUnavailable(f"the kernel computes float32, bfloat16 and int8, not {weights.dtype}")
        if config.head_dim // LANES not in (1, 2, 3, 4, 5, 6, 8) or config.head_dim % LANES:
            raise KernelUnavailable(f"the kernel has no attention for a head dimension of {config.head_dim}")
        if config.n_layers > MAX_LAYERS:
            raise KernelUnavailable(f"the kernel is for at most {MAX_LAYERS} layers, not {config.n_layers}")
        if config.use_moe and config.router_bias_rate:
            raise KernelUnavailable("the kernel does not support biases of routers")
        self.kernel, self.config = load_kernel(), config
        self._memory = Memory()  # what the structs point to
        self._arrays: list[ctypes.Array] = []
        self.rope, self.norm = weights.rope, weights.norm.weight.detach().float()
        self.layers = [self._layer(layer) for layer in weights.layers]
        routers = [layer.router for layer in weights.layers if layer.router is not None]
        self.struct = _Model(
            embedding=self._memory.keep(weights.embedding), embedding_kind=_KINDS[weights.dtype],
            cache_kind=_KINDS[weights.dtype], norm=self._floats(weights.norm.weight), output=self._matrix(weights.output),
            dim=config.dim, n_layers=config.n_layers, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim, n_routed=config.n_routed_experts if config.use_moe else 0,
            top_k=config.num_experts_per_tok, renormalise=any(router.renormalise for router in routers), eps=config.norm_eps,
        )  # fmt: skip

    def with_cache(self, keys: list[Tensor], values: list[Tensor]) -> NativeStep:
        """Return the decoding step on a cache: keys, values of each layer (slots, kv_heads, max_len, head_dim)."""
        return NativeStep(self, keys, values)

    def _layer(self, layer: DecodeLayer) -> _Layer:
        struct = _Layer(
            attention_norm=self._floats(layer.attention_norm.weight), ffn_norm=self._floats(layer.ffn_norm.weight),
            qkv=self._matrix(layer.qkv), wo=self._matrix(layer.wo),
        )  # fmt: skip
        if layer.q_norm is not None and layer.k_norm is not None:
            struct.q_norm, struct.k_norm = self._floats(layer.q_norm.weight), self._floats(layer.k_norm.weight)
        if layer.shared is not None:
            struct.shared = self._experts(layer.shared)
        if layer.router is not None:
            struct.gate = self._floats(layer.router.weight)
            routed = (_Experts * len(layer.routed))(*[self._experts(expert) for expert in layer.routed])
            self._arrays.append(routed)
            struct.routed = routed
        return struct

    def _experts(self, expert: SwiGLU) -> _Experts:
        w1, w3 = expert.w13.split(len(expert.w13.weight) // 2)
        return _Experts(self._matrix(w1), self._matrix(w3), self._matrix(expert.w2))

    def _matrix(self, matrix: Matrix) -> _Matrix:
        missing = -len(matrix.weight) % LANES
        # (outputs, inputs) -> (outputs / 16, inputs, 16), the last block padded with zeros
        data = F.pad(matrix.weight, (0, 0, 0, missing)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
        scale = None if matrix.scale is None else self._floats(F.pad(matrix.scale, (0, missing)))
        return _Matrix(self._memory.keep(data), scale, _KINDS[data.dtype], data.shape[0], data.shape[1], 0)

    def _floats(self, tensor: Tensor) -> int:
        return self._memory.keep(tensor.float())


class NativeStep:
    """A decoding step on a cache, like `backends.TorchStep`; this one also prefills prompts."""

    def __init__(self, native: NativeModel, keys: list[Tensor], values: list[Tensor]) -> None:
        slots, _, max_len, _ = keys[0].shape
        self.threads = torch.get_num_threads()
        cos, sin = native.rope(max_len)
        layers = (_Layer * len(keys))(*native.layers)
        for layer, key, value in zip(layers, keys, values, strict=True):
            layer.keys, layer.values = key.data_ptr(), value.data_ptr()
        model = _Model.from_buffer_copy(native.struct)
        model.cos, model.sin, model.max_len, model.layers = cos.data_ptr(), sin.data_ptr(), max_len, layers
        scratch = torch.empty(native.kernel.scratch_floats(ctypes.byref(model), MAX_ROWS, self.threads))
        model.scratch = scratch.data_ptr()
        self._model, self._run, self._scratch = ctypes.pointer(model), native.kernel.decode_step, scratch
        self._width, self._vocab_size = model.output.blocks * LANES, native.config.vocab_size
        self._all = torch.arange(max(slots, max_len))
        self._native = native
        self._alive = (keys, values, layers, model, cos, sin)  # what the struct points to, besides `native`

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Return float32 logits (rows, vocab) after the newest tokens (rows,) of slots 0, 1, ... at their positions."""
        rows = self._all[: len(tokens)]
        return self._rows(tokens, positions, rows, rows)

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Fill the slots from `first` on with prompts; return the logits (prompts, vocab) of the token after each."""
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        positions = torch.cat([self._all[: len(prompt)] for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        slots = torch.arange(first, first + len(prompts)).repeat_interleave(lengths)
        return self._rows(tokens, positions, slots, lengths.cumsum(0) - 1)

    def read(self, tokens: Sequence[int], start: int, logits_to_keep: int) -> tuple[Tensor, Tensor]:
        """Read the tokens of one text from position `start` on, after those that slot 0 of the cache has.

        Returns float32 (tokens, dim), their final hidden states, and (logits_to_keep, vocab), the logits of the token after
        each of the last ones.
        """
        n = len(tokens)
        residuals: list[Tensor] = []
        ends = self._all[n - logits_to_keep : n]
        positions = self._all[start : start + n]
        logits = self._rows(torch.tensor(tokens), positions, torch.zeros(n, dtype=torch.int64), ends, residuals)
        norm, eps = self._native.norm, self._native.config.norm_eps
        return F.rms_norm(torch.cat(residuals), norm.shape, norm, eps), logits

    def _rows(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, ends: Tensor, residuals: list[Tensor] | None = None
    ) -> Tensor:
        """Run tokens through the model, at most `MAX_ROWS` at a time; return the logits after those at `ends`.

        residuals: gets what the last layer returns for all tokens, before the final norm.
        """
        if len(tokens) > MAX_ROWS:
            logits = []
            for i in range(0, len(tokens), MAX_ROWS):
                part, here = slice(i, i + MAX_ROWS), ends - i
                here = here[(here >= 0) & (here < MAX_ROWS)]
                logits.append(self._rows(tokens[part], positions[part], slots[part], here, residuals))
            return torch.cat(logits)
        out = torch.empty(len(ends), self._width)
        self._run(
            self._model, len(tokens), tokens.data_ptr(), positions.data_ptr(), slots.data_ptr(),
            len(ends), ends.data_ptr(), out.data_ptr(), self.threads,
        )  # fmt: skip
        if residuals is not None:
            # The kernel's memory begins with the residual stream, whose rows are padded to a multiple of LANES.
            dim = self._native.config.dim
            stream = self._scratch[: len(tokens) * (-(-dim // LANES) * LANES)].view(len(tokens), -1)
            residuals.append(stream[:, :dim].clone())
        return out[:, : self._vocab_size]
