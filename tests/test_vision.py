"""model/vision.py: published MiniMind-Vs compute what independent code computes; text is untouched; encoders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import published, theirs
from test_model import published_state, reference_logits
from tolerances import assert_logits_close, close_to
from torch import Tensor

from common.errors import UserError
from model.architecture import VisionConfig
from model.LMConfig import LMConfig, preset
from model.model import Transformer, model_class, parameter_counts
from model.vision import PretrainedEncoder, VisionLanguageModel, image_positions
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint

PAD = 5
VIT = {"encoder": "vit", "image_ids": [PAD] * 4, "width": 24, "image_size": 8, "patch_size": 4, "n_layers": 2}
SMALL = dict(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97, max_seq_len=64)


def make(**fields) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(LMConfig(**SMALL, vision_config=VIT | fields)).eval()


def random(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


# ---- published weights


def linear_projector(width: int, dim: int) -> dict[str, Tensor]:
    weight, bias = random(dim, width, seed=1, std=0.2), random(dim, seed=2)
    return {"vision_proj.vision_proj.0.weight": weight, "vision_proj.vision_proj.0.bias": bias}


def mlp_projector(width: int, dim: int) -> dict[str, Tensor]:
    shapes = {"0.weight": (width,), "0.bias": (width,), "1.weight": (dim, width), "1.bias": (dim,)}
    shapes |= {"3.weight": (dim, dim), "3.bias": (dim,)}
    return {
        f"vision_proj.mlp.{name}": random(*shape, seed=i, std=0.3) for i, (name, shape) in enumerate(shapes.items())
    }


def project(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """The published projectors, written out in float64."""
    state = {name.removeprefix("vision_proj."): tensor.double() for name, tensor in state.items()}
    x = features.double()
    if "vision_proj.0.weight" in state:
        return x @ state["vision_proj.0.weight"].T + state["vision_proj.0.bias"]
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
    x = x * state["mlp.0.weight"] + state["mlp.0.bias"]
    x = x @ state["mlp.1.weight"].T + state["mlp.1.bias"]
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return x @ state["mlp.3.weight"].T + state["mlp.3.bias"]


def test_the_first_release_gives_the_published_logits(tmp_path):
    state = published_state(dim=32, n_layers=2, kv_dim=16, hidden=128, vocab=61)
    vision = linear_projector(12, 32)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in (state | vision).items()}
    torch.save(compiled, tmp_path / "512_vlm_pretrain.pth")
    checkpoint = load_checkpoint(tmp_path / "512_vlm_pretrain.pth")
    assert checkpoint.config.vision_config["image_ids"] == [30] * 25 + [32] * 25
    assert any("50 tokens" in note for note in checkpoint.notes)

    features = random(1, 50, 12, seed=9)
    ids = [1, 7, *[30] * 25, *[32] * 25, 30, 32, 8]  # a < and a > of the text stay what they are
    projected = project(vision, features)[0]
    # The reference reads an embedding for every id: the features become 50 more of them.
    more = state | {"tok_embeddings.weight": torch.cat([state["tok_embeddings.weight"].double(), projected])}
    expected = reference_logits(more, [1, 7, *range(61, 111), 30, 32, 8], 16, 8)
    found = checkpoint.model(torch.tensor([ids]), image_features=features).logits[0]
    assert expected.std() > 0.5
    assert_logits_close(found, expected, checkpoint.config)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "make_projector", "marker", "n_tokens"),
    [("minimind2", linear_projector, 34, 196), ("minimind-3", mlp_projector, 12, 64)],
)
def test_later_releases_give_the_published_logits(tmp_path, family, make_projector, marker, n_tokens):
    other, vision = theirs(family), make_projector(12, 64)
    extra = {"vision_encoder.embeddings.weight": random(3, 3)}  # some files have the encoder in them
    torch.save(published(other) | vision | extra, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    assert checkpoint.config.vision_config["image_ids"] == [marker] * n_tokens
    assert any("1 weights of the image encoder" in note for note in checkpoint.notes)

    features = random(2, n_tokens, 12, seed=9)  # two images side by side
    ids = torch.tensor([[1, *[marker] * (2 * n_tokens), 3, 4]])
    with torch.no_grad():
        embeddings = other.get_input_embeddings()(ids)
        embeddings[0, 1 : 1 + 2 * n_tokens] = project(vision, features).flatten(0, 1).float()
        expected = other(inputs_embeds=embeddings).logits
        found = checkpoint.model(ids, image_features=features).logits
    assert_logits_close(found, expected, checkpoint.config)
    assert (found - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_a_projector_that_is_not_known_is_refused(tmp_path):
    state = published_state(dim=32, n_layers=2, kv_dim=16, hidden=128, vocab=61)
    torch.save(state | {"vision_proj.resampler.weight": random(3, 3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no projector of a known MiniMind-V: it has vision_proj.resampler.weight"):
        load_checkpoint(tmp_path / "x.pth")


# ---- our own


def test_text_is_computed_to_the_bit_as_without_vision():
    model = make()
    text = Transformer(LMConfig(**SMALL)).eval()
    text.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("vision_")})
    ids = torch.randint(PAD + 1, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(ids).logits, text(ids).logits)
    no_images = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert torch.equal(model(ids, pixel_values=no_images).logits, text(ids).logits)


def test_every_pixel_of_every_image_counts_and_only_after_it():
    model = make(projector="mlp")
    ids = torch.tensor([[1, *[PAD] * 8, 9, 10], [1, 11, 12, 13, 14, 15, *[PAD] * 4, 9]])
    pixels = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float().requires_grad_()
    logits = model(ids, pixel_values=pixels).logits
    first = torch.autograd.grad(logits[0, 4].sum(), pixels, retain_graph=True)[0]  # the last token of the first image
    assert first[0].abs().min() > 0
    assert not first[1:].any()
    last = torch.autograd.grad(logits[1, -1].sum(), pixels)[0]
    assert last[2].abs().min() > 0
    assert not last[:2].any()


def test_two_orders_of_two_images_differ():
    model = make()
    ids = torch.tensor([[1, *[PAD] * 8, 9]])
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels.flip(0)).logits)


def test_the_encoder_sees_where_a_patch_is():
    encoder = make().vision_encoder
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[..., :4, :4] = 255
    assert not torch.allclose(encoder(pixels)[0, 0], encoder(pixels.flip(-1))[0, 1])


def test_places_and_images_must_be_as_many():
    model = make()
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="2 images of 4 features, and the prompts have places for 1 of 4"):
        model(torch.tensor([[1, *[PAD] * 4, 2]]), pixel_values=pixels)
    with pytest.raises(ValueError, match="0 images of 4 features, and the prompts have places for 1 of 4"):
        model(torch.tensor([[1, *[PAD] * 4, 2]]))
    published = VisionLanguageModel(LMConfig(**SMALL, vision_config={"width": 8}))
    with pytest.raises(ValueError, match="no encoder of its own"):
        published(torch.tensor([[1]]), pixel_values=pixels)


def test_generate_reads_the_images_once():
    """transformers' own loop: the images come with the prompt, the rest from the cache."""
    model = make()
    prompt = torch.tensor([[1, *[PAD] * 4, 9, 10]])
    pixels = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    settings = dict(
        max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
    )
    out = model.generate(prompt, pixel_values=pixels, **settings)
    assert out.sequences.shape == (1, 11)
    expected = model(out.sequences, pixel_values=pixels).logits[:, 6:-1]
    assert_logits_close(torch.stack(out.logits, 1), expected, model.config)


