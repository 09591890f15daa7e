"""model/rope.py: scaled rotations are those of transformers, short texts stay as they are, decoding follows the length."""

from __future__ import annotations

import math

import pytest
import torch
from decoding import generate_ids
from tolerances import assert_logits_close, rounding
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export.huggingface import read_folder, write_llama, write_minimind
from export.self_check import compare_folder
from inference.backends import TorchModel
from inference.generator import BatchGenerator, generate
from inference.kernels.decode_weights import DecodeWeights
from inference.options import SamplingParams
from model.architecture import ROPE_SCALING_METHODS, parse_rope_scaling
from model.LMConfig import LMConfig
from model.model import Transformer
from model.rope import DynamicRopeScaling, RopeScaling, doublings, rope_tables, scaled_frequencies
from model.tokenizer import TOKENIZER_DIR
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

VOCAB, TRAINED = 97, 16
methods = pytest.mark.parametrize("method", ROPE_SCALING_METHODS)


def make(use_moe: bool = False, **fields) -> Transformer:
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, initializer_range=0.2, max_seq_len=TRAINED)
    return Transformer(LMConfig(**(shape | fields), vocab_size=VOCAB, use_moe=use_moe)).eval()


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def plain_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def frequencies(method: str, factor, original: int, head_dim: int = 32, theta: float = 1e4):
    return scaled_frequencies(
        plain_frequencies(head_dim, theta), head_dim, theta, RopeScaling(method, factor, original)
    )


# ---- formulas


@pytest.mark.parametrize("head_dim, theta, original", [(32, 1e4, 512), (64, 1e4, 512), (128, 5e5, 4096), (48, 1e3, 64)])
@pytest.mark.parametrize("factor", [1.5, 4.0, 8.0])
@methods
def test_frequencies_are_those_of_transformers(method, factor, head_dim, theta, original):
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=original,
        rope_parameters={
            "linear": {"rope_type": "linear", "factor": factor, "rope_theta": theta},
            # Of a text `factor` times as long; its own factor of 1 makes that all.
            "ntk": {"rope_type": "dynamic", "factor": 1.0, "rope_theta": theta},
            "yarn": {
                "rope_type": "yarn",
                "factor": factor,
                "rope_theta": theta,
                "original_max_position_embeddings": original,
            },
        }[method],
    )
    name = "dynamic" if method == "ntk" else method
    seq_len = round(original * factor) if method == "ntk" else None
    expected, attention_factor = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), seq_len=seq_len)
    ours, our_amplitude = frequencies(method, factor, original, head_dim, theta)
    torch.testing.assert_close(
        ours[0], expected, rtol=rounding(depth=16), atol=0
    )  # a power has the error of its exponent, up to log(theta)
    assert our_amplitude.item() == pytest.approx(attention_factor, rel=rounding())


def test_what_the_papers_say():
    plain = plain_frequencies(32, 1e4)
    torch.testing.assert_close(frequencies("linear", 4.0, 512)[0][0], plain / 4)
    ntk = frequencies("ntk", 4.0, 512)[0][0]
    assert ntk[0] == plain[0]
    torch.testing.assert_close(ntk[-1], plain[-1] / 4)  # the exponent d / (d - 2) is chosen for that
    scaled, attention_factor = frequencies("yarn", 4.0, 512)
    turns = 512 * plain / (2 * math.pi)
    assert (scaled[0] == plain)[turns > 32].all()
    torch.testing.assert_close(scaled[0][turns < 1], plain[turns < 1] / 4)
    ratio = scaled[0] / plain
    assert (ratio.diff() <= 0).all() and ((ratio > 0.25) & (ratio < 1)).any()  # and a ramp between
    assert attention_factor.item() == pytest.approx(0.1 * math.log(4) + 1)  # sqrt(1 / t)


