"""The configuration of a MiniMind and its named presets.

    from model.LMConfig import LMConfig, preset
    config = preset("minimind-v1-small", max_seq_len=1024)

Field names are those of the published MiniMind-v1; the `attribute_map` gives the same numbers under the names
Hugging Face libraries ask for (`hidden_size`, `num_hidden_layers`, ...).
"""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedConfig


class LMConfig(PreTrainedConfig):
    """Shape and hyper-parameters of a dense or mixture-of-experts MiniMind.

    Args:
        dim: width of the residual stream (embedding size).
        n_layers: number of Transformer blocks.
        n_heads: number of query heads; `dim / n_heads` is the head dimension and must be even (RoPE rotates pairs).
        n_kv_heads: number of key/value heads shared by the query heads (grouped-query attention,
            https://arxiv.org/abs/2305.13245); must divide `n_heads`.
        vocab_size: number of tokens.
        hidden_dim: inner width of the SwiGLU feed-forward; None: 2/3 of 4 * dim rounded up to `multiple_of`.
        multiple_of: what `hidden_dim` is rounded up to when it is computed.
        norm_eps: epsilon of RMSNorm.
        max_seq_len: context length the model is trained at, in tokens.
        rope_theta: base of the rotary frequencies (https://arxiv.org/abs/2104.09864).
        dropout: probability of dropping activations while training (attention, residual outputs).
        flash_attn: use fused attention kernels; False runs the slow reference path, which is the same mathematics.
        use_moe: replace every feed-forward by a mixture of experts.
        num_experts_per_tok: how many routed experts each token is sent to (top-k).
        n_routed_experts: number of experts the gate chooses from.
        n_shared_experts: width, in units of `hidden_dim`, of the MLP that every token passes; 0 for none.
        aux_loss_alpha: weight of the sequence-level load-balancing loss; 0 switches it off.
        norm_topk_prob: renormalise the top-k gate weights to sum 1 (never for top-1: see `model.moe.Gate`).
        initializer_range: standard deviation of the initial weights.
    """

    model_type = "minimind"
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
    }
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "last_hidden_state"]

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 16
    n_kv_heads: int = 8
    vocab_size: int = 6400
    hidden_dim: int | None = None
    multiple_of: int = 64
    norm_eps: float = 1e-5
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    dropout: float = 0.0
    flash_attn: bool = True
    use_moe: bool = False
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 2
    aux_loss_alpha: float = 0.01
    norm_topk_prob: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    unk_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs) -> None:
        if self.hidden_dim is None:
            hidden = int(2 * 4 * self.dim / 3)
            self.hidden_dim = self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)
        super().__post_init__(**kwargs)
        problems = self.problems()
        if problems:
            raise ValueError("this model cannot be built: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def problems(self) -> list[str]:
        """Everything that is wrong with this configuration, each in words that name the flag."""
        found = []
        sizes = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "multiple_of", "max_seq_len"]
        for name in sizes:
            if getattr(self, name) < 1:
                found.append(f"--{name} {getattr(self, name)} must be at least 1")
        if found:  # the checks below would divide by zero
            return found
        if self.dim % self.n_heads:
            found.append(f"--dim {self.dim} is not divisible by --n_heads {self.n_heads}")
        elif self.head_dim % 2:
            found.append(
                f"head dimension {self.head_dim} (--dim {self.dim} / --n_heads {self.n_heads}) must be even: "
                "RoPE rotates pairs"
            )
        if self.n_heads % self.n_kv_heads:
            found.append(f"--n_heads {self.n_heads} is not divisible by --n_kv_heads {self.n_kv_heads}")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                found.append(f"--{name} {getattr(self, name)} must be more than 0")
        if not self.initializer_range >= 0:
            found.append(f"--initializer_range {self.initializer_range} must not be negative")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"--dropout {self.dropout} must be at least 0 and below 1")
        if self.use_moe:
            if self.n_routed_experts < 1:
                found.append(f"--n_routed_experts {self.n_routed_experts} must be at least 1")
            if not 1 <= self.num_experts_per_tok <= max(self.n_routed_experts, 1):
                found.append(
                    f"--num_experts_per_tok {self.num_experts_per_tok} must be between 1 and "
                    f"--n_routed_experts {self.n_routed_experts}"
                )
            if self.n_shared_experts < 0:
                found.append(f"--n_shared_experts {self.n_shared_experts} must not be negative")
            if not self.aux_loss_alpha >= 0:
                found.append(f"--aux_loss_alpha {self.aux_loss_alpha} must not be negative")
        return found

    def architecture(self) -> dict:
        """The fields that decide names, shapes and mathematics of the weights: what two checkpoints must share."""
        names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta"]
        if self.use_moe:
            names += ["num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob"]
        return {"use_moe": self.use_moe} | {name: getattr(self, name) for name in names}

    def own_fields(self) -> dict:
        """Every field declared in this class (not the hundred that Hugging Face adds), for a readable JSON."""
        return {name: getattr(self, name) for name in LMConfig.__annotations__}


def architecture_differences(ours: LMConfig, theirs: LMConfig) -> list[str]:
    """Lines `field: ours != theirs` for every architectural field that differs; empty if the weights fit."""
    a, b = ours.architecture(), theirs.architecture()
    return [f"{name}: {a.get(name)} != {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]


# The public contract: sizes of the published models, and one small enough to learn the sample data on a laptop.
PRESETS: dict[str, dict] = {
    "minimind-v1-small": dict(dim=512, n_layers=8),
    "minimind-v1": dict(dim=768, n_layers=16),
    "minimind-v1-moe": dict(dim=512, n_layers=8, use_moe=True, n_shared_experts=2, n_routed_experts=4),
    "toy": dict(dim=192, n_layers=4, n_heads=6, n_kv_heads=3),
}


def preset(name: str, **overrides) -> LMConfig:
    """The configuration called `name`, with single fields replaced.

    Raises:
        ValueError: unknown preset or field, or fields that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(LMConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"unknown model fields: {', '.join(unknown)}")
    return LMConfig(**(PRESETS[name] | overrides))
