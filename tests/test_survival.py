"""Two processes of which one is in trouble, files of runs that were killed, and two runs that want the same folder."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import another_process_holds
from tolerances import rounding, shape_of

from common.errors import UserError
from tests.test_trainer import ROW, config, options, same, train, weights
from trainer.checkpoint import hold_run

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, list[dict], str]:
    """The folder, what each rank has to tell, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, str(ROOT / "tests" / "two_processes.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], result.stdout


def test_nan_on_one_rank_stops_both_with_the_same_words_and_a_state(two_processes):
    folder, ranks, _ = two_processes
    assert ranks[0]["nan"]["error"] == ranks[1]["nan"]["error"]
    assert "step 6: grad_norm is nan" in ranks[0]["nan"]["error"]
    assert len(json.loads((folder / "nan" / "tiny.non_finite.json").read_text())["samples"]) == 8
    assert ranks[0]["nan_resumed"]["apart"] == 0


def test_data_lost_on_one_rank_stops_both_with_the_same_words_and_a_state(two_processes):
    folder, ranks, _ = two_processes
    assert ranks[0]["data"]["error"] == ranks[1]["data"]["error"]
    assert "on rank 1: OSError" in ranks[0]["data"]["error"] and "tokens.bin" in ranks[0]["data"]["error"]
    assert "Traceback" in (folder / "data" / "logs" / "tiny.rank1.log").read_text()
    assert ranks[0]["data_resumed"]["apart"] == 0


def test_memory_that_runs_out_on_one_rank_halves_the_batch_on_both(two_processes):
    _, ranks, printed = two_processes
    assert (
        printed.count("out of memory with 4 rows at once. --auto_batch continues with 2 rows and 2 accumulation") == 1
    )
    whole, memory = ranks[0]["whole"], ranks[0]["memory"]
    relative = rounding(**shape_of(config(), 8 * ROW, backward=True))
    assert memory["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=relative)
    opts = options(Path())  # see tolerances.assert_trained_alike
    assert memory["apart"] < math.sqrt(relative) * opts.max_steps * opts.learning_rate


def test_the_slowest_rank_and_the_rate_of_each_are_told(two_processes):
    folder, ranks, printed = two_processes
    lines = [json.loads(line) for line in (folder / "whole" / "tiny.metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 1 <= line["skew"] <= 2 and line["slowest_rank"] in (0, 1)
        assert line["tokens_per_second_per_process"] == pytest.approx(line["tokens_per_second"] / 2)
    assert " per process) | skew " in printed and printed.count("step 12/12") == 4  # by rank 0 alone, of four runs
    for rank in (0, 1):
        log = (folder / "whole" / "logs" / f"tiny.rank{rank}.log").read_text()
        assert f"rank {rank} of 2" in log and log.count(" s waiting for data") == 12 and "--- finished" in log


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".tiny.abc.tmp").mkdir()
    for name in (".tiny.pth.k3x.tmp", ".tiny.json.9.tmp", ".tiny_moe.pth.z.tmp", ".other.pth.a.tmp"):
        (tmp_path / name).write_text("half")
    train(options(tmp_path))
    assert {path.name for path in tmp_path.glob(".*.tmp")} == {".tiny_moe.pth.z.tmp", ".other.pth.a.tmp"}


def test_one_run_at_a_time_in_a_folder(tmp_path, monkeypatch):
    """The lock of another process keeps us out, ends with that process however it ends, and is no matter for other names."""
    monkeypatch.setattr("common.files.WAIT_SECONDS", 0.3)
    with another_process_holds(tmp_path, "tiny") as process:
        with pytest.raises(UserError, match="another run is training tiny in .*--out_dir"):
            train(options(tmp_path))
        with hold_run(tmp_path, "other"):
            pass
    assert process.returncode == -signal.SIGKILL
    monkeypatch.setattr("common.files.WAIT_SECONDS", 10)
    model, _ = train(options(tmp_path))
    again, _ = train(options(tmp_path, overwrite=True))  # and each of ours has let go
    assert same(weights(model), weights(again))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make a file")
def test_a_folder_that_takes_no_files_is_not_called_busy(monkeypatch):
    monkeypatch.setattr("common.files.WAIT_SECONDS", 0.3)
    with pytest.raises(UserError, match="nothing can be written into /proc"), hold_run(Path("/proc"), "tiny"):
        pass


def test_where_there_are_no_locks_nothing_is_deleted(tmp_path, monkeypatch, capsys):
    """It may be of a run that is alive."""

    def no_locks(*_, **__):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr("common.files.FileLock.acquire", no_locks)
    (tmp_path / ".tiny.pth.12345678.tmp").write_text("half")
    with hold_run(tmp_path, "tiny"):
        assert (tmp_path / ".tiny.pth.12345678.tmp").exists()
    assert "do not start tiny there twice" in capsys.readouterr().err


def test_the_log_of_a_run_has_its_warnings_and_its_end(tmp_path, recwarn):
    import warnings

    from trainer.losses import next_token_loss

    def warning_loss(model, batch):
        warnings.warn("the loss is odd", stacklevel=1)
        return next_token_loss(model, batch)

    warnings.simplefilter("always")
    with pytest.raises(SystemExit):
        train(options(tmp_path), loss_fn=warning_loss, stop_after=5)
    log = (tmp_path / "logs" / "tiny.rank0.log").read_text()
    assert "WARNING UserWarning: the loss is odd" in log and "--- stopped (exit code 143)" in log
    with pytest.raises(UserError):
        train(options(tmp_path))
    assert "continue it with --resume" in (tmp_path / "logs" / "tiny.rank0.log").read_text()
