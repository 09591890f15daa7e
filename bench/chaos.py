"""Inject random faults into one training run of two processes, restarting it with --resume auto until it is done.

    python bench/chaos.py                       # 40 faults, some minutes
    python bench/chaos.py --fsdp                # the same with sharded weights and states
    python bench/chaos.py --faults 4 --seed 7

The seed decides the order of the faults and the steps at which they happen:

- SIGKILL of one process, or of torchrun and all processes during a save; SIGTERM to torchrun, or to one process,
- one process frozen (SIGSTOP) until the error of the other names it,
- a flipped bit in the newest state, between two launches,
- a power cut between the two renames that replace a state: its folder is called .step_X.old, and there is no step_X,
- a full disk (a small tmpfs; it needs root, and without root this fault is left out with a message).

Afterwards the script checks that

- the final weights and optimizer state are identical, to the bit, to those of an undisturbed run of two processes,
- so is every line of the metrics, with each step once,
- every launch continued from the newest state that was not damaged, and said so if one was,
- no fault cost more than --save_interval steps (steps that had to be repeated), a damaged state twice as many, and faults
  after which the run could still save (SIGTERM) none,
- no process and no half-written file is left.

It prints a table of the kinds of faults, with --table also one of every fault. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import Parser  # noqa: E402
from trainer.checkpoint import complete_states, find_damage, load_tensors, tensor_layout  # noqa: E402

NAME = "pretrain_64"
MODEL = "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 64 --dropout 0.1"
KILL_RANK, TERM_LAUNCHER, TERM_RANK = "SIGKILL of one process", "SIGTERM to torchrun", "SIGTERM to one process"
KILL_IN_SAVE, DISK_FULL = "SIGKILL of all while saving", "disk full"
FREEZE, FLIP, POWER_CUT = "one process frozen", "bit flipped in the newest state", "power cut between two renames"
TIMEOUT = 600.0  # seconds in which a launch must make progress or end
NO_RESPONSE = 15  # --timeout: seconds until a frozen process is reported


@dataclass
class Result:
    """The effect of one fault.

    Attributes:
        done: the last step before it.
        intact: the step of the newest state that it left undamaged; 0: none.
        resumed: the step after which the next launch continued.
    """

    kind: str
    detail: str
    done: int
    intact: int
    resumed: int = -1

    @property
    def lost(self) -> int:
        return self.done - self.resumed

    def wrong(self, save_interval: int) -> str | None:
        """Return what should have been otherwise."""
        limit = {TERM_LAUNCHER: 0, TERM_RANK: 0, FLIP: 2 * save_interval}.get(self.kind, save_interval)
        where = f"{self.kind} ({self.detail}) after step {self.done}"
        if self.resumed != self.intact:
            return f"{where}: the newest good state was that of step {self.intact}, not of {self.resumed}"
        return None if 0 <= self.lost <= limit else f"{where}: {self.lost} steps lost"


class Launch:
    """One torchrun with its two workers; all its processes have ended when `with` is left."""

    def __init__(self, flags: list[str], out_dir: Path) -> None:
        self.log = out_dir / "logs" / f"{NAME}.rank0.log"
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        self.output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        self.process = subprocess.Popen(
            [*command, str(ROOT / "1-pretrain.py"), *flags, "--out_dir", str(out_dir)],
            stdout=self.output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        self._family: dict[int, psutil.Process] = {}

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_) -> None:
        self.kill_all()
        self.output.close()

    def workers(self) -> dict[int, psutil.Process]:
        """Return the running workers by rank. They are found by parentage: torchrun gives each a session."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, KeyError):
                    self._family[child.pid] = child
                    if "1-pretrain.py" in " ".join(child.cmdline()):
                        found.setdefault(int(child.environ()["RANK"]), child)
        return found

    def kill_all(self) -> None:
        """Send SIGKILL to the launcher and to every process that it started."""
        self.workers()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        for child in self._family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()  # psutil checks the start time too: it never hits a new process with the same id
        self.process.wait()
        psutil.wait_procs(list(self._family.values()), timeout=10)

    def left_behind(self) -> list[int]:
        """Return the processes that are still running a while after the launcher has ended."""
        _, alive = psutil.wait_procs(list(self._family.values()), timeout=20)
        return [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def steps_done(self) -> int:
        """Return the last step that rank 0 has finished in this launch, read from its log; -1: none yet."""
        if not self.log.exists():
            return -1
        with self.log.open("rb") as file:
            file.seek(self._offset)
            steps = re.findall(rb" step (\d+): [\d.]+ s,", file.read())
        return int(steps[-1]) if steps else -1

    def steps_done_by_all_signs(self, metrics: Path) -> int:
        """Return an upper bound of `steps_done` for a full disk, on which the last lines of some files may be lost."""
        lines = re.findall(r'^{"step": (\d+)', metrics.read_text(errors="replace"), re.MULTILINE)
        printed = re.findall(r"^step (\d+)/", self.text(), re.MULTILINE)
        shown, logged = max([-1, *map(int, lines[-1:] + printed[-1:])]), self.steps_done()
        if "no space left in" in self.text():  # in a save
            return max(shown, logged)
        # The log of a process has a step first. Where it has one more, the other line could not be written.
        return logged if logged > shown else shown + 1

    def wait_for_states(self, folder: Path, n: int) -> None:
        """Wait until there are `n` complete states. RuntimeError if the launch ends earlier."""
        deadline = time.monotonic() + TIMEOUT
        while len([*folder.glob("step_*/COMPLETE")]) < n:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{n} states were not written:\n{self.text()[-3000:]}")
            time.sleep(0.005)

    def kill_when_saving(self, folder: Path, prefix: str) -> None:
        """Kill all when a new temporary file or folder whose name starts with `prefix` appears."""
        old = {path.name for path in folder.glob(f"{prefix}*")}  # left by an earlier kill
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                new = [name for name in os.listdir(folder) if name.startswith(prefix) and name not in old]
                if any(not name.endswith(".lock") for name in new):
                    self.kill_all()
                    return
        raise RuntimeError(f"no save was seen:\n{self.text()[-3000:]}")

    def text(self) -> str:
        self.output.flush()
        self.output.seek(0)
        return self.output.read()

    def started_after(self) -> int:
        """Return the step after which this launch continued."""
        text = self.text()
        if found := re.search(r"resuming after step (\d+)", text):
            return int(found[1])
        if "starting from the beginning" in text:
            return 0
        raise RuntimeError(f"this launch did not print where it started:\n{text[-3000:]}")

    def wait_for(self, step: int) -> None:
        """Wait until that step is done. RuntimeError if the launch ends earlier or makes no progress."""
        deadline = time.monotonic() + TIMEOUT
        while self.steps_done() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"step {step} was not reached:\n{self.text()[-3000:]}")
            time.sleep(0.005)

    def wait_for_text(self, pattern: str) -> None:
        """Wait until the launch has printed that. RuntimeError if it ends without it."""
        deadline = time.monotonic() + TIMEOUT
        while not re.search(pattern, self.text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{pattern} was not printed:\n{self.text()[-3000:]}")
            time.sleep(0.05)

    def wait(self) -> int:
        """Return the exit code of the launcher."""
        try:
            return self.process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it hangs:\n{self.text()[-3000:]}") from None


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """Mount a tmpfs on `folder`; yields False where that is impossible (it needs root and Linux)."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = (
        sys.platform == "linux" and os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Write a file that leaves no byte free, or more into it."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def strike(launch: Launch, kind: str, out_dir: Path, rng: random.Random) -> str:
    """Inject one fault and wait until the launch has ended; returns what was hit."""
    workers = launch.workers()
    rank = rng.randrange(2)
    states = out_dir / f"{NAME}.resume"
    if kind == KILL_RANK:
        workers[rank].kill()
        launch.wait()
        return f"rank {rank}"
    if kind == TERM_RANK:
        workers[rank].terminate()
        launch.wait()
        return f"rank {rank}"
    if kind == TERM_LAUNCHER:
        launch.process.terminate()
        launch.wait()
        return "both"
    if kind == FREEZE:
        workers[rank].suspend()
        launch.wait_for_text(rf"1 of 2 processes did not respond .*: rank {rank} \(process {workers[rank].pid} on")
        workers[rank].resume()  # it must do no harm when it wakes up
        launch.wait()
        return f"rank {rank}"
    if kind == KILL_IN_SAVE:
        what = rng.choice(["state", "weights"])
        launch.kill_when_saving(*((states, ".step_") if what == "state" else (out_dir, f".{NAME}.")))
        return f"writing the {what}"
    if kind == FLIP:
        launch.wait_for_states(states, 2)
        launch.kill_all()
        return flip_bit(complete_states(states)[-1], rng)
    if kind == POWER_CUT:
        launch.wait_for_states(states, 1)
        launch.kill_all()
        newest = complete_states(states)[-1]
        shutil.copytree(newest, states / f".{newest.name}.12345678.tmp", dirs_exist_ok=True)
        newest.rename(states / f".{newest.name}.old")
        return newest.name
    try:
        deadline = time.monotonic() + TIMEOUT
        while launch.process.poll() is None and time.monotonic() < deadline:
            fill(out_dir)  # again and again: a save deletes what an earlier fault left, and then has space
            time.sleep(0.005)
        code, text = launch.wait(), launch.text()
        if code == 0 or "no space left" not in text:
            raise RuntimeError(f"a full disk was not reported:\n{text[-3000:]}")
    finally:
        (out_dir / "filler").unlink()
    return "while saving" if "no space left in" in text else "between saves"


def flip_bit(state: Path, rng: random.Random) -> str:
    """Flip one bit of one file in a state; returns its name."""
    path = rng.choice(sorted(path for path in state.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name


def newest_intact(states: Path) -> int:
    """Return the step of the newest state that is complete and not damaged; 0: there is none."""
    # Not complete_states(): it would recover what the next launch has to recover.
    found = [path.parent for path in states.glob("*step_*/COMPLETE") if not path.parent.name.endswith(".tmp")]
    return max((int(re.sub(r"\D", "", path.name)) for path in found if find_damage(path) is None), default=0)


def differences(a: Path, b: Path) -> list[str]:
    """Return the names of all results that are not identical, to the bit, in two runs."""
    one, other = final_tensors(a), final_tensors(b)
    found = [
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]
    fields = ("step", "loss", "grad_norm", "lr", "tokens")
    lines = [
        [[line[field] for field in fields] for line in map(json.loads, path.read_text().splitlines())]
        for path in (a / f"{NAME}.metrics.jsonl", b / f"{NAME}.metrics.jsonl")
    ]
    return found + (["the metrics"] if lines[0] != lines[1] else [])


def final_tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights for later stages and the tensors of the last state."""
    state = complete_states(out_dir / f"{NAME}.resume")[-1]
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensor_layout(state).items()}
    load_tensors(state, tensors)
    return tensors | torch.load(out_dir / f"{NAME}.pth", weights_only=True)


