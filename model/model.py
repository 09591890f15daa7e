"""The MiniMind Transformer, top to bottom in reading order.

A pre-norm decoder in the manner of Llama (https://arxiv.org/abs/2302.13971): RMSNorm, rotary positions, grouped-query
attention, SwiGLU or a mixture of experts, tied embeddings. It is a Hugging Face model (`generate`, `from_pretrained`,
peft, trl and accelerate work on it), and its parameter names are those of the published MiniMind-v1 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from model.attention import attention, cu_seqlens_from_positions, document_ids, varlen_attention
from model.LMConfig import LMConfig
from model.moe import FeedForward, MoEFeedForward, Router, Routing, balance_loss, is_tracing, residual_projection
from model.remote_code import AUTO_MAP, VISION_AUTO_MAP, copy_code
from model.rope import DynamicRopeScaling, RopeScaling, apply_rope, rope_tables

LOSS_CHUNK = 1024  # tokens whose logits exist at a time with gradient checkpointing


@dataclass
class TransformerOutput(MoeCausalLMOutputWithPast):
    """Hugging Face's output, `last_hidden_state` (batch, time, dim), the input of `output`, and the experts' load.

    `expert_load` (layers, experts): how many tokens each expert got.
    """

    last_hidden_state: Tensor | None = None
    expert_load: Tensor | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight (https://arxiv.org/abs/1910.07467), computed in float32, returned in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        xf = x.float()
        xf = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + self.eps)
        return xf.to(x.dtype) * self.weight


@dataclass
class AttentionMetadata:
    """Attention masks and positions of this forward pass, computed once and used by every layer.

    `cu_seqlens` for packed documents, else `mask` (None: plain causal). `rope` holds the cosine and sine tables,
    `valid` (batch, time) is False for padding, which is sent to no routed expert (None: no padding). `document`
    (batch, time) numbers the documents of packed rows where `mask` separates them. Layers append their attention weights
    to `attentions` if it is a list.
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    valid: Tensor | None = None
    document: Tensor | None = None
    attentions: list[Tensor] | None = None


