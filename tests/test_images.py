"""data_pipeline/images.py, image_records.py, image_data.py: what is broken, huge or lies is refused, with a reason."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import UserError
from data_pipeline.image_data import convert_images
from data_pipeline.image_records import parse_image_row
from data_pipeline.images import BadImage, check_image, open_image, read_image
from data_pipeline.images import data_url as image_url
from data_pipeline.readers import iter_records
from model.chat_format import IMAGE
from model.pixels import to_pixels

ROOT = Path(__file__).resolve().parent.parent
CHAT = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dot."}]


def picture(size=(6, 4), colour=(200, 30, 40), kind="PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind, **settings)
    return buffer.getvalue()


def noise() -> bytes:
    """A picture in which every byte counts."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_formats(kind):
    image = open_image(picture(kind=kind))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(image, int) - (200, 30, 40)).max() < 12


def test_what_is_transparent_is_white_and_what_lies_on_its_side_is_turned():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert set(np.asarray(open_image(buffer.getvalue())).flatten()) == {255}
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert open_image(picture(kind="JPEG", exif=exif)).size == (4, 6)


def test_a_camera_s_jpeg_with_a_preview_and_16_bits_of_grey():
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    red = np.asarray(open_image(buffer.getvalue(), "jpg"), int)
    assert np.abs(red - (255, 0, 0)).max() < 12
    assert read_image(image_url(buffer.getvalue()), None) == buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16)).save(buffer, "PNG")
    assert np.asarray(open_image(buffer.getvalue()))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_are_a_square_with_the_channels_first():
    pixels = to_pixels(open_image(picture()), 8)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), np.uint8)
    assert pixels[:, 3, 5].tolist() == [200, 30, 40]


@pytest.mark.parametrize(
    ("data", "extension", "reason"),
    [
        (b"", "", "no bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg", "not an image of a known format"),
        (b"\0" * 100, "", "not an image of a known format"),
        (noise()[:-200], "png", "a damaged image"),
        (picture()[:20], "png", "not an image|a damaged image"),
        (png_header(50_000, 50_000), "png", "more pixels than|50,000 x 50,000 pixels"),
        (png_header(20_000, 10), "png", "20,000 x 10 pixels: at most 16,384 on a side"),
        (png_header(7_000, 7_000), "png", "7,000 x 7,000 pixels"),
        (picture(kind="JPEG"), "png", "its name says png, and it is a JPEG"),
        (picture(), "exe", "its name says exe"),
        (animation(), "gif", "an animation"),
        (b"\0" * ((32 << 20) + 1), "", "larger than 32 MB"),
    ],
    ids=[
        "empty", "svg", "zeros", "cut", "header only", "bomb", "long", "large", "lies", "program", "animation", "bytes",
    ],
)  # fmt: skip
def test_images_that_are_refused(data, extension, reason):
    with pytest.raises(BadImage, match=reason):
        check_image(data, extension)


def test_any_damage_is_a_bad_image_and_nothing_else():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        whole = np.frombuffer(picture((20, 20), kind=kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[generator.integers(0, len(broken), 4)] = generator.integers(0, 256, 4)
            cut = broken[: generator.integers(1, len(broken) + 1)]
            try:
                open_image(cut.tobytes())
            except BadImage as error:
                assert str(error)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("https://example.com/cat.png", "is an address: download"),
        ("data:image/png,abc", "not a data URL in base64"),
        ("data:text/html;base64,AAAA", "says that it is text/html"),
        ("data:image/png;base64,####", "is not base64"),
        (data_url(picture(), "image/jpeg"), "its name says jpeg, and it is a PNG"),
        ("../secret.png", "outside of the folder"),
        ("nothing.png", "cannot be read"),
        ("a\0.png", "cannot be read"),
        ("\ud800.png", "cannot be read"),
        (7, "an image is int"),
    ],
)
def test_sources_that_are_refused(tmp_path, source, reason):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    with pytest.raises(BadImage, match=reason):
        read_image(source, tmp_path / "images")


@pytest.mark.parametrize(
    "source", [picture(), data_url(picture()), {"bytes": picture(), "path": None}, {"path": "a.png"}]
)
def test_sources(tmp_path, source):
    (tmp_path / "a.png").write_bytes(picture())
    assert read_image(source, tmp_path) == picture()


def test_a_link_to_an_image_is_followed(tmp_path):
    """As in the cache of the Hugging Face hub, where all files are links to others."""
    (tmp_path / "blob").write_bytes(picture())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "blob")
    assert read_image("a.png", tmp_path / "images") == picture()


# ---- rows


def test_rows_of_every_form_say_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    openai = [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": "\nWhat is it?"},
        ]},
        {"role": "assistant", "content": "A dot."},
    ]  # fmt: skip
    bare = [{"from": "human", "value": "What is it?"}, CHAT[1]]
    rows = [
        {"id": "1", "image": "a.png", "conversations": CHAT},
        {"image_bytes": [picture()], "conversations": json.dumps(CHAT)},
        {"image_bytes": picture(), "conversations": bare},
        {"images": [{"bytes": picture(), "path": "a.png"}], "conversations": CHAT},
        {"messages": openai},
    ]
    expected = [{"role": "user", "content": f"{IMAGE}\nWhat is it?"}, {"role": "assistant", "content": "A dot."}]
    for row in rows:
        assert parse_image_row(row, tmp_path) == (expected, [picture()])