@methods
def test_a_factor_of_1_changes_no_bit(method):
    positions = torch.arange(600)[None]
    plain = rope_tables(positions, 32, 1e4)
    for factor in (1.0, torch.ones(1)):
        scaled = rope_tables(positions, 32, 1e4, RopeScaling(method, factor, 512))
        assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    # Nor in rows beside others.
    both = rope_tables(positions.expand(2, -1), 32, 1e4, RopeScaling(method, torch.tensor([1.0, 2.0]), 512))
    alone = rope_tables(positions, 32, 1e4, RopeScaling(method, 2.0, 512))
    for rows, first, second in zip(both, plain, alone, strict=True):
        assert torch.equal(rows[:1], first) and torch.equal(rows[1:], second) and not torch.equal(first, second)


def test_scalings_that_are_none():
    assert parse_rope_scaling("yarn") == ("yarn", None) and parse_rope_scaling("linear:2.5") == ("linear", 2.5)
    for text in ("", "longrope", "yarn:", "yarn:x", "yarn:0.5", "yarn:nan", "yarn:inf", "yarn:4:4", "4"):
        with pytest.raises(ValueError, match="rope_scaling=.*yarn:4"):
            parse_rope_scaling(text)
    with pytest.raises(ValueError, match="unknown RoPE scaling 'x'; known: linear, ntk, yarn"):
        frequencies("x", 2.0, 512)


# ---- which factor


def test_doublings():
    assert [doublings(f) for f in (2, 2.5, 4, 8, 9)] == [(2,), (2, 2.5), (2, 4), (2, 4, 8), (2, 4, 8, 9)]


