"""export/: an exported model computes the same elsewhere, can be read back unchanged, and is complete or absent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import generate_ids
from gguf import GGUFReader
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from tolerances import rounding
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from common.files import atomic_folder
from export.exporter import read_ceval
from export.gguf import (
    check_splitting,
    compare_gguf,
    gguf_architecture,
    modelfile,
    round_to,
    write_gguf,
)
from export.huggingface import (
    check_target,
    config_from_llama,
    describe,
    from_stock_state,
    llama_config,
    read_folder,
    to_llama_state,
    write_llama,
    write_minimind,
)
from export.model_card import model_card
from export.onnx import compare_onnx, write_onnx
from export.self_check import (
    SAMPLE_TEXTS,
    Agreement,
    compare_folder,
    folder_logits,
    kl_divergence,
    largest_difference,
    model_logits,
    sample_rows,
)
from inference.options import SamplingParams
from model.chat_format import render_chat
from model.families import to_halves, to_pairs
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import TOKENIZER_DIR, load_tokenizer
from model.weights_file import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
# Larger weights than usual: logits of about 6, as after training, so that mistakes and rounding show.
TINY = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, max_seq_len=256, initializer_range=0.15)
KINDS = {
    "dense": {},
    "dense, heads and output of their own": dict(head_dim=16, tie_word_embeddings=False),
    "moe": dict(use_moe=True),
    "moe, no shared": dict(use_moe=True, n_shared_experts=0, n_routed_experts=3),
    "moe, top-1": dict(use_moe=True, num_experts_per_tok=1, n_shared_experts=1),
    "moe, as they are": dict(use_moe=True, norm_topk_prob=False),
}
NO_GGUF = {
    "moe, biases": dict(use_moe=True, router_bias_rate=0.001),
    "normed heads": dict(qk_norm=True, head_dim=16, tie_word_embeddings=False),
    "moe, normed heads": dict(use_moe=True, qk_norm=True, n_shared_experts=0),
    "moe, normed heads, top-1": dict(
        use_moe=True, qk_norm=True, n_shared_experts=0, num_experts_per_tok=1, norm_top1_prob=True
    ),
}
TYPE_BITS = {"f32": 32, "f16": 16, "q8_0": 8.5}
CHATS = [
    [{"role": "user", "content": "你好，你是谁？"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?\n\nShow it."}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello! 🙂"},
        {"role": "user", "content": "  spaces  "},
    ],
    [
        {"role": "system", "content": "Be brief.", "tools": [{"name": "add"}]},
        {"role": "user", "content": "2 + 2 = ?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "A sum.",
            "tool_calls": [{"name": "add", "arguments": {"x": 2}}],
        },
        {"role": "tool", "content": "4"},
    ],
]


def make(**fields) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(LMConfig(**(TINY | fields))).eval()
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if "gate.bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def checkpoint(model: Transformer, **info) -> Checkpoint:
    return Checkpoint(model, model.config, info, Path("out/full_sft_64.pth"), "0" * 16)


def state_equal(a: Transformer, b: Transformer) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def exported(folder: Path, model: Transformer, write=write_llama, dtype=torch.float32, **info) -> Path:
    check_target(folder)
    with atomic_folder(folder, hidden=False) as tmp:
        write(tmp, model, TOKENIZER_DIR, dtype, describe(checkpoint(model, **info), str(dtype)[6:]))
    return folder


def greedy(model, row: list[int], n: int = 32) -> list[int]:
    """n likeliest tokens after `row`, computed without a cache and without stopping."""
    ids = list(row)
    with torch.no_grad():
        for _ in range(n):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(row) :]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return sample_rows(tokenizer, None, LMConfig(**TINY))


# ---- llama


def test_rows_go_there_and_back():
    weight = torch.arange(2 * 6 * 3).view(12, 3)  # 2 heads of 6
    halves = to_halves(weight, 2)
    assert halves[:, 0].div(3, rounding_mode="floor").tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(to_pairs(halves, 2), weight)


@pytest.mark.parametrize("kind", [*KINDS, *NO_GGUF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_folder_computes_the_same_and_comes_back(kind, dtype, tmp_path, rows):
    fields = (KINDS | NO_GGUF)[kind]
    model = make(**fields, rope_theta=50_000.0 if kind == "moe" else 10_000.0)
    folder = exported(tmp_path / "x-llama", model, dtype=dtype, stage="pretrain", step=3)
    agreement = compare_folder(folder, model, rows)
    agreement.check()
    assert agreement.tolerance == 1e-4
    assert (agreement.kl is None) == (dtype == torch.float32)
    back = read_folder(folder)
    assert state_equal(back.model, make(**fields).to(dtype))
    assert back.config.own_fields() == model.config.own_fields()
    assert back.info == {"stage": "pretrain", "step": 3}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_mistake_in_the_rows_is_seen(tmp_path, rows):
    model = make()
    folder = exported(tmp_path / "x", model)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = to_pairs(weights[name], model.config.n_kv_heads)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not compute what its source does"):
        compare_folder(folder, model, rows).check()


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_transformers_must_find_every_weight(change, tmp_path, rows):
    folder = exported(tmp_path / "x", make())
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["model.layers.0.mlp.up_proj.weight"]
    else:
        weights["model.layers.0.mlp.bias"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s){change}.*model.layers.0.mlp"):
        folder_logits(folder, rows[:1])
    with pytest.raises(ValueError, match="model.layers.0.mlp"):
        read_folder(folder)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_generation_is_the_same_everywhere(kind, tmp_path, tokenizer, rows):
    model = make(**KINDS[kind])
    folder = exported(tmp_path / "x", model)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == ("LlamaForCausalLM" if kind == "dense" else "Ernie4_5_MoeForCausalLM")
    prompts = [row[:20] for row in rows[:3]]
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        settings = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False)
        a = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
        b = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
        assert a.shape == (1, 52) and a.tolist() == b.tolist()
    settings = SamplingParams(temperature=0, max_new_tokens=32)
    for prompt, answer in zip(prompts, generate_ids(model, prompts, settings), strict=True):
        expected = greedy(theirs, prompt)
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert [token for token in answer if token != 2] == expected


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_export_is_as_large_as_its_parameters(kind, tmp_path):
    model = make(**KINDS[kind])
    bytes_of_weights = 4 * sum(parameter.numel() for parameter in model.parameters())  # the tied pair once
    for write in (write_llama, write_minimind):
        folder = exported(tmp_path / write.__name__, model, write)
        overhead = (folder / "model.safetensors").stat().st_size - bytes_of_weights
        assert 0 < overhead < 16_000
        names = load_file(folder / "model.safetensors").keys()
        assert not {"lm_head.weight", "output.weight"} & names


def test_tokenizer_and_chat_template_travel_along(tmp_path, tokenizer):
    folder = exported(tmp_path / "x", make())
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in SAMPLE_TEXTS:
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    for chat in CHATS:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == render_chat(tokenizer, chat, add_generation_prompt=True)[0]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


def test_pipeline_runs(tmp_path):
    folder = exported(tmp_path / "x", make())
    answer = pipeline("text-generation", model=str(folder), device="cpu")(CHATS[0], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_what_transformers_saved_again_comes_back(tmp_path):
    for kind in ("dense", "moe"):
        model = make(**KINDS[kind])
        theirs = AutoModelForCausalLM.from_pretrained(exported(tmp_path / kind, model))
        theirs.save_pretrained(tmp_path / f"{kind}-again")
        back = read_folder(tmp_path / f"{kind}-again")
        assert state_equal(back.model, model)
        assert back.config.architecture() == model.config.architecture()


# ---- minimind


ALONE = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(os.path.exists(os.path.join(path, "LMConfig.py")) or path.endswith("minimind") for path in sys.path)
folder, prompt = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert "model.model" not in sys.modules
inputs = torch.tensor([prompt])
out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=32, min_new_tokens=32, do_sample=False)
chat = [{"role": "user", "content": "hi"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
print(json.dumps({"ids": out[0].tolist(), "chat": ids, "type": type(model).__name__}))
"""


