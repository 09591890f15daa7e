"""Published families of weights: which one a file is, and its weights under our names.

MiniMind-v1, MiniMind2 of February 2025   our names (those of v1); RoPE rotates interleaved pairs of features
MiniMind2 of April 2025, MiniMind-3       Llama's names; RoPE rotates feature i together with i + head_dim / 2
MiniMind-V                                a projector beside one of these: linear, later LayerNorm, Linear, GELU, Linear

A file without a description is recognised by the names and shapes in it: nothing is guessed. What the shapes of a family
do not show (rope_theta, ...) is as in its published models; shapes that fit none are refused, and the error names the
fields that decide. Exported folders bring a configuration: see `export.huggingface`, which uses the same names.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from model.architecture import PRESETS
from model.LMConfig import LMConfig, preset
from model.weights_file import EMBEDDING, OUTPUT, list_names

LLAMA_EMBEDDING, LLAMA_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"layers\.0\.feed_forward\.experts\.\d+\.w1\.weight")
_SHARED_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.shared_experts\.)(\d+)\.((?:gate|up|down)_proj\.weight)")
_STACKED_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_proj")


# ---- Llama's names and rows


def to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder rows (heads * head_dim, ...): in every head x0 x1 x2 x3 ... become x0 x2 ... x1 x3 ..."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Undo `to_halves`."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def llama_names(config: LMConfig) -> dict[str, str]:
    """Map our name of every weight to its name in the files of Llama and of what followed it; a tied output is left out."""
    names = {EMBEDDING: LLAMA_EMBEDDING, "norm.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        names[OUTPUT] = LLAMA_OUTPUT
    projections = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    if config.use_moe:
        parts = [f"experts.{j}." for j in range(config.n_routed_experts)]
        parts += ["shared_experts."] if config.n_shared_experts else []
    else:
        parts = [""]
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for projection in "qkvo":
            names[f"{ours}attention.w{projection}.weight"] = f"{theirs}self_attn.{projection}_proj.weight"
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            names[f"{ours}attention.{norm}.weight"] = f"{theirs}self_attn.{norm}.weight"
        names[f"{ours}attention_norm.weight"] = f"{theirs}input_layernorm.weight"
        names[f"{ours}ffn_norm.weight"] = f"{theirs}post_attention_layernorm.weight"
        if config.use_moe:
            names[f"{ours}feed_forward.gate.weight"] = f"{theirs}mlp.gate.weight"
        for part in parts:
            for w, projection in projections.items():
                names[f"{ours}feed_forward.{part}{w}.weight"] = f"{theirs}mlp.{part}{projection}.weight"
    return names


def rows_to_reorder(config: LMConfig) -> dict[str, int]:
    """Map our names of the weights whose rows Llama has in another order to their number of heads.

    The norms of queries and keys are one head: all heads share them.
    """
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads} | ({"q_norm": 1, "k_norm": 1} if config.qk_norm else {})
    return {f"layers.{i}.attention.{w}.weight": n for i in range(config.n_layers) for w, n in heads.items()}


def from_llama_state(
    state: dict[str, Tensor], config: LMConfig, where: Path | str, halves: bool = True
) -> dict[str, Tensor]:
    """Return weights with Llama's names under ours. Raises UserError for those that a MiniMind does not have.

    halves: the rows are in Llama's order; False: only the names are Llama's.
    """
    heads, names = rows_to_reorder(config) if halves else {}, llama_names(config)
    state = merge_experts(state)
    missing = [theirs for theirs in names.values() if theirs not in state]
    if missing:
        raise UserError(f"{where}: weights are missing: {list_names(missing)}")
    ours = {}
    for name, theirs in names.items():
        weight = state.pop(theirs)
        if name in heads:
            if not weight.dim() or len(weight) % (2 * heads[name]):
                raise UserError(f"{where}: {theirs} {tuple(weight.shape)} does not divide into {heads[name]} heads")
            weight = to_pairs(weight, heads[name])
        ours[name] = weight
    head = state.pop(LLAMA_OUTPUT, None)
    if head is not None and not torch.equal(head, ours[EMBEDDING]):
        raise UserError(f"{where}: {LLAMA_OUTPUT} differs from the embedding; in this MiniMind they are one tensor")
    if state:
        raise UserError(f"{where}: weights that a MiniMind does not have: {list_names(list(state))}")
    return ours


def merge_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy in which every expert has its matrices, and the shared experts of a layer are one.

    MiniMind2 adds the outputs of a list of shared experts: one expert as wide as all of them computes the same. Newer
    versions of transformers stack the routed ones: gate_up_proj (experts, 2 hidden, dim), down_proj (experts, dim, hidden).
    """
    merged: dict[str, Tensor] = {}
    shared: dict[str, dict[int, Tensor]] = {}
    for name, weight in state.items():
        stacked, one = _STACKED_EXPERTS.fullmatch(name), _SHARED_EXPERT.fullmatch(name)
        if one and weight.dim() == 2:
            shared.setdefault(one[1] + one[3], {})[int(one[2])] = weight
        elif stacked and weight.dim() == 3:
            kinds = ("gate", "up") if stacked[2] == "gate_up" else ("down",)
            for j, expert in enumerate(weight):
                for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=False):
                    merged[f"{stacked[1]}{j}.{kind}_proj.weight"] = part
        else:
            merged[name] = weight
    for name, parts in shared.items():
        side = 1 if "down_proj" in name else 0
        if len({part.shape[1 - side] for part in parts.values()}) == 1:  # else it will be missing
            merged[name] = torch.cat([parts[j] for j in sorted(parts)], side)
    return merged


