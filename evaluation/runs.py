"""The metrics of training runs: read the `.metrics.jsonl` files that training writes, also while it writes them.

for run in list_runs(Path("out")):
    print(run.name, curve(read_metrics(run.path), "loss", points=10))
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import jsonlines

from common.files import file_stamp

SUFFIX = ".metrics.jsonl"
RUNNING_SECONDS = 120  # a file that was written so recently belongs to a run that goes on


@dataclass(frozen=True)
class RunMetrics:
    """The metrics file of a run.

    name: its path below the folder that was searched, without the suffix; stamp: see `common.files.file_stamp`.
    """

    name: str
    path: Path
    stamp: tuple[int, int]

    def running(self, lines: list[dict]) -> bool:
        """Return whether the run seems to go on: its file was just written, and its last line is not the end."""
        recent = time.time() - self.stamp[0] / 1e9 < RUNNING_SECONDS
        return recent and bool(lines) and lines[-1].get("eta_seconds") != 0


def list_runs(folder: Path) -> list[RunMetrics]:
    """Return the runs in a folder and in the folders in it, the newest first; none for a folder that does not exist."""
    found = [
        RunMetrics(path.relative_to(folder).as_posix().removesuffix(SUFFIX), path, stamp)
        for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}"))
        if (stamp := file_stamp(path)) is not None  # else it was deleted meanwhile
    ]
    return sorted(found, key=lambda run: (-run.stamp[0], run.name))


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics file, without a last line that a killed process left incomplete."""
    if not path.exists():
        return []
    with jsonlines.open(path) as reader:
        return list(reader.iter(type=dict, skip_empty=True, skip_invalid=True))


def logged_shares(line: dict) -> list[float]:
    """Return the share of the tokens of every expert, from the metrics of a mixture; else none."""
    return [value for name, value in line.items() if name.startswith("expert_") and name.endswith("_share")]


def curve(lines: list[dict], name: str, x: str = "step", points: int = 300) -> list[tuple[float, float]]:
    """Return a metric as at most `points` pairs (x, value): of a longer run, the means of equal parts.

    Lines without the metric, such as those without a validation, are left out, and so is a value that is not finite.

    Args:
        name: of the metric.
        x: what it is drawn over: another metric that grows, such as step or tokens.
    """
    found = [(line[x], line[name]) for line in lines if _is_finite(line.get(x)) and _is_finite(line.get(name))]
    size = math.ceil(len(found) / points) or 1
    parts = (found[begin : begin + size] for begin in range(0, len(found), size))
    return [(sum(a for a, _ in part) / len(part), sum(b for _, b in part) / len(part)) for part in parts]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
