"""Several processes, really launched, against one: the same losses and weights, however the model is spread.

Many cases share a launch, because starting a process takes longer than training these models.
"""

from __future__ import annotations

import json
import math
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from distributed_worker import train
from launching import deepspeed, environment, torchrun
from states import read_state
from test_trainer import ROW, config, options
from tolerances import assert_moments_alike, assert_trained_alike, rounding, shape_of

from common.errors import UserError
from model.model import Transformer
from trainer.distributed import DistEnv
from trainer.parallel.zero import load_only_tensors
from trainer.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
ENGINES = {
    "plain": {},
    "fsdp": {"fsdp": True},
    "zero1": {"deepspeed": str(CONFIGS / "zero1.json")},
    "zero2": {"deepspeed": str(CONFIGS / "zero2.json")},
    "zero2_offload": {"deepspeed": str(CONFIGS / "zero2_offload.json")},
    "zero3": {},  # with a file of the test's own: every parameter is spread, however small
    "zero3_offload": {"deepspeed": str(CONFIGS / "zero3_offload.json")},
}
MODELS = {"dense": {}, "moe": {"use_moe": True}}
# Where the optimizer lies does not depend on the model, nor does what half precision is for on the sharding of gradients.
TRAINED = [(engine, model) for engine in ENGINES for model in MODELS if model == "dense" or "offload" not in engine]
HALF = ["plain", "fsdp", "zero1", "zero3_offload"]
# A norm that is infinite is found as one that is not a number is: by one strategy of PyTorch, and one of DeepSpeed.
SPOILED = [*((engine, "nan") for engine in ENGINES), ("plain", "inf"), ("zero2", "inf")]
STEPS = {"max_steps": 6, "save_interval": 3, "log_interval": 1}
ONE = STEPS | {"batch_size": 4, "accumulation_steps": 2}  # 8 samples a step
TWO = STEPS | {"batch_size": 2, "accumulation_steps": 2}
# Whose state after 3 of 6 steps is resumed by which engine of two processes.
RESUMED = [
    ("one", "plain"), ("one", "fsdp"), ("plain", "fsdp"), ("fsdp", "fsdp"), ("fsdp", "plain"), ("plain", "plain"),
    ("zero1", "zero1"), ("zero2", "zero2"), ("zero3", "zero3"),
]  # fmt: skip
# Of a gradient: 8 rows a step, of a run: its gradients follow each other.
ROUNDING = rounding(**shape_of(config(), 8 * ROW, backward=True))
BACK_TO_ONE = {"plain": "plain", "fsdp": "plain", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3_offload"}


def launch(command: list[str], cases: list[dict], folder: Path) -> subprocess.CompletedProcess:
    """Do `cases` in the processes of a launcher."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    command = [*command, str(ROOT / "tests" / "distributed_worker.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment(), cwd=ROOT)


def halfway(folder: Path) -> str:
    return str(folder / "tiny.resume" / "step_00000003")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of runs: {engine}_{model} by two processes and one_{model} by this one, of the same 8 samples a step;
    {engine}_after_{engine}, begun by the latter; {engine}_nan, whose gradient is not finite in the fourth step."""
    folder = tmp_path_factory.mktemp("world")
    zero3 = folder / "zero3.json"
    zero3.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    engines = ENGINES | {"zero3": {"deepspeed": str(zero3)}}
    for model, fields in MODELS.items():
        train({"out_dir": str(folder / f"one_{model}"), "options": ONE, "model": fields}, DistEnv())
    case = {"out_dir": str(folder / "one_bfloat16"), "options": ONE | {"dtype": "bfloat16"}, "model": {"use_moe": True}}
    train(case, DistEnv())
    train({"out_dir": str(folder / "one_muon"), "options": ONE | {"optimizer": "muon"}}, DistEnv())
    for command, group in (
        (torchrun(2), ["plain", "fsdp"]),
        (deepspeed(2), ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]),
    ):
        cases = [
            {"out_dir": str(folder / f"{engine}_{model}"), "options": TWO | engines[engine], "model": MODELS[model]}
            for engine, model in TRAINED
            if engine in group
        ]
        for source, engine in RESUMED:
            if engine in group:
                settings = TWO | engines[engine] | {"resume": halfway(folder / f"{source}_dense")}
                cases.append({"out_dir": str(folder / f"{engine}_after_{source}"), "options": settings})
        for engine, kind in SPOILED:
            if engine in group:
                case = {"out_dir": str(folder / f"{engine}_{kind}"), "options": TWO | engines[engine]}
                cases.append(case | {"spoil": [kind, 7], "fails": True})  # the seventh of two batches a step
        for engine in HALF:  # last: DeepSpeed remembers the precision for the whole process
            if engine in group:
                settings = TWO | engines[engine] | {"dtype": "bfloat16"}
                cases.append(
                    {"out_dir": str(folder / f"{engine}_bfloat16"), "options": settings, "model": MODELS["moe"]}
                )
        if "fsdp" in group:
            settings = TWO | {"fsdp": True, "optimizer": "muon"}
            cases.append({"out_dir": str(folder / "fsdp_muon"), "options": settings})
            settings = settings | {"resume": halfway(folder / "fsdp_muon")}
            cases.append({"out_dir": str(folder / "fsdp_muon_resumed"), "options": settings})
        case = {"out_dir": str(folder / "odd"), "options": TWO, "odd": {"learning_rate": 0.5, "seed": 1}, "fails": True}
        result = launch(command, [*cases, case], folder)
        assert result.returncode == 0, result.stdout + result.stderr
        (folder / f"{group[0]}.txt").write_text(result.stdout)
    return folder


