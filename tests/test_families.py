"""model/families.py: later MiniMinds load by their names and shapes, and compute what independent code computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_logits_close, rounding
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from export.huggingface import read_folder, write_llama, write_minimind
from export.self_check import compare_folder
from model.lora import add_adapter
from model.model import Transformer
from model.rope import RopeScaling, rope_tables, scaled_frequencies
from model.tokenizer import TOKENIZER_DIR
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

VOCAB = 61
COMMON = dict(
    vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=64, initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = COMMON | dict(hidden_size=64, intermediate_size=192, num_key_value_heads=2, rms_norm_eps=1e-5)
QWEN3 = COMMON | dict(
    hidden_size=64, intermediate_size=256, num_key_value_heads=4, rms_norm_eps=1e-6, head_dim=8, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MOE = dict(moe_intermediate_size=256, num_experts=4, num_experts_per_tok=1, norm_topk_prob=True)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListedExperts(nn.Module):
    """The mixture of MiniMind2: two of four experts, their probabilities scaled to sum 1, and a list of shared ones."""

    def __init__(self, dim: int, hidden: int, shared: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 4, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(4))
        self.shared_experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(shared))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.gate(x).softmax(-1)
        weights, chosen = probabilities.topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = sum(expert(x) for expert in self.shared_experts)
        for j, expert in enumerate(self.experts):
            out = out + expert(x) * ((chosen == j) * weights).sum(-1, keepdim=True)
        return out


def theirs(family: str) -> PreTrainedModel:
    """A model of another implementation with random weights, norms included."""
    torch.manual_seed(0)
    if family == "minimind2":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    elif family == "minimind2-moe":  # heads of 10, as the 80 of 640 no power of two
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | dict(hidden_size=80, intermediate_size=256)))
        for layer in model.model.layers:
            layer.mlp = ListedExperts(80, 256, shared=2)
    elif family == "minimind-3":
        model = Qwen3ForCausalLM(Qwen3Config(**QWEN3))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3, **MOE))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "mlp" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def published(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its weights as in the published file: every expert has matrices of its own."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for j, (gate, up) in enumerate(both.chunk(2) for both in tensor):
                state[name.replace("gate_up_proj", f"{j}.gate_proj.weight")] = gate.clone()
                state[name.replace("gate_up_proj", f"{j}.up_proj.weight")] = up.clone()
        elif name.endswith("experts.down_proj"):
            state |= {name.replace("down_proj", f"{j}.down_proj.weight"): t.clone() for j, t in enumerate(tensor)}
        else:
            state[name] = tensor
    return state


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


def assert_same(ours: Transformer, other: PreTrainedModel) -> None:
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = other(ids).logits
        assert expected.std() > 0.3
        assert_logits_close(ours(ids).logits, expected, ours.config)


FAMILIES = {
    "minimind2": dict(n_heads=8, n_kv_heads=2, norm_eps=1e-5),
    "minimind2-moe": dict(n_heads=8, n_kv_heads=2, norm_eps=1e-5, n_shared_experts=2, num_experts_per_tok=2),
    "minimind-3": dict(n_heads=8, n_kv_heads=4, norm_eps=1e-6, qk_norm=True),
    "minimind-3-moe": dict(
        n_kv_heads=4, qk_norm=True, n_shared_experts=0, num_experts_per_tok=1, renormalizes_top_k=True
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_a_published_file_computes_what_others_compute(tmp_path, family):
    other = theirs(family)
    checkpoint = load_checkpoint(save(tmp_path / "x.pth", published(other)))
    found = {name: getattr(checkpoint.config, name) for name in ["rope_theta", *FAMILIES[family]]}
    assert found == {"rope_theta": 1e6, **FAMILIES[family]}
    named = "MiniMind-3" if "3" in family else "MiniMind2 of April 2025"
    assumed = "norm_eps 1e-06" if "3" in family else "8 heads, 2 for keys"
    assert any(f"assumed: {assumed}, rope_theta 1e+06 (as in {named})" in note for note in checkpoint.notes)
    assert any("names of Llama" in note for note in checkpoint.notes)
    assert_same(checkpoint.model, other)


def test_keys_have_the_precision_of_values_with_autocast(tmp_path):
    """A norm's float32 weight would otherwise make queries and keys float32, and send them past the fast kernels."""
    model = load_checkpoint(save(tmp_path / "x.pth", published(theirs("minimind-3")))).model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = model(torch.arange(20)[None]).past_key_values.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


