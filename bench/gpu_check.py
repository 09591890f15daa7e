"""Check on a GPU everything that only a GPU can show: one table and one JSON file, in under 9 minutes.

    python bench/gpu_check.py
    python bench/gpu_check.py --only decoding mfu       # the checks whose names contain one of these words
    python bench/gpu_check.py --device cpu              # the same code at toy size: figures without meaning

Training with every stage's script in bfloat16 and float16, --compile, --auto_batch with too little memory, resuming,
torchrun with DDP, FSDP2 and (if it is installed) DeepSpeed; the kernels for packed attention and for experts against
their references; decoding with CUDA graphs, alone and in the server's engine; MFU of the presets at their best batch,
tokens per second of decoding. Every check runs in a process of its own: one that fails or hangs is a row of the table,
and the others go on. Those that measure run alone, the others --jobs at a time. Result: pass, FAIL with the reason, or
skipped. The JSON is written after every check; the output of each is in a log file beside it. The exit code is 1 if a
check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_checks import CHECKS, Place, Skipped  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script  # noqa: E402
from common.files import write_json  # noqa: E402

FIRST = "data and a model"  # what the other checks need
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for checks that run side by side


def work(name: str, place: Place, result: Path) -> None:
    """Run one check in this process and write its result; what it raises ends the process."""
    try:
        found: dict[str, Any] = {"result": "pass", "figures": CHECKS[name].function(place)}
    except Skipped as reason:
        found = {"result": "skipped", "detail": str(reason)}
    write_json(result, found)


@dataclass
class Report:
    """The rows of the table so far, in the file `output`; they are shown as they come."""

    output: Path
    head: dict[str, Any]

    def __post_init__(self) -> None:
        self.rows: dict[str, dict] = {}
        self.logs = self.output.with_suffix("")
        self.logs.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, row: dict) -> None:
        self.rows[name] = row
        print(table_row(name, row), flush=True)
        self.write()

    def write(self) -> None:
        write_json(self.output, self.head | {"rows": {name: self.rows[name] for name in CHECKS if name in self.rows}})


def run(name: str, place: Place, report: Report, deadline: float, environment: dict[str, str]) -> None:
    """Run a check in a process of its own and add its row."""
    started = time.monotonic()
    seconds = min(CHECKS[name].timeout, deadline - started)
    stem = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    log, result = report.logs / f"{stem}.log", place.folder / f"{stem}.json"
    if seconds < 5:
        report.add(name, {"result": "skipped", "detail": "no time was left: give more --minutes", "seconds": 0.0})
        return
    command = [sys.executable, __file__, f"--worker={name}", "--result", result, "--folder", place.folder]
    command += ["--device", place.device, "--processes", place.processes]
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            file.write(f"\nkilled after {seconds:.0f} s\n")
        finally:
            stop(process)
    row = {"result": "FAIL", "detail": last_line(log)}
    if process.returncode == 0 and result.exists():
        row = json.loads(result.read_text())
    report.add(name, row | {"seconds": round(time.monotonic() - started, 1)})


def stop(process: subprocess.Popen) -> None:
    """Kill what is left of a check: its own process and those that it started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        process.kill()
    process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def table_row(name: str, row: dict) -> str:
    shown = (f"{key} {show(value)}" for key, value in row.get("figures", {}).items())
    cells = (name, row["result"], f"{row['seconds']:.0f}", row.get("detail") or ", ".join(shown))
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def find_device(name: str) -> tuple[str, int]:
    """Return the kind of device, and how many processes can train together."""
    import torch

    from model.device import resolve_device

    kind = resolve_device(name).type
    if kind not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: use cuda, or cpu for a run at toy size")
    return kind, torch.cuda.device_count() if kind == "cuda" else 2


def describe() -> dict[str, Any]:
    """Return what the figures depend on."""
    import platform

    import torch

    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {"date": date, "torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cuda, or cpu for a run at toy size (default: auto)")
    add("--only", nargs="+", metavar="WORD", help="run the checks whose names contain one of these words")
    add("--list", action="store_true", help="print the names of the checks and exit")
    add("--minutes", type=float, default=8.5, help="stop starting checks after this time (default: 8.5)")
    add("--jobs", type=int, help="checks that run side by side (default: 8; 1 on a CPU)")
    add("--output", type=Path, default=ROOT / "out" / "gpu_check.json", help="default: out/gpu_check.json")
    for name, kind in {"worker": str, "result": Path, "folder": Path, "processes": int}.items():
        add(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, Place(args.folder, args.device, args.processes), args.result)
        return 0
    words = args.only or [""]
    chosen = [name for name in CHECKS if name != FIRST and any(word in name for word in words)]
    if args.list or not chosen:
        print("\n".join(chosen or CHECKS))
        return 0 if args.list else parser.error(f"--only {' '.join(words)}: no check has such a name; those are above")
    deadline = time.monotonic() + 60 * args.minutes
    device, processes = find_device(args.device)
    report = Report(args.output, {"device": device, **describe()})
    print("| check | result | seconds | figures |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), device, processes)
        run(FIRST, place, report, deadline, {})
        with ThreadPoolExecutor(args.jobs or (1 if device == "cpu" else 8)) as pool:
            side_by_side = [name for name in chosen if not CHECKS[name].alone]
            futures = [pool.submit(run, name, place, report, deadline, ONE_THREAD) for name in side_by_side]
            for future in futures:
                future.result()
        for name in chosen:
            if CHECKS[name].alone:
                run(name, place, report, deadline, {})
    failed = [name for name, row in report.rows.items() if row["result"] == "FAIL"]
    print(
        f"\n{len(report.rows) - len(failed)} of {len(report.rows)} without a fault; {args.output}, logs in {report.logs}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