def results(folder: Path, step: int = 6) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict]]:
    """The weights, the state of the optimizer ({} of DeepSpeed, in files of its own), and the lines of the metrics."""
    weights = torch.load(folder / "tiny.pth", weights_only=True)
    state = folder / "tiny.resume" / f"step_{step:08d}"
    moments = read_state(state)[1] if (state / ".metadata").exists() else {}
    return weights, moments, [json.loads(line) for line in (folder / "tiny.metrics.jsonl").read_text().splitlines()]


def assert_same_end(found: tuple, expected: tuple) -> None:
    """Weights and optimizer states of two runs differ by rounding only."""
    assert_trained_alike(found[0], expected[0], ROUNDING, STEPS["max_steps"] * options(Path()).learning_rate)
    if found[1] and expected[1]:
        assert_moments_alike(found[1], expected[1], ROUNDING)


@pytest.mark.parametrize("engine, model", TRAINED)
def test_two_processes_train_what_one_trains(trained, engine, model):
    expected, found = results(trained / f"one_{model}"), results(trained / f"{engine}_{model}")
    assert_same_end(found, expected)
    assert len(expected[2]) == len(found[2]) == 6
    for a, b in zip(expected[2], found[2], strict=True):
        assert ("val_loss" in a) == ("val_loss" in b)
        for name in {"loss", "val_loss", "lr", "tokens"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=ROUNDING), name
        later = math.sqrt(ROUNDING)  # what the weights differ by, see `assert_trained_alike`
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=ROUNDING if a["step"] == 1 else later)


@pytest.mark.parametrize("engine", HALF)
def test_half_precision_is_for_the_computation_only(trained, engine):
    expected, found = results(trained / "one_bfloat16"), results(trained / f"{engine}_bfloat16")
    exact = results(trained / "one_moe")
    assert found[2][0]["loss"] != exact[2][0]["loss"]  # it was asked for
    for a, b in zip(expected[2], found[2], strict=True):
        # The 8 rows of a step round each in its own way: their mean by less.
        for name, backward in (("loss", False), ("grad_norm", True)):
            depth = shape_of(config(), backward=backward)["depth"]
            assert a[name] == pytest.approx(b[name], rel=rounding(torch.bfloat16, depth=depth) / math.sqrt(8))
    assert {x.dtype for x in (*found[0].values(), *found[1].values())} == {torch.float32}
    # Not what bfloat16 could hold, rounded up again.
    assert any((x != x.bfloat16()).any() for x in found[0].values())


@pytest.mark.parametrize("source, engine", RESUMED)
def test_what_one_engine_began_another_ends(trained, source, engine):
    """With the optimizer's state: a run in one go comes to the same."""
    folder = trained / f"{engine}_after_{source}"
    found, expected = results(folder), results(trained / f"{engine}_dense")
    if source == engine:
        assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    assert_same_end(found, expected)
    assert [line["step"] for line in found[2]] == [4, 5, 6]