@pytest.mark.parametrize("how", ["export", "save_pretrained"])
def test_minimind_folder_runs_without_this_repository(tmp_path, tokenizer, rows, how):
    model = make()
    if how == "export":
        folder = exported(tmp_path / "x-minimind", model, write_minimind)
    else:
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    assert state_equal(read_folder(folder).model, model)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    deprecated = "error:`rope_scaling`:FutureWarning"
    arguments = [sys.executable, "-W", deprecated, "-c", ALONE, str(folder), json.dumps(rows[0][:20])]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    inputs = torch.tensor([rows[0][:20]])
    settings = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False)
    expected = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    assert result["ids"] == expected[0].tolist() and result["type"] == "Transformer"
    assert result["chat"] == render_chat(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)[0]


def test_minimind_folder_is_bit_identical(tmp_path, rows):
    model = make(use_moe=True)
    folder = exported(tmp_path / "x-minimind", model, write_minimind, torch.bfloat16)
    agreement = compare_folder(folder, model, rows)
    agreement.check()
    assert agreement.largest == 0.0 == agreement.tolerance and agreement.kl > 0
    assert state_equal(read_folder(folder).model, model.to(torch.bfloat16))


def test_a_folder_without_its_code_is_refused(tmp_path, rows):
    model = make()
    folder = exported(tmp_path / "x", model, write_minimind)
    (folder / "rope.py").unlink()
    with pytest.raises(ValueError, match="does not load on its own.*rope"):
        compare_folder(folder, model, rows[:1])