def test_the_factor_follows_the_length():
    dynamic = LMConfig(max_seq_len=512).dynamic_rope_scaling("yarn", max_len=1500)
    assert dynamic == DynamicRopeScaling("yarn", 512, 512, 1.0, (2.0, 1500 / 512))
    assert [dynamic.factor(n) for n in (1, 512, 513, 1024, 1025, 1500, 9999)] == [1, 1, 2, 2, *[1500 / 512] * 3]
    fixed = LMConfig(max_seq_len=512).dynamic_rope_scaling("ntk", 4.0)
    assert [fixed.factor(n) for n in (512, 513, 2048, 5000)] == [1, 4, 4, 4]
    # Trained with scaling already: that is what short texts get, and where further factors begin.
    trained = dict(max_seq_len=2048, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    further = LMConfig(**trained).dynamic_rope_scaling("yarn", max_len=8192)
    assert [further.factor(n) for n in (5, 2048, 2049, 8192)] == [4, 4, 8, 16] and further.original == 512


def test_extensions_that_make_no_sense():
    config = LMConfig(max_seq_len=512)
    for arguments, message in (
        (("yarn",), "needs a length: set max_seq_len=N, or a factor"),
        (("yarn", None, 512), "for texts longer than the 512 tokens"),
        (("yarn", 1.0), "for texts longer than the 512 tokens"),
        (("yarn", 2.0, 2048), "reaches 1024 tokens .* max_seq_len=2048 is more"),
    ):
        with pytest.raises(ValueError, match=message):
            config.dynamic_rope_scaling(*arguments)
    trained = LMConfig(max_seq_len=2048, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="was trained with yarn scaling"):
        trained.dynamic_rope_scaling("linear", 2.0)
    with pytest.raises(ValueError, match="head dimension of at least 4"):
        LMConfig(dim=8, n_heads=4, n_kv_heads=2).dynamic_rope_scaling("ntk", 2.0)
    with pytest.raises(ValueError, match="a rope_theta above 1"):
        LMConfig(rope_theta=0.5).dynamic_rope_scaling("yarn", 2.0)


# ---- decoding


@torch.no_grad()
def recompute(model: Transformer, prompt: list[int], n: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits, the whole sequence anew for each, scaled as its length asks for."""
    ids, rows = list(prompt), []
    for _ in range(n):
        factor = model.dynamic_rope_scaling.factor(len(ids))
        scaling = model.dynamic_rope_scaling.scaling(factor) if factor > 1 else None
        rows.append(model(torch.tensor([ids]), use_cache=False, rope_scaling=scaling).logits[0, -1])
        ids.append(rows[-1].argmax().item())
    return ids[len(prompt) :], torch.stack(rows)


@pytest.mark.parametrize("use_moe", [False, True])
@methods
def test_cached_is_uncached_in_a_ragged_batch_that_outgrows_the_training(method, use_moe):
    model, prompts = make(use_moe), make_prompts(3, 17, 9, 16, 40, 70)
    unscaled = generate_ids(model, prompts, SamplingParams(max_new_tokens=40), eos_id=None, max_len=100)
    model.dynamic_rope_scaling = model.config.dynamic_rope_scaling(method, max_len=100)
    plain = [recompute(model, prompt, 30) for prompt in prompts]
    sampling = SamplingParams(max_new_tokens=30, logprobs=0)
    # The fast step knows only the rotation of training: it has to leave the others to the model.
    backend = TorchModel(DecodeWeights(model), compiled=False)
    for max_rows, step in ((1, None), (2, None), (6, None), (2, backend)):
        events = list(generate(model, prompts, sampling, eos_id=None, max_len=100, max_rows=max_rows, backend=step))
        for key, (tokens, logits) in enumerate(plain):
            own = [event for event in events if event.key == key]
            assert [event.token for event in own] == tokens
            expected = logits.log_softmax(-1)[range(30), tokens]
            assert_logits_close(torch.tensor([e.logprob for e in own]), expected, model.config)
    # RopeScaling does something beyond the trained length, and nothing before: the text so far is <= 16 tokens there.
    for prompt, (tokens, _), before in zip(prompts, plain, unscaled, strict=True):
        short = max(TRAINED + 1 - len(prompt), 0)
        assert tokens[:short] == before[:short]
    assert any(tokens != before[:30] for (tokens, _), before in zip(plain, unscaled, strict=True))


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_fast_decoding_knows_the_scaling_of_the_training(method):
    model = Transformer(
        LMConfig(**(make().config.own_fields() | {"rope_scaling": {"rope_type": method, "factor": 4.0}}))
    )
    model.eval()
    prompts, sampling = make_prompts(3, 17), SamplingParams(max_new_tokens=12)
    plain = generate_ids(model, prompts, sampling, eos_id=None, max_len=64)
    backend = TorchModel(DecodeWeights(model), compiled=False)
    assert generate_ids(model, prompts, sampling, eos_id=None, max_len=64, backend=backend) == plain


@methods
def test_short_texts_stay_as_they_are_to_the_bit(method):
    model, prompts = make(), make_prompts(2, 8, 6)
    asked = SamplingParams(max_new_tokens=8, logprobs=5)
    plain = list(generate(model, prompts, asked, eos_id=None))
    model.dynamic_rope_scaling = model.config.dynamic_rope_scaling(method, max_len=64)
    assert list(generate(model, prompts, asked, eos_id=None, max_len=64)) == plain

    # Also beside a long one, whose rotations are others: the same events, up to the rounding of another batch size.
    decoder = BatchGenerator(model, 4, 64, eos_id=None)
    events = decoder.add([*make_prompts(50), *prompts], [SamplingParams(max_new_tokens=9)] + [asked] * 3, [9, 0, 1, 2])
    while decoder.rows:
        events += decoder.step()
    for key in range(3):
        ours, alone = ([event for event in some if event.key == key] for some in (events, plain))
        assert [event.token for event in ours] == [event.token for event in alone]
        a, b = (torch.tensor([event.logprob for event in some]) for some in (ours, alone))
        assert_logits_close(a, b, model.config)


def test_a_row_is_computed_anew_only_where_its_factor_changes(monkeypatch):
    model = make()
    model.dynamic_rope_scaling = model.config.dynamic_rope_scaling("yarn", max_len=64)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(k["input_ids"].shape[1]) or forward(*a, **k))
    generate_ids(model, make_prompts(10), SamplingParams(max_new_tokens=50), eos_id=None, max_len=64)
    assert [n for n in calls if n > 1] == [10, 16, 32]


# ---- models that were trained with it


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_configuration():
    assert LMConfig().rope_scaling is None and LMConfig().scaling is None
    config = LMConfig(max_seq_len=2048, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert config.rope_scaling == YARN and config.scaling == RopeScaling("yarn", 4.0, 512)
    assert LMConfig(**config.own_fields()).own_fields() == config.own_fields()
    assert config.architecture() != LMConfig(max_seq_len=2048).architecture()
    for wrong, message in (
        ("yarn:4", "must be like"),
        ({"rope_type": "llama3", "factor": 2.0}, "llama3: a model is trained with linear or yarn"),
        ({"rope_type": "ntk", "factor": 4.0}, "that is rope_theta=43873"),
        ({"rope_type": "yarn"}, "factor None must be a number"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor 0.5 must be a number of at least 1"),
        ({"rope_type": "yarn", "factor": math.inf}, "factor inf"),
        (YARN | {"beta_fast": 1}, "unknown: beta_fast"),
        (YARN | {"original_max_position_embeddings": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LMConfig(rope_scaling=wrong)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_a_model_trained_with_scaling(method, tmp_path):
    """It scales texts of every length, packed as well, in training as in decoding, and says so in its file."""
    scaling = {"rope_type": method, "factor": 4.0}
    model, plain = make(max_seq_len=64, rope_scaling=scaling), make(max_seq_len=64)
    (ids,) = make_prompts(30)
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(row).logits
        assert not torch.allclose(logits, plain(row).logits, atol=1e-2)
        assert torch.equal(logits, plain(row, rope_scaling=model.config.scaling).logits)
        positions = torch.tensor([[*range(12), *range(18)]])
        packed = model(row, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(row[:, :12]).logits, model(row[:, 12:]).logits], 1)
        assert_logits_close(packed, apart, model.config)
        greedy = generate_ids(model, [ids], SamplingParams(max_new_tokens=20), eos_id=None)[0]
        whole = model(torch.tensor([ids + greedy]), use_cache=False).logits[0, 29:-1].argmax(-1)
        assert whole.tolist() == greedy

    save_checkpoint(tmp_path / "a.pth", model, info={})
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert loaded.config.rope_scaling == scaling | {"original_max_position_embeddings": 16}
    assert torch.equal(loaded.model(row).logits, logits)
    with pytest.raises(ValueError, match="another architecture.*rope_scaling"):
        load_checkpoint(tmp_path / "a.pth", overrides={"rope_scaling": {"rope_type": method, "factor": 2.0}})


def test_extending_a_checkpoint(tmp_path):
    """Training on at a longer context: a file without scaling may get it, if the lengths fit."""
    save_checkpoint(tmp_path / "a.pth", make(), info={})
    wanted = {"rope_type": "yarn", "factor": 4.0}
    longer = load_checkpoint(tmp_path / "a.pth", overrides={"max_seq_len": 64, "rope_scaling": wanted})
    assert longer.config.rope_scaling == wanted | {"original_max_position_embeddings": TRAINED}
    with pytest.raises(ValueError, match="trained at 16 tokens; rope_scaling=yarn:4 makes that 64, not max_seq_len=32"):
        load_checkpoint(tmp_path / "a.pth", overrides={"max_seq_len": 32, "rope_scaling": wanted})
    with pytest.raises(ValueError, match="not max_seq_len=16"):
        load_checkpoint(tmp_path / "a.pth", overrides={"rope_scaling": wanted})


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_exports_have_it(method, use_moe, tmp_path):
    model = make(use_moe, max_seq_len=64, rope_scaling={"rope_type": method, "factor": 4.0})
    description = {"config": model.config.own_fields()}
    (row,) = make_prompts(60)
    kinds = {"llama": write_llama}
    if method == "yarn" and not use_moe:  # its code runs in a process of its own, which takes seconds
        kinds["minimind"] = write_minimind
    for kind, write in kinds.items():
        folder = tmp_path / kind
        folder.mkdir()
        write(folder, model, TOKENIZER_DIR, torch.float32, description)
        compare_folder(folder, model, [row]).check()
        assert read_folder(folder).config.own_fields() == model.config.own_fields()
    (tmp_path / "llama" / "minimind.json").unlink()  # transformers' own configuration is enough
    assert read_folder(tmp_path / "llama").config.rope_scaling == model.config.rope_scaling


def test_gguf_refuses_it_by_name(tmp_path):
    from export.gguf import write_gguf

    model = make(max_seq_len=64, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="RoPE scaling .yarn., which is not exported to GGUF"):
        write_gguf(tmp_path / "a.gguf", model, None, "f32", "a")
