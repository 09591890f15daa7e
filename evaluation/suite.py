"""lm-eval's multiple-choice tasks on local files: its prompts, targets and metrics, our scorer.

    tasks = load_tasks(["arc_easy", "cmmlu"], Path("dataset/suite"), shots=None)
    summary = evaluate_tasks(tasks, model, "float32", None, limit=None)

A task names a data set of the Hugging Face hub, such as allenai/ai2_arc. Here its rows come from the files in the folder
`ai2_arc`, under their names on the hub; nothing is downloaded.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from lm_eval import evaluator
from lm_eval.api import task as task_module
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict, TaskManager

from common.errors import UserError
from data_pipeline.readers import iter_records
from evaluation.evaluated_model import EvaluatedModel

FORMATS = r"\.(parquet|((jsonl|json|csv)(\.gz|\.zst)?))"
WORDS = {"validation": {"validation", "valid", "val"}}  # what the name of a file calls a split
NO_SUBSET = (None, "main", "default")  # names that need no folder, if no other subset is there


@functools.cache
def _task_manager() -> TaskManager:
    """Return lm-eval's index of its tasks, which it reads from some 15,000 files in about ten seconds."""
    return TaskManager()


def load_tasks(names: list[str], data_dir: Path, shots: int | None) -> TaskDict:
    """Return lm-eval's tasks and groups of these names, with rows from `data_dir`.

    shots: examples in front of each question; None: as the task says, mostly none.

    Raises UserError for an unknown task, files that are missing, and rows that are not those of the task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that its rows are custom
    disable_progress_bars()
    task_module.tqdm = lambda rows, **_: rows  # a bar for each of 67 subjects
    manager = _task_manager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists all"
            raise UserError(f"--tasks {name}: lm-eval has no such task; {hint}")
    reading = [""]  # the task that an error is about

    def read_splits(*, config_source: str, **_: Any) -> dict[str, Dataset]:
        config = load_yaml(config_source, resolve_func=False)
        reading[0] = config["task"]
        return _read_splits(config, data_dir, shots)

    found: TaskDict = {"tasks": {}, "groups": {}}
    overrides, index = {"custom_dataset": read_splits}, manager.task_index
    try:
        for name in names:
            reading[0] = name
            built = TaskFactory().build(index[name], overrides=overrides, registry=index)
            for one in built if isinstance(built, list) else [built]:  # a tag is a list of tasks
                is_group = isinstance(one, Group)
                found["tasks"] |= {task.task_name: task for task in (one.get_all_tasks() if is_group else [one])}
                found["groups"] |= {group.name: group for group in ([one, *one.get_all_groups()] if is_group else [])}
        for reading[0], task in found["tasks"].items():
            task.set_config("num_fewshot", (task.config.num_fewshot or 0) if shots is None else shots)
            task.set_fewshot_seed(1234)  # lm-eval's default
            n_examples = task.config.num_fewshot
            if n_examples and (n_rows := len([*task.fewshot_docs()])) <= n_examples:
                raise UserError(
                    f"{reading[0]}: {n_examples} examples are too many for {n_rows} rows: use fewer --shots"
                )
            if "acc" not in (metrics := task.aggregation()):
                raise UserError(f"{reading[0]}: only accuracy can be measured, and the task has {', '.join(metrics)}")
            _check_targets(task)
    except UserError:
        raise
    except Exception as error:  # from the templates of the task, which meet rows that they do not know
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{reading[0]}: the rows in {data_dir} are not those of this task ({reason})") from error
    return found


def _read_splits(config: dict, data_dir: Path, shots: int | None) -> dict[str, Dataset]:
    """Return the rows that a task needs, by split: the evaluated ones and, with examples, those of the examples."""
    if config.get("output_type") != "multiple_choice":
        raise UserError(f"{config['task']}: only multiple-choice tasks can be evaluated, and it is none")
    evaluated = config.get("test_split") or config.get("validation_split")
    if evaluated is None:
        raise UserError(f"{config['task']}: the task names no split that could be evaluated")
    others = (config.get(f"{kind}_split") for kind in ("fewshot", "training", "validation"))
    examples = next(filter(None, others), evaluated)  # as lm-eval chooses them
    found = {evaluated: _read_split(config, data_dir, evaluated)}
    with_examples = config.get("num_fewshot") if shots is None else shots
    found[examples] = _read_split(config, data_dir, examples) if with_examples else found[evaluated]
    unused = {config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")} - {None, *found}
    return found | dict.fromkeys(unused, found[evaluated])


def _read_split(config: dict, data_dir: Path, split: str) -> Dataset:
    """Return the rows of one split, from all its files."""
    hub_name, subset = config["dataset_path"], config.get("dataset_name")
    folder = data_dir / hub_name.rpartition("/")[2]
    of_split, of_subset = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        stem = re.sub(FORMATS, "", path.name)
        words = set(re.findall("[a-z]+", f"{inside.parent.as_posix()} {stem}".lower()))
        if re.search(f"{FORMATS}$", path.name) and words & WORDS.get(split, {split}):
            of_split.append(path)
            of_subset += [path] if subset in (*inside.parts[:-1], stem) else []
    files = of_subset or (of_split if subset in NO_SUBSET else [])
    if not files:
        part = "" if subset in NO_SUBSET else f" of {subset}"
        raise UserError(
            f"{config['task']}: no files of the split {split}{part} in {folder}; get the data set {hub_name} there, with "
            f"its names, for example: hf download --repo-type dataset {hub_name} --local-dir {folder}"
        )
    return Dataset.from_list([record.data for path in files for record in iter_records(path, None)])


def _check_targets(task: task_module.Task) -> None:
    """Raise UserError for a row whose answer is not among its choices."""
    for i, doc in enumerate(task.eval_docs, 1):
        choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
        valid = (*range(len(choices)), *choices)  # a number from 0 on, or the text of a choice
        if not all(one in valid for one in (target if isinstance(target, list) else [target])):
            raise UserError(
                f"{task.task_name}, row {i}: the answer {target!r} is none of {', '.join(map(repr, valid))}"
            )


class ScorerModel(LM):
    """Our scorer as a model of lm-eval."""

    def __init__(self, model: EvaluatedModel, dtype: str, batch_tokens: int | None) -> None:
        super().__init__()
        self.model, self.dtype, self.batch_tokens, self.n_cut = model, dtype, batch_tokens, 0

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context; the second value is not computed."""
        items = []
        for _, group in itertools.groupby(requests, key=lambda one: (one.task_name, one.doc_id, one.args[0])):
            asked = [one.args for one in group]
            item, n_kept = self.model.encode(asked[0][0], [continuation for _, continuation in asked])
            cut = self.model.cut(replace(item, lengths=None), n_kept)
            self.n_cut += len(cut.prompt) < len(item.prompt)
            items.append(cut)
        scores, _ = self.model.score(items, self.dtype, self.batch_tokens)
        return [(value, False) for one in scores for value in one.tolist()]

    loglikelihood_rolling = generate_until = None  # which multiple-choice tasks do not need


