"""Turn raw dumps into the files the training stages read.

    python data_process.py all                      # every dump that lies in dataset/
    python data_process.py pretrain                 # one stage
    python data_process.py sft --input a.jsonl.zst b.parquet --max_chars 1024
    python data_process.py all --data_dir dataset/sample --out_dir out/data
    python data_process.py vlm --input chat.json --image_dir images --output vlm_pretrain.parquet
    python data_process.py distill --input prompts.jsonl --endpoint http://127.0.0.1:8000/v1 --model NAME
    python data_process.py download                 # list the published data sets
    python data_process.py download sft ceval       # load two of them into dataset/
    python data_process.py download sft-mini --source modelscope    # from ModelScope

stage     reads (by default, in --data_dir; .gz and .zst too)    writes (in --out_dir)
pretrain  mobvoi_seq_monkey_general_open_corpus.jsonl            pretrain_data.csv                  text
sft       sft_data_zh.jsonl                                      sft_data_single.csv, sft_data.csv  history,q,a
dpo       dpo/*.json                                             dpo/train_data.json                a JSON list
vlm       the files of --input: dialogues about images           the file of --output               conversations,
                                                                                                    image_bytes
distill   the files of --input: prompts, or dialogues whose      the file of --output               messages
          last answer the model of --endpoint gives anew

Inputs may be JSONL, JSON, CSV, TXT (each also .gz or .zst) or Parquet, of any size: they are streamed. Rows that cannot
be read are skipped, counted and listed with file, line and reason. An output file is replaced when its stage is done;
that of distill grows with every answer, and a run that was stopped continues it.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from common.cli import flag, parse_options, validate_folder
from common.errors import UserError, exit_on_sigterm, run_script
from common.files import ROOT
from data_pipeline.cleaning import STAGES, CleaningOptions, Summary, clean, summary_table
from data_pipeline.download import SOURCES, download, list_data_sets
from data_pipeline.image_data import convert_images

DUMPS = {
    "pretrain": "mobvoi_seq_monkey_general_open_corpus.jsonl",
    "sft": "sft_data_zh.jsonl",
    "dpo": "dpo/*.json",
}
# The stages that a flag has a meaning for; the others that are not here are for all of them.
DUMP_STAGES = (*STAGES, "all")
ONLY_FOR = {
    "data_dir": DUMP_STAGES, "max_chars": DUMP_STAGES, "min_chinese_ratio": DUMP_STAGES, "dedupe": DUMP_STAGES,
    "near_dedupe": DUMP_STAGES, "contamination": DUMP_STAGES,
    "min_chars": ("pretrain", "all"), "min_q_chars": ("sft", "all"), "min_a_chars": ("sft", "all"),
    "history": ("sft", "all"),
    "num_workers": (*DUMP_STAGES, "vlm"), "image_dir": ("vlm",), "output": ("vlm", "distill"),
    "endpoint": ("distill",), "model": ("distill",), "api_key": ("distill",), "requests_per_minute": ("distill",),
    "parallel": ("distill",), "max_tokens": ("distill",), "temperature": ("distill",), "system": ("distill",),
    "source": ("download",),
}  # fmt: skip
OUTPUTS = {"vlm": "vlm_sft.parquet", "distill": "distill_data.jsonl"}  # the default of --output
# The data sets on ModelScope that hold the dumps.
PUBLISHED_IN = {
    "pretrain": "ddzhu123/seq-monkey",
    "sft": "deepctrl/deepctrl-sft-data",
    "dpo": "gongjy/minimind_dataset",
}
# A long answer in a preference pair is no fault, and pairs are few: no limit there unless asked for.
MAX_CHARS = {"pretrain": 512, "sft": 512, "dpo": 0}


@dataclass(frozen=True)
class Options(CleaningOptions):
    stage: str = flag(
        None,
        "what to make; all: every stage whose dump exists, without vlm and distill; download: load published files",
        positional=True,
        choices=[*STAGES, "vlm", "distill", "all", "download"],
    )
    names: list[str] = flag(
        [], "download: the data sets (default: list them)", positional=True, nargs="*", metavar="NAME"
    )
    source: str = flag("huggingface", "download: the site to load from", choices=[*SOURCES])
    input: list[Path] = flag([], "raw files to read instead of the default ones", nargs="+", metavar="PATH")
    data_dir: Path = flag(ROOT / "dataset", "folder of the raw dumps (default: dataset)")
    out_dir: Path = flag(ROOT / "dataset", "folder for the results (default: dataset)")
    num_workers: int = flag(os.cpu_count() or 1, "processes (default: one per CPU; 0: only this one)", min=0)
    max_chars: int | None = flag(
        None, "longest text, question or answer in characters; 0: any (default: 512; dpo: 0)", min=0
    )
    contamination: Path | None = flag(
        None, "folder of C-Eval: drop and list texts that contain a question of its part val", metavar="FOLDER"
    )

    output: Path | None = flag(
        None, "vlm, distill: name of the result in --out_dir (default: vlm_sft.parquet, distill_data.jsonl; "
        "8-pretrain_vlm.py reads vlm_pretrain.parquet)", metavar="NAME",
    )  # fmt: skip
    image_dir: Path | None = flag(
        None, "vlm: folder of the images that the rows name (default: that of each input)", metavar="FOLDER"
    )
    endpoint: str | None = flag(
        None, "distill: address of an OpenAI-compatible API: http://127.0.0.1:8000/v1", metavar="URL"
    )
    model: str | None = flag(None, "distill: name of the model that answers", metavar="NAME")
    api_key: str | None = flag(
        None, "distill: better in the environment as OPENAI_API_KEY (default: none)", metavar="KEY"
    )
    requests_per_minute: float = flag(0.0, "distill: ask at most this often; 0: no limit", min=0)
    parallel: int = flag(4, "distill: requests at a time", min=1, max=256)
    max_tokens: int = flag(512, "distill: longest answer in tokens; longer ones are dropped", min=1)
    temperature: float = flag(0.7, "distill: randomness of the answers; 0: none", min=0)
    system: str | None = flag(None, "distill: system message for prompts that have none", metavar="TEXT")

    def validate(self) -> list[str]:
        errors = [
            f"--{name} is for the stage {' or '.join(s for s in stages if s != 'all')} and does nothing for {self.stage}: "
            "leave it out"
            for name, stages in ONLY_FOR.items()
            if self.stage not in stages and getattr(self, name) != getattr(Options, name)
        ]
        if self.stage == "download":
            published, here = SOURCES["huggingface"], SOURCES[self.source]
            unknown = [name for name in self.names if name not in published]
            errors += [f"no data set {', '.join(unknown)}; there are {', '.join(published)}"] if unknown else []
            elsewhere = [name for name in self.names if name in published and name not in here]
            if elsewhere:
                errors += [
                    f"--source {self.source} has {', '.join(here)}, but not {', '.join(elsewhere)}: leave --source out for "
                    "those, Hugging Face has them"
                ]
            errors += ["--input is not for download: leave it out"] if self.input else []
        elif self.names:
            errors += [f"{' '.join(self.names)}: only download takes names; name files with --input"]
        elif self.stage in OUTPUTS:
            errors += [] if self.input else [f"{self.stage} needs --input"]
            suffix = Path(OUTPUTS[self.stage]).suffix
            if self.output is not None and (self.output.suffix != suffix or self.output.name != str(self.output)):
                errors += [f"--output {self.output} must be a name that ends in {suffix}, in --out_dir"]
        elif self.input:
            errors += ["--input needs one stage, not all"] if self.stage == "all" else []
            if self.data_dir != Options.data_dir:
                errors += ["--input names the files itself: leave --data_dir out"]
        if self.image_dir is not None and not self.image_dir.is_dir():
            errors += [f"--image_dir {self.image_dir} is not a folder"]
        if self.stage == "distill" and not (self.endpoint and self.model):
            errors += ["distill needs --endpoint URL and --model NAME: who answers"]
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            errors += [f"--endpoint {self.endpoint} must begin with http:// or https://"]
        return errors + validate_folder("--out_dir", self.out_dir)


def find_inputs(stage: str, data_dir: Path) -> list[Path]:
    """Return the dumps of `stage` in `data_dir`, sorted, without the files that this script wrote."""
    found = [path for ending in ("", ".gz", ".zst") for path in data_dir.glob(DUMPS[stage] + ending)]
    return sorted(path for path in found if path.name not in map(os.path.basename, STAGES[stage].outputs))


def main() -> None:
    options = parse_options(Options, __doc__)
    exit_on_sigterm()
    if options.stage == "download":
        if options.names:
            download(options.names, options.out_dir, options.source)
        else:
            print(list_data_sets(options.source))
        return
    if options.stage in OUTPUTS:
        output = options.out_dir / (options.output or OUTPUTS[options.stage])
        if options.stage == "vlm":
            summary = convert_images(options.input, output, options.image_dir, options.num_workers)
        else:
            summary = ask(options, output)
        print(summary_table(options.stage, summary), flush=True)
        check_complete(summary.bad.incomplete)
        return
    done = 0
    incomplete: list[str] = []
    questions: tuple[str, ...] = ()
    if options.contamination is not None:
        from data_pipeline.near_duplicates import count_too_short
        from evaluation.ceval import read_questions

        questions = tuple(q.question for q in read_questions(options.contamination, "val", answers=True))
        n_short = count_too_short(questions)
        print(
            f"--contamination: {len(questions) - n_short:,} questions; {n_short:,} more are too short to be recognised"
        )
    names = list(STAGES) if options.stage == "all" else [options.stage]
    for name in names:
        inputs = options.input or find_inputs(name, options.data_dir)
        if not inputs:
            print(f"{name}: skipped, there is no {options.data_dir / DUMPS[name]}")
            continue
        # Workers get these options: not the script's own class, for which each would run the script's file.
        limits = {field.name: getattr(options, field.name) for field in dataclasses.fields(CleaningOptions)}
        limits["questions"] = questions
        limits["max_chars"] = MAX_CHARS[name] if options.max_chars is None else options.max_chars
        summary = clean(STAGES[name], inputs, options.out_dir, CleaningOptions(**limits), options.num_workers)
        print(summary_table(name, summary), flush=True)
        incomplete += summary.bad.incomplete
        done += 1
    if not done:
        dumps = ", ".join(f"{DUMPS[name]} (ModelScope: {PUBLISHED_IN[name]})" for name in names)
        raise UserError(
            f"no raw data in {options.data_dir}. Download into it {dumps}; or take data that is ready for training: "
            "python data_process.py download; or name files of your own with --input; or try "
            f"the sample data: --data_dir {ROOT / 'dataset' / 'sample'}"
        )
    check_complete(incomplete)


def ask(options: Options, output: Path) -> Summary:
    """Collect the answers of the model of --endpoint."""
    from data_pipeline.teacher_answers import TeacherAPI, collect_answers  # openai takes a second to import

    assert options.endpoint and options.model
    endpoint = TeacherAPI(
        options.endpoint, options.model, options.api_key or os.environ.get("OPENAI_API_KEY", "none"),
        options.requests_per_minute, options.parallel,
        {"max_tokens": options.max_tokens, "temperature": options.temperature},
    )  # fmt: skip
    return collect_answers(options.input, output, endpoint, options.system)


def check_complete(incomplete: list[str]) -> None:
    """Raise UserError if the end of an input was lost."""
    if incomplete:
        raise UserError(
            f"{'; '.join(incomplete)}. What was read is written; repair the file or download it again for the rest"
        )


if __name__ == "__main__":
    run_script(main)
