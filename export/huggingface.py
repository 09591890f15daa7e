"""Taking a MiniMind to other libraries, and back: names, order of the rows, configurations, folders.

    with new_folder("out/full_sft_512-llama") as folder:
        write_llama(folder, checkpoint.model, tokenizer_dir, torch.float32, describe(checkpoint, "float32"))
        compare_folder(folder, checkpoint.model, rows).check()        # export/self_check.py
    checkpoint = read_folder("out/full_sft_512-llama")

`llama` folders hold an architecture that transformers itself knows, so no code travels with them:

dense               LlamaForCausalLM. It rotates feature i together with i + head_dim / 2 where we rotate pairs, so the
                    rows of wq and wk are put in another order: the scores, sums over a head's features, stay the same.
mixture of experts  Ernie4_5_MoeForCausalLM: interleaved pairs like ours, softmax before the choice, weights renormalised,
                    and shared experts that are simply added. Qwen2-MoE's would be multiplied by a sigmoid, which comes
                    near 1 and never to it; DeepSeek's routers do not renormalise (V2) or have no softmax (V3).

`minimind` folders hold the weights under our names and the few files of code that compute with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files

from common.files import fsync_dir
from model.LMConfig import FIELD_TYPES, LMConfig, architecture_differences
from model.model import Transformer
from model.weights import EMBEDDING, OUTPUT, Checkpoint

HERE = Path(__file__).resolve().parent
WEIGHTS, CONFIG, DESCRIPTION = "model.safetensors", "config.json", "minimind.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
ROUTER_BIAS = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"  # Ernie's; ours has none, so zeros


# ---- folders


@contextlib.contextmanager
def new_folder(target: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its name when the block ends well and is removed otherwise."""
    target = Path(target)
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without a dot in front: transformers makes a module name of it when it loads code from there.
    tmp = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield tmp
        for path in tmp.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        fsync_dir(tmp)
        tmp.chmod(0o755)  # temporary folders are private
        old = _replaced(target)
        if target.exists():
            os.replace(target, old)
        os.replace(tmp, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    fsync_dir(target.parent)


def check_target(target: Path, overwrite: bool = False) -> None:
    """Raise ValueError if `target` must not be written: it exists, or is no export that could be replaced."""
    old = _replaced(target)
    if old.exists():  # killed while replacing: the name was given up and not yet taken again
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists; replace it with --overwrite, or choose another --output")
    if not target.is_dir() or (any(target.iterdir()) and not (target / DESCRIPTION).is_file()):
        raise ValueError(f"{target} is not an exported model (no {DESCRIPTION} in it), so it is not replaced")


def _replaced(target: Path) -> Path:
    """Where the old folder is while the new one takes its name: two folders cannot be exchanged in one go."""
    return target.with_name(f".{target.name}.old")


# ---- llama: names, rows, configuration


def to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Rows (heads * head_dim, in) from our order x0 x1 x2 x3 ... in every head to x0 x2 ... x1 x3 ..."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def llama_names(config: LMConfig) -> dict[str, str]:
    """Our name of every weight -> its name in Llama's or Ernie's files. The tied output is not among them."""
    names = {EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
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
        names[f"{ours}attention_norm.weight"] = f"{theirs}input_layernorm.weight"
        names[f"{ours}ffn_norm.weight"] = f"{theirs}post_attention_layernorm.weight"
        if config.use_moe:
            names[f"{ours}feed_forward.gate.weight"] = f"{theirs}mlp.gate.weight"
        for part in parts:
            for w, projection in projections.items():
                names[f"{ours}feed_forward.{part}{w}.weight"] = f"{theirs}mlp.{part}{projection}.weight"
    return names


def rows_to_reorder(config: LMConfig) -> dict[str, int]:
    """Our names of the weights whose rows Llama has in another order -> their number of heads."""
    if config.use_moe:  # Ernie rotates pairs like us
        return {}
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    return {f"layers.{i}.attention.{w}.weight": n for i in range(config.n_layers) for w, n in heads.items()}


def to_llama_state(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Our state dict under the names and in the order of Llama (dense) or Ernie 4.5 (mixture of experts)."""
    heads = rows_to_reorder(config)
    names = llama_names(config)
    new = {
        theirs: to_halves(state[ours], heads[ours]) if ours in heads else state[ours] for ours, theirs in names.items()
    }
    if config.use_moe:
        bias = torch.zeros(1, config.n_routed_experts)
        new |= {ROUTER_BIAS.format(i): bias.clone() for i in range(config.n_layers)}
    return new


def from_llama_state(state: dict[str, Tensor], config: LMConfig, where: Path | str) -> dict[str, Tensor]:
    """The inverse of `to_llama_state`. Raises ValueError for weights of theirs that ours has no place for."""
    heads, names = rows_to_reorder(config), llama_names(config)
    state = dict(state)
    missing = [theirs for theirs in names.values() if theirs not in state]
    if missing:
        raise ValueError(f"{where}: weights are missing: {_some(missing)}")
    ours = {}
    for name, theirs in names.items():
        weight = state.pop(theirs)
        if name in heads:
            if weight.dim() != 2 or len(weight) % (2 * heads[name]):
                raise ValueError(f"{where}: {theirs} {tuple(weight.shape)} does not divide into {heads[name]} heads")
            weight = to_pairs(weight, heads[name])
        ours[name] = weight
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, ours[EMBEDDING]):
        raise ValueError(f"{where}: lm_head.weight differs from the embedding; in a MiniMind they are one tensor")
    if config.use_moe:
        biases = [state.pop(ROUTER_BIAS.format(i), None) for i in range(config.n_layers)]
        if any(bias is not None and bias.any() for bias in biases):
            raise ValueError(f"{where}: the routers have biases (e_score_correction_bias), which a MiniMind has not")
    if state:
        raise ValueError(f"{where}: weights that a MiniMind has no place for: {_some(list(state))}")
    return ours


def renormalises(config: LMConfig) -> bool:
    """Whether the gate's weights are scaled to sum 1 (see `model.moe.Gate`)."""
    return config.norm_topk_prob and config.num_experts_per_tok > 1


def llama_config(config: LMConfig, dtype: torch.dtype) -> dict:
    """`config.json` of the stock architecture that computes the same."""
    rope = {"rope_type": "default", "rope_theta": float(config.rope_theta), **(config.rope_scaling or {})}
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_theta),  # for transformers before 5, vLLM, llama.cpp
        "rope_parameters": rope,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        **_token_ids(config),
        "dtype": dtype_name(dtype),
        "transformers_version": transformers.__version__,
    }
    if config.rope_scaling:
        content["rope_scaling"] = config.rope_scaling  # the older name, like rope_theta
    if config.use_moe:
        for name in ("attention_bias", "mlp_bias", "attention_dropout"):
            del content[name]
        content |= {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "use_bias": False,
            "moe_intermediate_size": config.hidden_dim,
            "moe_num_experts": config.n_routed_experts,
            "moe_num_shared_experts": config.n_shared_experts,
            "moe_k": config.num_experts_per_tok,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": config.n_layers - 1,
            "moe_layer_interval": 1,
            # The weights are divided by max(their sum, this). Probabilities sum to 1 at most: with 1 nothing changes.
            "moe_norm_min": 1e-12 if renormalises(config) else 1.0,
            "router_aux_loss_coef": config.aux_loss_alpha,
        }
    return content


def config_from_llama(content: dict, where: Path | str) -> LMConfig:
    """The LMConfig of a Llama's or Ernie's `config.json`. Raises ValueError naming what a MiniMind cannot be."""
    moe = content.get("model_type") == "ernie4_5_moe"
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # What is not known (YaRN's other settings) stays in, and LMConfig refuses it by name.
    scaling = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta")}
    n_layers, n_heads = content.get("num_hidden_layers"), content.get("num_attention_heads")
    fixed = {
        "hidden_act": ("silu", content.get("hidden_act", "silu")),
        "tie_word_embeddings": (True, content.get("tie_word_embeddings", moe)),
        "attention_bias": (False, content.get("attention_bias", False)),
        "mlp_bias": (False, content.get("mlp_bias", False)),
    }
    if isinstance(n_heads, int) and n_heads and isinstance(content.get("hidden_size"), int):
        head_dim = content["hidden_size"] // n_heads
        fixed["head_dim"] = (head_dim, content.get("head_dim") or head_dim)
    if moe:
        fixed |= {
            "use_bias": (False, content.get("use_bias", False)),
            "moe_layer_start_index": (0, content.get("moe_layer_start_index", 1)),
            "moe_layer_end_index": (n_layers, (content.get("moe_layer_end_index", -1) + 1) or n_layers),
            "moe_layer_interval": (1, content.get("moe_layer_interval", 1)),
            "moe_norm_min is 1, or next to 0": (True, content.get("moe_norm_min", 1e-12) in (1e-12, 1.0)),
        }
    wrong = [f"{name}: {value}, not {ours}" for name, (ours, value) in fixed.items() if value != ours]
    if wrong:
        raise ValueError(f"{where} is no model that a MiniMind can be: {'; '.join(wrong)}")
    try:
        fields = {
            "dim": content["hidden_size"],
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": content.get("num_key_value_heads") or n_heads,
            "vocab_size": content["vocab_size"],
            "hidden_dim": content["moe_intermediate_size" if moe else "intermediate_size"],
            "norm_eps": content["rms_norm_eps"],
            "max_seq_len": content["max_position_embeddings"],
            "rope_theta": rope.get("rope_theta", content.get("rope_theta", 10000.0)),
            "rope_scaling": None if rope_type == "default" else {"rope_type": rope_type} | scaling,
            "use_moe": moe,
        }
        if moe:
            fields |= {
                "num_experts_per_tok": content["moe_k"],
                "n_routed_experts": content["moe_num_experts"],
                "n_shared_experts": content["moe_num_shared_experts"],
                "norm_topk_prob": content["moe_norm_min"] < 1,
            }
        return LMConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be used ({error!r:.200})") from error


# ---- writing folders


def write_llama(
    folder: Path, model: Transformer, tokenizer_dir: Path, dtype: torch.dtype, description: dict
) -> dict[str, Tensor]:
    """Write the files that plain transformers, vLLM and llama.cpp's converter read; returns the weights written."""
    state = to_llama_state(export_state(model, dtype), model.config)
    _write_folder(folder, llama_config(model.config, dtype), model.config, state, tokenizer_dir, description)
    return state


def write_minimind(
    folder: Path, model: Transformer, tokenizer_dir: Path, dtype: torch.dtype, description: dict
) -> dict[str, Tensor]:
    """Write our weights with the code that runs them, for `trust_remote_code=True`; returns the weights written."""
    content = {
        "architectures": ["Transformer"],
        "model_type": LMConfig.model_type,
        "auto_map": {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.Transformer"},
        **model.config.own_fields(),
        "dtype": dtype_name(dtype),
        "transformers_version": transformers.__version__,
    }
    main = HERE / "model.py"
    for path in {main, *map(Path, get_relative_import_files(main))}:
        shutil.copyfile(path, folder / path.name)
    state = export_state(model, dtype)
    _write_folder(folder, content, model.config, state, tokenizer_dir, description)
    return state


def export_state(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by our names in `dtype`, the tied pair once. Raises ValueError for what `dtype` cannot hold."""
    state = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in model.state_dict().items()}
    if not torch.equal(state[EMBEDDING], state[OUTPUT]):
        raise ValueError(f"{OUTPUT} differs from {EMBEDDING}; in a MiniMind they are one tensor")
    del state[OUTPUT]
    broken = [name for name, weight in state.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"not finite, or too large for {dtype_name(dtype)}: {_some(broken)}; export as float32 or bfloat16"
        )
    return state


def describe(checkpoint: Checkpoint, dtype: str) -> dict:
    """What `minimind.json` says: the configuration and how the weights were made, without paths of this machine."""
    made = {key: value for key, value in checkpoint.info.items() if key not in ("config", "dtype", "fingerprint")}
    return {"config": checkpoint.config.own_fields(), "dtype": dtype, **_without_paths(made)}


def write_description(folder: Path, description: dict) -> None:
    _write_json(folder / DESCRIPTION, description)


def _write_folder(
    folder: Path, content: dict, config: LMConfig, state: dict[str, Tensor], tokenizer_dir: Path, description: dict
) -> None:
    _write_json(folder / CONFIG, content)
    _write_json(
        folder / "generation_config.json", _token_ids(config) | {"transformers_version": transformers.__version__}
    )
    write_description(folder, description)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / name, folder / name)
    # Bytes first, written here: the library's own writer turns a full disk into an error without its number.
    (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _token_ids(config: LMConfig) -> dict:
    return {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _without_paths(value):
    """A copy in which absolute paths are only their last part: what is published should not tell where it lay."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


# ---- reading folders


def read_folder(folder: Path | str) -> Checkpoint:
    """The model in an exported folder (`llama` or `minimind`), in the precision it is stored in.

    Also one that transformers has saved again after more training.
    Raises ValueError for anything missing, damaged, left over, or that a MiniMind has no place for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one that export_model.py made (llama or minimind)")
    content = read_json(folder / CONFIG)
    kind = content.get("model_type")
    description = read_json(folder / DESCRIPTION) if (folder / DESCRIPTION).exists() else {}
    if kind == LMConfig.model_type:
        own = {name: content[name] for name in FIELD_TYPES if name in content}
        try:
            config = LMConfig(**own)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} cannot be used: {error}") from error
    elif kind in ("llama", "ernie4_5_moe"):
        config = config_from_llama(content, folder / CONFIG)
    else:
        raise ValueError(
            f"{folder / CONFIG}: a {kind} is not an export of a MiniMind (minimind, llama or ernie4_5_moe)"
        )
    if "config" in description:  # what the architecture does not decide: dropout, initialisation, ...
        try:
            told = LMConfig(**description["config"])
        except (ValueError, TypeError) as error:
            raise ValueError(f'{folder / DESCRIPTION}: "config" cannot be used: {error}') from error
        # Where it makes no difference (top-1 never renormalises) a stock configuration does not say.
        if config.use_moe and renormalises(config) == renormalises(told):
            config.norm_topk_prob = told.norm_topk_prob
        differences = architecture_differences(config, told)
        if differences:
            raise ValueError(f"{folder}: {CONFIG} and {DESCRIPTION} differ: {', '.join(differences)}")
        config = told

    state = read_weights(folder / WEIGHTS)
    if kind != LMConfig.model_type:
        state = from_llama_state(state, config, folder / WEIGHTS)
    else:
        state.pop(OUTPUT, None)
    model = build(state, config, folder / WEIGHTS)
    info = {key: value for key, value in description.items() if key not in ("config", "dtype")}
    return Checkpoint(model, config, info, folder, fingerprint="")


def build(state: dict[str, Tensor], config: LMConfig, where: Path | str) -> Transformer:
    """A Transformer of exactly these weights (our names, without the tied output). ValueError if they do not fit."""
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items() if name != OUTPUT}
    missing, extra = [n for n in expected if n not in state], [n for n in state if n not in expected]
    wrong = [f"{n} {tuple(state[n].shape)}" for n in expected if n in state and state[n].shape != expected[n]]
    parts = {"missing": missing, "unexpected": extra, "of another shape": wrong}
    errors = [f"{what}: {_some(names)}" for what, names in parts.items() if names]
    if errors:
        raise ValueError(f"{where}: the weights do not fit their configuration; {'; '.join(errors)}")
    if len({weight.dtype for weight in state.values()}) > 1:
        raise ValueError(f"{where}: weights of several precisions; save them in one")
    model.load_state_dict(state | {OUTPUT: state[EMBEDDING]}, strict=True, assign=True)
    model.output.weight = model.tok_embeddings.weight
    return model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {path.parent}: it is not an exported folder, or not all of it") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); copy it again") from error


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {path.parent}: it is not an exported folder, or not all of it") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no object in it); copy it again")
    return content


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
