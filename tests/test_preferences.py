"""preferences.py: only valid pairs are trained on, and the reference is computed once, for the right weights."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import rounding, shape_of

from common.errors import UserError
from data_pipeline.preferences import EncodedPair, PreferencePairs, read_pairs, train_and_val_pairs
from model.chat_format import render_chat
from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import EOS_ID, encode_text, load_tokenizer
from trainer import losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def read(tokenizer, *paths: Path, max_tokens: int = 128, max_dropped: float = 0.5) -> list[EncodedPair]:
    return read_pairs(list(paths), tokenizer, max_tokens, max_dropped)


# ---- reading

GOOD = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
UNSOUND = {  # what is wrong: (row, part of the reason)
    "same": (GOOD | {"rejected": "4"}, "chosen and rejected are the same"),
    "same but for blanks": (GOOD | {"rejected": " 4\n"}, "chosen and rejected are the same"),
    "chosen empty": (GOOD | {"chosen": "  "}, "chosen is empty"),
    "rejected missing": ({"prompt": "2 + 2?", "chosen": "4"}, "no rejected"),
    "prompt empty": (GOOD | {"prompt": ""}, "no prompt, or an empty one"),
    "unknown role": (GOOD | {"prompt": [turn("wizard", "2 + 2?")]}, "unknown role 'wizard'"),
    "assistant first": (GOOD | {"prompt": [turn("assistant", "hi"), turn("user", "q")]}, "roles out of order"),
    "assistant last": (GOOD | {"prompt": [turn("user", "q"), turn("assistant", "hi")]}, "roles out of order"),
    "answer of the user": (GOOD | {"chosen": [turn("user", "4")]}, "chosen is a user message"),
    "not JSON": ('{"prompt": "cut off', ""),
}


def test_formats_become_the_same_tokens(tokenizer, tmp_path):
    text = write(tmp_path / "a.jsonl", [GOOD])
    dialogue = {"from": "human", "value": "2 + 2?"}
    chats = write(tmp_path / "b.json", [{"conversations": [dialogue], "chosen": turn("assistant", "4"),
                                         "rejected": {"from": "gpt", "value": "5"}}])  # fmt: skip
    whole = write(
        tmp_path / "c.jsonl",
        [{"chosen": [turn("user", "2 + 2?"), turn("assistant", "4")],
          "rejected": [turn("user", "2 + 2?"), turn("assistant", "5")]}],
    )  # fmt: skip
    pairs = read(tokenizer, text, chats, whole)
    assert len(pairs) == 3 and pairs[0] == pairs[1] == pairs[2]
    assert pairs[0].prompt == render_chat(tokenizer, [turn("user", "2 + 2?")], add_generation_prompt=True)[0]
    assert pairs[0].chosen == [*encode_text(tokenizer, "4"), EOS_ID]
    assert pairs[0].rejected == [*encode_text(tokenizer, "5"), EOS_ID]


def test_multi_turn_prompts(tokenizer, tmp_path):
    prompt = [turn("system", "be kind"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    (pair,) = read(tokenizer, write(tmp_path / "a.jsonl", [GOOD | {"prompt": prompt}]))
    assert pair.prompt == render_chat(tokenizer, prompt, add_generation_prompt=True)[0]


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_pair_is_named_and_not_trained_on(tokenizer, tmp_path, capsys, name):
    row, reason = UNSOUND[name]
    pairs = read(tokenizer, path := write(tmp_path / "pairs.jsonl", [GOOD, row, GOOD]))
    assert len(pairs) == 2 and pairs[0] == pairs[1]
    printed = capsys.readouterr().out
    assert "2 preference pairs, 1 unusable rows" in printed
    assert f"{path}:2: " in printed and reason in printed
    with pytest.raises(UserError, match=r"pairs.jsonl: no usable preference pair in it \(.*pairs.jsonl:1: "):
        read(tokenizer, write(path, [row]))


def test_many_unsound_pairs_are_counted_and_the_first_listed(tokenizer, tmp_path, capsys):
    read(tokenizer, write(tmp_path / "pairs.jsonl", [GOOD, *[UNSOUND["same"][0]] * 25]), max_dropped=1)
    printed = capsys.readouterr().out
    assert "1 preference pairs, 25 unusable rows" in printed and "and 15 more" in printed
    assert "jsonl:11:" in printed and "jsonl:12:" not in printed


def test_pairs_that_do_not_fit_are_counted_and_too_many_refused(tokenizer, tmp_path, capsys):
    long = GOOD | {"prompt": "word " * 200}
    alike = {"prompt": "q", "chosen": "word " * 200 + "a", "rejected": "word " * 200 + "b"}
    path = write(tmp_path / "pairs.jsonl", [GOOD] * 8 + [long, alike])
    assert len(read(tokenizer, path, max_tokens=64)) == 8
    printed = capsys.readouterr().out
    assert f"{path}:9: too long: the last question leaves no room for an answer in 64 tokens" in printed
    assert f"{path}:10: too long: the answers are the same as far as there is room in 64 tokens" in printed
    with pytest.raises(
        UserError,
        match=r"2 of 10 rows cannot be used, more than max_dropped=0.1 .*jsonl:9: .*longer ones with --max_seq",
    ):
        read(tokenizer, path, max_tokens=64, max_dropped=0.1)
    with pytest.raises(
        UserError, match="no usable preference pair in it .*jsonl:1: too long: the last question leaves"
    ):
        read(tokenizer, write(path, [long]), max_tokens=64)


def test_half_a_file_is_not_taken_for_a_whole_one(tokenizer, tmp_path):
    path = write(tmp_path / "pairs.json", [GOOD] * 100)
    path.write_text(path.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(
        UserError, match=r"pairs.json:100: invalid JSON.* could be read. Repair the file .*max_dropped=1"
    ):
        read(tokenizer, path)
    assert len(read(tokenizer, path, max_dropped=1)) == 99


def test_a_signal_while_reading_is_answered(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.preferences.encode_preference", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt) as stop:
        read(tokenizer, write(tmp_path / "pairs.jsonl", [GOOD]))
    assert stop.value.args == (signal.SIGTERM,) and stop.value.__notes__[0].startswith("tokenizing was not finished")


def test_no_pair_is_longer_than_allowed(tokenizer, tmp_path):
    row = {"prompt": "q", "chosen": "one " * 100, "rejected": "two " * 50}
    (pair,) = read(tokenizer, write(tmp_path / "pairs.jsonl", [row]), max_tokens=40)
    assert len(pair.prompt) + len(pair.chosen) == 40 and EOS_ID not in pair.chosen  # cut: it does not end there


# ---- batches


def some_pairs(n: int, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(3, 48, rng.integers(low, high)).tolist()

    return [EncodedPair(ids(2, 12), ids(1, 9), ids(1, 9)) for _ in range(n)]


def make(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=32)).train()


def test_a_batch_is_what_its_numbers_say():
    pairs = some_pairs(5)
    data = PreferencePairs(pairs, "t")
    data.ref_logps = np.arange(10, dtype=np.float32).reshape(5, 2)
    batch = data.batch([3, 0])
    ids, bounds = batch.inputs["input_ids"][0].tolist(), batch.inputs["cu_seqlens"].tolist()
    positions = batch.inputs["position_ids"][0].tolist()
    answers = [answer for i in (3, 0) for answer in (pairs[i].chosen, pairs[i].rejected)]
    prompts = [pairs[i].prompt for i in (3, 3, 0, 0)]
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert ids[bounds[n] : bounds[n + 1]] == prompt + answer
        assert positions[bounds[n] : bounds[n + 1]] == list(range(len(prompt + answer)))
        own = batch.inputs["sequence"] == n
        assert batch.inputs["targets"][own].tolist() == answer
        first = bounds[n] + len(prompt)
        assert batch.inputs["predicts"][own].tolist() == list(range(first - 1, first - 1 + len(answer)))
    assert batch.inputs["ref_logps"].tolist() == [[6, 7], [0, 1]]
    assert batch.n_targets == 2 and batch.n_tokens == len(ids) == bounds[-1]
    assert batch.attention_pairs == sum(len(p + a) ** 2 for p, a in zip(prompts, answers, strict=True))
    assert len(data) == 5 and data.documents([3, 0]) == [0, 3]


def test_fingerprints_tell_pairs_and_tokenizers_apart():
    pairs = some_pairs(4)
    assert PreferencePairs(pairs, "t").fingerprint == PreferencePairs(list(pairs), "t").fingerprint
    others = [PreferencePairs(pairs, "u"), PreferencePairs(pairs[:3], "t"), PreferencePairs(pairs[::-1], "t")]
    assert len({data.fingerprint for data in [PreferencePairs(pairs, "t"), *others]}) == 4
    # Where the prompt ends belongs to the pair, not only the tokens.
    assert EncodedPair([1, 2], [3], [4]).content_hash() != EncodedPair([1], [2, 3], [2, 4]).content_hash()


def test_duplicates_stay_on_one_side_of_the_split(tokenizer):
    pairs = some_pairs(60)
    train, val = train_and_val_pairs([*pairs, *pairs], tokenizer, 0.2, 10**6)
    keys = [{pair.content_hash() for pair in data.pairs} for data in (train, val)]
    assert not keys[0] & keys[1] and len(train) + len(val) == 120 and 4 < len(val) < 60
    train, val = train_and_val_pairs(pairs, tokenizer, 0.0, 10**6)
    assert val is None and len(train) == 60


# ---- the reference


def add_reference(data, model, cache, origin="one", dtype=torch.float32) -> np.ndarray:
    compute = partial(losses.compute_ref_logps, model, data, CPU, dtype, 3)
    data.add_ref_logps(cache, [origin, str(dtype)], compute)
    return data.ref_logps


def test_the_reference_is_computed_once_for_each_model(tmp_path, monkeypatch):
    calls = []
    original = losses.sequence_logps
    monkeypatch.setattr(losses, "sequence_logps", lambda *args: calls.append(1) or original(*args))
    pairs, model = some_pairs(7), make()
    first = add_reference(PreferencePairs(pairs, "t"), model, tmp_path)
    assert len(calls) == 3 and first.shape == (7, 2) and first.dtype == np.float32 and (first < 0).all()
    assert model.training and all(p.grad is None for p in model.parameters())
    again = add_reference(PreferencePairs(pairs, "t"), model, tmp_path)
    assert len(calls) == 3 and np.array_equal(first, again)
    other = add_reference(PreferencePairs(pairs, "t"), make(1), tmp_path, origin="two")
    assert len(calls) == 6 and not np.allclose(first, other)
    add_reference(PreferencePairs(pairs[:6], "t"), model, tmp_path)
    assert len(calls) == 8
    half = add_reference(PreferencePairs(pairs, "t"), model, tmp_path, dtype=torch.bfloat16)
    relative = rounding(torch.bfloat16, depth=shape_of(model.config)["depth"])
    assert len(calls) == 11 and not np.array_equal(half, first) and np.allclose(half, first, rtol=relative)


@pytest.mark.parametrize("damage", ["cut off", "empty", "another shape", "not finite", "text", "objects"])
def test_a_damaged_cache_is_computed_again(tmp_path, damage):
    pairs, model = some_pairs(7), make()
    expected = add_reference(PreferencePairs(pairs, "t"), model, tmp_path)
    (path,) = tmp_path.glob("ref_logps-*.npy")
    content = {
        "another shape": expected[:3],
        "not finite": np.full_like(expected, np.nan),
        "objects": np.array([{}], dtype=object),
    }.get(damage)
    if content is not None:
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes({"cut off": path.read_bytes()[:-9], "empty": b"", "text": b"hello, this is text"}[damage])
    assert np.array_equal(add_reference(PreferencePairs(pairs, "t"), model, tmp_path), expected)
    assert np.array_equal(np.load(path), expected)


def test_dropout_is_off_for_the_reference(tmp_path):
    model = make()
    expected = add_reference(PreferencePairs(some_pairs(3), "t"), model, tmp_path / "a")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert np.array_equal(add_reference(PreferencePairs(some_pairs(3), "t"), model, tmp_path / "b"), expected)


def test_broken_weights_are_named(tmp_path):
    model = make()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="its weights are broken"):
        add_reference(PreferencePairs(some_pairs(3), "t"), model, tmp_path)
    assert not list(tmp_path.glob("ref_logps-*"))
