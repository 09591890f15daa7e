"""The stage scripts as users start them on several processes: with torchrun, deepspeed, and on two machines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from launching import ROOT, deepspeed, environment, free_port, node, torchrun
from states import read_state
from tolerances import assert_moments_alike, assert_trained_alike, rounding, shape_of

from model.LMConfig import LMConfig
from model.model import Transformer
from model.tokenizer import load_tokenizer, tokenizer_hash
from model.weights_file import save_checkpoint

SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
MODEL = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]
ROUNDING = rounding(**shape_of(LMConfig(**SHAPE), 8 * 64, backward=True))  # of a gradient: 4 rows or 4 pairs a step
COMMON = (
    "--device cpu --dtype float32 --log_interval 1 --val_fraction 0.1 --val_interval 3 --learning_rate 0.001".split()
)
PRETRAIN = [*COMMON, *MODEL, "--max_steps", "8", "--optimizer", "adamw"]  # the one that DeepSpeed has, too
STAGES = {
    "3-full_sft.py": ("chats.jsonl", "full_sft_32", ["--max_steps", "5"]),
    "4-lora_sft.py": ("chats.jsonl", "lora_me_32", ["--max_steps", "5", "--lora_name", "me", "--merge"]),
    "5-dpo_train.py": ("pairs.jsonl", "rl_32", ["--max_steps", "5"]),
}


class Launch:
    """A launcher and its processes; nothing of them outlives `with`. `text` is what they have printed."""

    def __init__(self, command: list) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self._output, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT
        )
        self._family: set[psutil.Process] = set()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_) -> None:
        self.workers()
        for process in (
            [*self._family, psutil.Process(self.process.pid)] if self.process.poll() is None else self._family
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._output.close()

    def workers(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, KeyError):
                    self._family.add(child)
                    if "1-pretrain.py" in " ".join(child.cmdline()) and (rank := child.environ().get("RANK")):
                        found[int(rank)] = child
        return found

    def alive(self) -> list[int]:
        _, alive = psutil.wait_procs(self._family, timeout=60)
        return [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    @property
    def text(self) -> str:
        # Not with seek and read: the processes write at the position that they share with this file.
        output = self._output.fileno()
        return os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace")

    def wait_until(self, condition: Callable[[], object], seconds: float = 550) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def end(self, seconds: float = 550) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end:\n{self.text}")


def launch(*command) -> str:
    """What a launch that succeeds prints."""
    with Launch(list(command)) as launched:
        assert launched.end() == 0, launched.text
        return launched.text


def alone(script: str, *flags) -> None:
    """The script in this process: the same code as in one of its own, without the seconds of a start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not stop.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with texts, chats, preference pairs, a cache of their tokens, and models to start from."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(
            rng.choices("the cat saw a dog near 河 and 山 then slept until morning".split(), k=rng.randint(3, 20))
        )

    def write(name: str, rows: Iterator[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("texts.jsonl", ({"text": sentence()} for _ in range(300)))
    roles = ("user", "assistant")
    write("chats.jsonl", ({"messages": [{"role": r, "content": sentence()} for r in roles]} for _ in range(120)))
    write("pairs.jsonl", ({name: sentence() for name in ("prompt", "chosen", "rejected")} for _ in range(60)))
    torch.manual_seed(0)
    info = {"stage": "full_sft", "step": 1, "tokenizer_hash": tokenizer_hash(load_tokenizer())}
    save_checkpoint(folder / "base.pth", Transformer(LMConfig(**SHAPE)), info=info)
    return folder


def pretrain_flags(data: Path, out: Path, *more) -> list[str]:
    flags = [*PRETRAIN, "--data_path", data / "texts.jsonl", "--cache_dir", data / "cache", "--out_dir", out, *more]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def one(data) -> Path:
    """1-pretrain.py in one process, 4 rows a step."""
    alone("1-pretrain.py", *pretrain_flags(data, data / "one", "--batch_size", 4))
    return data / "one"


@pytest.fixture(scope="module")
def stages(data) -> Path:
    """A folder of later stages in one process, 4 rows a step, each in a folder with the script's name."""
    for script in STAGES:
        alone(script, *stage_flags(data, script), "--batch_size", 4, "--out_dir", data / script)
    return data


def stage_flags(data: Path, script: str) -> list:
    file, _, more = STAGES[script]
    places = ["--init_from", data / "base.pth", "--data_path", data / file, "--cache_dir", data / "cache"]
    return [*COMMON, *more, *places]


def launch_stages(folder: Path, command: list[str], cases: list[tuple]) -> str:
    """Run stages one after the other in the processes of one launcher."""
    path = folder / "cases.json"
    path.write_text(json.dumps([list(map(str, case)) for case in cases]))
    return launch(*command, ROOT / "tests" / "stage_worker.py", path)


@pytest.fixture(scope="module")
def two(data) -> Path:
    """A folder of what two processes do that torchrun started."""
    folder = data / "two"
    folder.mkdir()
    cases: list[tuple] = [
        ("1-pretrain.py", *pretrain_flags(data, folder / "undisturbed", *LONG)),
        *(
            (script, *stage_flags(data, script), *flags, "--batch_size", 2, "--out_dir", folder / how / script)
            for how, flags in (("together", []), ("fsdp", ["--fsdp"]))
            for script in STAGES
        ),
        ("1-pretrain.py", *pretrain_flags(data, folder / "compiled", "--batch_size", 2, "--compile")),
    ]
    launch_stages(folder, torchrun(2), cases)
    return folder


@pytest.fixture(scope="module")
def two_by_deepspeed(data) -> Path:
    """A folder of what a process alone began with DeepSpeed, and of what two do that its launcher started."""
    folder = data / "two_by_deepspeed"
    zero1, zero3 = (["--deepspeed", ROOT / "configs" / name] for name in ("zero1.json", "zero3_offload.json"))
    flags = pretrain_flags(data, folder / "begun_by_one", *zero1)
    launch(sys.executable, "1-pretrain.py", *flags, "--batch_size", 4, "--save_interval", 4)
    shutil.copytree(folder / "begun_by_one", folder / "one")
    state = folder / "begun_by_one" / "pretrain_32.resume" / "step_00000004"
    cases: list[tuple] = [
        ("1-pretrain.py", *flags, "--batch_size", 2, "--resume", state),
        ("1-pretrain.py", *pretrain_flags(data, folder / "without_a_file", "--batch_size", 2)),
        *(
            (script, *stage_flags(data, script), *zero3, "--batch_size", 2, "--out_dir", folder / "zero3" / script)
            for script in list(STAGES)[1:]
        ),
    ]
    launch_stages(folder, deepspeed(2), cases)
    return folder


LONG = ["--batch_size", 2, "--max_steps", 80, "--save_interval", 5, "--dropout", 0.1]


def weights(out: Path, name: str = "pretrain_32") -> dict[str, torch.Tensor]:
    return torch.load(out / f"{name}.pth", weights_only=True)


def metrics(out: Path, name: str = "pretrain_32") -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.metrics.jsonl").read_text().splitlines()]


def assert_same_run(out: Path, expected: Path, name: str = "pretrain_32") -> None:
    """To rounding, in its metrics, weights and gradients."""
    a, b = metrics(out, name), metrics(expected, name)
    assert len(a) == len(b) > 1
    for one, other in zip(a, b, strict=True):
        assert ("val_loss" in one) == ("val_loss" in other)
        for key in {"step", "tokens", "lr", "loss", "grad_norm", "val_loss"} & one.keys():
            later = key == "grad_norm" and one["step"] > 1  # follows the weights, see tolerances.assert_trained_alike
            tolerance = math.sqrt(ROUNDING) if later else ROUNDING
            assert one[key] == pytest.approx(other[key], rel=tolerance), (key, one["step"])
    assert_trained_alike(weights(out, name), weights(expected, name), ROUNDING, sum(line["lr"] for line in b))
    if (found := moments(out, name)) is not None:
        assert_moments_alike(found, moments(expected, name), ROUNDING)


def moments(out: Path, name: str) -> dict[str, torch.Tensor] | None:
    """The optimizer's state; None if DeepSpeed has it in files of its own."""
    state = max((out / f"{name}.resume").glob("step_*"))
    return read_state(state)[1] if (state / ".metadata").exists() else None


def bit_identical(out: Path, expected: Path) -> bool:
    a, b = weights(out), weights(expected)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_deepspeed_as_the_readme_writes_it(data, one, tmp_path):
    flags = pretrain_flags(data, tmp_path, "--batch_size", 2, "--deepspeed", ROOT / "configs" / "zero1.json")
    text = launch(*deepspeed(2), "1-pretrain.py", *flags)
    assert len(re.findall("^.*step 8/8", text, re.MULTILINE)) == 1
    assert_same_run(tmp_path, one)


def test_deepspeed_in_one_process_needs_no_launcher(one, two_by_deepspeed):
    """And its state is continued by two, which the launcher starts."""
    assert_same_run(two_by_deepspeed / "one", one)
    assert_same_run(two_by_deepspeed / "begun_by_one", one)
    states = (two_by_deepspeed / "begun_by_one" / "pretrain_32.resume").iterdir()
    assert sorted(path.name for path in states) == ["step_00000004", "step_00000008"]


def test_deepspeed_without_a_file_is_data_parallel(one, two_by_deepspeed):
    assert_same_run(two_by_deepspeed / "without_a_file", one)


def test_compiled_in_two_processes(one, two):
    """The number of documents in a batch is dynamic, which PyTorch's cutting of graphs at DDP's buckets cannot take."""
    for compiled, eager in zip(metrics(two / "compiled"), metrics(one), strict=True):
        later = compiled["step"] > 1  # follows the weights, see tolerances.assert_trained_alike
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=math.sqrt(ROUNDING) if later else ROUNDING)


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("how", ["together", "fsdp"])
def test_a_later_stage_in_two_processes(stages, two, script, how):
    assert_same_run(two / how / script, stages / script, STAGES[script][1])


@pytest.mark.parametrize("script", list(STAGES)[1:])
def test_a_later_stage_with_zero3(stages, two_by_deepspeed, script):
    assert_same_run(two_by_deepspeed / "zero3" / script, stages / script, STAGES[script][1])


def test_fsdp_ends_by_itself(data, one, tmp_path):
    with Launch([*torchrun(2), "1-pretrain.py", *pretrain_flags(data, tmp_path, "--batch_size", 2, "--fsdp")]) as run:
        run.wait_until(run.workers)
        assert run.end() == 0, run.text
        assert not run.alive() and "Error" not in run.text and "destroy_process_group" not in run.text
    assert_same_run(tmp_path, one)


def test_two_machines(data, one, tmp_path):
    """Two launchers with one process each."""
    port = free_port()
    flags = pretrain_flags(data, tmp_path, "--batch_size", 2)
    with (
        Launch([*node(port), "1-pretrain.py", *flags]) as first,
        Launch([*node(port), "1-pretrain.py", *flags]) as second,
    ):
        assert first.end() == 0 and second.end() == 0, first.text + second.text
        assert (first.text + second.text).count("step 8/8") == 1
    assert_same_run(tmp_path, one)


def test_a_process_that_is_killed_is_started_again_and_goes_on(data, two, tmp_path):
    states = tmp_path / "pretrain_32.resume"
    flags = pretrain_flags(data, tmp_path, *LONG)
    with Launch([*torchrun(2, "--max_restarts", 2, "--monitor_interval", 0.1), "1-pretrain.py", *flags]) as run:
        run.wait_until(lambda: list(states.glob("step_*[1-9]?/COMPLETE")))  # step 10 or later
        run.workers()[1].send_signal(signal.SIGKILL)
        run.wait_until(lambda: "(restart 1)" in run.text and "step 30/" in run.text)
        run.workers()[0].send_signal(signal.SIGKILL)
        assert run.end() == 0, run.text
        found = re.findall(r"restarted by the launcher \(restart (\d)\)\nresuming after step (\d+)", run.text)
        assert [number for number, _ in found] == ["1", "2"] and 0 < int(found[0][1]) < int(found[1][1]) < 80, run.text
        assert not run.alive()
    assert bit_identical(tmp_path, two / "undisturbed")
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 81))


def test_a_process_that_hangs_is_named_and_all_end(data, tmp_path):
    flags = pretrain_flags(data, tmp_path, *LONG, "--max_steps", 100_000, "--save_interval", 100_000, "--timeout", 10)
    with Launch([*torchrun(2), "1-pretrain.py", *flags]) as run:
        run.wait_until(lambda: "step 9/" in run.text)
        time.sleep(2)  # twice as long as the watch takes to write down where a process is
        workers = run.workers()
        workers[1].suspend()
        workers[0].wait(timeout=300)
        errors = [line for line in run.text.splitlines() if "error: " in line]
        assert len(errors) == 1, run.text
        assert re.search(
            rf"1 of 2 processes did not respond within --timeout 10 seconds.*rank 1 \(process {workers[1].pid} on .*\), "
            r"last seen at .*step \d+",
            errors[0],
        ), errors[0]
        # torchrun gives it 30 seconds to end, which a stopped process cannot, and kills it; here it need not wait so long.
        workers[1].kill()
        assert run.end() != 0
        assert not run.alive()
