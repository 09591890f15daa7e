"""Turn raw dumps into the files the training stages read.

    python data_process.py all                      # every dump that lies in dataset/
    python data_process.py pretrain                 # one stage
    python data_process.py sft --input a.jsonl.zst b.parquet --max_chars 1024
    python data_process.py all --data_dir dataset/sample --out_dir out/data
    python data_process.py vlm --input chat.json --image_dir images --output vlm_pretrain.parquet

stage     reads (by default, in --data_dir; .gz and .zst too)    writes (in --out_dir)
pretrain  mobvoi_seq_monkey_general_open_corpus.jsonl            pretrain_data.csv                  text
sft       sft_data_zh.jsonl                                      sft_data_single.csv, sft_data.csv  history,q,a
dpo       dpo/*.json                                             dpo/train_data.json                a JSON list
vlm       the files of --input: dialogues about images           the file of --output               conversations,
                                                                                                    image_bytes

Inputs may be JSONL, JSON, CSV, TXT (each also .gz or .zst) or Parquet, of any size: they are streamed. Rows that cannot
be read are skipped, counted and listed with file, line and reason. An output file is replaced when its stage is done.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from common.cli import flag, parse_options, validate_folder
from common.errors import UserError, exit_on_sigterm, run_script
from common.files import ROOT
from data_pipeline.cleaning import STAGES, CleaningOptions, clean, summary_table
from data_pipeline.image_data import convert_images

DUMPS = {
    "pretrain": "mobvoi_seq_monkey_general_open_corpus.jsonl",
    "sft": "sft_data_zh.jsonl",
    "dpo": "dpo/*.json",
}
ONLY_FOR = {"min_chars": "pretrain", "min_q_chars": "sft", "min_a_chars": "sft", "history": "sft"}  # flag: its stage
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
        "what to make; all: every stage whose dump exists, without vlm",
        positional=True,
        choices=[*STAGES, "vlm", "all"],
    )
    input: list[Path] = flag([], "raw files to read instead of the default ones", nargs="+", metavar="PATH")
    data_dir: Path = flag(ROOT / "dataset", "folder of the raw dumps (default: dataset)")
    out_dir: Path = flag(ROOT / "dataset", "folder for the results (default: dataset)")
    num_workers: int = flag(os.cpu_count() or 1, "processes (default: one per CPU; 0: only this one)", min=0)
    max_chars: int | None = flag(
        None, "longest text, question or answer in characters; 0: any (default: 512; dpo: 0)", min=0
    )

    image_dir: Path | None = flag(
        None, "vlm: folder of the images that the rows name (default: that of each input)", metavar="FOLDER"
    )
    output: Path | None = flag(
        None, "vlm: name of the result in --out_dir (default: vlm_sft.parquet; 8-pretrain_vlm.py reads "
        "vlm_pretrain.parquet)", metavar="NAME",
    )  # fmt: skip

    def validate(self) -> list[str]:
        if self.stage == "vlm":
            return self._validate_vlm()
        errors = [
            f"--{name} is for the stage vlm: leave it out" for name in ("image_dir", "output") if getattr(self, name)
        ]
        errors += ["--input needs one stage, not all"] if self.input and self.stage == "all" else []
        if self.input and self.data_dir != Options.data_dir:
            errors += ["--input names the files itself: leave --data_dir out"]
        for name, stage in ONLY_FOR.items():
            if self.stage not in (stage, "all") and getattr(self, name) != getattr(Options, name):
                errors += [f"--{name} is for the stage {stage} and does nothing for {self.stage}: leave it out"]
        return errors + validate_folder("--out_dir", self.out_dir)

    def _validate_vlm(self) -> list[str]:
        errors = [] if self.input else ["vlm needs --input: JSON, JSONL or Parquet with dialogues about images"]
        used = {"stage", "input", "out_dir", "num_workers", "image_dir", "output"}
        for field in dataclasses.fields(self):
            if field.name not in used and getattr(self, field.name) != getattr(Options, field.name, []):
                errors += [f"--{field.name} does nothing for vlm: leave it out"]
        if self.output is not None and (self.output.suffix != ".parquet" or self.output.name != str(self.output)):
            errors += [f"--output {self.output} must be a name that ends in .parquet, in --out_dir"]
        if self.image_dir is not None and not self.image_dir.is_dir():
            errors += [f"--image_dir {self.image_dir} is not a folder"]
        return errors + validate_folder("--out_dir", self.out_dir)


def find_inputs(stage: str, data_dir: Path) -> list[Path]:
    """Return the dumps of `stage` in `data_dir`, sorted, without the files that this script wrote."""
    found = [path for ending in ("", ".gz", ".zst") for path in data_dir.glob(DUMPS[stage] + ending)]
    return sorted(path for path in found if path.name not in map(os.path.basename, STAGES[stage].outputs))


def main() -> None:
    options = parse_options(Options, __doc__)
    exit_on_sigterm()
    if options.stage == "vlm":
        output = options.out_dir / (options.output or "vlm_sft.parquet")
        summary = convert_images(options.input, output, options.image_dir, options.num_workers)
        print(summary_table("vlm", summary), flush=True)
        check_complete(summary.bad.incomplete)
        return
    done = 0
    incomplete: list[str] = []
    names = list(STAGES) if options.stage == "all" else [options.stage]
    for name in names:
        inputs = options.input or find_inputs(name, options.data_dir)
        if not inputs:
            print(f"{name}: skipped, there is no {options.data_dir / DUMPS[name]}")
            continue
        # Workers get these options: not the script's own class, for which each would run the script's file.
        limits = {field.name: getattr(options, field.name) for field in dataclasses.fields(CleaningOptions)}
        limits["max_chars"] = MAX_CHARS[name] if options.max_chars is None else options.max_chars
        summary = clean(STAGES[name], inputs, options.out_dir, CleaningOptions(**limits), options.num_workers)
        print(summary_table(name, summary), flush=True)
        incomplete += summary.bad.incomplete
        done += 1
    if not done:
        dumps = ", ".join(f"{DUMPS[name]} (ModelScope: {PUBLISHED_IN[name]})" for name in names)
        raise UserError(
            f"no raw data in {options.data_dir}. Download into it {dumps}; or name files of your own with --input; or try "
            f"the sample data: --data_dir {ROOT / 'dataset' / 'sample'}"
        )
    check_complete(incomplete)


def check_complete(incomplete: list[str]) -> None:
    """Raise UserError if the end of an input was lost."""
    if incomplete:
        raise UserError(
            f"{'; '.join(incomplete)}. What was read is written; repair the file or download it again for the rest"
        )


if __name__ == "__main__":
    run_script(main)
