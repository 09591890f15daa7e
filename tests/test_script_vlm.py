"""8-pretrain_vlm.py, 9-sft_vlm.py and eval_vlm.py as a user runs them, and the data and decoding they stand on."""

from __future__ import annotations

import base64
import copy
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from serving_helpers import png
from test_vision import save_encoder
from tolerances import assert_logits_close, rounding
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import export_model
from common.errors import UserError
from data_pipeline.datasets import PackedRows
from data_pipeline.image_features import Features, Pixels, cached_features
from data_pipeline.image_records import parse_image_row
from data_pipeline.images import open_image
from data_pipeline.tokenize_chats import tokenize_chat_data
from evaluation.vlm import ImageQuestion, draw_sheet, evaluate, is_right, wrong_images
from inference.generator import Images, generate, generate_text
from inference.model_loader import open_model
from inference.options import SamplingParams
from inference.vision import ImageProcessor
from model.chat_format import IMAGE, render_chat, truncate_chat, with_images
from model.LMConfig import LMConfig
from model.model import Transformer, initial_weights
from model.tokenizer import encode_text, load_tokenizer, tokenizer_hash
from model.vision import VisionLanguageModel
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint
from trainer.losses import next_token_loss
from trainer.options import TrainOptions
from trainer.vision import ImageRows, image_ids

ROOT = Path(__file__).resolve().parents[1]
QUICK = "--device cpu --dtype float32 --batch_size 2 --log_interval 1 --val_fraction 0 --learning_rate 1e-2".split()
TINY = "--image_size 16 --patch_size 8 --vision_width 16 --vision_layers 1 --vision_heads 2".split()