def test_several_images_stand_where_the_row_says(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(colour=(ord(name[0]), 0, 0)))
    chat = [
        {"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "The first <image>."},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is red."},
    ]  # fmt: skip
    messages, images = parse_image_row({"image": "a.png, b.png", "messages": chat}, tmp_path)
    assert messages[0]["content"] == f"{IMAGE} or {IMAGE}?"
    assert messages[1]["content"] == "The first <image>."  # an answer is text
    assert images == [picture(colour=(ord(name), 0, 0)) for name in "ab"]
    with_tools, none = parse_image_row({"messages": chat[2:], "tools": [{"name": "zoom"}]}, None)  # and no images
    assert with_tools[0] == {"role": "system", "content": "", "tools": [{"name": "zoom"}]} and none == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image_bytes": [picture()] * 2, "conversations": CHAT}, "1 times <image> in the questions, and 2 images"),
        ({"conversations": CHAT}, "1 times <image> in the questions, and 0 images"),
        ({"image_bytes": [picture()], "text": "x"}, "no conversations or messages; the fields are image_bytes, text"),
        ({"image_bytes": [picture()], "conversations": CHAT[:1]}, "roles out of order"),
        ({"image_bytes": [picture()], "conversations": [CHAT[0], {"from": "gpt", "value": f"{IMAGE}"}]}, "U\\+FFFC"),
        ({"image": "a.png", "conversations": CHAT}, "is the name of a file: python data_process.py vlm"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type audio"),
        ({"image_bytes": [picture()], "conversations": CHAT, "label": False}, "label is false"),
        ({"image_bytes": [picture()], "conversations": CHAT, "chosen": "a", "rejected": "b"}, "preference pairs"),
        ({"image_bytes": [picture()] * 33, "conversations": [{**CHAT[0], "value": "?"}, CHAT[1]]}, "33 images"),
    ],
)
def test_rows_that_are_refused(row, reason):
    with pytest.raises(UserError, match=reason):
        parse_image_row(row, None)


# ---- data_process.py vlm


def test_one_parquet_of_three_formats_without_the_broken_rows(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(picture())
    (folder / "cut.png").write_bytes(noise()[:-200])
    (folder / "liar.png").write_bytes(picture(kind="JPEG"))
    names = ["good.png", "cut.png", "liar.png", "missing.png", "good.png"]
    llava = tmp_path / "chat.json"
    llava.write_text(json.dumps([{"id": n, "image": n, "conversations": CHAT} for n in names]), encoding="utf-8")
    lines = tmp_path / "urls.jsonl"
    rows = [{"image": data_url(picture()), "conversations": CHAT}, {"image": "x", "conversations": "?"}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"image_bytes": [picture()], "conversations": json.dumps(CHAT)}]), table)

    summary = convert_images([llava, lines, table], tmp_path / "all.parquet", folder, 2)
    assert (summary.kept, dict(summary.dropped)) == (
        4, {"bad image": 3, "wrong fields or roles": 1, "cannot be read": 1},
    )  # fmt: skip
    found = [record.data for record in iter_records(tmp_path / "all.parquet", None)]
    assert len(found) == 4
    expected = [{"role": "user", "content": CHAT[0]["value"]}, {"role": "assistant", "content": CHAT[1]["value"]}]
    for row in found:
        assert row["image_bytes"] == [picture()] and json.loads(row["conversations"]) == expected
    rejects = [json.loads(line) for line in (tmp_path / "all.rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(Path(bad["file"]).name, bad["line"]) for bad in rejects] == [
        ("chat.json", 2), ("chat.json", 3), ("chat.json", 4), ("urls.jsonl", 2), ("urls.jsonl", 3),
    ]  # fmt: skip
    assert "a damaged image" in rejects[0]["reason"] and "it is a JPEG" in rejects[1]["reason"]

    before = (tmp_path / "all.parquet").read_bytes()
    lines.write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="no valid rows in .*earlier output files are unchanged"):
        convert_images([lines], tmp_path / "all.parquet", None, 1)
    assert (tmp_path / "all.parquet").read_bytes() == before


def test_the_stage_finds_the_images_in_the_folder_of_the_flag(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "dot.png").write_bytes(picture())
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"image": "dot.png", "conversations": CHAT}]), encoding="utf-8")
    files = ["--input", chat, "--out_dir", tmp_path, "--output", "all.parquet"]
    command = [sys.executable, ROOT / "data_process.py", "vlm", *files]
    alone = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert alone.returncode == 1 and "no valid rows" in alone.stderr  # beside the rows there is no such image
    done = subprocess.run([*map(str, command), "--image_dir", str(tmp_path / "images")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record.data["image_bytes"] for record in iter_records(tmp_path / "all.parquet", None)] == [[picture()]]


def test_wrong_flags_of_the_stage_are_all_named(tmp_path):
    command = [sys.executable, ROOT / "data_process.py", "vlm", "--max_chars", "9", "--output", "x.csv"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2
    for words in (
        "vlm needs --input",
        "--max_chars is for the stage pretrain or sft or dpo and does nothing for vlm",
        "--output x.csv must be a name that ends in",
    ):
        assert words in done.stderr