def chaos(
    folder: Path, n_faults: int, seed: int, save_interval: int, extra_flags: list[str]
) -> tuple[list[Result], list[str]]:
    """Run everything in the empty `folder`; returns the effect of each fault, and a list of failed checks."""
    rng = random.Random(seed)
    words = "the cat saw a dog near 河 and 山 then slept until morning came".split()
    data = folder / "texts.jsonl"
    texts = (json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(3, 30)))}) for _ in range(2000))
    data.write_text("\n".join(texts), encoding="utf-8")
    steps = (n_faults + 1) * 2 * save_interval  # enough even if every fault costs the maximum
    flags = f"{MODEL} --device cpu --dtype float32 --batch_size 2 --val_fraction 0 --log_interval 1 --max_steps {steps}"
    flags = [
        *flags.split(), *extra_flags, "--timeout", str(NO_RESPONSE), "--data_path", str(data),
        "--cache_dir", str(folder / "cache"), "--save_interval",
    ]  # fmt: skip
    wrong: list[str] = []

    print(f"an undisturbed run of {steps} steps ...", flush=True)
    with Launch([*flags, str(steps)], folder / "whole") as launch:
        if launch.wait() != 0:
            raise RuntimeError(launch.text()[-3000:])

    out_dir = folder / "disk"
    states = out_dir / f"{NAME}.resume"
    with small_disk(out_dir, megabytes=48) as mounted:
        kinds = [KILL_IN_SAVE, FLIP, POWER_CUT, FREEZE, KILL_RANK, TERM_LAUNCHER, *[DISK_FULL] * mounted, TERM_RANK]
        if not mounted:
            print(f"left out: {DISK_FULL} (a tmpfs needs root on Linux)")
        plan = [kinds[i % len(kinds)] for i in range(n_faults)]
        rng.shuffle(plan)
        results: list[Result] = []
        position = 0
        for number, kind in enumerate([*plan, None], start=1):
            started = time.monotonic()
            with Launch([*flags, str(save_interval), "--resume", "auto"], out_dir) as launch:
                if kind is not None:
                    launch.wait_for(position + rng.randint(1, 2 * save_interval))
                    time.sleep(rng.random() * 0.02)
                    detail = strike(launch, kind, out_dir, rng)
                elif launch.wait() != 0:
                    raise RuntimeError(launch.text()[-3000:])
                if alive := launch.left_behind():
                    wrong.append(f"{kind}: processes {alive} were left behind")
                position = launch.started_after()
                if results:
                    results[-1].resumed = position
                    if results[-1].kind == FLIP and "falling back to the state before" not in launch.text():
                        wrong.append(f"a damaged state ({results[-1].detail}) was not reported")
                if kind is None:
                    break
                full = kind == DISK_FULL
                done = (
                    launch.steps_done_by_all_signs(out_dir / f"{NAME}.metrics.jsonl") if full else launch.steps_done()
                )
                results.append(Result(kind, detail, done, newest_intact(states)))
            print(
                f"{number}/{n_faults}: {kind}, {detail}, after step {results[-1].done} ({time.monotonic() - started:.1f} s)",
                flush=True,
            )
        print("done; comparing", flush=True)
        wrong += filter(None, (result.wrong(save_interval) for result in results))
        wrong += [f"not identical to the bit: {name}" for name in differences(folder / "whole", out_dir)]
        rubbish = [*out_dir.glob(".*.tmp"), *states.glob(".*")]
        wrong += [f"left behind: {path.name}" for path in rubbish]
    return results, wrong


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the faults, their order and their steps (default: 0)"
    )
    parser.add_argument("--save_interval", type=int, default=4, help="optimizer steps between saves (default: 4)")
    parser.add_argument("--fsdp", action="store_true", help="shard weights and states over the processes")
    parser.add_argument("--table", action="store_true", help="also print a table of every fault")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes and its disk are removed too
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        results, wrong = chaos(Path(folder), args.faults, args.seed, args.save_interval, ["--fsdp"] * args.fsdp)
    print()
    if args.table:
        print("| | fault | hit | step reached | resumed after | steps lost |\n|---|---|---|---|---|---|")
        for number, r in enumerate(results, start=1):
            print(f"| {number} | {r.kind} | {r.detail} | {r.done} | {r.resumed} | {r.lost} |")
        print()
    print("| fault | times | steps lost, mean | maximum |\n|---|---|---|---|")
    for kind in dict.fromkeys(sorted(r.kind for r in results)):
        lost = [r.lost for r in results if r.kind == kind]
        print(f"| {kind} | {len(lost)} | {sum(lost) / len(lost):.1f} | {max(lost)} |")
    verdict = (
        "; ".join(wrong)
        if wrong
        else "weights, optimizer state and metrics are those of the undisturbed run, to the bit"
    )
    print(
        f"\n{len(results)} faults in {time.monotonic() - started:.0f} s, a save every {args.save_interval} steps: {verdict}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