# ---- gguf


@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, "f32") for kind in KINDS), ("dense", "f16"), ("moe, no shared", "q8_0")],
)
def test_gguf_holds_what_it_should(kind, form, tmp_path, tokenizer, rows):
    odd = form == "q8_0"  # rows of 80 are not blocks of 32
    model = make(**KINDS[kind], hidden_dim=80 if odd else 128)
    path = tmp_path / "x.gguf"
    write_gguf(path, model, tokenizer, form, "x")
    agreement = compare_gguf(path, model, form, rows[:4])
    agreement.check()
    assert agreement.largest == 0.0 and (agreement.kl is None) == (form == "f32")
    assert state_equal(round_to(model, form), model) == (form == "f32")
    weights = sum(parameter.numel() for parameter in model.parameters()) * TYPE_BITS[form] / 8
    assert 0 < path.stat().st_size - weights < 400_000  # the vocabulary, norms and gates in float32


def test_the_template_in_a_gguf_needs_no_extension_of_jinja(tmp_path, tokenizer):
    write_gguf(tmp_path / "x.gguf", make(), tokenizer, "f16", "x")
    field = GGUFReader(tmp_path / "x.gguf").fields["tokenizer.chat_template"]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(field.contents())
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert template.render(messages=chat, add_generation_prompt=True) == expected


def test_gguf_that_no_architecture_can_hold(tokenizer, tmp_path):
    names = {kind: gguf_architecture(LMConfig(**TINY, **fields)) for kind, fields in KINDS.items()}
    assert list(names.values()) == ["llama", "llama", "ernie4_5-moe", "ernie4_5-moe", "deepseek", "deepseek"]
    for fields, message in (
        (dict(use_moe=True, num_experts_per_tok=1, n_shared_experts=0), "num_experts_per_tok 1.*--format llama"),
        (dict(qk_norm=True), "qk_norm is not exported to GGUF; use --format minimind"),
        (NO_GGUF["moe, biases"], "router_bias_rate is not exported to GGUF; use --format llama or minimind"),
    ):
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / "x.gguf", make(**fields), tokenizer, "f32", "x")
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_a_tokenizer_that_splits_otherwise(tokenizer):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    check_splitting(content)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    with pytest.raises(ValueError, match="cannot split text"):
        check_splitting(content)


def test_modelfile_writes_the_chat_format():
    text = modelfile("x.f16.gguf", "x", LMConfig(**TINY))
    assert "FROM ./x.f16.gguf\n" in text and "PARAMETER num_ctx 256\n" in text
    assert (
        'TEMPLATE """{{- range .Messages }}{{ if eq .Role "system" }}{{ .Content }}{{ else }}<s>{{ .Role }}\n'
        '{{ .Content }}</s>\n{{ end }}{{ end }}<s>assistant\n"""\n' in text
    )


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind, tmp_path, tokenizer, rows):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = make(**KINDS[kind])
    path = tmp_path / "x.gguf"
    write_gguf(path, model, tokenizer, "f32", "x")
    settings = dict(n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)  # 0: float32
    llama = llama_cpp.Llama(str(path), **settings)
    try:
        for text, row in zip(SAMPLE_TEXTS, rows, strict=True):
            assert llama.tokenize(text.encode(), add_bos=False, special=False) == row[1:-1]
            llama.reset()
            llama.eval(row)
            theirs = torch.from_numpy(np.array(llama.scores[: len(row)]))
            assert largest_difference(model_logits(model, [row]), [theirs]) < 1e-3
        for row in rows[:3]:
            llama.reset()
            llama.eval(row[:20])
            answer = []
            for position in range(19, 51):
                answer.append(int(np.argmax(llama.scores[position])))
                llama.eval(answer[-1:])
            assert answer == greedy(model, row[:20])
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            llama.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>"
        )
        for chat in CHATS:
            prompt = formatter(messages=chat).prompt
            ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
            assert ids == render_chat(tokenizer, chat, add_generation_prompt=True)[0]
    finally:
        llama.close()


