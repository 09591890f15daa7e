"""The loop: the same gradient however a step is cut up, exact resuming, and no silent failure."""

from __future__ import annotations

import dataclasses
import json
import math
import signal

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_gradients_close, assert_trained_alike, rounding, shape_of

from common.cli import parse_options
from common.errors import UserError, stop_signals
from data_pipeline.datasets import Batch, PackedRows
from data_pipeline.tokenize import TokenizedDataset
from model.LMConfig import LMConfig
from model.model import Transformer
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint
from trainer import trainer as trainer_module
from trainer.distributed import DistEnv
from trainer.losses import next_token_loss
from trainer.options import TrainOptions
from trainer.trainer import Run, Trainer, fit

VOCAB, ROW = 48, 32


def config(**fields) -> LMConfig:
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=ROW)
    return LMConfig(**shape | fields)


def corpus(n: int = 60, seed: int = 0) -> TokenizedDataset:
    """Documents that count upwards from a random start: easily learned, of ragged lengths."""
    rng = np.random.default_rng(seed)
    documents = [3 + (rng.integers(0, 45) + np.arange(rng.integers(2, 50))) % 45 for _ in range(n)]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    lengths = np.diff(offsets)
    return TokenizedDataset(
        tokens=np.concatenate(documents).astype(np.uint16),
        loss_mask=None,
        offsets=offsets,
        n_bytes=3 * lengths,
        content_hashes=rng.integers(0, 2**63, n).astype(np.uint64),
        fingerprint=f"corpus{seed}",
        info={},
    )


def rows(ids=range(60), seed: int = 0) -> PackedRows:
    return PackedRows(corpus(seed=seed), np.arange(60)[list(ids)], ROW, seed=0)


def options(out_dir, **fields) -> TrainOptions:
    settings = dict(
        out_dir=out_dir, batch_size=4, max_steps=12, learning_rate=1e-2, device="cpu", dtype="float32", val_interval=5,
        log_interval=3, save_interval=4, num_workers=1,
    )  # fmt: skip
    return TrainOptions(**settings | fields)


def run_for(model, opts, **identity) -> Run:
    def save_weights(info, tensors):
        save_checkpoint(opts.out_dir / "tiny.pth", model, info=info, overwrite=True, tensors=tensors)

    return Run("pretrain", "tiny", model.config, {"tokenizer_hash": "t", **identity}, save_weights)


