"""Several processes, really launched, against one: the same losses and weights, however the model is spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loop import options
from world_worker import train

from trainer.distributed import World
from trainer.zero_config import zero_problems

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {
    "plain": {},
    "fsdp": {"fsdp": True},
    "zero1": {"deepspeed": str(ROOT / "configs" / "zero1.json")},
    "zero2": {"deepspeed": str(ROOT / "configs" / "zero2.json")},
    "zero3": {},  # with a file of the test's own: every parameter is spread, however small
}
MODELS = {"dense": {}, "moe": {"use_moe": True}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of runs: {engine}_{model} by two processes, one_{model} by this one, of the same 8 samples a step."""
    folder = tmp_path_factory.mktemp("world")
    zero3 = folder / "zero3.json"
    zero3.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    cases = []
    for model, fields in MODELS.items():
        for engine, flags in ENGINES.items():
            flags = {"deepspeed": str(zero3)} if engine == "zero3" else flags
            settings = {"batch_size": 2, "accumulation_steps": 2, "max_steps": 6} | flags
            cases.append({"out_dir": str(folder / f"{engine}_{model}"), "options": settings, "model": fields})
        settings = {"batch_size": 4, "accumulation_steps": 2, "max_steps": 6}
        train({"out_dir": str(folder / f"one_{model}"), "options": settings, "model": fields}, World())
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [*launcher, str(ROOT / "tests" / "world_worker.py"), str(folder / "cases.json")],
        capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_what_one_trains(trained, engine, model):
    one, two = trained / f"one_{model}", trained / f"{engine}_{model}"
    expected, weights = (torch.load(folder / "tiny.pth", weights_only=True) for folder in (one, two))
    assert expected.keys() == weights.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=5e-5, rtol=0, msg=name)
    lines = [[json.loads(x) for x in (f / "tiny.metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(lines[0]) == len(lines[1]) > 1
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-4), name


def test_a_deepspeed_file_that_contradicts_the_flags_is_refused_by_name(tmp_path):
    path = tmp_path / "zero.json"
    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": 5.0, "train_micro_batch_size_per_gpu": "auto"}
    content |= {"fp16": {"enabled": True}, "scheduler": {}, "optimizer": {"type": "AdamW", "params": {"lr": 3.0}}}
    path.write_text(json.dumps(content))
    found = "\n".join(zero_problems(path, options(tmp_path), "float32"))
    for words in ('"gradient_clipping" is 5.0, but --grad_clip', '"fp16" is True, but --dtype', "scheduler", "lr of"):
        assert words in found
    assert "train_micro_batch" not in found
    path.write_text('{"zero_optimization": {"stage": 0}}')
    assert "stage" in zero_problems(path, options(tmp_path), "float32")[0]