def evaluate_tasks(
    tasks: TaskDict, model: EvaluatedModel, dtype: str, batch_tokens: int | None, limit: int | None
) -> dict:
    """Return the results by task, groups and their parts included, and how many questions were cut from the left.

    limit: only so many questions of each task. A result has `accuracy` and `standard_error` (None for one question),
    the same of `normalised` accuracy where the task has it, `chance`, `questions` and `above_chance`.
    """
    scorer = ScorerModel(model, dtype, batch_tokens)
    found = evaluator.evaluate(scorer, task_dict=tasks, limit=limit, log_samples=True)
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in tasks["groups"].items()}
    results = {}
    for name in [*tasks["groups"], *tasks["tasks"]]:
        samples = [one for task in members.get(name, [name]) for one in found["samples"][task]]
        if "acc,none" in found["results"].get(name, {}):
            results[name] = _result(found["results"][name], samples)
    return {"questions_cut": scorer.n_cut, "tasks": results}


def _result(metrics: dict[str, Any], samples: list[dict]) -> dict:
    """Return the metrics of a task or group in our names, with the accuracy of guessing."""
    n, chance = len(samples), sum(1 / len(one["resps"]) for one in samples) / len(samples)
    result = {"chance": chance, "questions": n}
    for key, name in (("", "acc"), ("normalised_", "acc_norm")):
        if f"{name},none" in metrics:
            error = metrics[f"{name}_stderr,none"]
            result[f"{key}accuracy"] = float(metrics[f"{name},none"])
            result[f"{key}standard_error"] = float(error) if isinstance(error, float) and math.isfinite(error) else None
    return result | {"above_chance": result["accuracy"] > chance + 2 * math.sqrt(chance * (1 - chance) / n)}


def format_results(results: dict[str, dict]) -> str:
    """Return a table for the terminal, with a star where the accuracy is above chance."""
    lines = [f"{'accuracy':>8}  {'± s.e.':>6}  {'by length':>9}  {'± s.e.':>6}  {'chance':>6}  {'questions':>9}"]
    for name, one in results.items():
        keys = ("accuracy", "standard_error", "normalised_accuracy", "normalised_standard_error", "chance")
        cells = ["–" if one.get(key) is None else f"{one[key]:.1%}" for key in keys]
        star = "*" if one["above_chance"] else " "
        lines.append("{:>8}  {:>6}  {:>9}  {:>6}  {:>6}".format(*cells) + f"  {one['questions']:9,} {star} {name}")
    return "\n".join([*lines, "", "* more than two standard errors of guessing above chance"])