def test_what_torch_compile_and_transformers_make_of_the_names(tmp_path):
    """Prefixes of torch.compile; experts stacked into one tensor."""
    other = theirs("minimind-3-moe")
    assert any(name.endswith("experts.gate_up_proj") for name in other.state_dict())
    assert_same(load_checkpoint(save(tmp_path / "x.pth", other.state_dict())).model, other)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in published(other).items()}
    assert_same(load_checkpoint(save(tmp_path / "x.pth", compiled)).model, other)


@families
def test_fine_tuning_and_export(tmp_path, family):
    """A step of LoRA, the file that a stage would write, and a folder for transformers, which comes back."""
    base = load_checkpoint(save(tmp_path / "x.pth", published(theirs(family))))
    adapted = add_adapter(base.model, rank=2, alpha=4.0, dropout=0.0).train()
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = adapted(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    model = adapted.merge_and_unload().eval()
    save_checkpoint(tmp_path / "out" / "lora.pth", model, info={})
    again = load_checkpoint(tmp_path / "out" / "lora.pth")
    assert again.config.own_fields() == model.config.own_fields() and again.notes == []

    folder = tmp_path / "exported"
    folder.mkdir()
    write_llama(folder, again.model, TOKENIZER_DIR, torch.float32, {})
    compare_folder(folder, again.model, ids.tolist()).check()
    back = read_folder(folder).model
    assert back.config.architecture() == model.config.architecture()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["minimind2", "minimind-3", "minimind-3-moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_folders_of_transformers(tmp_path, family, tied):
    other = theirs(family)
    if not tied:
        other.config.tie_word_embeddings = False
        other.lm_head.weight = nn.Parameter(torch.randn_like(other.lm_head.weight))
    other.save_pretrained(tmp_path / "x")
    ours = read_folder(tmp_path / "x").model
    assert ours.config.tie_word_embeddings == tied
    assert_same(ours, other)


def test_an_output_of_its_own(tmp_path):
    """Only a MiniMind-3 may have one; it is saved and read like any other weight."""
    other = theirs("minimind-3")
    other.config.tie_word_embeddings = False
    other.lm_head.weight = nn.Parameter(torch.randn_like(other.lm_head.weight))
    checkpoint = load_checkpoint(save(tmp_path / "x.pth", published(other)))
    assert any("lm_head.weight differs from the embedding" in note for note in checkpoint.notes)
    assert_same(checkpoint.model, other)
    save_checkpoint(tmp_path / "y.pth", checkpoint.model, info={})
    assert_same(load_checkpoint(tmp_path / "y.pth").model, other)
    (tmp_path / "ours").mkdir()
    write_minimind(tmp_path / "ours", checkpoint.model, TOKENIZER_DIR, torch.float32, {})
    assert_same(read_folder(tmp_path / "ours").model, other)
    state = published(theirs("minimind2")) | {"lm_head.weight": torch.randn(VOCAB, 64)}
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding; in this MiniMind"):
        load_checkpoint(save(tmp_path / "z.pth", state))


@pytest.mark.parametrize(
    ("kind", "fields", "asked"),
    [
        ("llama", dict(intermediate_size=256), ["n_heads", "n_kv_heads", "rope_theta"]),
        ("llama", dict(num_key_value_heads=4), ["n_heads", "n_kv_heads", "rope_theta"]),
        ("qwen3", dict(num_key_value_heads=2), ["rope_theta", "norm_eps"]),
        ("qwen3", dict(head_dim=16), ["rope_theta", "norm_eps"]),
        (
            "qwen3_moe",
            dict(moe_intermediate_size=128),
            ["rope_theta", "norm_eps", "num_experts_per_tok", "norm_top1_prob"],
        ),
    ],
)
def test_shapes_of_no_family_are_asked_for(tmp_path, kind, fields, asked):
    """Names alone do not decide; with the JSON that the error shows, filled in, the file loads."""
    torch.manual_seed(0)
    if kind == "llama":
        other = LlamaForCausalLM(LlamaConfig(**LLAMA | fields)).eval()
    elif kind == "qwen3":
        other = Qwen3ForCausalLM(Qwen3Config(**QWEN3 | fields)).eval()
    else:
        other = Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3 | MOE | fields)).eval()
    path = save(tmp_path / "x.pth", published(other))
    with pytest.raises(ValueError, match="the shapes are not; write the configuration to x.json beside it") as caught:
        load_checkpoint(path)
    config = json.loads(str(caught.value)[str(caught.value).index("{") :])["config"]
    assert [name for name, value in config.items() if value == "?"] == asked
    heads = other.config.num_key_value_heads
    values = dict(
        n_heads=8, n_kv_heads=heads, rope_theta=1e6, norm_eps=1e-6, num_experts_per_tok=1, norm_top1_prob=True
    )
    filled = {name: values[name] if value == "?" else value for name, value in config.items()}
    path.with_suffix(".json").write_text(json.dumps({"config": filled}))
    assert_same(load_checkpoint(path).model, other)


