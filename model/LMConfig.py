"""The configuration of a MiniMind and its named presets.

    from model.LMConfig import LMConfig, preset
    config = preset("minimind-v1-small", max_seq_len=1024)

Field names are those of the published MiniMind-v1; the `attribute_map` gives the same numbers under the names
Hugging Face libraries ask for (`hidden_size`, `num_hidden_layers`, ...).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeGuard

from transformers import PreTrainedConfig

from common.errors import UserError
from model.architecture import PRESETS, Architecture, VisionConfig
from model.rope import DynamicRopeScaling, RopeScaling, doublings


class LMConfig(Architecture, PreTrainedConfig):
    """The fields of `Architecture`, which its docstring explains, as a configuration of Hugging Face's libraries.

    Raises UserError, with everything that is wrong at once, for fields that do not fit together.
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
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "last_hidden_state", "expert_load"]

    use_cache: bool = True
    tie_word_embeddings: bool = True
    unk_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    vision_config: dict | None = None  # the fields of `VisionConfig`; None: a model of text
    if TYPE_CHECKING:
        hidden_dim: int  # computed below if it is not given
        head_dim: int

    def __post_init__(self, **kwargs: Any) -> None:
        for theirs, ours in self.attribute_map.items():  # a value under our own name comes before one under theirs
            if theirs in kwargs and getattr(self, ours) != getattr(type(self), ours):
                del kwargs[theirs]
            elif theirs in kwargs:
                setattr(self, ours, kwargs.pop(theirs))
        if self.hidden_dim is None:
            hidden = int(2 * 4 * self.dim / 3)
            self.hidden_dim = self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)
        if self.head_dim is None and self.n_heads > 0 and self.dim % self.n_heads == 0:
            self.head_dim = self.dim // self.n_heads
        if isinstance(self.rope_scaling, dict):
            self.rope_scaling = self._complete_rope_scaling(self.rope_scaling)
        if isinstance(self.vision_config, dict):
            self.vision_config = VisionConfig.complete(self.vision_config)
        super().__post_init__(**kwargs)
        errors = self._errors()
        if errors:
            raise UserError("this model cannot be built: " + "; ".join(errors))

    def _complete_rope_scaling(self, given: dict) -> dict:
        """Return a copy of `rope_scaling` that holds the original length, computed from the factor if it is missing."""
        factor = given.get("factor")
        if "original_max_position_embeddings" in given or not _is_factor(factor):
            return dict(given)
        return given | {"original_max_position_embeddings": max(round(self.max_seq_len / factor), 1)}

    @property
    def renormalizes_top_k(self) -> bool:
        """Return whether the router scales the weights of the chosen experts to sum 1."""
        return self.norm_topk_prob and (self.num_experts_per_tok > 1 or self.norm_top1_prob)

    @property
    def scaling(self) -> RopeScaling | None:
        """Return `rope_scaling` as `model.rope` takes it."""
        given = self.rope_scaling
        if given is None:
            return None
        original, attention_factor = given["original_max_position_embeddings"], given.get("attention_factor")
        return RopeScaling(given["rope_type"], given["factor"], original, attention_factor)

    @property
    def vision(self) -> VisionConfig | None:
        """Return `vision_config` as `model.vision` takes it."""
        return None if self.vision_config is None else VisionConfig(**self.vision_config)

    def dynamic_rope_scaling(
        self, method: str, factor: float | None = None, max_len: int | None = None
    ) -> DynamicRopeScaling:
        """Return how this model is to read texts longer than it was trained at.

        Args:
            method: one of `ROPE_SCALING_METHODS`.
            factor: scale all of those by this, relative to the trained length; None: each by the smallest power of two
                that suffices.
            max_len: the longest text in tokens; needed if there is no factor.

        Raises UserError if texts of that length need no scaling, if the factor does not suffice, or if the model was
        trained with another method: two methods cannot be mixed.
        """
        trained, given, name = self.max_seq_len, self.rope_scaling, f"rope_scaling={method}"
        if given is not None and given["rope_type"] != method:
            raise UserError(
                f"{name}: this model was trained with {given['rope_type']} scaling, and only that method can extend it"
            )
        if max_len is None and factor is None:
            raise UserError(f"{name} needs a length: set max_seq_len=N, or a factor ({method}:4)")
        longest = max_len if max_len is not None else int(trained * (factor or 1))
        if longest <= trained:
            raise UserError(
                f"{name} is for texts longer than the {trained} tokens that this model was trained at, and {longest} is "
                "not more: set a larger max_seq_len=N, or leave the scaling out"
            )
        if factor is not None and trained * factor < longest:
            raise UserError(
                f"{name}:{factor:g} reaches {int(trained * factor)} tokens ({factor:g} times the {trained} of the "
                f"training), max_seq_len={longest} is more: choose a larger factor, or none"
            )
        if method == "ntk" and self.head_dim < 4:
            raise UserError(f"{name} needs a head dimension of at least 4, not {self.head_dim}")
        if method == "yarn" and not self.rope_theta > 1:
            raise UserError(f"{name} needs a model with a rope_theta above 1, not {self.rope_theta}")
        return DynamicRopeScaling(
            method=method,
            original=given["original_max_position_embeddings"] if given else trained,
            trained=trained,
            trained_factor=given["factor"] if given else 1.0,
            factors=(float(factor),) if factor is not None else doublings(longest / trained),
            attention_factor=given.get("attention_factor") if given else None,
        )

    def _errors(self) -> list[str]:
        """Return everything that is wrong, as `field=value`: a command line translates that with `name_flags`."""
        found: list[str] = []

        def require(name: str, holds: bool, rule: str) -> None:
            if not holds:
                found.append(f"{name}={getattr(self, name)} {rule}")

        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "hidden_dim",
            "multiple_of",
            "max_seq_len",
        ):
            if name == "hidden_dim" and found:  # computed from one of those before
                continue
            require(name, getattr(self, name) >= 1, "must be at least 1")
        if found:  # the checks below would divide by zero
            return found
        require("dim", self.head_dim is not None, f"is not divisible by n_heads={self.n_heads}")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            shown = f"head dimension {self.head_dim} (dim={self.dim} / n_heads={self.n_heads})"
            shown = shown if self.head_dim * self.n_heads == self.dim else f"head_dim={self.head_dim}"
            found.append(f"{shown} must be even: RoPE rotates pairs")
        require("n_heads", self.n_heads % self.n_kv_heads == 0, f"is not divisible by n_kv_heads={self.n_kv_heads}")
        for name in ("norm_eps", "rope_theta", "initializer_range", "aux_loss_alpha"):
            require(name, getattr(self, name) != math.inf, "must be a finite number")
        require("norm_eps", self.norm_eps > 0, "must be more than 0")
        require("rope_theta", self.rope_theta > 0, "must be more than 0")
        if self.rope_scaling is not None:
            found += self._rope_scaling_errors(self.rope_scaling)
        require("initializer_range", self.initializer_range >= 0, "must not be negative")
        require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        if self.use_moe:
            experts = self.n_routed_experts
            require("n_routed_experts", experts >= 1, "must be at least 1")
            in_range = 1 <= self.num_experts_per_tok <= max(experts, 1)
            require("num_experts_per_tok", in_range, f"must be between 1 and n_routed_experts={experts}")
            require("n_shared_experts", self.n_shared_experts >= 0, "must not be negative")
            require("router_bias_rate", 0 <= self.router_bias_rate < 1, "must be at least 0 and below 1")
            require("aux_loss_alpha", self.aux_loss_alpha >= 0, "must not be negative")
        elif self.router_bias_rate:
            found.append(f"router_bias_rate={self.router_bias_rate} is for a mixture of experts, which use_moe makes")
        if self.vision is not None:
            found += self.vision.errors(self.vocab_size)
        return found

    def _rope_scaling_errors(self, given: object) -> list[str]:
        if not isinstance(given, dict):
            return [f'rope_scaling={given!r} must be like {{"rope_type": "yarn", "factor": 4.0}}']
        found = []
        method, factor = given.get("rope_type"), given.get("factor")
        original = given.get("original_max_position_embeddings", 1)
        known = {"rope_type", "factor", "original_max_position_embeddings"}
        known |= {"attention_factor"} if method == "yarn" else set()
        if unknown := sorted(set(given) - known):
            found.append(f"rope_scaling: unknown: {', '.join(unknown)}")
        multiplied = given.get("attention_factor", 1.0)
        if isinstance(multiplied, bool) or not isinstance(multiplied, int | float) or not 0 < multiplied < math.inf:
            found.append(f"rope_scaling: attention_factor {multiplied} must be a number above 0")
        if not _is_factor(factor):
            found.append(f"rope_scaling: the factor {factor} must be a number of at least 1")
        elif method == "ntk" and (self.head_dim or 0) > 2:
            theta = self.rope_theta * factor ** (self.head_dim / (self.head_dim - 2))
            found.append(f"rope_scaling=ntk:{factor:g} is for decoding; in training, that is rope_theta={theta:.6g}")
        elif method not in ("linear", "yarn"):
            found.append(f"rope_scaling={method}: a model is trained with linear or yarn")
        if type(original) is not int or original < 1:
            found.append(f"rope_scaling: original_max_position_embeddings {original} must be at least 1 token")
        if method == "yarn" and not self.rope_theta > 1:
            found.append(f"rope_scaling=yarn needs rope_theta={self.rope_theta} to be above 1")
        return found

    def architecture(self) -> dict[str, Any]:
        """Return the fields that decide names, shapes and mathematics of the weights: two checkpoints must share them."""
        names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "norm_eps", "rope_theta"]
        names += ["rope_scaling", "head_dim", "qk_norm", "tie_word_embeddings"]
        if self.use_moe:
            names += ["num_experts_per_tok", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "norm_top1_prob"]
        if self.vision_config is not None:
            names += ["vision_config"]
        fields = {"use_moe": self.use_moe, "router_bias": self.use_moe and self.router_bias_rate > 0}
        return fields | {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what `to_dict` returned: where a size is there under both names, ours counts."""
        given = {name: value for name, value in config_dict.items() if cls.attribute_map.get(name) not in config_dict}
        return super().from_dict(given, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, in which libraries (peft) find its sizes under their names too."""
        return super().to_dict() | {theirs: getattr(self, ours) for theirs, ours in self.attribute_map.items()}

    def own_fields(self) -> dict[str, Any]:
        """Return every field declared here (not the hundred that Hugging Face adds), for a readable JSON."""
        return {name: getattr(self, name) for name in FIELD_TYPES}


def _is_factor(factor: object) -> TypeGuard[float]:
    return isinstance(factor, int | float) and not isinstance(factor, bool) and 1 <= factor < math.inf


# name -> annotation of every field of ours, not of the hundred that Hugging Face adds
FIELD_TYPES: dict[str, str] = {**Architecture.__annotations__, **LMConfig.__annotations__}


def architecture_differences(ours: LMConfig, theirs: LMConfig) -> list[str]:
    """Return a line `field: ours != theirs` for every architectural field that differs; none if the weights fit."""
    a, b = ours.architecture(), theirs.architecture()
    return [f"{name}: {a.get(name)} != {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]


def preset(name: str, **overrides: Any) -> LMConfig:
    """Return the configuration called `name`, with single fields replaced. Raises UserError for unknown names."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(LMConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise UserError(f"unknown model fields: {', '.join(unknown)}")
    return LMConfig(**(PRESETS[name] | overrides))