def test_muon_orthogonalises_whole_matrices_though_they_are_sharded(trained):
    """In bfloat16, in which the order of a sum shows; of shards by themselves it would be another matrix altogether."""
    expected, found = results(trained / "one_muon"), results(trained / "fsdp_muon")
    eps = torch.finfo(torch.bfloat16).eps
    for a, b in zip(expected[2], found[2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=ROUNDING if a["step"] == 1 else eps)
    torch.manual_seed(0)
    for name, start in Transformer(config()).named_parameters():
        if start.dim() == 2:
            change = (expected[0][name] - start).norm()
            assert (expected[0][name] - found[0][name]).norm() < 0.1 * change, name
    resumed = results(trained / "fsdp_muon_resumed")
    assert all(torch.equal(resumed[0][name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("source", BACK_TO_ONE)
def test_one_process_ends_what_two_began(trained, source, tmp_path):
    settings = ONE | ENGINES[BACK_TO_ONE[source]] | {"resume": halfway(trained / f"{source}_dense")}
    train({"out_dir": str(tmp_path), "options": settings}, DistEnv())
    found, expected = results(tmp_path), results(trained / "one_dense")
    assert_same_end(found, expected)


@pytest.mark.parametrize("engine, kind", SPOILED)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight(trained, engine, kind):
    folder = trained / f"{engine}_{kind}"
    errors = [(folder / f"error.rank{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and "step 4: grad_norm is " in errors[0]
    assert sorted(path.name for path in (folder / "tiny.resume").iterdir()) == ["step_00000003"]
    if not engine.startswith("zero"):
        whole, saved = (read_state(Path(halfway(x)))[0] for x in (trained / f"{engine}_dense", folder))
        assert all(torch.equal(saved[name], whole[name]) for name in whole)


def test_processes_with_other_flags_are_refused_by_name(trained):
    errors = [(trained / "odd" / f"error.rank{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "rank 1 (on " in errors[0] and "seed is 1 there and 1337 here" in errors[0]


def test_three_processes_and_one_that_fails(tmp_path):
    """With an uneven last step; in the end an error of one process ends all three, and is told once."""
    settings = {"max_steps": None, "epochs": 1.4, "log_interval": 1}
    cases = [
        {
            "out_dir": str(tmp_path / f"{engine}_{model}"),
            "options": settings | {"batch_size": 2} | flags,
            "model": fields,
        }
        for model, fields in MODELS.items()
        for engine, flags in (("plain", {}), ("fsdp", {"fsdp": True}))
    ]
    cases.append({"out_dir": str(tmp_path / "fails"), "options": {"batch_size": 2}, "spoil": ["error", 3]})
    result = launch(torchrun(3), cases, tmp_path)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: this process has a reason to stop"], result.stderr
    assert "Traceback" not in result.stderr.partition("error: ")[0], result.stderr
    for model, fields in MODELS.items():
        train(
            {"out_dir": str(tmp_path / f"one_{model}"), "options": settings | {"batch_size": 6}, "model": fields},
            DistEnv(),
        )
        expected = json_and_weights(tmp_path / f"one_{model}")
        for engine in ("plain", "fsdp"):
            found = json_and_weights(tmp_path / f"{engine}_{model}")
            assert_trained_alike(found[0], expected[0], ROUNDING, sum(line["lr"] for line in expected[1]))
            assert [x["tokens"] for x in found[1]] == [x["tokens"] for x in expected[1]]
            assert found[1][-1]["val_loss"] == pytest.approx(expected[1][-1]["val_loss"], rel=ROUNDING)


def json_and_weights(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    lines = [json.loads(line) for line in (folder / "tiny.metrics.jsonl").read_text().splitlines()]
    return torch.load(folder / "tiny.pth", weights_only=True), lines


def test_a_state_of_an_older_version_is_refused_with_what_to_do(tmp_path):
    train({"out_dir": str(tmp_path), "options": ONE | {"max_steps": 3}}, DistEnv())
    (tmp_path / "tiny.resume" / "step_00000003" / "state.pt").touch()
    with pytest.raises(UserError, match="cannot resume .*step_00000003.*older version.*finish the run with that"):
        train({"out_dir": str(tmp_path), "options": ONE | {"resume": "newest"}}, DistEnv())


@pytest.mark.parametrize(
    "saved, now, how",
    [
        ("fsdp", "zero1", "without --deepspeed"),
        ("zero2", "plain", "with --deepspeed"),
        ("zero2", "zero3_offload", "without ZeRO-3"),
        ("zero3", "zero1", "with ZeRO-3"),
    ],
)
def test_a_state_of_deepspeed_is_continued_by_deepspeed_only(trained, tmp_path, saved, now, how):
    settings = ONE | ENGINES[now] | {"resume": halfway(trained / f"{saved}_dense")}
    with pytest.raises(UserError, match=f"it was saved {how}, and can only be continued so"):
        train({"out_dir": str(tmp_path), "options": settings}, DistEnv())


def test_files_of_deepspeed_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"module": Bomb()}, tmp_path / "mp_rank_00_model_states.pt")
    load_only_tensors()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "mp_rank_00_model_states.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("spread", [{"fsdp": True}, {"deepspeed": CONFIGS / "zero1.json"}], ids=["fsdp", "deepspeed"])
def test_what_does_not_go_together_is_refused_before_any_work(tmp_path, spread):
    for fields, word in (
        ({"dtype": "float16"}, "float16"),
        ({"auto_batch": True}, "--auto_batch"),
    ):
        found = options(tmp_path, **spread | fields).validate()
        assert len(found) == 1 and word in found[0]
    assert not options(tmp_path, **spread).validate()
    (found,) = options(tmp_path, optimizer="muon", embedding_lr_scale=3.0, deepspeed=CONFIGS / "zero1.json").validate()
    assert "muon" in found
    assert "two ways" in options(tmp_path, fsdp=True, deepspeed=CONFIGS / "zero1.json").validate()[0]
    assert "--compile" in options(tmp_path, compile=True, deepspeed=CONFIGS / "zero1.json").validate()[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_that_come_along_fit_any_flags(tmp_path, path):
    assert not options(tmp_path, deepspeed=path, grad_clip=0.3, batch_size=5, dtype="bfloat16").validate()


def test_a_deepspeed_file_that_decides_what_a_flag_decides_is_refused_by_name(tmp_path):
    path = tmp_path / "zero.json"
    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": 5.0, "train_micro_batch_size_per_gpu": "auto"}
    content |= {"fp16": {"enabled": True}, "scheduler": {"type": "X", "params": {"lr": "auto"}}, "amp": {}}
    path.write_text(json.dumps(content | {"optimizer": {"type": "AdamW", "params": {"lr": 3.0}}}))
    found = "\n".join(options(tmp_path, deepspeed=path).validate())
    for words in (
        '"gradient_clipping" is what --grad_clip', '"fp16" is what --dtype', '"optimizer" is what', "here: amp"
    ):  # fmt: skip
        assert words in found
    assert "train_micro_batch" not in found and "scheduler" not in found
    path.write_text('{"zero_optimization": {"stage": 0}}')
    assert "stage" in options(tmp_path, deepspeed=path).validate()[0]


@pytest.fixture
def watchdog(monkeypatch) -> Watchdog:
    """A watchdog that has not started; it keeps the error that would end its process, as `reported`."""
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", torch.distributed.HashStore)
    watchdog = Watchdog(0, 3, timeout=1.0, restarts=0)
    watchdog.reported = ""

    def fail(text: str) -> None:
        watchdog.reported = watchdog.reported or text
        watchdog._stopped.set()

    monkeypatch.setattr("trainer.watchdog.fail", fail)
    return watchdog


def wait_for_report(watchdog: Watchdog) -> str:
    """What it reports while rank 1 publishes nothing new, and rank 2 does."""
    watchdog._store.set("1", json.dumps([1, "waiting for rank 0", "elsewhere", 7, 5]))
    watchdog.start()
    for i in range(200):
        watchdog._store.set("2", json.dumps([1, "waiting for rank 0", "elsewhere", 8, i]))
        if watchdog._stopped.wait(0.05):
            break
    watchdog.stop()
    return watchdog.reported


def test_a_stopped_process_is_named_where_none_is_behind(watchdog):
    """All wait for the same thing and have made the same calls, but one of them shows no life any more."""
    watchdog.heartbeat("waiting for rank 0")
    found = wait_for_report(watchdog)
    assert "1 of 3 processes did not respond within --timeout 1 seconds" in found
    assert "rank 1 (process 7 on elsewhere), last seen at waiting for rank 0" in found


def test_a_stopped_process_is_named_while_the_others_may_take_any_time(watchdog):
    """Rank 1 was stopped while rank 0 read data: rank 0 would wait for it forever."""
    with watchdog.suspend("reading data"):
        found = wait_for_report(watchdog)
    assert "1 of 3 processes did not respond within --timeout 1 seconds" in found
    assert "rank 1 (process 7 on elsewhere), last seen at waiting for rank 0" in found