def run(script: str, *args) -> None:
    """Run a script in this process: the same code, without the seconds of a fresh start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, f"{script} exited with {stop.code}"


def row(i: int, n_images: int = 1, n_turns: int = 1, **more) -> dict:
    messages = []
    for turn in range(n_turns):
        place = "<image>\n" * n_images if turn == 0 else ""
        messages.append({"role": "user", "content": f"{place}What is number {i}?"})
        messages.append({"role": "assistant", "content": f"It is {'abcdefgh'[(i + turn) % 8]}."})
    return {"image_bytes": [png(10 * i + k) for k in range(n_images)], "conversations": json.dumps(messages), **more}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows with none to two images, and one to two turns."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    rows = [row(i, n_images=(1, 1, 2, 0)[i % 4], n_turns=1 + i % 2) for i in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, data) -> Path:
    """The output folder of both stages, from a chat model of random weights."""
    out = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    text = Transformer(LMConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=96))
    info = {"stage": "full_sft", "tokenizer_hash": tokenizer_hash(tokenizer)}
    save_checkpoint(out / "full_sft_32.pth", text, info=info)
    blind = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (out / "text.jsonl").write_text(json.dumps(blind) + "\n", encoding="utf-8")
    run("8-pretrain_vlm.py", *QUICK, *TINY, "--out_dir", out, "--data_path", data, "--max_steps", 2)
    run("9-sft_vlm.py", *QUICK, "--out_dir", out, "--data_path", data, "--max_steps", 6, "--save_interval", 3)
    return out


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).model.state_dict()


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- training


def test_the_first_stage_trains_what_sees_and_nothing_else(trained):
    before, after = state(trained / "full_sft_32.pth"), state(trained / "pretrain_vlm_32.pth")
    assert changed(before, after) == set()
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"vision_encoder", "vision_proj"}
    config = load_checkpoint(trained / "pretrain_vlm_32.pth").config
    random = dict(initial_weights(config, TrainOptions.seed))
    assert changed(random, after) >= after.keys() - before.keys()
    description = json.loads((trained / "sft_vlm_32.json").read_text(encoding="utf-8"))
    assert description["stage"] == "sft_vlm"
    assert description["config"]["vision_config"]["encoder"] == "vit"


def test_the_second_stage_trains_everything(trained):
    before, after = state(trained / "pretrain_vlm_32.pth"), state(trained / "sft_vlm_32.pth")
    assert changed(before, after) == before.keys()


def test_freezing_the_middle_and_the_encoder(trained, data, tmp_path):
    start = trained / "pretrain_vlm_32.pth"
    flags = ["--freeze", "middle", "--freeze_encoder", "--init_from", start, "--max_steps", 2]
    run("9-sft_vlm.py", *QUICK, *flags, "--out_dir", tmp_path, "--data_path", data)
    moved = changed(state(start), state(tmp_path / "sft_vlm_32.pth"))
    assert {name.split(".")[0] for name in moved} == {"layers", "vision_proj"}
    assert {name.split(".")[1] for name in moved if name.startswith("layers")} == {"0", "2"}
    assert list((tmp_path / "cache").glob("features-*/features.bin"))


def test_a_resumed_run_ends_with_the_same_bits(trained, data, tmp_path):
    for name in ("pretrain_vlm_32.pth", "pretrain_vlm_32.json"):
        shutil.copy(trained / name, tmp_path)
    shutil.copytree(trained / "sft_vlm_32.resume" / "step_00000003", tmp_path / "sft_vlm_32.resume" / "step_00000003")
    flags = ["--init_from", tmp_path / "pretrain_vlm_32.pth", "--max_steps", 6, "--save_interval", 3]
    run("9-sft_vlm.py", *QUICK, *flags, "--out_dir", tmp_path, "--data_path", data, "--resume")
    assert changed(state(trained / "sft_vlm_32.pth"), state(tmp_path / "sft_vlm_32.pth")) == set()


def test_an_encoder_from_a_folder(tokenizer, trained, data, tmp_path, capsys):
    save_encoder(tmp_path / "clip", "clip")
    flags = [*QUICK, "--out_dir", tmp_path, "--data_path", data, "--max_steps", 1]
    start = ["--init_from", trained / "full_sft_32.pth", "--vision_encoder", tmp_path / "clip", "--projector", "linear"]
    run("8-pretrain_vlm.py", *flags, *start)
    run("9-sft_vlm.py", *flags)  # the folder is that of the stage before
    assert capsys.readouterr().out.count("images, 0.0 MB, kept in") == 1  # its features are computed once
    checkpoint = load_checkpoint(tmp_path / "sft_vlm_32.pth", tokenizer=tokenizer)
    assert checkpoint.config.vision_config["image_ids"] == image_ids(tokenizer, 17)
    assert not any(name.startswith("vision_encoder") for name in checkpoint.model.state_dict())
    prepared = ImageProcessor.for_checkpoint(checkpoint)([Image.new("RGB", (50, 30))])
    assert prepared.name == "image_features" and prepared.values.shape == (1, 17, 16)
    save_encoder(tmp_path / "siglip", "siglip")
    with pytest.raises(UserError, match="makes 16 features of width 16; this model was trained with 17"):
        ImageProcessor.for_checkpoint(checkpoint, tmp_path / "siglip")([Image.new("RGB", (50, 30))])


@pytest.mark.parametrize(
    ("script", "flags", "error"),
    [
        ("8-pretrain_vlm.py", ["--freeze_encoder"], "unrecognized arguments: --freeze_encoder"),
        ("9-sft_vlm.py", ["--data_path", "{out}/text.jsonl", "--freeze_encoder"], "text.jsonl: no images in it"),
        ("8-pretrain_vlm.py", ["--fsdp"], "--fsdp and --deepspeed do not support vision-language models"),
        (
            "8-pretrain_vlm.py",
            ["--vision_encoder", "x", "--vision_layers", "4"],
            "--vision_layers is for our own encoder",
        ),
        ("8-pretrain_vlm.py", ["--image_size", "20"], "image_size 20 is not a multiple of patch_size 16"),
        (
            "3-full_sft.py",
            ["--init_from", "{out}/pretrain_vlm_32.pth"],
            "only 8-pretrain_vlm.py and 9-sft_vlm.py train",
        ),
        ("9-sft_vlm.py", ["--init_from", "{out}/full_sft_32.pth"], "this model does not see; run 8-pretrain_vlm.py"),
        ("9-sft_vlm.py", ["--vision_encoder", "{out}"], "an encoder of its own: leave --vision_encoder"),
        ("9-sft_vlm.py", ["--data_path", "missing.parquet"], "make it with: python data_process.py vlm"),
    ],
)
def test_what_cannot_start_says_why(trained, data, capsys, script, flags, error):
    given = [flag.format(out=trained) for flag in flags]
    with pytest.raises(AssertionError, match="exited with"):
        run(script, *QUICK, "--out_dir", trained, "--data_path", data, "--overwrite", *given)
    assert error in capsys.readouterr().err


# ---- data


@pytest.fixture(scope="module")
def model(trained) -> VisionLanguageModel:
    return load_checkpoint(trained / "sft_vlm_32.pth").model


def make_rows(model, tokenizer, data, cache, seq_len, load=None) -> ImageRows:
    ids = model.vision.image_ids
    dataset = tokenize_chat_data([data], tokenizer, cache, image_ids=ids, max_tokens=96)
    images = load(dataset) if load else Pixels(dataset, model.vision.image_size)
    name = "image_features" if load else "pixel_values"
    return ImageRows(PackedRows(dataset, np.arange(len(dataset)), seq_len, 1), images, name)


def test_packed_equals_unpacked(model, tokenizer, data, tmp_path):
    rows = make_rows(model, tokenizer, data, tmp_path, 200)
    assert len(rows) < len(rows.rows.dataset)
    batch = rows.batch(range(len(rows)))
    packed, n, _ = next_token_loss(model, batch)
    total, count = 0.0, 0
    for i in range(len(rows.rows.dataset)):
        alone = ImageRows(PackedRows(rows.rows.dataset, np.array([i]), 96, 1), rows.images, rows.name).batch([0])
        assert len(alone.inputs["pixel_values"]) == (1, 1, 2, 0)[i % 4]
        loss, one, _ = next_token_loss(model, alone)
        total, count = total + float(loss.detach()), count + one
    assert n == count
    assert float(packed.detach()) == pytest.approx(total, rel=rounding(terms=model.config.vocab_size, depth=20))


def test_cached_equals_uncached(model, tokenizer, data, tmp_path):
    prepare = ImageProcessor(model, None)
    calls = []

    @torch.no_grad()
    def encode(images):
        calls.append(len(images))
        return model.vision_encoder(prepare(images).values)

    load = lambda dataset: Features(cached_features(dataset, encode, "x", tmp_path, batch_size=5))  # noqa: E731
    uncached = make_rows(model, tokenizer, data, tmp_path, 96)
    cached = make_rows(model, tokenizer, data, tmp_path, 96, load)
    assert sum(calls) == int(uncached.n_images.sum()) == 16
    for i in range(len(uncached)):
        expected, found = (next_token_loss(model, rows.batch([i]))[0] for rows in (uncached, cached))
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=rounding(torch.float16, depth=20))
    make_rows(model, tokenizer, data, tmp_path, 96, load)
    assert sum(calls) == 16
    expected = cached.images([3])
    (next(tmp_path.glob("features-*")) / "features.bin").write_bytes(b"x")  # damaged: computed again
    again = make_rows(model, tokenizer, data, tmp_path, 96, load)
    assert sum(calls) == 32 and torch.equal(again.images([3]), expected)


def test_a_batch_without_images_still_reaches_every_parameter(model, tokenizer, data, tmp_path):
    """Processes that train together wait for the gradients of all of them."""
    rows = make_rows(model, tokenizer, data, tmp_path, 96)
    alone = ImageRows(PackedRows(rows.rows.dataset, np.array([3]), 96, 1), rows.images, rows.name).batch([0])
    assert len(alone.inputs["pixel_values"]) == 0
    next_token_loss(model, alone)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.vision_proj.mlp[1].weight.grad.any()
    model.zero_grad()


def test_a_long_dialogue_loses_its_oldest_turns_with_their_images(tokenizer, tmp_path):
    chat = [
        {"role": "user", "content": "<image>first?"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "<image><image>second?"}, {"role": "assistant", "content": "two"},
    ]  # fmt: skip
    images = [png(i) for i in range(3)]
    pq.write_table(
        pa.Table.from_pylist([{"image_bytes": images, "conversations": json.dumps(chat)}]), tmp_path / "x.parquet"
    )
    ids = image_ids(tokenizer, 8)
    for max_tokens, kept in ((96, 3), (40, 2)):
        dataset = tokenize_chat_data(
            [tmp_path / "x.parquet"], tokenizer, tmp_path / "cache", image_ids=ids, max_tokens=max_tokens
        )
        assert int(dataset.n_images[0]) == kept
        assert dataset.image_bytes.tobytes() == b"".join(images[-kept:])


def test_the_tokens_of_an_image_stand_where_its_place_is(tokenizer):
    chat = [{"role": "user", "content": f"a {IMAGE}{IMAGE} b"}]
    pattern = [30] * 3 + [32] * 3
    ids = render_chat(tokenizer, chat, add_generation_prompt=True, image_ids=pattern)[0]
    around = [render_chat(tokenizer, [{"role": "user", "content": text}])[0] for text in ("a ", "a  b")]
    at = ids.index(30)
    assert ids[at : at + 12] == pattern * 2
    assert ids[:at] == around[0][:at]
    assert truncate_chat(tokenizer, chat, 96, image_ids=pattern).ids == ids
    plain = render_chat(tokenizer, chat, add_generation_prompt=True)[0]  # for a model of text it is a character
    assert tokenizer.decode(plain).count(IMAGE) == 2
    elsewhere = [
        {"role": "system", "content": IMAGE},
        chat[0] | {"content": "a"},
        {"role": "assistant", "content": IMAGE},
    ]
    assert render_chat(tokenizer, elsewhere, image_ids=pattern) == render_chat(tokenizer, elsewhere)


def test_a_text_with_the_tokens_of_an_image_is_not_trained_on(tokenizer, tmp_path):
    text = "What a strange sentence"
    ids = encode_text(tokenizer, text)  # as the first MiniMind-V took 25 times < and 25 times >
    chat = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": text}]
    rows = [row(1), {"image_bytes": [png(1)], "conversations": json.dumps(chat)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    dataset = tokenize_chat_data(
        [tmp_path / "x.parquet"], tokenizer, tmp_path / "cache", image_ids=ids, max_tokens=96, max_dropped=1
    )
    assert len(dataset) == 1
    assert "a text has the tokens that stand for an image" in dataset.info["first_skipped"][0]


# ---- decoding


def test_prompts_with_and_without_images_are_decoded_together(model, tokenizer):
    prepare = ImageProcessor(model, None)
    pictures = [[Image.open(io.BytesIO(png(i))) for i in range(n)] for n in (1, 0, 2, 1)]
    prompts = [
        render_chat(
            tokenizer, [{"role": "user", "content": IMAGE * len(some) + "What?"}], add_generation_prompt=True,
            image_ids=model.vision.image_ids,
        )[0]
        for some in pictures
    ]  # fmt: skip
    images = [prepare(some) for some in pictures]
    sampling = SamplingParams(max_new_tokens=6)
    together = generate_text(model, tokenizer, prompts, sampling, images=images, max_rows=2)
    for prompt, own, answer in zip(prompts, images, together, strict=True):
        assert generate_text(model, tokenizer, [prompt], sampling, images=[own]) == [answer]
    assert Images.join([None, None]) is None
    for shown, n in ((images[0], 1), (None, 0)):
        with pytest.raises(ValueError, match=f"{n} images of 4 features, and the prompts have places for 2 of 4"):
            generate_text(model, tokenizer, [prompts[2]], sampling, images=[shown])


def test_several_answers_to_prompts_with_several_images(model):
    picture = [*model.vision.image_ids]
    ids = torch.tensor([[1, *picture, *picture, 50], [1, *picture, 50, *[70] * len(picture)]])
    pixels = torch.arange(3)[:, None, None, None].expand(3, 3, 16, 16)
    expanded, kwargs = model._expand_inputs_for_generation(2, input_ids=ids, pixel_values=pixels)
    assert expanded.tolist() == [*[ids[0].tolist()] * 2, *[ids[1].tolist()] * 2]
    assert kwargs["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 2, 2]


def test_a_chat_that_is_continued_with_a_cache_sees_a_new_image(model):
    from transformers import DynamicCache

    image = [*model.vision.image_ids]
    begin, rest = [1, *image, 60], [*image, 70, 80]
    first = torch.full((1, 3, 16, 16), 90)
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = []
    for value in (0, 255):
        pixels = torch.full((1, 3, 16, 16), value)
        whole = model.generate(torch.tensor([begin + rest]), pixel_values=torch.cat([first, pixels]), **settings)
        cache = DynamicCache()
        model(torch.tensor([begin]), pixel_values=first, past_key_values=cache, use_cache=True)
        asked = {"pixel_values": pixels, "past_key_values": cache}
        continued = model.generate(torch.tensor([begin + rest]), **asked, **settings)
        assert_logits_close(continued.logits[0], whole.logits[0], model.config)
        found.append(continued.logits[0])
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_cache_of_prompts_with_images_gives_the_logits_of_the_whole(model):
    from transformers import DynamicCache

    ids = torch.tensor([[1, *model.vision.image_ids, 50, 60, 70]])
    pixels = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    whole = model(ids, pixel_values=pixels).logits
    cache = DynamicCache()
    model(ids[:, :-2], pixel_values=pixels, past_key_values=cache, use_cache=True)
    rest = model(ids[:, -2:], past_key_values=cache, use_cache=True).logits
    assert_logits_close(rest, whole[:, -2:], model.config)


# ---- eval_vlm.py


def question(kind: str, answer: str, seed: int) -> ImageQuestion:
    chat = [{"role": "user", "content": f"{IMAGE}\nWhat?"}]
    return ImageQuestion(chat, [Image.open(io.BytesIO(png(seed)))], answer, kind, "en")


def test_a_wrong_image_is_always_that_of_another_question_of_the_kind():
    questions = [question("ab"[i % 2], "x", i) for i in range(10)]
    for seed in range(5):
        for i, images in enumerate(wrong_images(questions, seed)):
            j = next(j for j, other in enumerate(questions) if other.images is images)
            assert j != i and questions[j].kind == questions[i].kind
    questions.append(question("alone", "x", 10))
    assert wrong_images(questions, 0)[10] is not questions[10].images
    with pytest.raises(UserError, match="no wrong image for question 1"):
        wrong_images(questions[:1], 0)


def test_right_chance_and_wrong(model, tokenizer):
    prepare = ImageProcessor(model, None)
    questions = [question("a", answer, i) for i, answer in enumerate("xxxy")]
    results, answers = evaluate(prepare, tokenizer, questions)
    assert results["a"].n == 4 and results["a"].chance == 0.75
    told = [
        ImageQuestion(q.chat, q.images, answer, q.kind, q.language)
        for q, answer in zip(questions, answers, strict=True)
    ]
    assert evaluate(prepare, tokenizer, told)[0]["a"].right == 1
    assert is_right(" Red.", "red") and is_right("红色。", "红色") and not is_right("dark red", "red")


def test_the_sheet_has_pictures_of_every_kind(tmp_path, monkeypatch):
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, text, **_: titles.append(text))
    questions = [question(kind, "x", 0) for kind in "abcdefg" for _ in range(5)]
    for q in questions:
        q.chat[0]["content"] = q.kind
    draw_sheet(questions, ["x"] * len(questions), 24, tmp_path / "sheet.png")
    counts = [titles.count(kind) for kind in "abcdefg"]
    assert sum(counts) == 24 and max(counts) - min(counts) == 1 and titles == sorted(titles)


def test_eval_vlm_writes_a_summary_and_a_sheet(trained, tmp_path, capsys):
    rows = [row(i, kind=kind, language="en") for kind in ("letter", "colour") for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    flags = ["--out_dir", trained, "--data_path", tmp_path / "x.parquet", "--device", "cpu"]
    for limit in (0, 3):
        run("eval_vlm.py", *flags, "--limit", limit)
        folder = trained / ("vlm_first_3" if limit else "vlm")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        assert {kind: found["n"] for kind, found in summary["kinds"].items()} == dict.fromkeys(
            ["letter", "colour"], limit or 6
        )
    assert Image.open(trained / "vlm" / "sheet.png").size[0] > 500
    out = capsys.readouterr().out
    assert "wrong image" in out and "letter" in out
    with pytest.raises(AssertionError, match="exited with 1"):
        run("eval_vlm.py", *flags, "--vision_encoder", tmp_path)
    assert "an image encoder of its own; leave out --vision_encoder" in capsys.readouterr().err


# ---- 2-eval.py


def test_chat_about_images(trained, tmp_path, capsys, monkeypatch):
    """Images with the flag and with /image; what is saved is what 9-sft_vlm.py reads; only what fits is shown."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "liar.png").write_bytes(b"GIF89a")
    lines = ["first?", f"/image {tmp_path / '1.png'}", "/image", f"/image {tmp_path / 'liar.png'}", "second?"]
    lines += [f"/save {tmp_path / 'kept.jsonl'}", "/clear", "third?", f"/save {tmp_path / 'text.jsonl'}"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8"))
    flags = ["--out_dir", trained, "--device", "cpu", "--temperature", "0", "--max_new_tokens", "8"]
    run("2-eval.py", *flags, "--image", tmp_path / "0.png")
    said = capsys.readouterr()
    assert "/image FILE" in said.out and "1.png: with the next question" in said.out
    assert "no image: name a file: /image FILE" in said.err and "no image: " in said.err.splitlines()[-1]
    saved = json.loads((tmp_path / "kept.jsonl").read_text(encoding="utf-8"))
    assert [m["content"] for m in saved["messages"] if m["role"] == "user"] == ["<image>\nfirst?", "<image>\nsecond?"]
    messages, images = parse_image_row(saved, None)
    assert images == [png(0), png(1)]
    checkpoint = load_checkpoint(trained / "sft_vlm_32.pth")
    prepare, tokenizer = ImageProcessor.for_checkpoint(checkpoint), load_tokenizer()
    ids = truncate_chat(tokenizer, messages[:-1], 88, image_ids=checkpoint.model.vision.image_ids).ids
    seen = prepare([Image.open(io.BytesIO(data)) for data in images])
    expected = generate_text(checkpoint.model, tokenizer, [ids], SamplingParams(max_new_tokens=8), images=[seen])
    assert messages[-1]["content"] == expected[0]
    text = json.loads((tmp_path / "text.jsonl").read_text(encoding="utf-8"))
    assert text.keys() == {"messages"} and text["messages"][0]["content"] == "third?"


def test_images_for_a_model_of_text_are_refused(trained, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(png(0))
    with pytest.raises(AssertionError, match="exited with"):
        run("2-eval.py", "--weights", trained / "full_sft_32.pth", "--image", tmp_path / "0.png", "--device", "cpu")
    assert "full_sft_32.pth does not see images" in capsys.readouterr().err


def test_the_built_in_questions_about_an_image(trained, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(png(0))
    flags = ["--auto", "--image", tmp_path / "0.png", "--max_new_tokens", "3"]
    run("2-eval.py", "--out_dir", trained, "--device", "cpu", *flags)
    assert "> Describe this picture." in (out := capsys.readouterr().out)
    assert out.count(" tokens/s]") == 4


def test_which_tokens_stand_for_an_image(tokenizer):
    token = tokenizer.convert_tokens_to_ids("<image>")
    assert image_ids(tokenizer, 3) == [token] * 3 and tokenizer.decode([token]) == "<image>"
    published = copy.deepcopy(tokenizer)
    published.get_added_vocab = dict
    left, right = (encode_text(tokenizer, text)[0] for text in "<>")
    assert image_ids(published, 5) == [left] * 2 + [right] * 3


# ---- export_model.py


def test_an_exported_folder_runs_in_a_pipeline(trained, tokenizer, tmp_path, capsys, monkeypatch):
    folder, picture = tmp_path / "x", tmp_path / "0.png"
    picture.write_bytes(png(0))
    clear = tmp_path / "clear.png"  # transparent at the left
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 8, 16))
    with Image.open(picture) as opened:
        rgba = opened.convert("RGB").resize((16, 16))
    rgba.putalpha(mask)
    rgba.save(clear)
    weights = ["--weights", trained / "sft_vlm_32.pth", "--output", folder]
    run("export_model.py", *weights, "--format", "minimind")  # compared there with its source, without this repository
    assert "(allowed: 0)" in capsys.readouterr().out
    assert "image-text-to-text" in (folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(AssertionError, match="exited with"):
        run("export_model.py", *weights, "--overwrite")
    assert "an image encoder of its own, and only --format minimind holds such a model" in capsys.readouterr().err
    model = open_model(folder)[0].model
    assert changed(load_checkpoint(trained / "sft_vlm_32.pth").model.state_dict(), model.state_dict()) == set()

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe = pipeline("image-text-to-text", str(folder), trust_remote_code=True)
    assert type(pipe.model) is not VisionLanguageModel
    sampling = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    settings = dict(generate_kwargs=sampling, return_full_text=False)
    question = {"type": "text", "text": "What?"}
    prepare = ImageProcessor(model, None)
    prepared = prepare([Image.open(picture)])
    transparent = prepare([open_image(clear.read_bytes())])
    encoded = base64.b64encode(clear.read_bytes()).decode()
    for inputs, images in (
        ({"text": [{"role": "user", "content": [{"type": "image", "url": str(picture)}, question]}]}, prepared),
        ({"text": [{"role": "user", "content": [{"type": "image", "path": str(clear)}, question]}]}, transparent),
        ({"text": [{"role": "user", "content": [{"type": "image", "base64": encoded}, question]}]}, transparent),
        ({"images": Image.open(picture), "text": "What?"}, prepared),
        ({"text": [{"role": "user", "content": "What?"}]}, None),
    ):
        chat = [{"role": "user", "content": with_images("What?", len(images or ()))}]
        ids = render_chat(tokenizer, chat, add_generation_prompt=True, image_ids=model.vision.image_ids)[0]
        outputs = generate(model, [ids], SamplingParams(max_new_tokens=8), eos_id=None, images=[images])
        expected = tokenizer.decode([output.token for output in outputs], skip_special_tokens=True)
        assert pipe(**inputs, **settings)[0]["generated_text"] == expected


@pytest.fixture(scope="module")
def sees_through_clip(tokenizer, tmp_path_factory) -> Path:
    """The weights of a model with a linear projector, and the folder of its CLIP, of random weights."""
    out = tmp_path_factory.mktemp("clip")
    save_encoder(out / "clip", "clip")
    save_encoder(out / "siglip", "siglip")
    return out


def save_model(out: Path, tokenizer, ids: list[int], name: str = "sft_vlm_32.pth", **fields) -> Path:
    vision = {"width": 16, "image_ids": ids} | fields
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, initializer_range=0.15)
    torch.manual_seed(0)
    model = VisionLanguageModel(LMConfig(**shape, vision_config=vision))
    info = {"tokenizer_hash": tokenizer_hash(tokenizer), "options": {"vision_encoder": str(out / "clip")}}
    save_checkpoint(out / name, model, info=info, overwrite=True)
    return out / name


@pytest.mark.parametrize(
    ("n_tokens", "pattern", "dtype"), [(17, False, "float32"), (16, False, "bfloat16"), (17, True, "float32")]
)
def test_a_llava_of_transformers_sees_the_same(
    sees_through_clip, tokenizer, tmp_path, capsys, n_tokens, pattern, dtype
):
    """With the class token and without it; tokens of their own, or the pattern of the first release."""
    left, right = (encode_text(tokenizer, text)[0] for text in "<>")
    ids = [left] * 8 + [right] * 9 if pattern else image_ids(tokenizer, n_tokens)
    weights, folder = save_model(sees_through_clip, tokenizer, ids), tmp_path / "x"
    run("export_model.py", "--weights", weights, "--output", folder, "--dtype", dtype)
    assert "(allowed: 0.0001)" in capsys.readouterr().out
    assert not any(str(sees_through_clip).encode() in path.read_bytes() for path in folder.iterdir())
    assert "LLaVA of a CLIP and Llama" in (folder / "README.md").read_text(encoding="utf-8")
    assert not [*folder.glob("*.py")]

    picture = Image.open(io.BytesIO(png(5))).resize((50, 30))
    picture.save(tmp_path / "0.png")
    processor = AutoProcessor.from_pretrained(folder)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    part = {"type": "image", "url": str(tmp_path / "0.png")}
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    question = [{"role": "user", "content": with_images("What is it?", 1)}]
    expected = render_chat(tokenizer, question, add_generation_prompt=True, image_ids=image_ids(tokenizer, n_tokens))[0]
    assert inputs["input_ids"].tolist() == [expected]

    checkpoint = load_checkpoint(weights)
    prepare = ImageProcessor.for_checkpoint(checkpoint)
    ours = render_chat(tokenizer, question, add_generation_prompt=True, image_ids=ids)[0]
    with torch.no_grad():
        found = theirs(**inputs).logits
        expected = checkpoint.model(torch.tensor([ours]), image_features=prepare([picture]).values).logits
    assert expected.std() > 0.3
    if dtype == "float32":
        assert_logits_close(found, expected, checkpoint.config)

    with pytest.raises(UserError, match="a MiniMind-V as a LLaVA, .*: use the .pth it was made from"):
        open_model(folder)


def test_models_that_no_llava_holds(sees_through_clip, trained, tokenizer, tmp_path, monkeypatch):
    ids, folder = image_ids(tokenizer, 17), ["--output", tmp_path / "x"]

    def refused(weights: Path, error: str, *flags) -> None:
        monkeypatch.setattr(sys, "argv", ["export_model.py", "--weights", str(weights), *map(str, [*folder, *flags])])
        with pytest.raises(UserError, match=error):
            export_model.main()
        assert not [*tmp_path.glob("x*")]

    refused(save_model(sees_through_clip, tokenizer, ids, projector="mlp"), "a LayerNorm, which a LLaVA does not have")
    linear = save_model(sees_through_clip, tokenizer, ids)
    refused(linear, "siglip is no CLIP", "--vision_encoder", sees_through_clip / "siglip")
    refused(linear, "no config.json", "--vision_encoder", tmp_path)
    refused(linear, "only --format llama holds both", "--format", "minimind")
    refused(linear, "--format gguf cannot hold that", "--format", "gguf")
    refused(
        trained / "sft_vlm_32.pth", "leave --vision_encoder .*clip out", "--vision_encoder", sees_through_clip / "clip"
    )
    few = save_model(sees_through_clip, tokenizer, ids[:9])
    refused(few, "makes 17 features of width 16; .* was trained with 9")
    monkeypatch.setattr("export.llava.IMAGE_TOKEN", "<picture>")
    refused(linear, "the tokenizer has no <picture>")
