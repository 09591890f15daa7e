"""wandb and TensorBoard: they get the figures, and no trouble of theirs ends a run."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.model import Transformer, parameter_counts
from tests.test_trainer import config, options, rows, run_for, same, train, weights
from trainer.distributed import DistEnv
from trainer.losses import next_token_loss
from trainer.trainer import fit


class StubRun:
    """A run at Weights & Biases that loses its connection at step `fails_at`."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None, finish_error=None) -> None:
        self.fails_at, self.error, self.finish_error = fails_at, error, finish_error
        self.logged: list[int] = []
        self.finished = 0

    def log(self, figures, step):
        if self.fails_at is not None and step >= self.fails_at:
            raise self.error
        assert "loss" in figures and "step" not in figures
        self.logged.append(step)

    def finish(self):
        self.finished += 1
        if self.finish_error is not None:
            raise self.finish_error


@pytest.fixture
def undisturbed(tmp_path):
    return weights(train(options(tmp_path / "whole"))[0])


@pytest.mark.parametrize(
    "error", [ConnectionResetError("connection reset"), wandb.errors.CommError("no route"), TimeoutError()], ids=repr
)
def test_a_lost_connection_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys, undisturbed, error):
    stub, asked = StubRun(fails_at=6, error=error), {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings) or stub)
    monkeypatch.setenv("WANDB_MODE", "online")
    names = {"wandb_project": "mine", "wandb_run_name": "first"}
    model, _ = train(options(tmp_path / "a", use_wandb=True, **names))
    assert (asked["project"], asked["name"], asked["mode"]) == ("mine", "first", "online")
    assert stub.logged == [1, 3]
    warnings = capsys.readouterr().err
    assert warnings.count("WARNING: wandb failed") == 1 and (str(error) or "TimeoutError") in warnings
    assert same(weights(model), undisturbed)


def test_an_end_that_cannot_be_uploaded_is_a_warning(tmp_path, monkeypatch, capsys):
    stub = StubRun(finish_error=wandb.errors.CommError("gone"))
    monkeypatch.setattr(wandb, "init", lambda **_: stub)
    monkeypatch.setenv("WANDB_MODE", "online")
    train(options(tmp_path, use_wandb=True))
    assert stub.logged == [1, 3, 6, 9, 12] and stub.finished == 1
    assert "WARNING: wandb failed (gone)" in capsys.readouterr().err


def test_a_server_that_cannot_be_reached_means_offline(tmp_path, monkeypatch, capsys):
    stub, modes = StubRun(), []

    def init(mode, **_):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("Run initialization has timed out")
        return stub

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    train(options(tmp_path, use_wandb=True))
    assert modes == ["online", "offline"] and stub.logged == [1, 3, 6, 9, 12]
    assert "logging offline" in capsys.readouterr().err


def test_no_wandb_at_all_is_a_warning(tmp_path, monkeypatch, capsys):
    def init(**_):
        raise wandb.errors.UsageError("no space for its files")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(options(tmp_path, use_wandb=True))
    assert "wandb cannot be used (no space for its files): training without it" in capsys.readouterr().err


def test_a_bug_of_ours_is_not_taken_for_a_lost_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: StubRun(fails_at=3, error=ZeroDivisionError()))
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ZeroDivisionError):
        train(options(tmp_path, use_wandb=True))


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_figures_and_no_step_twice_after_a_resume(tmp_path):
    opts = options(tmp_path, use_tensorboard=True, log_interval=1, save_interval=4)
    with pytest.raises(SystemExit):
        train(opts, stop_after=7)
    folder = tmp_path / "tiny.resume"
    # From step 4, though 5 to 7 were logged.
    train(dataclasses.replace(opts, resume=str(folder / "step_00000004")))
    found = scalars(tmp_path / "tensorboard" / "tiny")
    lines = [json.loads(line) for line in (tmp_path / "tiny.metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in found["loss"]] == list(range(1, 13))
    assert [value for _, value in found["loss"]] == pytest.approx([line["loss"] for line in lines])
    assert {"lr", "grad_norm", "tokens_per_second"} <= found.keys()


@pytest.mark.parametrize(("first_seconds", "first_eta"), [(5.0, None), (100.0, 1100.0)])
def test_the_remaining_time_is_not_that_of_a_slow_first_step(tmp_path, monkeypatch, capsys, first_seconds, first_eta):
    """The first step takes long, the others a second; all that is known before it is printed before it."""
    now, printed_before = 0.0, []

    def slow_loss(model, batch):
        nonlocal now
        if not printed_before:
            printed_before.append(capsys.readouterr().out)
        now += 1.0 if now else first_seconds
        return next_token_loss(model, batch)

    monkeypatch.setattr("trainer.metrics.time", SimpleNamespace(perf_counter=lambda: now))
    train(options(tmp_path), loss_fn=slow_loss)
    assert printed_before == [
        "adamw, learning rate 0.01; steps to do: 12; rows in each: 4; the log begins after step 1\n"
    ]
    lines = [json.loads(line) for line in (tmp_path / "tiny.metrics.jsonl").read_text().splitlines()]
    assert [line.get("eta_seconds") for line in lines] == [first_eta, 9.0, 6.0, 3.0, 0.0]
    first, *others = capsys.readouterr().out.splitlines()
    assert ("eta" in first) == bool(first_eta) and "mfu" not in first
    assert [line.split(" | ")[-1] for line in others] == [f"eta 0:00:{seconds:02d}" for seconds in (9, 6, 3, 0)]


def test_mfu_is_the_share_of_the_peak_and_is_not_given_where_weights_are_frozen(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.metrics.peak_flops", lambda *_: 1e12)
    for frozen in (False, True):
        opts, model = options(tmp_path / str(frozen)), Transformer(config())
        model.layers[0].requires_grad_(not frozen)
        run = dataclasses.replace(run_for(model, opts), save_weights=lambda info, tensors: list(tensors))
        fit(model, next_token_loss, rows(), None, opts, run, DistEnv())
        lines = [json.loads(line) for line in (opts.out_dir / "tiny.metrics.jsonl").read_text().splitlines()]
        assert all(("mfu" in line) == (not frozen) for line in lines)
        for line in lines if not frozen else []:
            per_token = line["mfu"] * 1e12 / line["tokens_per_second"]
            assert 1 < per_token / (6 * parameter_counts(model)["active"]) < 1.2  # attention is the rest
