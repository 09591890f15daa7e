"""The shape of a MiniMind: its fields and the named presets, readable without loading torch or transformers.

`model.LMConfig` builds the configuration of a model from them; command lines take a flag for each field.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.errors import UserError

TOKENIZER_DIR = Path(__file__).resolve().parent / "minimind_tokenizer"  # the tokenizer that the project ships

# The public contract: sizes of the published models, and one small enough to learn the sample data on a laptop.
PRESETS: dict[str, dict] = {
    "minimind-v1-small": dict(dim=512, n_layers=8),
    "minimind-v1": dict(dim=768, n_layers=16),
    "minimind-v1-moe": dict(dim=512, n_layers=8, use_moe=True, n_shared_experts=2, n_routed_experts=4),
    "toy": dict(dim=192, n_layers=4, n_heads=6, n_kv_heads=3),
}
ROPE_SCALING_METHODS = ("linear", "ntk", "yarn")  # see `model.rope`


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Architecture:
    """Shape and hyper-parameters of a dense or mixture-of-experts MiniMind.

    Args:
        dim: width of the residual stream (embedding size).
        n_layers: number of Transformer blocks.
        n_heads: number of query heads.
        n_kv_heads: number of key/value heads shared by the query heads (grouped-query attention,
            https://arxiv.org/abs/2305.13245); must divide `n_heads`.
        head_dim: width of a head, an even number (RoPE rotates pairs); None: `dim / n_heads`.
        qk_norm: normalise every query and key with an RMSNorm before RoPE rotates it, as MiniMind-3 and Qwen3 do.
        vocab_size: number of tokens.
        hidden_dim: inner width of the SwiGLU feed-forward; None: 2/3 of 4 * dim rounded up to `multiple_of`.
        multiple_of: what `hidden_dim` is rounded up to when it is computed.
        norm_eps: epsilon of RMSNorm.
        max_seq_len: context length the model is trained at, in tokens.
        rope_theta: base of the rotary frequencies (https://arxiv.org/abs/2104.09864).
        rope_scaling: train a longer context, as yarn:4 or linear:4: positions of texts of any length are scaled (see
            `model.rope`), `max_seq_len` is FACTOR times the length before. In Hugging Face's form, {"rope_type": "yarn",
            "factor": 4.0, "original_max_position_embeddings": 512}.
        dropout: probability of dropping activations while training (attention, residual outputs).
        flash_attn: use fused attention kernels; False runs the slow reference path, which is the same mathematics.
        use_moe: replace every feed-forward by a mixture of experts.
        num_experts_per_tok: how many routed experts each token is sent to (top-k).
        n_routed_experts: number of experts the gate chooses from.
        n_shared_experts: width, in units of `hidden_dim`, of the MLP that every token passes; 0 for none.
        aux_loss_alpha: weight of the sequence-level load-balancing loss; 0 switches it off.
        router_bias_rate: balance the experts by a bias on each one's score, by which the router chooses and which moves by
            this much in every step (DeepSeek-V3's 0.001), instead of or beside the loss; 0: no biases.
        norm_topk_prob: renormalise the top-k gate weights to sum 1 (top-1: only with `norm_top1_prob`).
        norm_top1_prob: renormalise also the one weight of top-1, to the constant 1, as MiniMind-3 does; the router then
            learns from the load-balancing loss alone.
        initializer_range: standard deviation of the initial weights.
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int | None = None
    qk_norm: bool = False
    vocab_size: int = 6400
    hidden_dim: int | None = None
    multiple_of: int = 64
    norm_eps: float = 1e-5
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    dropout: float = 0.0
    flash_attn: bool = True
    use_moe: bool = False
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 2
    aux_loss_alpha: float = 0.01
    router_bias_rate: float = 0.0
    norm_topk_prob: bool = True
    norm_top1_prob: bool = False
    initializer_range: float = 0.02


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Describe how a MiniMind sees, for `model.vision`. The defaults are those of the first published MiniMind-V.

    Args:
        image_ids: the tokens that stand for an image in a prompt, as many as it has features. They are one token, repeated,
            or a pattern that cannot overlap with itself, such as 25 times `<` and 25 times `>`.
        encoder: "pretrained": an image model in a folder of its own, such as CLIP; "vit": our own, trained with it.
        width: of the features.
        projector: "linear", or "mlp": LayerNorm, Linear, GELU, Linear.
        image_size, patch_size: of our own encoder, in pixels; the latter is a power of two.
        n_layers, n_heads: of our own encoder.
    """

    image_ids: tuple[int, ...] = (30,) * 25 + (32,) * 25
    encoder: str = "pretrained"
    width: int = 768
    projector: str = "linear"
    image_size: int = 48
    patch_size: int = 16
    n_layers: int = 2
    n_heads: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_ids", tuple(self.image_ids))  # a list in JSON

    @classmethod
    def complete(cls, given: dict) -> dict:
        """Return all fields as JSON has them. Raises UserError for unknown ones."""
        if unknown := sorted(set(given) - {field.name for field in fields(cls)}):
            raise UserError(f"vision_config: unknown: {', '.join(unknown)}")
        return asdict(cls(**given)) | {"image_ids": list(cls(**given).image_ids)}

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def errors(self, vocab_size: int) -> list[str]:
        """Return everything that is wrong, in words."""
        ids, size = self.image_ids, self.image_size
        overlaps = any(ids[:n] == ids[-n:] for n in range(1, len(ids)))
        rules = {
            f"encoder {self.encoder!r} is neither pretrained nor vit": self.encoder in ("pretrained", "vit"),
            f"projector {self.projector!r} is neither linear nor mlp": self.projector in ("linear", "mlp"),
            "image_ids is empty": bool(ids),
            f"image_ids has tokens that are not among the {vocab_size}": all(0 <= i < vocab_size for i in ids),
            "image_ids is a pattern that can overlap with itself": len(set(ids)) <= 1 or not overlaps,
            f"width {self.width} must be at least 1": self.width >= 1,
        }
        if self.encoder == "vit":
            whole = self.patch_size >= 1 and size >= self.patch_size and size % self.patch_size == 0
            heads = self.n_heads >= 1 and self.width % (2 * self.n_heads) == 0
            rules |= {
                f"patch_size {self.patch_size} is not 2, 4, 8, 16, ...": self.patch_size.bit_count()
                == 1
                < self.patch_size,
                f"image_size {size} is not a multiple of patch_size {self.patch_size}": whole,
                f"width {self.width} does not divide into {self.n_heads} heads of an even width": heads,
                f"n_layers {self.n_layers} must be at least 1": self.n_layers >= 1,
                f"image_ids has {len(ids)} tokens, an image has {self.n_patches if whole else '?'} patches": not whole
                or len(ids) == self.n_patches,
            }
        return [f"vision_config: {error}" for error, kept in rules.items() if not kept]


def checkpoint_name(stage: str, config: Architecture) -> str:
    """Return the file name of a stage's weights: `pretrain_512.pth`, `full_sft_512_moe.pth`."""
    return f"{stage}_{config.dim}{'_moe' if config.use_moe else ''}.pth"


def field_descriptions() -> dict[str, str]:
    """Return the description of every field, from the docstring of `Architecture`: each is written there, once."""
    docstring = inspect.cleandoc(Architecture.__doc__ or "")  # Python 3.13 has removed its indentation already
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", docstring, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def parse_rope_scaling(text: str) -> tuple[str, float | None]:
    """Return method and factor of `yarn:4`, or of `yarn` (no factor: None). Raises UserError for anything else."""
    method, colon, number = text.partition(":")
    try:
        factor = float(number) if colon else None
    except ValueError:
        factor = math.nan
    if method not in ROPE_SCALING_METHODS or (factor is not None and not 1 <= factor < math.inf):
        methods = ", ".join(ROPE_SCALING_METHODS)
        raise UserError(f"rope_scaling={text} must be {methods}, or one of them with a factor: yarn:4")
    return method, factor