def train(opts, *, train_rows=None, val=None, model_fields=(), loss_fn=next_token_loss, stop_after=None, **identity):
    """Run `fit` on a fresh model; stop_after: ask it to stop as a signal would."""
    torch.manual_seed(0)
    model = Transformer(config(**dict(model_fields)))
    calls = 0

    def counting_loss(model, batch):
        nonlocal calls
        result = loss_fn(model, batch)
        calls += model.training
        if calls == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return result

    run = run_for(model, opts, **identity)
    metrics = fit(model, counting_loss, train_rows or rows(), val, opts, run, DistEnv())
    return model, metrics


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_what_it_promises(tmp_path, capsys):
    val = rows(range(50, 60))
    model, metrics = train(options(tmp_path, max_steps=60), train_rows=rows(range(50)), val=val)
    assert metrics["loss"] < 0.5 * math.log(VOCAB)
    assert metrics["val_loss"] < 0.7 * math.log(VOCAB)
    n_targets = sum(val.batch([i]).n_targets for i in range(len(val)))
    expected = metrics["val_loss"] * n_targets / math.log(2) / val.n_bytes
    assert metrics["bits_per_byte"] == pytest.approx(expected)

    lines = [json.loads(line) for line in (tmp_path / "tiny.metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, *(n for n in range(2, 61) if n % 3 == 0 or n % 5 == 0)]
    assert all(line["tokens_per_second"] > 0 and line["memory_gb"] > 0 for line in lines)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    saved = load_checkpoint(tmp_path / "tiny.pth")
    assert same(weights(saved.model), weights(model))
    assert saved.info["step"] == 60 and saved.info["tokens"] == lines[-1]["tokens"]
    printed = capsys.readouterr().out
    assert "step 60/60 100% | loss " in printed and " | bpb " in printed and " tok/s" in printed


def gradient(opts, step_samples, model_fields=()) -> dict[str, torch.Tensor]:
    """The gradient of one step, before clipping."""
    torch.manual_seed(0)
    model = Transformer(config(**dict(model_fields)))
    trainer = Trainer(model, next_token_loss, rows(), None, opts, run_for(model, opts), DistEnv())
    trainer.prepare()
    model.train()
    data, size = trainer.train, opts.batch_size
    batches = [data.batch(step_samples[i : i + size]) for i in range(0, len(step_samples), size)]
    captured = {}

    def capture(*_args, **_kwargs):
        captured.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.strategy.optimizers[0].register_step_pre_hook(capture)
    trainer.step(0, batches)
    return captured


@pytest.mark.parametrize("fields", [(), (("use_moe", True),)], ids=["dense", "moe"])
def test_accumulation_does_not_change_the_gradient(tmp_path, fields):
    samples = list(range(8))
    one = gradient(options(tmp_path / "a", batch_size=8, grad_clip=0), samples, fields)
    many = gradient(options(tmp_path / "b", batch_size=1, accumulation_steps=8, grad_clip=0), samples, fields)
    assert_gradients_close(many, one, rounding(**shape_of(config(), 8 * ROW, backward=True)))


def test_the_last_step_takes_what_is_left_with_its_own_count(tmp_path):
    data = rows()
    opts = options(tmp_path, max_steps=None, epochs=2, batch_size=5, accumulation_steps=2, val_fraction=0)
    seen = []

    class Spy:
        fingerprint, packing = data.fingerprint, data.packing

        def __len__(self):
            return len(data)

        def documents(self, indices):
            return data.documents(indices)

        def batch(self, indices):
            seen.append(list(indices))
            return data.batch(indices)

    train(opts, train_rows=Spy())
    flat = [sample for batch in seen for sample in batch]
    assert sorted(flat) == sorted(list(range(len(data))) * 2)  # every sample once an epoch
    assert all(len(batch) <= 5 for batch in seen)
    n = len(data)
    assert sorted(flat[:n]) == list(range(n))


class Numbers:
    """A data set whose batches hold the numbers of their samples."""

    fingerprint = "numbers"

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batch(self, indices):
        return Batch({"samples": torch.tensor(indices)}, len(indices), len(indices), 0)


@settings(max_examples=60, deadline=None)
@given(
    n_samples=st.integers(1, 60),
    epochs=st.sampled_from([1, 2, 2.5]),
    micro_rows=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    num_workers=st.sampled_from([0, 1, 2]),
    resumed_at=st.integers(0, 5),
    halved=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_sample_once_an_epoch_in_the_same_order_for_every_world(
    n_samples, epochs, micro_rows, accumulation, num_workers, resumed_at, halved, seed
):
    """No duplicate and no gap for 1 to 4 processes, whatever is left over, and wherever a run is resumed.

    These are the batches that the loop trains on: those of `Trainer.loader`, of one trainer for each rank.
    """
    per_step = 12 * micro_rows * accumulation  # divisible by every number of processes
    orders = []
    for size in (1, 2, 3, 4):
        opts = TrainOptions(
            batch_size=per_step // size // accumulation, accumulation_steps=accumulation, epochs=epochs, seed=seed,
            num_workers=num_workers, device="cpu", dtype="float32",
        )  # fmt: skip
        run = Run("pretrain", "numbers", config(), {}, lambda info: None)
        steps: dict[int, dict[int, list[int]]] = {}
        n_batches: dict[int, set[int]] = {}
        for rank in range(size):
            trainer = Trainer(None, None, Numbers(n_samples), None, opts, run, DistEnv(rank, size))
            assert trainer.schedule.per_step == per_step
            first = min(resumed_at, trainer.total_steps - 1)
            if halved:  # as --auto_batch does in the middle of a run
                trainer.loader.micro_batch = -(-opts.batch_size // 2)
            for step, (batches, _) in enumerate(trainer.loader.prefetch(first), start=first):
                assert all(0 < batch.n_targets <= trainer.loader.micro_batch for batch in batches)
                counted = [batch.inputs["samples"].tolist() for batch in batches if not batch.dummy]
                steps.setdefault(step, {})[rank] = sum(counted, [])
                n_batches.setdefault(step, set()).add(len(batches))
        assert sorted(steps) == list(range(first, trainer.total_steps))
        assert all(len(numbers) == 1 for numbers in n_batches.values())  # all make the same number of forward passes
        order = []
        for step in sorted(steps):
            shares = [steps[step][rank] for rank in range(size)]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1  # nobody waits long for another
            order += [shares[g % size][g // size] for g in range(sum(map(len, shares)))]
        orders.append(order)
    assert all(order == orders[0] for order in orders)
    skipped, total = first * per_step, round(epochs * n_samples)
    assert len(orders[0]) == total - skipped
    for epoch in range(math.ceil(epochs)):
        begin, end = max(epoch * n_samples - skipped, 0), min((epoch + 1) * n_samples, total) - skipped
        part = orders[0][begin : max(end, 0)]
        assert len(set(part)) == len(part)  # no duplicate
        if end - begin == n_samples:
            assert sorted(part) == list(range(n_samples))  # no gap


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer": "muon"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"accumulation_steps": 2, "num_workers": 0},
    ],
    ids=["adamw", "muon", "bf16", "fp16", "accumulated"],
)
@pytest.mark.parametrize(
    "model_fields", [(("dropout", 0.1),), (("use_moe", True), ("router_bias_rate", 0.01))], ids=["dropout", "moe"]
)
def test_stopped_and_resumed_is_bit_identical(tmp_path, fields, model_fields):
    whole, _ = train(options(tmp_path / "a", **fields), model_fields=model_fields, val=rows(range(5)))
    micro = fields.get("accumulation_steps", 1)
    opts = options(tmp_path / "b", **fields)
    with pytest.raises(SystemExit) as stop:
        train(opts, model_fields=model_fields, val=rows(range(5)), stop_after=6 * micro)
    assert stop.value.code == 128 + signal.SIGTERM
    resumed, _ = train(dataclasses.replace(opts, resume="newest"), model_fields=model_fields, val=rows(range(5)))
    assert same(weights(whole), weights(resumed))
    assert same(weights(load_checkpoint(tmp_path / "b" / "tiny.pth").model), weights(whole))
    steps = [json.loads(x)["step"] for x in (tmp_path / "b" / "tiny.metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def test_resuming_another_run_is_refused_with_the_reason(tmp_path):
    opts = options(tmp_path)
    with pytest.raises(SystemExit):
        train(opts, stop_after=5)
    again = dataclasses.replace(opts, resume="newest")
    with pytest.raises(UserError, match="train_data: .* the files of --data_path have other content than before"):
        train(again, train_rows=rows(seed=1))
    with pytest.raises(UserError, match="train_data: .* the data differs because of --val_fraction 0.01 -> 0.2"):
        train(dataclasses.replace(again, val_fraction=0.2), train_rows=rows(range(50)))
    with pytest.raises(UserError, match="config.n_layers: 2 -> 3"):
        train(again, model_fields=[("n_layers", 3)])
    with pytest.raises(UserError, match="tokenizer_hash: t -> u"):
        train(again, tokenizer_hash="u")
    with pytest.raises(UserError, match="samples_per_step: 4 -> 8"):
        train(dataclasses.replace(again, batch_size=8))
    with pytest.raises(UserError, match="seed: 1337 -> 1"):
        train(dataclasses.replace(again, seed=1))
    train(again)


def test_resume_needs_something_to_resume_and_auto_says_which_it_did(tmp_path, capsys):
    with pytest.raises(UserError, match="--resume auto"):
        train(options(tmp_path, resume="newest"))
    train(options(tmp_path, resume="auto"))
    assert "starting from the beginning" in capsys.readouterr().out
    train(options(tmp_path, resume="auto"))
    assert "the run is finished" in capsys.readouterr().out


def test_an_unfinished_run_is_not_lost_by_starting_again(tmp_path):
    opts = options(tmp_path)
    with pytest.raises(SystemExit):
        train(opts, stop_after=5)
    with pytest.raises(UserError, match="stopped at step 5: continue it with --resume"):
        train(opts)
    train(dataclasses.replace(opts, overwrite=True))


def test_a_finished_run_is_replaced_only_when_asked_and_not_before_something_new_is_saved(tmp_path):
    opts, folder = options(tmp_path), tmp_path / "tiny.resume"
    train(opts)
    before = (tmp_path / "tiny.pth").read_bytes()
    with pytest.raises(UserError, match="holds a finished run of 12 steps: replace it with --overwrite"):
        train(dataclasses.replace(opts, max_steps=3))
    again = dataclasses.replace(opts, max_steps=9, overwrite=True)
    with pytest.raises(SystemExit):
        train(again, stop_after=3, loss_fn=killed_before_saving(folder))
    assert states(folder) == [3] and (tmp_path / "tiny.pth").read_bytes() != before


def killed_before_saving(folder):
    """A loss that looks whether the states of the run before are still there."""

    def loss_fn(model, batch):
        assert states(folder) == [8, 12] and (folder.parent / "tiny.pth").exists()
        return next_token_loss(model, batch)

    return loss_fn


def states(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


def test_a_changed_schedule_is_said(tmp_path, capsys):
    opts = options(tmp_path)
    with pytest.raises(SystemExit):
        train(opts, stop_after=5)
    train(dataclasses.replace(opts, resume="newest", max_steps=14, learning_rate=1e-3))
    printed = capsys.readouterr().out
    assert "learning_rate: 0.01 -> 0.001" in printed and "total_steps: 12 -> 14" in printed


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_weights_change(tmp_path, where):
    steps = 0

    def poisoned(model, batch):
        nonlocal steps
        loss, n, extras = next_token_loss(model, batch)
        steps += 1
        if steps == 6:
            if where == "loss":
                loss = loss * math.nan
                extras = {"loss": loss.detach()}
            else:
                loss.register_hook(lambda g: g * math.inf)
        return loss, n, extras

    opts = options(tmp_path, save_interval=100)
    with pytest.raises(UserError, match=r"step 6: (loss is nan|grad_norm is (nan|inf))") as error:
        train(opts, loss_fn=poisoned)
    assert "weights changed" in str(error.value)
    report = json.loads((tmp_path / "tiny.non_finite.json").read_text())
    assert report["step"] == 6 and len(report["samples"]) == 4 and report["documents"]
    resumed, _ = train(dataclasses.replace(opts, resume="newest"))
    whole, _ = train(options(tmp_path / "other"))
    assert same(weights(resumed), weights(whole))


def test_float16_overflow_skips_the_step_lowers_the_scale_and_says_so(tmp_path):
    def steep(model, batch):
        loss, n, extras = next_token_loss(model, batch)
        return loss * 1e36, n, extras  # times the scale of 65536 it overflows even in float32

    opts = options(tmp_path, dtype="float16", max_steps=3, log_interval=3, val_interval=3)
    torch.manual_seed(0)
    before = weights(Transformer(config()))
    model, metrics = train(opts, loss_fn=steep)
    assert metrics["skipped_steps"] >= 1 and math.isfinite(metrics["grad_norm"])
    lines = [
        json.loads(x, parse_constant=pytest.fail) for x in (tmp_path / "tiny.metrics.jsonl").read_text().splitlines()
    ]
    assert lines
    if metrics["skipped_steps"] == 3:
        assert same(weights(model), before)


def test_a_skipped_step_is_skipped_by_every_optimizer(tmp_path):
    """Only the gradient of the embedding overflows: Muon, which has the matrices, must not step either."""

    def steep(model, batch):
        loss, n, extras = next_token_loss(model, batch)
        weight = model.tok_embeddings.weight.float()
        return loss + 1e36 * (weight - weight.detach()).sum(), n, extras

    opts = options(tmp_path, dtype="float16", optimizer="muon", max_steps=1)
    torch.manual_seed(0)
    before = weights(Transformer(config()))
    model, metrics = train(opts, loss_fn=steep)
    assert metrics["skipped_steps"] == 1 and same(weights(model), before)


def test_a_miscounting_loss_is_caught(tmp_path):
    def wrong(model, batch):
        loss, n, extras = next_token_loss(model, batch)
        return loss, n + 1, extras

    with pytest.raises(AssertionError, match="the loss summed over"):
        train(options(tmp_path), loss_fn=wrong)


def test_validation_is_tried_before_the_first_step(tmp_path):
    class Broken:
        fingerprint = "x"

        def __len__(self):
            return 3

        def batch(self, indices):
            raise UserError("broken validation data")

    with pytest.raises(UserError, match="broken validation"):
        train(options(tmp_path), val=Broken())
    assert not list(tmp_path.glob("*.pth"))


def test_a_balance_loss_is_optimised_and_logged_apart_with_the_share_of_every_expert(tmp_path, capsys):
    fields = [("use_moe", True), ("aux_loss_alpha", 0.5)]
    _, metrics = train(options(tmp_path), model_fields=fields)
    assert metrics["balance_loss"] >= 0.5 * 2 * 0.99  # alpha * layers, when experts are used evenly
    shares = [metrics[f"expert_{i}_share"] for i in range(4)]
    assert sum(shares) == pytest.approx(1) and max(shares) <= metrics["expert_max_load"] / 4
    line = f"experts {min(shares):.0%}-{max(shares):.0%}, busiest {metrics['expert_max_load']:.2f}x"
    assert line in capsys.readouterr().out
    plain = tmp_path / "dense"
    train(options(plain))
    heights = [matplotlib.image.imread(folder / "tiny.png").shape[0] for folder in (tmp_path, plain)]
    assert heights[0] == 2 * heights[1]  # the shares have a plot of their own
    with_loss = gradient(options(tmp_path / "a"), [0, 1], fields)
    without = gradient(options(tmp_path / "b"), [0, 1], [("use_moe", True), ("aux_loss_alpha", 0.0)])
    gate = "layers.0.feed_forward.gate.weight"
    assert not torch.allclose(with_loss[gate], without[gate])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dead_data_worker_ends_the_run_with_its_sample_and_a_saved_state(tmp_path, num_workers):
    data = rows()

    class Dying:
        fingerprint = data.fingerprint

        def __len__(self):
            return len(data)

        def documents(self, indices):
            return data.documents(indices)

        def batch(self, indices):
            if len(seen) == 6 and not bad:
                bad.append(indices[2])
            if bad and bad[0] in indices:
                raise OSError(5, "Input/output error", "tokens.bin")
            seen.append(indices)
            return data.batch(indices)

    seen, bad = [], []
    opts = options(tmp_path, num_workers=num_workers, save_interval=100, data_path=[tmp_path / "texts.csv"])
    with pytest.raises(UserError, match=r"step 7: no batch could be made: sample (\d+) \(documents? ") as error:
        train(opts, train_rows=Dying())
    text = str(error.value)
    assert f"sample {bad[0]} " in text
    assert "tokens.bin" in text and "texts.csv" in text and "--resume" in text
    assert "Traceback" in (tmp_path / "logs" / "tiny.rank0.log").read_text()
    whole, _ = train(options(tmp_path / "other"))
    resumed, _ = train(
        dataclasses.replace(opts, resume="newest")
    )  # from the step before, though none was due to be saved
    assert same(weights(whole), weights(resumed))


def test_out_of_memory_while_a_batch_is_made_says_what_to_change(tmp_path):
    """As when the model writes the answers that it learns from."""
    data = rows()

    class Full(type(data)):
        def __init__(self):
            self.__dict__.update(data.__dict__)

        def batch(self, indices):
            if len(indices) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return data.batch(indices)

    with pytest.raises(UserError) as error:
        train(options(tmp_path), train_rows=Full())
    reason = "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)"
    text = f"no batch could be made: {reason}: use a smaller --batch_size"
    assert text in str(error.value)


def test_a_second_ctrl_c_stops_at_once():
    with stop_signals() as received:
        assert received == []
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_resuming_from_an_older_state_keeps_the_later_ones_until_it_has_saved(tmp_path):
    """Afterwards they would count as the newest, and the new run's states as too old to keep."""
    opts, folder = options(tmp_path, keep=5), tmp_path / "tiny.resume"
    train(opts)  # 12 steps, states 4, 8 and 12
    again = dataclasses.replace(opts, resume=str(folder / "step_00000004"), max_steps=7, save_interval=1)
    with pytest.raises(RuntimeError, match="killed"):
        train(again, loss_fn=interrupted)
    assert states(folder) == [4, 8, 12]
    train(again)
    assert states(folder) == [4, 5, 6, 7]


def interrupted(model, batch):
    if model.training:
        raise RuntimeError("killed")
    return next_token_loss(model, batch)


def test_resume_takes_the_flags_of_the_run_and_given_ones_replace_them(tmp_path, capsys):
    @dataclasses.dataclass
    class Options(TrainOptions):
        stage = "tiny"

    def parse(*flags: str) -> TrainOptions:
        return parse_options(Options, None, ["--out_dir", str(tmp_path), *flags])

    (tmp_path / "x.csv").touch()
    opts = options(tmp_path, seed=7, data_path=[tmp_path / "x.csv"], model={"dim": 32, "dropout": 0.1}, epochs=2.0)
    opts = dataclasses.replace(opts, grad_clip=0.5)
    model = Transformer(config())
    run = dataclasses.replace(run_for(model, opts), name="tiny_32")
    fit(model, next_token_loss, rows(), None, opts, run, DistEnv())
    found = parse("--resume", "--learning_rate", "0.5", "--dropout", "0.2")
    assert found.resume == "newest" and "--seed 7" in capsys.readouterr().out
    same_flags = dataclasses.replace(opts, resume="newest", learning_rate=0.5, model={"dim": 32, "dropout": 0.2})
    assert found.describe() == same_flags.describe()
    assert parse("--resume", "--epochs", "1").max_steps is None  # which would count instead of --epochs
    assert parse("--resume", "--dim", "64").seed == 1337  # another model: not that run
    assert parse("--resume", str(tmp_path / "tiny_32.resume" / "step_00000012")).grad_clip == 0.5
    assert parse().seed == 1337


def flip_a_bit(state) -> None:
    file = max(state.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_the_newest_state_is_noticed_and_the_one_before_is_used(tmp_path, capsys):
    whole, _ = train(options(tmp_path))
    folder = tmp_path / "tiny.resume"
    flip_a_bit(folder / "step_00000012")
    resumed, _ = train(options(tmp_path, resume="newest"))
    printed = capsys.readouterr().out
    assert "step_00000012 is damaged (__0_0.distcp has changed" in printed and "resuming after step 8" in printed
    assert same(weights(resumed), weights(whole)) and states(folder) == [8, 12]
    flip_a_bit(folder / "step_00000008")
    with pytest.raises(UserError, match="step_00000008 is damaged .*resume from another state"):
        train(options(tmp_path, resume=str(folder / "step_00000008")))


@pytest.mark.parametrize("content", ["{}", "{broken"])
def test_a_damaged_description_of_a_run_is_not_a_finished_run(tmp_path, content, capsys):
    train(options(tmp_path))
    (tmp_path / "tiny.resume" / "step_00000012" / "run.json").write_text(content)
    with pytest.raises(UserError, match="continue it with --resume"):
        train(options(tmp_path))
    train(options(tmp_path, resume="newest"))
    assert "step_00000012 is damaged (run.json has changed" in capsys.readouterr().out


def test_a_state_whose_loss_is_not_what_it_was_stops_before_it_does_harm(tmp_path):
    """Weights that were swapped, hashes included: the loss shows it."""
    with pytest.raises(SystemExit):
        train(options(tmp_path), stop_after=9)
    before = (tmp_path / "tiny.pth").read_bytes()

    def far_off(model, batch):
        loss, n, extras = next_token_loss(model, batch)
        return loss, n, extras | {"loss": extras["loss"] + 3.5 * n}

    with pytest.raises(UserError, match="step 10: the loss is .* when the state was saved"):
        train(options(tmp_path, resume="newest"), loss_fn=far_off)
    assert (tmp_path / "tiny.pth").read_bytes() == before and states(tmp_path / "tiny.resume") == [8, 9]


@pytest.mark.parametrize(
    "loss, before, exploded", [(8.7, 2.0, True), (4.9, 2.0, False), (40.0, 25.0, False), (3e35, 2500.0, True)]
)
def test_a_loss_explodes_by_its_own_measure(loss, before, exploded):
    """IPO starts at 25 with the default beta, at 2500 with 0.01."""
    assert trainer_module.has_exploded(loss, before) == exploded


def test_a_state_of_another_precision_is_continued(tmp_path):
    with pytest.raises(SystemExit):
        train(options(tmp_path), stop_after=5)
    train(options(tmp_path, resume="newest", dtype="float16"))


def test_a_first_step_that_fails_deletes_nothing_of_the_run_before(tmp_path):
    train(options(tmp_path))
    before = (tmp_path / "tiny.metrics.jsonl").read_text()

    def nan(model, batch):
        loss, n, extras = next_token_loss(model, batch)
        return loss * math.nan, n, {"loss": extras["loss"] * math.nan}

    with pytest.raises(UserError, match="step 1: .*Nothing was trained yet"):
        train(options(tmp_path, overwrite=True), loss_fn=nan)
    assert states(tmp_path / "tiny.resume") == [8, 12]
    train(options(tmp_path, resume="newest"))  # nothing is left to do, and the curve is there
    assert (tmp_path / "tiny.metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match="step 9: "):
        train(options(tmp_path, resume=str(tmp_path / "tiny.resume" / "step_00000008")), loss_fn=nan)
    train(options(tmp_path, resume="newest"))
    assert (tmp_path / "tiny.metrics.jsonl").read_text() == before
    train(options(tmp_path, overwrite=True, max_steps=4, epochs=1.0))
    assert len((tmp_path / "tiny.metrics.jsonl").read_text().splitlines()) < len(before.splitlines())
    assert not [*tmp_path.glob(".*.old")]


def test_a_loss_that_explodes_does_not_replace_better_weights(tmp_path, capsys):
    calls = 0

    def exploding(model, batch):
        nonlocal calls
        loss, n, extras = next_token_loss(model, batch)
        calls += model.training
        return loss, n, extras | {"loss": extras["loss"] + (10.0 * n if 6 < calls < 13 else 0.0)}

    with pytest.raises(UserError, match="the loss is .* after step 12.*stay those of the last good save"):
        train(options(tmp_path, log_interval=1), loss_fn=exploding)
    assert "WARNING: the loss is" in capsys.readouterr().out
    assert json.loads((tmp_path / "tiny.json").read_text())["step"] == 4
    assert states(tmp_path / "tiny.resume") == [8, 12]


def short_of_memory(limit: int, error=torch.OutOfMemoryError):
    """A loss for a device that holds `limit` rows: forward and backward of more end in an error, part of the way on."""

    def loss_fn(model, batch):
        loss, n, extras = next_token_loss(model, batch)
        if model.training and len(batch.inputs["input_ids"]) > limit:
            loss.backward(retain_graph=True)  # leaves gradients behind, which must not count
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss, n, extras

    return loss_fn


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_auto_batch_halves_until_it_fits_and_keeps_the_samples(tmp_path, capsys, error):
    whole, expected = train(options(tmp_path / "a", batch_size=7, accumulation_steps=2))
    opts = options(tmp_path / "b", batch_size=7, accumulation_steps=2, auto_batch=True)
    model, metrics = train(opts, loss_fn=short_of_memory(2, error))
    printed = capsys.readouterr().out
    assert "out of memory with 7 rows at once. --auto_batch continues with 4 rows and 4 accumulation steps" in printed
    assert "continues with 2 rows and 7 accumulation steps" in printed and printed.count("--auto_batch") == 2
    relative = rounding(**shape_of(config(), 14 * ROW, backward=True))
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=relative)
    assert_trained_alike(weights(model), weights(whole), relative, opts.max_steps * opts.learning_rate)
    # A run that goes on does not try again what did not fit.
    train(dataclasses.replace(opts, resume="newest", max_steps=14), loss_fn=short_of_memory(2, error))
    assert "out of memory" not in capsys.readouterr().out


def test_out_of_memory_says_what_helps(tmp_path):
    with pytest.raises(UserError, match=r"step 1: out of memory with 4 rows .*--auto_batch.*--gradient_checkpointing"):
        train(options(tmp_path / "a"), loss_fn=short_of_memory(2))
    with pytest.raises(UserError, match=r"out of memory with 1 rows .*--max_seq_len"):
        train(options(tmp_path / "b", auto_batch=True), loss_fn=short_of_memory(0))

    # The validation before the first step: one row at once as long as nothing is known.
    def one_row(model, batch):
        if len(batch.inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return next_token_loss(model, batch)

    train(options(tmp_path / "d", auto_batch=True), loss_fn=one_row, val=rows(range(20)))
    with pytest.raises(UserError, match=r"validation after step 0: out of memory with 4 rows .*--auto_batch"):
        train(options(tmp_path / "e"), loss_fn=one_row, val=rows(range(20)))
    with pytest.raises(RuntimeError, match="shapes"):
        train(options(tmp_path / "c", auto_batch=True), loss_fn=short_of_memory(2, lambda _: RuntimeError("shapes")))
