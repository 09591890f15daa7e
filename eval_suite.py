"""lm-eval's multiple-choice benchmarks (ARC, PIQA, HellaSwag, OpenBookQA, MMLU, CMMLU, ...) on files that you have.

    pip install -r requirements-suite.txt
    hf download --repo-type dataset allenai/ai2_arc --local-dir dataset/suite/ai2_arc
    python eval_suite.py --tasks arc_easy                        # the newest of out/{rlvr,rl,distill,full_sft}_*.pth
    python eval_suite.py --tasks arc_easy piqa hellaswag cmmlu --weights out/pretrain_512.pth
    python eval_suite.py --tasks mmlu --shots 5 --hf path/to/folder

In: the files of each data set as they are on the Hugging Face hub, in a folder of its name: dataset/suite/ai2_arc, piqa,
hellaswag, openbookqa, mmlu, cmmlu; Parquet, JSONL or CSV. Nothing is downloaded. Out: a table on the terminal, and
summary.json in --out_dir, which replaces an earlier one.

Prompts, targets and metrics are those of lm-eval, so the results compare with published ones; the answers are scored as in
eval_ceval.py, many at once. The prompt is bare text, as it is in lm-eval by default. "By length" is lm-eval's acc_norm:
log-probabilities divided by the length of the answer. A small model is often near chance: look at the standard error.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from common.cli import flag, parse_options, validate_folder
from common.errors import UserError, run_script
from common.files import ROOT, write_json
from evaluation.options import EvaluatedModelOptions


@dataclass
class SuiteOptions(EvaluatedModelOptions):
    tasks: list[str] = flag([], "names of tasks or groups of lm-eval", nargs="+")
    data_dir: Path = flag(ROOT / "dataset" / "suite", "folder of the data sets (default: dataset/suite)")
    out_dir: Path = flag(ROOT / "out" / "suite", "folder for summary.json (default: out/suite)")
    shots: int | None = flag(None, "examples before each question (default: as the task says, mostly 0)", min=0)
    limit: int | None = flag(None, "ask only the first N questions of each task", metavar="N", min=1)
    dtype: str = flag("float32", "precision", choices=["bfloat16", "float16", "float32"])

    def validate(self) -> list[str]:
        errors = super().validate() + validate_folder("--out_dir", self.out_dir)
        return errors if self.tasks else [*errors, "--tasks is missing, for example --tasks arc_easy piqa"]


def main() -> None:
    options = parse_options(SuiteOptions, __doc__)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install -r requirements-suite.txt")

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # a task that is not redirected must not download
    # Heavy imports come after the command line is checked, so that --help is fast.
    from evaluation.evaluated_model import open_evaluated_model
    from evaluation.suite import evaluate_tasks, format_results, load_tasks
    from model.device import DTYPES

    tasks = load_tasks(options.tasks, options.data_dir, options.shots)
    model = open_evaluated_model(options, DTYPES[options.dtype], plain=True)
    print(f"{model.name}: {', '.join(options.tasks)}, on {model.model.device}")
    found = evaluate_tasks(tasks, model, options.dtype, options.batch_tokens, options.limit)
    if found["questions_cut"]:
        print(f"warning: {found['questions_cut']} prompts are longer than {model.context} tokens: cut from the left")
    summary = {
        "model": model.name,
        "data": str(options.data_dir),
        "shots": options.shots,
        "limit": options.limit,
        "dtype": options.dtype,
        "lm_eval": version("lm_eval"),
        **found,
    }
    write_json(options.out_dir / "summary.json", summary)
    print(format_results(found["tasks"]))
    print(f"results: {options.out_dir / 'summary.json'}")


if __name__ == "__main__":
    run_script(main)
