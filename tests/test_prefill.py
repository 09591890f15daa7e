"""inference/kernels/prefill.py: the C++ kernel gives the model's logits in the requested precision, on every matrix unit."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from inference.kernels.loader import KernelUnavailable
from inference.kernels.prefill import PrefillModel, PrefillWeights, load_kernel
from model.LMConfig import preset
from model.model import Transformer

SHAPES = {
    "narrow": dict(dim=64, n_heads=4, n_kv_heads=2),  # heads of 16: half a tile
    "one pair": dict(dim=64, n_heads=2, n_kv_heads=1),
    "every head its own": dict(dim=96, n_heads=6, n_kv_heads=6),
    "three share": dict(dim=96, n_heads=6, n_kv_heads=2, hidden_dim=104),  # hidden features that fill no tile
    "heads of 48": dict(dim=192, n_heads=4, n_kv_heads=2),  # a tile and a half
    "heads of 128": dict(dim=256, n_heads=2, n_kv_heads=1),
    "deep": dict(dim=64, n_heads=2, n_kv_heads=1, hidden_dim=1408, n_layers=3),  # sums in several slabs
    "other angles": dict(dim=64, n_heads=2, n_kv_heads=1, rope_theta=50_000.0),
    "normed heads": dict(dim=64, n_heads=2, n_kv_heads=1, head_dim=48, qk_norm=True, tie_word_embeddings=False),
    "yarn": dict(dim=64, n_heads=2, n_kv_heads=1, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
}
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 70)


def make(**fields) -> Transformer:
    torch.manual_seed(0)
    fields = dict(n_layers=2, vocab_size=200, initializer_range=0.1) | fields
    model = Transformer(preset("toy", **fields)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # folded into matrices: must not be 1
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_texts(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(200) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def logits_of(model: Transformer, texts: list[list[int]], skip: int = 0) -> torch.Tensor:
    """(all tokens, vocab): the model itself, one text at a time."""
    return torch.cat([model(torch.tensor([text]), use_cache=False).logits[0, skip:] for text in texts])


def everywhere(texts: list[list[int]]) -> list[tuple[int, int]]:
    return [(i, t) for i, text in enumerate(texts) for t in range(len(text))]


def assert_close(found: torch.Tensor, expected: torch.Tensor, parts: int, n_layers: int = 3) -> None:
    """Operands are rounded to one or two numbers of bfloat16, and the errors of 6 operations a layer add up like noise."""
    assert found.shape == expected.shape
    error = (found - expected) / expected.std()
    average = 2 * (torch.finfo(torch.bfloat16).eps / 2) ** parts * (6 * n_layers + 2) ** 0.5
    assert float(error.square().mean().sqrt()) < average and float(error.abs().max()) < 8 * average


@pytest.fixture(
    params=[(), ("-mno-amx-bf16",), ("-mno-amx-bf16", "-mno-avx512bf16"), ("-mno-amx-bf16", "-mno-avx512f")]
)
def kernel(request):
    """The kernel as compiled for this CPU, and for lesser ones."""
    try:
        return load_kernel(*request.param)
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_models(shape, parts):
    model, texts = make(**SHAPES[shape]), make_texts()
    found = PrefillModel(PrefillWeights(model), parts).logits(texts, everywhere(texts))
    assert_close(found, logits_of(model, texts), parts)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", ["narrow", "three share", "heads of 48"])
@pytest.mark.parametrize("length", [1, 31, 32, 50])
def test_texts_go_on_from_a_beginning(shape, length, parts):
    model, texts, (beginning,) = make(**SHAPES[shape]), make_texts(), make_texts([length], seed=1)
    fast = PrefillModel(PrefillWeights(model), parts)
    found = fast.logits(texts, everywhere(texts), fast.read(beginning))
    assert_close(found, logits_of(model, [beginning + text for text in texts], skip=length), parts)


@pytest.mark.parametrize("parts", [1, 2])
def test_every_matrix_unit(kernel, parts):
    model, texts, (beginning,) = make(**SHAPES["heads of 48"]), make_texts(), make_texts([40], seed=1)
    fast = PrefillModel(PrefillWeights(model, kernel), parts)
    assert fast.weights.unit in ("AMX", "AVX512-BF16", "vectors")
    assert_close(fast.logits(texts, everywhere(texts)), logits_of(model, texts), parts)
    found = fast.logits(texts, everywhere(texts), fast.read(beginning))
    assert_close(found, logits_of(model, [beginning + text for text in texts], skip=40), parts)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_text_is_the_same_to_the_bit_whatever_is_beside_it(parts):
    model, texts = make(**SHAPES["narrow"]), make_texts()
    fast = PrefillModel(PrefillWeights(model), parts)
    alone = torch.cat([fast.logits([text], everywhere([text])) for text in texts])
    assert torch.equal(fast.logits(texts, everywhere(texts)), alone)
    places = [(8, 69), (0, 0), (8, 3)]  # in the order they were asked for
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    assert torch.equal(fast.logits(texts, places), alone[[starts[i] + t for i, t in places]])


def test_positions_beyond_the_trained_length():
    model, texts = make(**SHAPES["narrow"], max_seq_len=32), make_texts([100])
    fast = PrefillModel(PrefillWeights(model), 2)
    assert_close(fast.logits(texts, everywhere(texts)), logits_of(model, texts), 2)


def test_weights_are_copies():
    model, texts = make(**SHAPES["narrow"]), make_texts()
    fast = PrefillModel(PrefillWeights(model))
    before = fast.logits(texts, everywhere(texts))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(fast.logits(texts, everywhere(texts)), before)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_out_of_range_are_never_silently_wrong(kernel, sign):
    """Attention subtracts no largest score: what leaves the range of e^x must not pass for a result."""
    model, texts = make(dim=64, n_heads=2, n_kv_heads=1, n_layers=1), make_texts((2, 3, 20))
    embeddings, attention = model.tok_embeddings.weight.data, model.layers[0].attention
    embeddings[:] = embeddings[0] + 0.5 * embeddings  # tokens are alike: nearly all scores of a row have one sign
    start = attention.wk.weight.data.repeat(2, 1)
    missing = present = 0
    for scale in torch.logspace(-1, 2, 20):
        attention.wq.weight.data = sign * scale * start
        expected = logits_of(copy.deepcopy(model).double(), texts)
        found = PrefillModel(PrefillWeights(model, kernel), 2).logits(texts, everywhere(texts))
        broken = found.isnan().any(1)
        missing, present = missing + int(broken.sum()), present + int((~broken).sum())
        assert ((found - expected).abs()[~broken] < 0.02 * expected.std()).all(), scale
    assert missing > 50 and present > 150


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_not_a_number_stays_that(parts):
    model, texts = make(**SHAPES["narrow"]), make_texts([60])
    for name in ("layers.0.attention.wo", "layers.1.feed_forward.w1", "layers.0.feed_forward.w3"):
        broken = copy.deepcopy(model)
        broken.get_submodule(name).weight.data[3, 5] = float("nan")
        assert PrefillModel(PrefillWeights(broken), parts).logits(texts, [(0, 59)]).isnan().all()


def test_what_would_be_read_from_elsewhere_is_refused():
    weights = PrefillWeights(make(**SHAPES["narrow"]))
    fast, finer = PrefillModel(weights), PrefillModel(weights, 2)
    for texts, places in [
        ([[1, 200]], [(0, 1)]),
        ([[-1]], [(0, 0)]),
        ([[1]], [(0, 1)]),
        ([[1]], [(1, 0)]),
        ([[1]], [(0, -1)]),
    ]:
        with pytest.raises(IndexError):
            fast.logits(texts, places)
    for texts in ([], [[1], []]):
        with pytest.raises(ValueError, match="without tokens"):
            fast.logits(texts, [])
    with pytest.raises(ValueError, match="in 2 parts cannot be continued in 1"):
        fast.logits([[1]], [(0, 0)], finer.read([1]))


@pytest.mark.parametrize(
    "fields, message",
    [(dict(use_moe=True), "dense models"), (dict(dim=64, n_heads=8, n_kv_heads=8), "64 features in 8 heads of 8")],
)
def test_what_the_kernel_is_not_for(fields, message):
    with pytest.raises(KernelUnavailable, match=message):
        PrefillWeights(make(**fields))
