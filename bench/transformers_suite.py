"""Run transformers' own tests of language models on MiniMind, dense and mixture of experts, and on its Llama.

    pip install -r requirements-bench.txt
    python bench/transformers_suite.py

The tests are `tests/test_modeling_common.py` of the transformers that is installed: pip downloads its source distribution.
(It holds neither the tests of `generate` nor those of exporters, which that file imports; they are left out.) Prints every
test that a MiniMind fails or skips and Llama does not, and exits with 1 if there is a failure among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import Parser  # noqa: E402

CASES = '''
import unittest

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.LMConfig import LMConfig
from model.model import Transformer

from .test_modeling_common import ModelTesterMixin, ids_tensor

MINIMIND = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=99, max_seq_len=64)
LLAMA = dict(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)


class ModelTester:
    """What the common tests ask about a model."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    __test__ = False

    def __init__(self, config_class, fields):
        self.config_class, self.fields = config_class, fields

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, 99), "attention_mask": torch.ones(shape, dtype=torch.long)}
        return self.get_config(), inputs


def case(model_class, config_class, fields):
    class Case(ModelTesterMixin, unittest.TestCase):
        all_model_classes = all_generative_model_classes = (model_class,)

        def setUp(self):
            self.model_tester = ModelTester(config_class, fields)

        def _prepare_for_class(self, inputs, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs, model_class, return_labels)
            return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

        def test_generation_tester_mixin_inheritance(self):
            self.skipTest("the tests of generate are not in the source distribution")

        @unittest.skipIf(model_class is Transformer, "names of MiniMind-v1's weights have no prefix")
        def test_model_base_model_prefix(self):
            super().test_model_base_model_prefix()

    return Case


TestLlama = case(LlamaForCausalLM, LlamaConfig, LLAMA)
TestDense = case(Transformer, LMConfig, MINIMIND)
TestMoE = case(Transformer, LMConfig, MINIMIND | {"use_moe": True})
'''


def write_tests(folder: Path) -> Path:
    """Put the tests of the installed transformers and ours on top of them into `folder`; return the file of ours."""
    version = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers", version]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = next(folder.glob("*/tests"))
    missing = {"exporters/test_export": "ExportTesterMixin", "generation/test_utils": "GenerationTesterMixin"}
    for name, mixin in missing.items():
        file = tests / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(f"class {mixin}:\n    pass\n")
    (tests / "__init__.py").touch()
    ours = tests / "test_minimind.py"
    ours.write_text(CASES)
    return ours


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Return test -> model -> "passed", "skipped" or the first line of the failure."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ET.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = "passed" if outcome is None else outcome.get("message", "").partition("\n")[0]
        name, model = case.get("name", ""), case.get("classname", "").rpartition(".Test")[2]
        if found[name].get(model, "passed") == "passed":  # a test with parts is listed more than once
            found[name][model] = f"skipped: {text}" if outcome is not None and outcome.tag == "skipped" else text
    return found


def main() -> None:
    Parser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests, report = write_tests(Path(folder)), Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        command += [f"--junitxml={report}", str(tests)]
        result = subprocess.run(command, cwd=tests.parents[1], env=environment, stdout=sys.stderr)
        if result.returncode not in (0, 1):
            sys.exit("the tests could not be run: see above")
        found = outcomes(report)
    failed = 0
    for name, results in sorted(found.items()):
        llama = results.get("Llama", "skipped")
        for model in ("Dense", "MoE"):
            result = results.get(model, "skipped: not run")
            if result == "passed" or (llama != "passed" and result.startswith("skipped")):
                continue
            print(f"{model}: {name}: {result[:200]}; Llama: {llama[:80]}")
            failed += llama == "passed" and not result.startswith("skipped")
    passed = [
        f"{model} {sum(results.get(model) == 'passed' for results in found.values())}"
        for model in ("Dense", "MoE", "Llama")
    ]
    print(f"of {len(found)} tests pass: {', '.join(passed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