def test_a_pattern_is_found_wherever_it_stands():
    a, b = 30, 32
    ids = torch.tensor([[a, a, a, b, b, 7, a, b, b, a, a, b, b]])
    found = image_positions(ids, (a, a, b, b))[0].tolist()
    assert [i for i, here in enumerate(found) if here] == [1, 2, 3, 4, 9, 10, 11, 12]
    assert not image_positions(ids[:, :3], (a, a, b, b)).any()
    # Of one token, repeated: as often as an image has it, or a multiple of that where images stand side by side.
    ids = torch.tensor([[a, 7, a, a, a, b, a, a, 7], [a, a, a, a, a, a, 7, a, 7]])
    assert image_positions(ids, (a, a, a)).nonzero().tolist() == [[0, 2], [0, 3], [0, 4], *([1, i] for i in range(6))]


def test_saved_and_loaded_with_the_encoder(tmp_path):
    model = make(projector="mlp")
    save_checkpoint(tmp_path / "sft_vlm_48.pth", model, info={"stage": "sft_vlm"})
    loaded = load_checkpoint(tmp_path / "sft_vlm_48.pth").model
    assert type(loaded) is VisionLanguageModel
    assert loaded.config.vision_config == model.config.vision_config
    ids, pixels = torch.tensor([[1, *[PAD] * 4, 2]]), torch.ones(1, 3, 8, 8)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)
    counts = parameter_counts(model)
    assert counts["vision"] == sum(p.numel() for module in model.vision_modules() for p in module.parameters())
    text = LMConfig(**SMALL)
    save_checkpoint(tmp_path / "text.pth", Transformer(text), info={})
    with pytest.raises(UserError, match="another architecture .*vision_config"):
        save_checkpoint(tmp_path / "text.pth", model, info={})


def test_text_models_have_no_trace_of_vision():
    config = preset("toy")
    assert model_class(config) is Transformer
    assert "vision_config" not in config.architecture()
    assert json.loads(json.dumps(LMConfig(**SMALL, vision_config=VIT).own_fields()))["vision_config"]["width"] == 24


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"encoder": "cnn"}, "encoder 'cnn' is neither pretrained nor vit"),
        ({"projector": "q-former"}, "projector 'q-former'"),
        ({"image_ids": [1, 2, 1]}, "can overlap with itself"),
        ({"image_ids": [97] * 4}, "not among the 97"),
        ({"image_ids": [5] * 3}, "image_ids has 3 tokens, an image has 4 patches"),
        ({"patch_size": 16}, "image_size 8 is not a multiple of patch_size 16"),
        ({"patch_size": 6, "image_size": 12}, "patch_size 6 is not 2, 4"),
        ({"width": 20, "n_heads": 4}, "does not divide into 4 heads"),
        ({"depth": 3}, "unknown: depth"),
    ],
)
def test_configurations_that_cannot_be(fields, error):
    with pytest.raises(UserError, match=error):
        LMConfig(**SMALL, vision_config=VIT | fields)


