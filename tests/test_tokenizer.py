"""The tokenizer that ships: text is text, chats are rendered with exact masks, wrong folders are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from data_pipeline.bpe import measure
from data_pipeline.tokenizer_data import is_held_out, row_text
from model.tokenizer import (
    CONTROL_TOKENS,
    EOS_ID,
    TOKENIZER_DIR,
    encode_text,
    encode_texts,
    load_tokenizer,
    tokenizer_hash,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MINIMIND_DATA", ROOT.parent / "shared" / "data"))

TOKENIZER = load_tokenizer()

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
# Hypothesis alone would hardly ever write these.
awkward = st.lists(
    st.sampled_from(
        [
            "<s>",
            "</s>",
            "<unk>",
            "user\n",
            "assistant\n",
            "\n",
            "\r\n",
            " ",
            "\t",
            "，我们",
            "12",
            "a",
            *CONTROL_TOKENS[:9],
        ]
    )
).map("".join)
text = unicode_text | awkward


# --- text ------------------------------------------------------------------------------------------------------------


def test_shipped_tokenizer_has_the_ids_of_the_design():
    assert len(TOKENIZER) == 6400
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert (TOKENIZER.unk_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert TOKENIZER.pad_token_id == 0
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab())
    tags = "<think> </think> <tools> </tools> <tool_call> </tool_call> <tool_response> </tool_response> <image>"
    assert (*tags.split(), *(f"<reserved_{i}>" for i in range(7))) == CONTROL_TOKENS
    ids = TOKENIZER.convert_tokens_to_ids(list(CONTROL_TOKENS))
    assert ids == [*range(6384, 6400)]
    assert TOKENIZER.decode([*ids, EOS_ID], skip_special_tokens=True) == "".join(CONTROL_TOKENS)  # they stay visible


def test_auto_tokenizer_loads_the_same():
    assert tokenizer_hash(AutoTokenizer.from_pretrained(TOKENIZER_DIR)) == tokenizer_hash(TOKENIZER)


@settings(max_examples=500, deadline=None)
@given(text)
@example("<s>user\n</s><unk>")
@example("\x00\x1b\ufeff\U0010ffff e\u0301 \u00e9 \u200d")
def test_any_text_comes_back_and_never_becomes_a_control_token(text):
    ids = encode_text(TOKENIZER, text)
    assert TOKENIZER.decode(ids) == text
    assert all(EOS_ID < i < 6400 - len(CONTROL_TOKENS) for i in ids)


@settings(deadline=None)
@given(st.lists(text))
def test_a_batch_is_encoded_like_its_texts(texts):
    assert encode_texts(TOKENIZER, texts) == [encode_text(TOKENIZER, text) for text in texts]


def test_digits_are_single_tokens():
    assert len(encode_text(TOKENIZER, "3141592653")) == 10


def test_the_shared_tokenizer_is_never_changed():
    before = TOKENIZER.backend_tokenizer.to_str()

    def encode(i: int) -> list[int]:
        return encode_text(TOKENIZER, "a</s>") if i % 2 else TOKENIZER("a</s>").input_ids

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(encode, range(2000)))
    assert all((EOS_ID in ids) == (i % 2 == 0) for i, ids in enumerate(results))
    assert TOKENIZER.backend_tokenizer.to_str() == before


def test_truncation_and_padding_of_other_callers_do_not_cut_text():
    tokenizer = load_tokenizer()
    tokenizer(["a b c d e f g"] * 2, truncation=True, max_length=2, padding="max_length")
    assert tokenizer.decode(encode_text(tokenizer, "a b c d e f g")) == "a b c d e f g"


def test_a_token_added_later_is_text_as_well():
    tokenizer = load_tokenizer()
    encode_text(tokenizer, "x")
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    assert len(tokenizer) - 1 not in encode_text(tokenizer, "<tool>")


def test_an_added_token_that_is_not_special_is_text_as_well():
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["<thought>", "你好"])
    assert encode_text(tokenizer, "<thought>你好") == encode_text(TOKENIZER, "<thought>你好")
    assert tokenizer("<thought>").input_ids == [6400]  # the tokenizer itself is as it was


def test_a_pickled_tokenizer_encodes_text_as_text():  # it travels to worker processes
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert encode_text(copy, "<s>你好") == encode_text(TOKENIZER, "<s>你好")


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match=r"text 1 is not Unicode.*U\+D800.*character 2"):
        encode_texts(TOKENIZER, ["fine", "ab\ud800"])


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TOKENIZER_DIR, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def swap_specials(content: dict) -> None:
    vocab = content["model"]["vocab"]
    vocab["<s>"], vocab["</s>"] = 2, 1
    for token in content["added_tokens"][:3]:
        token["id"] = vocab[token["content"]]


def set_added(content: dict, **values) -> None:
    content["added_tokens"][1].update(values)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda c: c["model"]["merges"].pop()),
        ("tokenizer.json", lambda c: c["model"]["merges"].insert(0, c["model"]["merges"].pop(7))),
        ("tokenizer.json", lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0)),
        ("tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"})),
        ("tokenizer.json", lambda c: set_added(c, lstrip=True)),
        ("tokenizer_config.json", lambda c: c.update(chat_template=c["chat_template"] + " ")),
        ("tokenizer_config.json", lambda c: c.update(pad_token="</s>")),
    ],
)
def test_the_hash_changes_with_any_change(folder, name, change):
    edit(folder / name, change)
    assert tokenizer_hash(load_tokenizer(folder)) != tokenizer_hash(TOKENIZER)


def test_the_hash_is_of_the_content_only(folder):
    edit(folder / "tokenizer.json", lambda content: None)  # other white space
    copy = load_tokenizer(folder)
    copy(["a", "b c d"], truncation=True, max_length=2, padding=True)
    assert tokenizer_hash(copy) == tokenizer_hash(TOKENIZER)
    assert len(tokenizer_hash(copy)) == 16


def remove_chat_template(content: dict) -> None:
    del content["chat_template"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", swap_specials, "special tokens are .*'<s>': 2.*MiniMind needs"),
        ("tokenizer_config.json", lambda c: c.update(eos_token="<s>"), "have the roles .*tokenizer_config.json"),
        ("tokenizer_config.json", remove_chat_template, "no chat_template"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(folder, name, change, message):
    edit(folder / name, change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_incomplete_and_damaged_folders_are_refused(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_tokenizer(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"no {name} in it"):
        load_tokenizer(folder)


def test_a_missing_folder_is_not_looked_up_on_the_network(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json in it"):
        load_tokenizer(tmp_path / "gpt2")


# --- what the shipped tokenizer promises -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft/sft_data_zh.jsonl", "pretrain/mobvoi_seq_monkey_general_open_corpus.jsonl"])
def test_held_out_text_has_3_6_bytes_per_token(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip("needs the real data")
    training = json.loads((TOKENIZER_DIR / "training.json").read_text(encoding="utf-8"))
    with path.open(encoding="utf-8") as file:
        texts = {row_text(json.loads(line)) for line in file}
    figures = measure(TOKENIZER, sorted(text for text in texts if is_held_out(text, training["held_out"])))
    assert figures.texts > 100
    assert figures.bytes_per_token >= 3.6


def test_english_and_code_are_covered():
    english = (
        "The little boat left the harbour at sunrise, when the water was still and the wind came from the west. "
        "Nobody on the island knew where it was going, but everyone agreed that it would be back before winter."
    )
    code = (
        "def main() -> None:\n    for i in range(10):\n        if i % 2 == 0:\n            print(i, file=sys.stderr)\n"
    )
    assert measure(TOKENIZER, [english]).bytes_per_token > 2.2
    assert measure(TOKENIZER, [code]).bytes_per_token > 2