class PagedCache:
    """The cache of `generate_batch`, which shares its pages between requests and needs the arguments of the call."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def get_seq_length(self) -> int:
        return 0  # positions and masks are given

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.arguments["cache"].update(k, v, layer, dict(self.arguments))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout, self.flash = config.dropout, config.flash_attn
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, q_dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = residual_projection(q_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: Any = None) -> Tensor:
        """x (batch, time, dim) -> (batch, time, dim). New keys and values are appended to `cache` if there is one."""
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (batch, time, heads, head_dim)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (batch, time, kv_heads, head_dim)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # with autocast they come in float32
        q, k = apply_rope(q, *metadata.rope), apply_rope(k, *metadata.rope)
        options: dict[str, Any] = dict(
            dropout=self.dropout if self.training else 0.0, flash=self.flash, weights=metadata.attentions
        )
        if metadata.cu_seqlens is not None:
            out = varlen_attention(q, k, v, metadata.cu_seqlens, **options)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (batch, heads, time, head_dim)
            if cache is not None:
                k, v = cache.update(k, v, self.layer)
            out = attention(q, k, v, metadata.mask, **options).transpose(1, 2)
        return self.resid_dropout(self.wo(out.flatten(2)))


class TransformerBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = (
            MoEFeedForward(config) if config.use_moe else FeedForward(config.dim, config.hidden_dim, config.dropout)
        )

    def forward(
        self, x: Tensor, metadata: AttentionMetadata, past_key_values: Any = None
    ) -> tuple[Tensor, Routing | None]:
        """x (batch, time, dim) -> the same shape, and what the router did if there is one."""
        x = x + self.attention(self.attention_norm(x), metadata, past_key_values)
        hidden = self.ffn_norm(x)
        if isinstance(self.feed_forward, MoEFeedForward):
            out, routing = self.feed_forward(hidden, metadata.valid)
        else:
            out, routing = self.feed_forward(hidden), None
        return x + out, routing


class Transformer(PreTrainedModel, GenerationMixin):
    """A MiniMind language model, dense or mixture of experts."""

    if TYPE_CHECKING:
        config: LMConfig
    config_class = LMConfig
    base_model_prefix = ""
    _input_embed_layer = "tok_embeddings"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # of the loss; each layer has its own
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["TransformerBlock"]
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}

    def __init__(self, config: LMConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        # Scaling of texts beyond the trained length, for generation; None: no scaling.
        self.dynamic_rope_scaling: DynamicRopeScaling | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw normal weights; those that write into the residual stream are smaller by sqrt(2 * layers).

        The 2 * layers additions then keep the variance of the stream at that of one (GPT-2, section 2.3).
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if getattr(module, "is_residual_projection", False):
                std /= (2 * self.config.n_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (nn.Embedding, Router)):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, Router) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        loss_only: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        rope_scaling: RopeScaling | None = None,
        **kwargs: Any,
    ) -> TransformerOutput | tuple:
        """Return next-token logits, and the loss if `labels` are given.

        Args:
            input_ids: (batch, time) token ids; or `inputs_embeds` (batch, time, dim).
            attention_mask: (batch, past + time), 0 for padding; or a ready (batch, 1, time, past + time) mask.
                In packed rows it only says which tokens are padding.
            position_ids: (batch, time). Without a mask or cache, a position that does not follow its left neighbour
                starts a new document, and documents do not see each other (the ecosystem's padding-free packing).
            past_key_values: any object with `update(k, v, layer) -> (k, v)` and `get_seq_length()`.
            labels: (batch, time), aligned with `input_ids`: the shift by one happens here; -100 is not a target.
            use_cache: return the cache; by default whenever no labels are given (as `config.use_cache` says). Packed
                documents have none.
            logits_to_keep: compute logits of the last n positions only (0: all), or of the given indices.
            cu_seqlens: (documents + 1,) int32 boundaries of packed documents in flattened (batch * time) order, as
                `model.attention.varlen_attention` takes them; saves deriving them from `position_ids`.
            num_items_in_batch: divide the summed loss by this many targets instead of those in `labels`
                (gradient accumulation over batches of different sizes).
            loss_only: return the loss without materialised logits.
            output_hidden_states: also return the (batch, time, dim) input of every layer and the final normed output;
                by default as the configuration says.
            output_attentions: also return the attention weights of every layer (batch, heads, time, past + time), which
                only the slow reference path computes; by default as the configuration says.
            return_dict: False: return a tuple of what there is; by default as the configuration says.
            rope_scaling: of the positions, for texts longer than the model was trained at; what is in the cache must have
                been computed with the same. None: as trained.

        Returns:
            `loss` includes the experts' balance loss while training; `aux_loss` is that part alone.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; packed documents together with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (batch, time, dim)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if "cache" in kwargs:
            past_key_values = PagedCache(kwargs)
        scaling = rope_scaling or self.config.scaling
        metadata = self._attention_metadata(x, attention_mask, position_ids, past_key_values, cu_seqlens, scaling)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            metadata.attentions = []
        if use_cache and past_key_values is None and metadata.cu_seqlens is None:
            past_key_values = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.dropout(x)
        hidden_states, routings = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            x, routing = layer(x, metadata, past_key_values=past_key_values)
            routings.append(routing)
        x = self.norm(x)

        logits = loss = aux_loss = None
        if not (loss_only and labels is not None):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.output(x[:, kept])
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
            n_targets = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = self._cross_entropy_sum(x, targets) / n_targets
            if self.config.use_moe and self.config.aux_loss_alpha:
                aux_loss = self._balance_loss_sum(routings, metadata, targets) / n_targets
                loss = loss + aux_loss if self.training else loss
            for routing in routings:  # with `router_bias_rate`, in training: zeros that have a gradient
                if routing is not None and routing.bias_loss is not None:
                    loss = loss + routing.bias_loss / n_targets
        output = TransformerOutput(
            loss=loss,
            aux_loss=aux_loss,
            expert_load=torch.stack([r.load for r in routings]) if self.config.use_moe and labels is not None else None,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=None if metadata.attentions is None else tuple(metadata.attentions),
            # For libraries with losses of their own (trl's), which give no labels.
            last_hidden_state=x if labels is None else None,
        )
        as_output = self.config.return_dict if return_dict is None else return_dict
        return output if as_output else output.to_tuple()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save weights, configuration and the code, so that `AutoModelForCausalLM` loads the folder anywhere."""
        if self._auto_class is None:  # else loaded from such a folder: the library copies the code from there
            self.config.auto_map = AUTO_MAP if self.config.vision is None else VISION_AUTO_MAP
        super().save_pretrained(save_directory, **kwargs)
        if self._auto_class is None:
            copy_code(Path(save_directory), self.config.vision is not None)

    def _attention_metadata(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        cu_seqlens: Tensor | None,
        scaling: RopeScaling | None,
    ) -> AttentionMetadata:
        """Work out positions, masks and document boundaries of this call."""
        batch, time = x.shape[:2]
        if cache is not None and cu_seqlens is not None:
            raise ValueError("packed documents cannot be kept in a KV cache: give cu_seqlens or past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        # A static cache returns all its slots: those that are not filled yet must be masked.
        is_static = getattr(cache, "is_compileable", False)
        n_keys = cache.get_mask_sizes(time, 0)[0] if is_static else past + time
        document = None
        if position_ids is None:
            if cu_seqlens is not None:
                starts = cu_seqlens[document_ids(cu_seqlens, batch, time)]
                position_ids = torch.arange(batch * time, device=x.device).view(batch, time) - starts
            else:
                position_ids = (torch.arange(time, device=x.device) + past)[None]
        elif cu_seqlens is None and attention_mask is None and cache is None and time > 1:
            if is_tracing():  # a mask, whatever the positions are
                previous = F.pad(position_ids, (1, 0))[:, :-1]
                document = (position_ids != previous + 1).cumsum(1)
                document = (document - document[:, :1]).expand(batch, time)  # (batch, time), from 0
            elif (position_ids[:, 1:] != position_ids[:, :-1] + 1).any():
                cu_seqlens = cu_seqlens_from_positions(position_ids.expand(batch, time))
        rope = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta, scaling)

        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        valid = None if padding is None else padding[:, -time:].bool()
        if cu_seqlens is not None:
            return AttentionMetadata(rope, cu_seqlens=cu_seqlens, valid=valid)
        if attention_mask is not None and attention_mask.dim() == 4:
            return AttentionMetadata(rope, mask=attention_mask)
        if padding is None and document is None and not is_static and (past == 0 or time == 1):
            return AttentionMetadata(rope)  # plain causal, or one query that sees every key
        query = torch.arange(time, device=x.device)[:, None] + past
        key = torch.arange(n_keys, device=x.device)[None, :]
        mask = (key <= query)[None, None]  # (1, 1, time, n_keys)
        if document is not None:
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
        if padding is not None:
            padding = F.pad(padding, (0, n_keys - padding.shape[1]))
            # Padding sees itself: a row without any visible key would become NaN and spread through the values.
            mask = mask & (padding[:, None, None, :].bool() | (key == query))
        return AttentionMetadata(rope, mask=mask, valid=valid, document=document)

    def _cross_entropy_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy summed over all targets.

        `output` is called as a module: an adapter on it, or weights that are offloaded, take part.
        """
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            # In fine-tuning most tokens are not targets: leave out their rows of the largest matrix product. (On a GPU the
            # count would have to come back from the device, which costs more than it saves.)
            # Rounded up, because the CPU library compiles and keeps a kernel for every shape.
            ignored = targets == -100
            n_kept = min(-(-(len(ignored) - int(ignored.sum())) // 256) * 256, len(ignored))
            first = ignored.to(torch.uint8).argsort(stable=True)[:n_kept]
            hidden, targets = hidden[first], targets[first]
        if not self.gradient_checkpointing:
            return self._chunk_cross_entropy(hidden, targets)
        # The logits are the largest tensors of all: keep those of one chunk, and compute them again in the backward pass.
        chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses = (self._gradient_checkpointing_func(self._chunk_cross_entropy, *chunk) for chunk in chunks)
        return sum(losses, hidden.new_zeros((), dtype=torch.float32))

    def _chunk_cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.output(hidden).float(), targets, ignore_index=-100, reduction="sum")

    def _balance_loss_sum(self, routings: Sequence, metadata: AttentionMetadata, targets: Tensor) -> Tensor:
        """Return the balance loss of all layers, every document weighted by its number of targets.

        With these weights it adds up over micro-batches and ranks like the cross entropy: the gradient does not
        depend on how documents are packed, accumulated or distributed.
        """
        batch, time = targets.shape
        if metadata.cu_seqlens is not None:
            n_documents, document = (
                len(metadata.cu_seqlens) - 1,
                document_ids(metadata.cu_seqlens, batch, time).flatten(),
            )
        else:
            n_documents = batch if metadata.document is None else batch * time  # at most
            document = torch.arange(batch, device=targets.device).repeat_interleave(time)
            if metadata.document is not None:
                document = document * time + metadata.document.flatten()
        loss_mask = (targets.flatten() != -100).float()
        weight = loss_mask.new_zeros(n_documents).index_add(0, document, loss_mask)
        losses = (balance_loss(r.probabilities, r.chosen, document, n_documents) for r in routings)
        per_document = sum(losses, torch.zeros_like(weight))
        return self.config.aux_loss_alpha * (per_document * weight).sum()


# The class of each kind of model; model/vision.py adds its own.
MODEL_CLASSES: dict[str, type[Transformer]] = {"minimind": Transformer}


def model_class(config: LMConfig) -> type[Transformer]:
    """Return the class of a model with this configuration."""
    return MODEL_CLASSES["minimind" if config.vision_config is None else "minimind-v"]


if __package__ == "model":  # not in a copy beside exported weights, which would take the place of this module
    AutoConfig.register(LMConfig.model_type, LMConfig)
    AutoModelForCausalLM.register(LMConfig, Transformer)


def parameter_counts(model: Transformer) -> dict[str, int]:
    """Count the parameters of each part, tied ones once; `active` are those that one token of text passes through."""
    counts = dict.fromkeys(["embedding", "attention", "feed_forward", "experts", "router", "norm", "vision"], 0)
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter in seen:
            continue
        seen.add(parameter)
        if name.startswith("vision_"):
            part = "vision"
        elif "embeddings" in name or name == "output.weight":
            part = "embedding"
        elif ".experts." in name:
            part = "experts"
        elif ".gate." in name:
            part = "router"
        elif "norm" in name:
            part = "norm"
        else:
            part = "attention" if ".attention." in name else "feed_forward"
        counts[part] += parameter.numel()
    config = model.config
    counts["total"] = sum(counts.values())
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts if config.use_moe else 0
    counts["active"] = counts["total"] - round(counts["experts"] * idle) - counts["vision"]
    return counts


@torch.no_grad()
def initial_weights(config: LMConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the random weights of a new model, one tensor at a time, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = model_class(config)(config)
    for name, module in model.named_modules():
        tied = module is model.output and config.tie_word_embeddings
        if not tied and next(module.parameters(recurse=False), None) is not None:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
            yield from ((f"{name}.{key}", weight.detach()) for key, weight in module.named_parameters(recurse=False))
            module.to_empty(device="meta", recurse=False)


def training_flops(config: LMConfig, active_parameters: int, n_tokens: float, attention_pairs: float) -> float:
    """Return the FLOPs of forward and backward on real tokens (padding is not counted).

    6 per parameter and token (PaLM, https://arxiv.org/abs/2204.02311, appendix B), and for attention 2 products of 2 FLOPs
    per pair of tokens and channel of a head, of which the causal mask leaves half, three times for forward and backward.

    attention_pairs: the sum of length^2 over documents.
    """
    width = config.n_heads * config.head_dim
    return 6 * active_parameters * n_tokens + 6 * config.n_layers * width * attention_pairs


def describe_parameters(model: Transformer) -> str:
    """Return the counts as one line, in millions."""
    counts = parameter_counts(model)
    parts = [f"{part} {n / 1e6:.2f}M" for part, n in counts.items() if part not in ("total", "active") and n]
    active = f", {counts['active'] / 1e6:.2f}M active per token" if counts["active"] != counts["total"] else ""
    return f"{counts['total'] / 1e6:.2f}M parameters{active} ({' + '.join(parts)})"
