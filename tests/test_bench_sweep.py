"""bench/sweep.py: the combinations of flags, one run each, and what is not run again."""

from __future__ import annotations

import json

import pytest

from bench import sweep
from common.errors import UserError


def test_combinations():
    assert sweep.combinations("a=1,2 b=3") == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]
    with pytest.raises(UserError, match="--grid b: write name=value"):
        sweep.combinations("a=1 b")


def test_runs_that_have_ended_are_not_repeated_unless_the_flags_differ(monkeypatch, tmp_path, capsys):
    ran, stopped = [], []

    def run_stage(script: str, *words: object) -> None:
        folder = words[words.index("--out_dir") + 1]
        ran.append(words[: words.index("--out_dir")])
        folder.mkdir(parents=True, exist_ok=True)
        loss = {"val_loss": float(words[words.index("--learning_rate") + 1])}
        (folder / "run.metrics.jsonl").write_text(json.dumps({"val_loss": 9.0}) + "\n" + json.dumps(loss) + "\n")
        (folder / "run.report.html").touch()
        if stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_stage", run_stage)

    def print_of(flags: str) -> str:
        argv = [
            "sweep.py",
            "3-full_sft.py",
            "--flags",
            flags,
            "--grid",
            "learning_rate=1,2",
            "--out_dir",
            str(tmp_path),
        ]
        monkeypatch.setattr("sys.argv", argv)
        sweep.main()
        return capsys.readouterr().out

    first = print_of("--epochs 1")
    assert "| `--learning_rate 2` | 2.0000 | – |" in first and len(ran) == 2
    assert print_of("--epochs 1") == first and len(ran) == 2
    stopped.append(True)
    with pytest.raises(KeyboardInterrupt):
        print_of("--epochs 2")
    stopped.clear()
    print_of("--epochs 2")  # the run that was stopped is done again
    assert len(ran) == 5 and ran[2] == ran[3] == ("--epochs", "2", "--learning_rate", "1")