# ---- folders, whole or not there


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="wrong"), atomic_folder(tmp_path / "x", hidden=False) as folder:
        (folder / "half").write_text("half")
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_only_replaced_when_asked_and_only_an_export(tmp_path):
    folder = exported(tmp_path / "x", make(), step=1)
    with pytest.raises(ValueError, match="exists; replace it with --overwrite"):
        exported(folder, make())
    check_target(folder, overwrite=True)
    with atomic_folder(folder, hidden=False) as tmp:
        (tmp / "minimind.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["minimind.json"]
    with pytest.raises(ValueError), atomic_folder(folder, hidden=False):
        raise ValueError
    assert (folder / "minimind.json").exists() and list(tmp_path.iterdir()) == [folder]

    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not an exported model"):
        check_target(home, overwrite=True)
    assert (home / "thesis.tex").exists()


def test_killed_while_replacing(tmp_path):
    folder = exported(tmp_path / "x", make(), step=1)
    os.replace(folder, tmp_path / ".x.old")  # where a kill between the two renames leaves it
    with pytest.raises(ValueError, match="exists"):
        check_target(folder)
    assert read_folder(folder).info == {"step": 1}


# ---- what cannot be read


def test_damaged_folders_are_refused(tmp_path):
    folder = exported(tmp_path / "x", make())

    def refuses(match: str, name: str, content: bytes | None) -> None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_folder(copy)

    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    refuses("no config.json", "config.json", None)
    refuses("config.json is damaged", "config.json", b"{")
    refuses("a gpt2 is not an export", "config.json", json.dumps(config | {"model_type": "gpt2"}).encode())
    refuses("dim: 64 != 32|differ", "config.json", json.dumps(config | {"hidden_size": 32, "head_dim": 4}).encode())
    refuses("attention_bias: True", "config.json", json.dumps(config | {"attention_bias": True}).encode())
    refuses("no model.safetensors", "model.safetensors", None)
    refuses("damaged or cut off", "model.safetensors", weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")


def test_models_that_are_no_minimind_are_refused():
    config = LMConfig(**TINY, use_moe=True)
    content = llama_config(config, torch.float32)
    assert config_from_llama(content, "x").architecture() == config.architecture()
    for change in (
        {"moe_layer_start_index": 1},
        {"moe_norm_min": 0.5},
        {"use_bias": True},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            config_from_llama(content | change, "x")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    for change, message in (
        (yarn | {"rope_type": "llama3"}, "rope_scaling=llama3"),
        (yarn | {"beta_fast": 16}, "rope_scaling: unknown: beta_fast"),
    ):
        with pytest.raises(ValueError, match=message):
            config_from_llama(content | {"rope_parameters": change}, "x")
    with pytest.raises(ValueError, match="no architecture with qk_norm and shared experts"):
        llama_config(LMConfig(**TINY, use_moe=True, qk_norm=True), torch.float32)
    qwen = llama_config(LMConfig(**TINY, use_moe=True, qk_norm=True, n_shared_experts=0), torch.float32)
    for change in ({"use_sliding_window": True}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}):
        with pytest.raises(ValueError, match=next(iter(change))):
            config_from_llama(qwen | change, "x")
    state = to_llama_state(make(use_moe=True).state_dict(), config)
    state["model.layers.1.mlp.moe_statics.e_score_correction_bias"][0, 1] = 0.5
    with pytest.raises(ValueError, match="routers have biases"):
        from_stock_state(state, config, "x")
    untied = {"lm_head.weight": torch.zeros(6400, 64)}
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        from_stock_state(to_llama_state(make().state_dict(), LMConfig(**TINY)) | untied, LMConfig(**TINY), "x")


def test_weights_too_large_for_the_precision_are_refused(tmp_path, tokenizer):
    model = make()
    model.norm.weight.data[0] = 1e6
    for write in (write_llama, write_minimind):
        with pytest.raises(ValueError, match="too large for float16: norm.weight"):
            exported(tmp_path / "x", model, write, torch.float16)
    with pytest.raises(ValueError, match="too large for float16"):
        write_gguf(tmp_path / "x.gguf", model, tokenizer, "f16", "x")
    assert list(tmp_path.iterdir()) == []


# ---- agreement and card


def test_agreement_refuses():
    Agreement(10, 1e-5, 1e-4).check()
    for bad in (Agreement(10, 2e-4, 1e-4), Agreement(10, float("nan"), 1e-4), Agreement(10, float("inf"), 1e-4)):
        with pytest.raises(ValueError, match="does not compute"):
            bad.check()
    with pytest.raises(ValueError, match="too much is lost"):
        Agreement(10, 0.0, 0.0, 3.0, 0.2, 0.05).check()
    a, b = torch.zeros(3, 4), torch.zeros(3, 4)
    b[1, 2] = float("nan")
    assert largest_difference([a], [b]) == float("inf") and largest_difference([a], [a + 1]) == 1
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert kl_divergence([p.log()], [q.log()]) == pytest.approx(
        0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=rounding(depth=8)
    )


def test_onnx_computes_the_same_for_any_number_and_length_of_rows(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    model = Transformer(LMConfig(**TINY | {"n_layers": 1})).eval()
    file = tmp_path / "model.onnx"
    write_onnx(file, model)
    assert compare_onnx(file, model, [[1, 2], [1, *range(3, 200), 2]], 1e-5).largest < 1e-5
    session = onnxruntime.InferenceSession(str(file))
    ids = torch.randint(3, 6400, (3, 9))
    (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], dim=1)  # on the right, where nothing attends to it
    (longer,) = session.run(["logits"], {"input_ids": padded.numpy()})
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(longer)[:, :9], expected, atol=1e-5, rtol=1e-5)


def test_card_and_description_tell_no_paths(tmp_path):
    model = make(use_moe=True)
    info = {
        "stage": "full_sft",
        "step": 1200,
        "metrics": {"val_loss": 2.34567, "memory_gb": 77.7, "by_task": {}},
        "options": {
            "data_path": ["/home/someone/secret/chats.csv"],
            "learning_rate": 0.0005,
            "out_dir": "/home/someone",
        },
        "tokenizer_hash": "abc",
    }
    description = describe(checkpoint(model, **info, fingerprint="f"), "float32")
    assert "/home" not in json.dumps(description) and "fingerprint" not in description
    summary = tmp_path / "summary.json"
    groups = {"accuracy": 0.253, "questions": 1346}, {"STEM": {"accuracy": 0.3, "questions": 100}}
    summary.write_text(json.dumps(dict(zip(("overall", "categories"), groups, strict=True))))
    quiz = read_ceval(summary)
    agreement = Agreement(100, 1e-6, 1e-4)
    card = model_card("me/x", checkpoint(model, **info), description, "llama", agreement, ceval=quiz)
    assert card.startswith("---\nlanguage:\n- zh\n- en\nlibrary_name: transformers\n")
    for expected in (
        "chats.csv",
        "2.346",
        "25.3% of 1346 questions",
        "| STEM | 30.0%",
        "Ernie 4.5 MoE",
        "2 of 4",
        "1e-06",
    ):
        assert expected in card
    assert 'from_pretrained("me/x")' in card and "77.7" not in card
    assert "secret" not in card and "trust_remote_code" not in card
    card = model_card("x", checkpoint(model), {}, "minimind", agreement)
    assert "trust_remote_code=True" in card and "needs transformers 5" in card
    assert "ollama create x" in model_card("me/x", checkpoint(model), {}, "gguf", agreement, "x.gguf")
    for content in ("{}", "[]", '{"overall": 1, "categories": {}}'):
        summary.write_text(content)
        with pytest.raises(ValueError, match="has no accuracy"):
            read_ceval(summary)