def test_the_defaults_are_those_of_the_first_release():
    vision = VisionConfig()
    assert (vision.width, vision.projector, vision.encoder) == (768, "linear", "pretrained")
    assert vision.image_ids == (30,) * 25 + (32,) * 25


# ---- encoders of others


def save_encoder(folder, kind: str):
    """A CLIP or SigLIP with random weights, as its folder is published."""
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = sizes | dict(image_size=32, patch_size=8)
    torch.manual_seed(0)
    if kind == "clip":
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

        text = sizes | dict(vocab_size=11, bos_token_id=1, eos_token_id=2)
        model, size = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)), {"shortest_edge": 32}
        processor = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    else:
        from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

        model = SiglipVisionModel(SiglipVisionConfig(**vision))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "n_tokens"), [("clip", 17), ("siglip", 16)])
def test_a_folder_of_clip_or_siglip(tmp_path, kind, n_tokens):
    model = save_encoder(tmp_path, kind).eval()
    encoder = PretrainedEncoder(tmp_path)
    noise = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    image = Image.fromarray(noise.numpy())
    features = encoder([image, image.rotate(180)])
    assert features.shape == (2, n_tokens, 16)
    # The published way: a hook on the layers, so that CLIP's last norm is left out.
    seen = []
    vision = getattr(model, "vision_model", model)
    vision.encoder.register_forward_hook(lambda module, inputs, out: seen.append(out.last_hidden_state))
    pixels = encoder.processor(images=[image.resize((32, 32))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vision(pixels)
    expected = seen[0] if kind == "clip" else vision.post_layernorm(seen[0])
    torch.testing.assert_close(features[:1], expected, **close_to(expected, terms=32, depth=20))
    assert encoder.fingerprint == PretrainedEncoder(tmp_path).fingerprint
    other = PretrainedEncoder(tmp_path)
    weight = next(p for p in other.model.parameters() if p.dim() == 2)
    weight.data = weight.data.flip(0)  # the same numbers in other places
    assert other.fingerprint != encoder.fingerprint


def test_a_folder_of_a_vision_transformer_whose_images_would_be_cut(tmp_path):
    """DINOv2: its folder takes the middle of a larger picture, and we take all of it."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    image = Image.new("RGB", (28, 28), "white")
    image.paste("red", (0, 0, 4, 28))  # at an edge, which the folder's processor would cut off
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        expected = model((pixels - mean) / std).last_hidden_state  # of 28 x 28 pixels, not of the 56 in config.json
    features = PretrainedEncoder(tmp_path)([image])
    assert features.shape == (1, 1 + 4, 16)
    torch.testing.assert_close(features, expected, **close_to(expected, terms=32, depth=20))


def test_a_folder_of_a_convolutional_network(tmp_path):
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])).eval()
    model.save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    encoder = PretrainedEncoder(tmp_path)
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (0, 0, 32, 32))
    features = encoder([image, image.rotate(180)])
    assert features.shape == (2, 4, 16)
    pixels = encoder.processor(images=[image], return_tensors="pt", do_resize=False)["pixel_values"]
    with torch.no_grad():
        columns = model(pixels).last_hidden_state[0]  # (width, 2 rows, 2 columns)
    expected = torch.stack([columns[:, row, column] for row in range(2) for column in range(2)])
    torch.testing.assert_close(features[0], expected, **close_to(expected, terms=32, depth=20))


def test_folders_that_are_no_encoders(tmp_path):
    from transformers import LlamaConfig, LlamaModel, ViTImageProcessor

    with pytest.raises(UserError, match="no config.json"):
        PretrainedEncoder(tmp_path)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    LlamaModel(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded as an image model"):
        PretrainedEncoder(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a llama model"):
        PretrainedEncoder(tmp_path)


def test_image_models_that_cannot_be_encoders(tmp_path):
    from transformers import (
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
        ViTMAEConfig,
        ViTMAEModel,
        ViTModel,
    )

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(image_size=32, patch_size=8)
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    encoder = PretrainedEncoder(tmp_path)
    assert (encoder.n_tokens, encoder.width) == (1 + 16, 16)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["size"] = {"longest_edge": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="must name one size"):
        PretrainedEncoder(tmp_path)
    processor.save_pretrained(tmp_path)
    # It leaves out patches at random, so that training and inference would see other ones.
    ViTMAEModel(ViTMAEConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="at random"):
        PretrainedEncoder(tmp_path)
    ViTForImageClassification(ViTConfig(**sizes | dict(image_size=16))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a vit model makes no features of an image: .*doesn't match"):
        PretrainedEncoder(tmp_path)  # of 16 x 16 pixels, and the processor makes 32 x 32