# ---- MiniMind-V

_VISION = re.compile(r"(?:model\.)?(vision_(?:proj|encoder)\..+)")


def split_vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the weights that a model of text does not have out of `state` and return them, under their plain names."""
    return {match[1]: state.pop(name) for name in [*state] if (match := _VISION.fullmatch(name))}


def vision_config_from_shapes(
    vision: dict[str, Tensor], names_of_llama: bool, path: Path, notes: list[str]
) -> dict[str, Any]:
    """Return the `vision_config` of published weights without a description; remove an encoder's weights from `vision`.

    Which tokens stand for an image is not in the weights: it is as in the release that has such names and shapes.
    """
    if encoder := [name for name in vision if name.startswith("vision_encoder.")]:
        for name in encoder:
            del vision[name]
        notes.append(f"{len(encoder)} weights of the image encoder in it: ignored, its own folder has them")
    linear, mlp = vision.get("vision_proj.vision_proj.0.weight"), vision.get("vision_proj.mlp.1.weight")
    weight = linear if linear is not None else mlp
    if weight is None or weight.dim() != 2:
        raise UserError(f"{path}: no projector of a known MiniMind-V: it has {list_names(list(vision)) or 'none'}")
    if mlp is not None:
        release, image_ids = "MiniMind-3-V", [12] * 64
    elif names_of_llama:
        release, image_ids = "MiniMind2-V", [34] * 196
    else:
        release, image_ids = "the first MiniMind-V", [30] * 25 + [32] * 25
    projector = "linear" if linear is not None else "mlp"
    notes.append(f"a {projector} projector of features of width {weight.shape[1]} in it: it sees images")
    notes.append(f"assumed: an image has {len(image_ids)} tokens (as in {release})")
    return {"encoder": "pretrained", "projector": projector, "width": weight.shape[1], "image_ids": image_ids}


# ---- the configuration of a file without one


def config_from_shapes(state: dict[str, Tensor], pos_cis: Tensor | None, path: Path, notes: list[str]) -> LMConfig:
    """Return the configuration of weights with our names: from their shapes, the rest as in the published models."""
    fields, _, kv_dim = _shapes(state, path)
    n_heads, rope_theta, source = _heads(fields["dim"], fields["n_layers"], kv_dim, fields["use_moe"], pos_cis)
    head_dim = fields["dim"] // n_heads if n_heads and fields["dim"] % n_heads == 0 else 0
    if not head_dim or kv_dim % head_dim:
        reason = (
            f"the number of heads cannot be derived from keys of width {kv_dim} in a model of width {fields['dim']}"
        )
        raise _ambiguous(path, reason, ["n_heads", "n_kv_heads", "rope_theta"], fields)
    fields |= dict(n_heads=n_heads, n_kv_heads=kv_dim // head_dim, rope_theta=rope_theta)
    return _config(fields, path, notes, source)


def config_from_llama_shapes(state: dict[str, Tensor], path: Path, notes: list[str]) -> LMConfig:
    """Return the configuration of weights with Llama's names: MiniMind2 of April 2025, or MiniMind-3."""
    is_list = any(map(_SHARED_EXPERT.fullmatch, state))
    head, embedding = state.get(LLAMA_OUTPUT), state[LLAMA_EMBEDDING]
    state = {_our_name(name): weight for name, weight in merge_experts(state).items()}
    fields, q_dim, kv_dim = _shapes(state, path)
    dim, hidden_dim, n_shared = fields["dim"], fields["hidden_dim"], fields.get("n_shared_experts", 0)
    norm = state.get("layers.0.attention.q_norm.weight")
    if norm is None:
        source, decisive = "MiniMind2 of April 2025", ["n_heads", "n_kv_heads", "rope_theta"]
        assumed: dict[str, Any] = dict(n_heads=8, n_kv_heads=2, rope_theta=1e6)
        fits = (q_dim, 4 * kv_dim, dim % 16) == (dim, dim, 0) and is_list == (n_shared > 0)
        fits = fits and hidden_dim == preset("minimind-v1-small", dim=dim, n_heads=8).hidden_dim
    else:
        source, decisive = "MiniMind-3", ["rope_theta", "norm_eps"]
        assumed = dict(rope_theta=1e6, norm_eps=1e-6)
        if fields["use_moe"]:
            decisive += ["num_experts_per_tok", "norm_top1_prob"]
            assumed |= dict(num_experts_per_tok=1, norm_top1_prob=True)
        head_dim = norm.numel()
        fields |= dict(qk_norm=True, head_dim=head_dim, n_heads=q_dim // head_dim, n_kv_heads=kv_dim // head_dim)
        fits = (8 * head_dim, q_dim, 2 * kv_dim, n_shared) == (dim, dim, dim, 0)
        fits = fits and hidden_dim == math.ceil(dim * math.pi / 64) * 64
        if head is not None and not torch.equal(head, embedding):
            fields["tie_word_embeddings"] = False
            notes.append(f"{LLAMA_OUTPUT} differs from the embedding: it is a matrix of its own")
    if not fits:
        raise _ambiguous(path, f"the names are those of {source}, the shapes are not", decisive, fields)
    return _config(fields | assumed, path, notes, f"as in {source}")


def _our_name(name: str) -> str:
    """Return our name of a weight with one of Llama's names."""
    for theirs, ours in (
        ("model.embed_tokens", "tok_embeddings"), ("model.", ""), (".mlp.", ".feed_forward."),
        (".self_attn.", ".attention."), (".q_proj", ".wq"), (".k_proj", ".wk"), ("gate_proj", "w1"),
        ("down_proj", "w2"), ("up_proj", "w3"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def _shapes(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the fields of LMConfig that the shapes show, and the widths of all queries and of all keys."""
    n_experts = sum(bool(_EXPERT.fullmatch(name)) for name in state)
    first = "layers.0.feed_forward." + ("experts.0." if n_experts else "") + "w1.weight"
    keys, queries = "layers.0.attention.wk.weight", "layers.0.attention.wq.weight"
    missing = [name for name in (keys, queries, first) if name not in state or not state[name].dim()]
    if missing:
        raise UserError(f"{path} is not a MiniMind: missing: {', '.join(missing)}; it holds {list_names(list(state))}")
    vocab_size, dim = state[EMBEDDING].shape
    layers = {match[1] for name in state if (match := _LAYER.match(name))}
    hidden_dim = len(state[first])
    fields: dict[str, Any] = dict(
        dim=dim, n_layers=len(layers), vocab_size=vocab_size, hidden_dim=hidden_dim, use_moe=n_experts > 0
    )
    if n_experts:
        shared = state.get("layers.0.feed_forward.shared_experts.w1.weight")
        if shared is not None and len(shared) % hidden_dim:
            raise UserError(
                f"{path}: the shared experts are {len(shared)} wide, not a multiple of the experts' {hidden_dim}"
            )
        n_shared = 0 if shared is None else len(shared) // hidden_dim
        fields |= dict(n_routed_experts=n_experts, n_shared_experts=n_shared, num_experts_per_tok=min(2, n_experts))
    return fields, len(state[queries]), len(state[keys])


def _ambiguous(path: Path, reason: str, decisive: list[str], fields: dict[str, Any]) -> UserError:
    config = dict.fromkeys(decisive, "?") | {name: value for name, value in fields.items() if name not in decisive}
    return UserError(
        f"{path}: {reason}; write the configuration to {path.with_suffix('.json').name} beside it, values for the question "
        f"marks: {json.dumps({'config': config})}"
    )


def _config(fields: dict[str, Any], path: Path, notes: list[str], source: str) -> LMConfig:
    """Return the configuration, and note what was found and what was assumed."""
    try:
        config = LMConfig(**fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    found = f"no JSON beside it, read from the shapes: dim {config.dim}, {config.n_layers} layers"
    found += f", {config.vocab_size} tokens"
    if config.use_moe:
        found += f", {config.n_routed_experts} routed experts, {config.n_shared_experts} shared"
        found += f" (of width {config.hidden_dim})"
    notes.append(found)
    unseen = f"{config.n_heads} heads, {config.n_kv_heads} for keys"
    if config.qk_norm:  # its norms show the heads
        unseen = f"norm_eps {config.norm_eps:g}"
    assumed = f"assumed: {unseen}, rope_theta {config.rope_theta:g} ({source})"
    notes.append(assumed + (f", {config.num_experts_per_tok} experts per token" if config.use_moe else ""))
    return config


def _heads(dim: int, n_layers: int, kv_dim: int, use_moe: bool, pos_cis: Tensor | None) -> tuple[int, float, str]:
    """Return the number of query heads (0: unknown), rope_theta, and their source.

    The matrices do not show them, but an old position table does; and the published families differ in the keys' width.
    """
    if pos_cis is not None and pos_cis.dim() == 2 and pos_cis.shape[1] > 0:
        pairs, theta = pos_cis.shape[1], 1e4  # (positions, head_dim / 2)
        if pos_cis.is_complex() and len(pos_cis) > 1 and pairs > 1:
            slowest = pos_cis[1, -1].angle().item()  # theta ** -((pairs - 1) / pairs)
            theta = float(f"{slowest ** (-pairs / (pairs - 1)):.4g}") if slowest > 0 else 0.0
        return dim // (2 * pairs), theta, "from the table pos_cis"
    for name in PRESETS:
        known = preset(name)
        same = (known.dim, known.n_layers, known.use_moe) == (dim, n_layers, use_moe)
        if same and known.n_kv_heads * known.head_dim == kv_dim:
            return known.n_heads, known.rope_theta, f"as in {name}"
    if kv_dim * 4 == dim:
        return 8, 1e6, "as in MiniMind2 of February 2025"
    return 16 if kv_dim * 2 == dim else 0, 1e4, "as in MiniMind-v1"
