"""model/weights.py: what is saved is what is read, nothing doubtful is read, and a crash leaves the old or the new."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

from common import files
from model.families import config_from_shapes
from model.LMConfig import LMConfig, preset
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights import load_checkpoint
from model.weights_file import check_can_write, save_checkpoint

TINY = dict(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, vocab_size=97)
MOE = dict(use_moe=True, n_routed_experts=4, n_shared_experts=2)


def make(seed: int = 0, **fields) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(LMConfig(**(TINY | fields)))


def same_weights(a: Transformer, b: Transformer) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out" / "pretrain_64.pth"


@pytest.fixture
def saved(path) -> Path:
    save_checkpoint(path, make(), info={"stage": "pretrain", "step": 7})
    return path


def as_published(path: Path, model: Transformer, **changes) -> dict:
    """Write a state dict without a JSON; `changes` by name with "." as "__": None takes a tensor out."""
    state = dict(model.state_dict())
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return state


def refuses(match: str, path: Path, **options) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        load_checkpoint(path, **options)
    assert len(str(caught.value)) < 700 + 3 * len(str(path))
    return str(caught.value)


# ---- round trip


@pytest.mark.parametrize("fields", [{}, MOE, dict(MOE, n_shared_experts=0), dict(rope_theta=5e4, n_kv_heads=16)])
def test_what_is_saved_is_what_is_read(path, fields):
    model = make(**fields)
    save_checkpoint(path, model, info={"stage": "pretrain", "step": 7, "data": {"名": "值"}})
    checkpoint = load_checkpoint(path)
    assert same_weights(checkpoint.model, model) and not checkpoint.model.training
    assert checkpoint.model.output.weight is checkpoint.model.tok_embeddings.weight
    assert checkpoint.config.own_fields() == model.config.own_fields()
    assert checkpoint.path == path and checkpoint.notes == []
    assert (checkpoint.info["step"], checkpoint.info["data"]) == (7, {"名": "值"})
    assert checkpoint.info["config"] == model.config.own_fields()
    assert all(parameter.requires_grad for parameter in checkpoint.model.parameters())
    ids = torch.randint(0, 97, (1, 9))
    assert torch.equal(checkpoint.model(ids).logits, model.eval()(ids).logits)


def test_the_file_is_a_plain_state_dict(saved):
    state = torch.load(saved, weights_only=True)
    assert type(state) is dict
    assert state.keys() == make().state_dict().keys()
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    assert sorted(file.name for file in saved.parent.iterdir()) == ["pretrain_64.json", "pretrain_64.pth"]
    content = json.loads(saved.with_suffix(".json").read_text())
    assert content["dtype"] == "float32" and "previous" not in content


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_file_and_of_the_model(path, dtype):
    model = make()
    save_checkpoint(path, model, dtype=dtype, info={})
    assert {tensor.dtype for tensor in torch.load(path, weights_only=True).values()} == {dtype}
    assert load_checkpoint(path).model.dtype == dtype
    full = load_checkpoint(path, dtype=torch.float32).model
    assert full.dtype == torch.float32
    precision = torch.finfo(dtype)  # values below `tiny` have fewer bits
    torch.testing.assert_close(full.state_dict(), dict(model.state_dict()), atol=precision.tiny, rtol=precision.eps)
    with pytest.raises(ValueError, match="not float64"):
        save_checkpoint(path, model, dtype=torch.float64, info={})


def test_info_cannot_replace_what_is_known(saved):
    info = load_checkpoint(saved).info | {"step": 8, "fingerprint": "x", "dtype": "int4"}
    save_checkpoint(saved, make(1), info=info)
    again = load_checkpoint(saved)
    assert same_weights(again.model, make(1))
    assert (again.info["step"], again.info["dtype"]) == (8, "float32")
    assert again.fingerprint == again.info["fingerprint"] != "x"


def test_the_model_read_does_not_depend_on_the_file(saved):
    checkpoint = load_checkpoint(saved)
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    with open(saved, "r+b") as file:
        file.write(b"\0" * os.path.getsize(saved))
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.model.state_dict().items())


def test_fields_outside_the_architecture_can_be_replaced(saved):
    checkpoint = load_checkpoint(saved, overrides={"dropout": 0.1, "max_seq_len": 2048, "dim": 64})
    assert (checkpoint.config.dropout, checkpoint.config.max_seq_len) == (0.1, 2048)
    assert checkpoint.model.layers[0].attention.resid_dropout.p == 0.1
    message = refuses("another architecture", saved, overrides={"n_layers": 3, "dropout": 0.1})
    assert "n_layers: 3 != 2" in message and "dropout" not in message
    refuses("unknown model fields: depth", saved, overrides={"depth": 3})


def test_compiled_model_is_saved_under_plain_names(path):
    model = make()
    save_checkpoint(path, torch.compile(model), info={})
    assert same_weights(load_checkpoint(path).model, model)


# ---- files that came without a JSON


@pytest.mark.parametrize("name", ["minimind-v1-small", "minimind-v1-moe", "toy"])
def test_architecture_of_presets_is_read_from_shapes(name):
    with torch.device("meta"):
        model = Transformer(preset(name))
    notes = []
    found = config_from_shapes(model.state_dict(), None, Path("x.pth"), notes)
    assert found.own_fields() == preset(name).own_fields()
    assert name in notes[1]


@pytest.mark.parametrize(("shared", "note"), [(0, "0 shared"), (1, "1 shared"), (2, "2 shared")])
def test_shared_experts_are_told_by_their_width(path, shared, note):
    model = make(**dict(MOE, n_shared_experts=shared))
    as_published(path, model)
    checkpoint = load_checkpoint(path)
    assert same_weights(checkpoint.model, model)
    assert checkpoint.config.n_shared_experts == shared and checkpoint.info == {}
    assert any(note in text for text in checkpoint.notes)
    assert any(
        "assumed: 16 heads, 8 for keys, rope_theta 10000 (as in MiniMind-v1)" in text and "2 experts per token" in text
        for text in checkpoint.notes
    )


def test_position_table_of_an_old_file_tells_the_heads(path):
    model = make(n_heads=4, n_kv_heads=2)
    angles = torch.outer(torch.arange(512.0), 5e4 ** -(torch.arange(8) / 8))
    as_published(path, model, pos_cis=torch.polar(torch.ones(512, 8), angles))
    checkpoint = load_checkpoint(path)
    assert (checkpoint.config.n_heads, checkpoint.config.n_kv_heads, checkpoint.config.rope_theta) == (4, 2, 5e4)
    assert "pos_cis" in " ".join(checkpoint.notes)
    as_published(path, model, pos_cis=torch.polar(torch.ones(512, 8), torch.zeros(512, 8)))
    refuses("rope_theta=0.0 must be more than 0", path)
    as_published(path, model, pos_cis=torch.ones(512, 8))  # converted to a real dtype: only its width is left
    assert load_checkpoint(path).config.rope_theta == 1e4


@pytest.mark.parametrize(
    "fields", [dict(dim=60, n_heads=10, n_kv_heads=5), dict(n_kv_heads=16), dict(n_kv_heads=2, **MOE)]
)
def test_heads_that_cannot_be_told_are_asked_for(path, fields):
    """Neither the width of MiniMind-v1's keys nor of MiniMind2's; the JSON in the message is complete."""
    model = make(**fields)
    as_published(path, model)
    message = refuses(r'number of heads cannot be derived .* \{"config": \{"n_heads"', path)
    asked = json.loads(message[message.index("{") :])
    given = {name: getattr(model.config, name) if value == "?" else value for name, value in asked["config"].items()}
    path.with_suffix(".json").write_text(json.dumps({"config": given}))
    checkpoint = load_checkpoint(path)
    assert same_weights(checkpoint.model, model) and checkpoint.config.architecture() == model.config.architecture()


def test_output_may_be_absent_but_not_different(path):
    as_published(path, make(), output__weight=None)
    checkpoint = load_checkpoint(path)
    assert same_weights(checkpoint.model, make()) and any("no output.weight" in note for note in checkpoint.notes)
    as_published(path, make(), output__weight=torch.randn(97, 64))
    refuses("output.weight differs from tok_embeddings.weight", path)


# ---- refusals


def test_missing_file_says_what_is_there(tmp_path, saved):
    assert "pretrain_64.pth" in refuses("no checkpoint", saved.with_name("full_sft_64.pth"))
    refuses("no .pth file is in", tmp_path / "nowhere" / "x.pth")
    refuses("is a folder", saved.parent)


@pytest.mark.parametrize("json_too", [True, False])
def test_missing_unexpected_and_misshapen_weights_are_named(saved, json_too):
    if not json_too:
        saved.with_suffix(".json").unlink()
    else:  # a JSON without a fingerprint, so that the shapes are what is looked at
        content = json.loads(saved.with_suffix(".json").read_text())
        del content["fingerprint"]
        saved.with_suffix(".json").write_text(json.dumps(content))
    wq = "layers.1.attention.wq.weight"
    as_published(saved, make(), layers__1__attention__wq__weight=None, norm__weight=None)
    refuses(rf"missing: {wq}, norm.weight$", saved)
    as_published(saved, make(), extra=torch.ones(1), layers__0__feed_forward__w4__weight=torch.ones(2))
    refuses(r"unexpected: extra, layers.0.feed_forward.w4.weight$", saved)
    as_published(saved, make(), layers__1__attention__wq__weight=torch.zeros(64, 65))
    refuses(rf"other shapes: {wq} \(64, 65\) instead of \(64, 64\)$", saved)
    state = as_published(saved, make())
    torch.save({name: t for name, t in state.items() if ".1." not in name} | {"layers.2.x": torch.ones(1)}, saved)
    refuses(r"missing: layers.1.attention.wq.weight, .* and 5 more; unexpected: layers.2.x", saved)


def test_shapes_that_contradict_the_json_are_refused(saved):
    content = json.loads(saved.with_suffix(".json").read_text())
    content["config"]["n_layers"] = 3
    saved.with_suffix(".json").write_text(json.dumps(content))
    refuses("missing: layers.2.attention.wq.weight.* and 5 more", saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_neither_saved_nor_read(saved, value):
    model = make()
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 4] = value
    before = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    with pytest.raises(ValueError, match="was not written: .* not finite: layers.1.feed_forward.w2.weight"):
        save_checkpoint(saved, model, info={})
    assert before == (saved.read_bytes(), saved.with_suffix(".json").read_bytes())
    saved.with_suffix(".json").unlink()
    as_published(saved, model)
    refuses("not finite .*: layers.1.feed_forward.w2.weight", saved)


def test_weights_too_large_for_half_precision_are_not_saved(path):
    model = make()
    with torch.no_grad():
        model.norm.weight[0] = 1e5
    with pytest.raises(ValueError, match="too large for float16: norm.weight"):
        save_checkpoint(path, model, dtype=torch.float16, info={})
    assert not path.exists()
    save_checkpoint(path, model, dtype=torch.bfloat16, info={})


def test_only_a_minimind_is_saved(path):
    model = make()
    model.layers[0].attention.wq.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(ValueError, match="unexpected: layers.0.attention.wq.bias"):
        save_checkpoint(path, model, info={})
    model = make()
    model.output.weight = torch.nn.Parameter(torch.randn(97, 64))
    with pytest.raises(ValueError, match="no longer tied"):
        save_checkpoint(path, model, info={})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(path, make(), info={"loss": float("nan")})
    assert not path.exists() and not path.with_suffix(".json").exists()


@pytest.mark.parametrize("json_too", [True, False])
def test_truncated_and_damaged_files(saved, json_too):
    if not json_too:
        saved.with_suffix(".json").unlink()
    whole = saved.read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 10):
        saved.write_bytes(whole[:size])
        refuses("damaged or cut off|is not a state dict of tensors", saved)


def test_a_flipped_bit_is_found(saved):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 1000] ^= 4
    saved.write_bytes(content)
    refuses("damaged", saved)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/must_not_exist_minimind",))


def test_other_kinds_of_files(tmp_path):
    file = tmp_path / "x.pth"
    file.write_text("not weights at all\n" * 100)
    refuses("not a state dict|damaged", file)
    file.write_text("hi\n")
    refuses(r"damaged or cut off \(not written by torch.save\)", file)
    torch.save(Evil(), file)
    refuses("holds objects, which are never loaded", file)
    file.write_bytes(pickle.dumps(Evil()))
    refuses("x.pth", file)
    assert not Path("/tmp/must_not_exist_minimind").exists()
    for content, match in [
        ([torch.ones(2)], "holds a list"),
        ({}, "holds a dict without named tensors"),
        (torch.ones(2), "holds a Tensor"),
        ({"model": {"norm.weight": torch.ones(2)}, "step": 3}, "not a tensor: model, step"),
        ({"weight": torch.ones(2)}, "is not a MiniMind: there is no matrix tok_embeddings.weight; it holds weight"),
        ({"tok_embeddings.weight": torch.ones(4, 4)}, "is not a MiniMind: missing: layers.0.attention.wk.weight"),
    ]:
        torch.save(content, file)
        refuses(match, file)
    as_published(file, make(), norm__weight=torch.ones(64, dtype=torch.int8))
    refuses(r"not floating-point weights: norm.weight \(int8\)", file)
    as_published(file, make(), _orig_mod__norm__weight=torch.ones(64))
    refuses("norm.weight twice", file)


def test_old_torch_format_is_read(path):
    path.parent.mkdir()
    torch.save(make().state_dict(), path, _use_new_zipfile_serialization=False)
    assert same_weights(load_checkpoint(path).model, make())
    save_checkpoint(path, make(1), info={}, overwrite=True)
    assert same_weights(load_checkpoint(path).model, make(1))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is damaged"),
        ("[]", 'has no "config"'),
        ('{"config": 3}', 'has no "config"'),
        ('{"config": {"dim": 64, "depth": 3}}', 'unknown fields in "config": depth'),
        ('{"config": {"dim": 65}}', "dim=65 is not divisible by n_heads=16"),
        ('{"config": {"dim": "64"}}', "cannot be used"),
        ('{"config": {"dim": 64, "n_layers": 2.5}}', "cannot be used"),
    ],
)
def test_a_json_that_cannot_be_used(saved, content, match):
    saved.with_suffix(".json").write_text(content)
    assert "pretrain_64.json" in refuses(match, saved)


def test_a_json_of_other_weights_is_refused(saved, tmp_path):
    other = tmp_path / "other.pth"
    save_checkpoint(other, make(1, n_heads=8, n_kv_heads=4), info={})
    shutil.copy(other, saved)  # the same shapes, another number of heads
    refuses("describes other weights than those in pretrain_64.pth", saved)
    shutil.copy(other.with_suffix(".json"), saved.with_suffix(".json"))
    assert load_checkpoint(saved).config.n_heads == 8


def test_another_tokenizer_is_refused(path):
    tokenizer = load_tokenizer()
    ours = tokenizer_hash(tokenizer)
    save_checkpoint(path, make(), info={"tokenizer_hash": ours})
    refuses(rf"has 97 tokens, the tokenizer {len(tokenizer)}", path, tokenizer=tokenizer)
    right_size = make(vocab_size=len(tokenizer))
    other = path.with_name("other.pth")
    save_checkpoint(other, right_size, info={"tokenizer_hash": "0123456789abcdef"})
    message = refuses("trained with the tokenizer 0123456789abcdef", other, tokenizer=tokenizer)
    assert ours in message
    save_checkpoint(other, right_size, info={"tokenizer_hash": ours})
    load_checkpoint(other, tokenizer=tokenizer)
    save_checkpoint(other, right_size, info={})
    load_checkpoint(other, tokenizer=tokenizer)


# ---- replacing


def test_another_architecture_is_not_replaced_unasked(saved):
    deeper = make(n_layers=3)
    for attempt in (
        lambda: check_can_write(saved, deeper.config),
        lambda: save_checkpoint(saved, deeper, info={}),
    ):
        with pytest.raises(ValueError, match=r"n_layers: 3 != 2.*overwrite=True"):
            attempt()
    assert same_weights(load_checkpoint(saved).model, make())
    check_can_write(saved, make(dropout=0.1).config)
    check_can_write(saved.with_name("new.pth"), deeper.config)
    check_can_write(saved, deeper.config, overwrite=True)
    save_checkpoint(saved, deeper, info={}, overwrite=True)
    assert load_checkpoint(saved).config.n_layers == 3


def test_what_is_not_a_checkpoint_is_not_replaced_unasked(path):
    path.parent.mkdir()
    path.write_text("my diary")
    with pytest.raises(ValueError, match="exists, and no description is beside it.*overwrite=True"):
        save_checkpoint(path, make(), info={})
    assert path.read_text() == "my diary"
    save_checkpoint(path, make(), info={}, overwrite=True)
    assert same_weights(load_checkpoint(path).model, make())


class Stop(BaseException):
    """Like a kill at a chosen moment."""


@pytest.mark.parametrize("before", ["published", "own", "nothing"])
@pytest.mark.parametrize("moment", range(4))
def test_stopped_between_any_two_writes_the_pair_fits(path, monkeypatch, before, moment):
    """`moment` 0: before the first JSON, 1: before the new weights, 2: before the last JSON, 3: not at all."""
    if before == "own":
        save_checkpoint(path, make(0, n_heads=8, n_kv_heads=4), info={"step": 1})
    elif before == "published":
        as_published(path, make(0))
    replaced = []

    def replace(source, target):
        if len(replaced) == moment:
            raise Stop
        replaced.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        n_writes = 2 if before == "nothing" else 3
        try:
            save_checkpoint(path, make(1), info={"step": 2}, overwrite=True)
            assert moment >= n_writes
        except Stop:
            assert moment < n_writes
    if before == "nothing" and moment < 2:
        assert not path.exists()
        refuses("no checkpoint", path)
        save_checkpoint(path, make(1), info={"step": 2})
    checkpoint = load_checkpoint(path)
    if moment < 2 and before != "nothing":
        assert same_weights(checkpoint.model, make(0))
        if before == "own":
            assert (checkpoint.info["step"], checkpoint.config.n_heads) == (1, 8)
        else:
            assert checkpoint.info == {} and checkpoint.config.n_heads == 16
    else:
        assert same_weights(checkpoint.model, make(1))
        assert (checkpoint.info["step"], checkpoint.config.n_heads) == (2, 16)
    assert not list(path.parent.glob(".*.tmp"))
    save_checkpoint(path, make(2), info={"step": 3}, overwrite=True)  # and the next save goes through
    assert load_checkpoint(path).info["step"] == 3


def fork(work, *args) -> int:
    """Run `work` in a copy of this process, which ends with it; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the threads of a pool do not survive a fork
            work(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(path):
    """Two models of the same shapes and different heads are saved in turn: a wrong pairing would show."""
    sizes = dict(dim=256, vocab_size=97)
    models = [make(0, **sizes, n_heads=8, n_kv_heads=4), make(1, **sizes, n_heads=16, n_kv_heads=8)]
    started = time.perf_counter()
    save_checkpoint(path, models[0], info={"step": 0})
    seconds = time.perf_counter() - started + 0.05

    def save_for_ever() -> None:
        for step in range(1, 100_000):
            save_checkpoint(path, models[step % 2], info={"step": step}, overwrite=True)

    chance = random.Random(0)
    steps = set()
    for _ in range(12):
        pid = fork(save_for_ever)
        time.sleep(chance.uniform(0.2, 3) * seconds)  # of a save: a busy machine is slower
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        checkpoint = load_checkpoint(path)
        step = checkpoint.info["step"]
        steps.add(step)
        assert same_weights(checkpoint.model, models[step % 2])
        assert checkpoint.config.n_heads == [8, 16][step % 2]
    assert len(steps) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("limit", [100, 100_000])
def test_full_disk_leaves_the_old_file_and_says_so(saved, limit):
    """A limit on the size of files fails just like a full disk, with another number."""
    import resource

    model = make(1)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as caught:
            save_checkpoint(saved, model, info={"step": 8})
        os._exit(0 if (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(saved)) else 2)

    before = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    assert os.waitstatus_to_exitcode(os.waitpid(fork(save), 0)[1]) == 0
    assert before == (saved.read_bytes(), saved.with_suffix(".json").read_bytes())
    assert len(list(saved.parent.iterdir())) == 2
