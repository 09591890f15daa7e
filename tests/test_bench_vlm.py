"""bench/vlm.py: what it draws and compares, without the packages that have the pictures."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from test_script_vlm import row

from bench.vlm import TextRows, black_lines
from data_pipeline.datasets import PackedRows
from data_pipeline.image_features import Features
from data_pipeline.tokenize_chats import tokenize_chat_data
from model.tokenizer import load_tokenizer
from trainer.vision import ImageRows, image_ids


def test_a_black_drawing_has_the_lines_only():
    shape = '<circle cx="36" cy="36" r="{}" />'
    groups = "".join(
        f'<g id="{name}">{shape.format(i)}</g>' for i, name in enumerate(["color", "skin", "line", "line-2"])
    )
    found = black_lines(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{groups}</svg>')
    assert [f'r="{i}"' in found for i in range(4)] == [False, False, True, True]


def test_text_has_the_same_tokens_as_the_images_beside_it(tmp_path):
    path, tokenizer = tmp_path / "rows.parquet", load_tokenizer()
    pq.write_table(pa.Table.from_pylist([row(i) for i in range(3)]), path)
    ids = image_ids(tokenizer, 6)
    dataset = tokenize_chat_data([path], tokenizer, tmp_path / "cache", image_ids=ids, max_tokens=64)
    images = ImageRows(
        PackedRows(dataset, np.arange(3), 64, 1), Features(np.ones((3, 6, 4), np.float16)), "image_features"
    )
    text, seen = TextRows(images, ids[0]).batch([0]), images.batch([0])
    assert "image_features" not in text.inputs and len(seen.inputs["image_features"])
    assert (text.n_tokens, text.n_targets) == (seen.n_tokens, seen.n_targets)
    here = seen.inputs["input_ids"] == ids[0]
    assert here.sum() == 6 * len(seen.inputs["image_features"])
    assert not (text.inputs["input_ids"] == ids[0]).any()
    assert torch.equal(text.inputs["input_ids"][~here], seen.inputs["input_ids"][~here])