def test_missing_and_unexpected_weights_are_named_as_in_the_file(tmp_path):
    state = published(theirs("minimind-3"))
    name = "model.layers.1.self_attn.k_norm.weight"
    with pytest.raises(ValueError, match=f"weights are missing: {name}$"):
        load_checkpoint(save(tmp_path / "x.pth", {key: value for key, value in state.items() if key != name}))
    with pytest.raises(ValueError, match="does not have: model.layers.0.mlp.bias$"):
        load_checkpoint(save(tmp_path / "x.pth", state | {"model.layers.0.mlp.bias": torch.zeros(3)}))


# ---- folders with the code of the authors, and their YaRN


def authors_config(family: str, **more) -> dict:
    config = LLAMA if "2" in family else QWEN3
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "initializer_range")}
    moe = dict(
        n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2, norm_topk_prob=True, scoring_func="softmax"
    )
    if family == "minimind2-moe":
        config |= dict(hidden_size=80, intermediate_size=256) | moe
    if family == "minimind-3-moe":
        config |= MOE
    more = {"rope_theta": 1e6, "rope_scaling": None, "hidden_act": "silu", "use_moe": "moe" in family} | more
    return {"architectures": ["MiniMindForCausalLM"], "model_type": "minimind"} | config | more


def authors_folder(folder: Path, state: dict[str, Tensor], config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@families
def test_folders_with_the_code_of_the_authors(tmp_path, family):
    other = theirs(family)
    assert_same(read_folder(authors_folder(tmp_path / "x", published(other), authors_config(family))).model, other)


YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1}


def test_their_yarn(tmp_path):
    """Queries and keys are not multiplied; the ramp ends at the last pair at the latest, which matters for a small base."""
    other = theirs("minimind-3")
    scaled = authors_config("minimind-3", rope_scaling=YARN | {"attention_factor": 1.0}, max_position_embeddings=32768)
    ours = read_folder(authors_folder(tmp_path / "x", published(other), scaled)).model
    assert ours.config.scaling == RopeScaling("yarn", 16, 2048, 1.0)

    head_dim, theta, factor, original = 96, 1e6, 16, 2048
    plain = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    turns = original * plain / (2 * math.pi)  # of every pair within the trained length
    first = math.floor(head_dim * math.log(original / (32 * 2 * math.pi)) / (2 * math.log(theta)))
    last = min(math.ceil(head_dim * math.log(original / (2 * math.pi)) / (2 * math.log(theta))), head_dim // 2 - 1)
    assert turns[first] >= 32 > turns[first + 1] and turns[last - 1] >= 1 > turns[last]
    share = ((torch.arange(head_dim // 2).double() - first) / (last - first)).clamp(0, 1)
    expected = plain * (1 - share + share / factor)
    frequencies, attention_factor = scaled_frequencies(
        plain.float(), head_dim, theta, RopeScaling("yarn", 16, 2048, 1.0)
    )
    torch.testing.assert_close(frequencies[0].double(), expected, rtol=rounding(depth=16), atol=0)
    assert attention_factor.item() == 1
    cos, sin = rope_tables(torch.arange(5)[None], head_dim, theta, RopeScaling("yarn", 16, 2048, 1.0))
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))

    for change, message in (
        ({"rope_theta": 20.0}, "scales the last pairs otherwise"),
        ({"rope_scaling": YARN | {"beta_fast": 4}}, "rope_scaling: unknown: beta_fast"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor 0 must be a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_folder(authors_folder(tmp_path / "x", published(other), scaled | change))
