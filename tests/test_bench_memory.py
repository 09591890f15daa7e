"""bench/memory.py: what is computed on tensors without data is what a step needs."""

from __future__ import annotations

import json

import pytest
from torch.profiler import ProfilerActivity, profile

from bench import memory
from bench.memory import BLOCK, Step, computed_peak, largest_batch, make_batch, start, train
from model.model import Transformer

TINY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256)
RNG_STATE = 5056  # bytes that a checkpointed layer, or chunk of the loss, keeps to draw the same dropout again


def allocated_peak(step: Step, path) -> tuple[int, int]:
    """Return the most bytes that PyTorch's allocator had given out during a step, and the number of tensors before it."""
    strategy, batch = start(Transformer(step.config), step), make_batch(step)
    train(strategy, batch, step)
    tensors = {p.data_ptr(): p for p in strategy.module.parameters()} | {id(x): x for x in batch.inputs.values()}
    for optimizer in strategy.optimizers:
        tensors |= {id(x): x for state in optimizer.state.values() for x in state.values()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(strategy, batch, step)
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak, len(tensors)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_computed_peak_is_what_the_allocator_gives_out(tmp_path, dtype, checkpointing):
    """A tensor is rounded up to a block; there are the model's and at most a hundred activations and gradients a layer."""
    step = Step(TINY, 8, checkpointing, dtype)
    computed, (measured, n_tensors) = computed_peak(step, gpu=False), allocated_peak(step, tmp_path / "trace.json")
    bound = BLOCK * (n_tensors + 100 * TINY["n_layers"]) + RNG_STATE * (TINY["n_layers"] + 2) * checkpointing
    assert abs(computed - measured) <= bound < 0.01 * measured


def test_a_gpu_takes_its_own_kernels_and_a_mixture_has_no_need_of_values():
    for fields in ({}, {"use_moe": True}, {"qk_norm": True}):
        plain, less = (computed_peak(Step(TINY | fields, 4, checkpointing)) for checkpointing in (False, True))
        assert 0 < less < plain
        weights = sum(p.numel() for p in Transformer(Step(TINY | fields, 1).config).parameters())
        assert plain > 12 * weights  # weights and two moments of AdamW in float32


def test_the_largest_batch_fits_and_the_next_does_not(capsys, monkeypatch):
    for checkpointing in (False, True):
        rows, budget = largest_batch(TINY, 100e6, checkpointing), 100e6
        steps = [Step(TINY, n, checkpointing) for n in (rows, rows + 1)]
        assert rows > 0 and computed_peak(steps[0]) <= budget < computed_peak(steps[1])
    assert largest_batch(TINY, 5e6, gradient_checkpointing=False) == 0
    flags = "--gpu_gb 0.95 --presets toy --contexts 128".split()
    monkeypatch.setattr("sys.argv", ["memory.py", *flags])
    memory.main()
    assert "| toy | 128 | " in capsys.readouterr().out
