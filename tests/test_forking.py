"""docs/forking.md stays true: each of its diffs fits the code, and the laws hold with it (`make test-forks`)."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from patches import changed_lines, copy_with, diffs, laws

from benchmarks.lines import ROOT

PAGE = ROOT / "docs" / "forking.md"
DIFFS = diffs(PAGE)
RECIPES = {  # the laws that matter most for each, and the keys that it is tried with
    "An activation": ("law_1 or law_4", ["model.hidden_act=gelu"]),
    "A schedule": ("law_2", ["optim.decay_share=0.5"]),
    "A projection in the plan": ("law_1", ["model.attention_gate=true"]),
    "A parameter in a block": ("law_1", ["model.qk_norm=true"]),
    "A number for each head": ("law_1", ["model.head_scale=true"]),
    "A norm": ("law_1", ["model.norm=LayerNorm"]),
    "An attention mask": ("law_1", ["model.window=8", "model.global_every=2"]),
    "A feed-forward with experts": ("law_1", ["model.experts=4", "model.top_k=2"]),
    "A loss": ("law_1", ["model.z_loss=0.01"]),
    "A small optimizer": ("law_2", ["optim.lr=3e-4"]),
    "An optimizer of whole matrices": ("law_1 or law_2", ["optim.lr=1e-3"]),
}
DATA = "A data format"  # the laws bring documents of their own

TAKEN_FOR_WHOLE = """class TakenForWhole(SequenceParallel):
    def __init__(self):
        super().__init__(use_local_output=True)
        self.sequence_sharding = (WHOLE,)


class ReplicatedLinear(ParallelStyle):"""
FIRST_NUMBERS = """        module.forward = lambda y: y * module.weight.to_local()[: y.size(1)].view(-1, 1, 1)
        return distribute_module(module, device_mesh)"""
MISTAKES = {  # what is replaced in parallel.py, the law that sees it, and what it says
    "A parameter in a block": (
        {
            "class ReplicatedLinear(ParallelStyle):": TAKEN_FOR_WHOLE,
            "SequenceParallel(use_local_output=True) for": "TakenForWhole() for",
        },
        "law_1",
        "step 1, grad_norm",
    ),
    "A number for each head": (
        {"        return distribute_module(module, device_mesh, self._cut, self._arrive, self._leave)": FIRST_NUMBERS},
        "law_1",
        "step 1, grad_norm",
    ),
    "A feed-forward with experts": (
        {"ReplicatedLinear()}": "ColwiseParallel(output_layouts=WHOLE)}"},
        "law_1",
        "step 1, grad_norm",
    ),
    "A projection in the plan": (
        {"        **gate,\n": ""},
        "law_5",
        "the TP plans have no line for model.layers.0.self_attn.gate_proj.weight",
    ),
}

pytestmark = pytest.mark.fork


def section(heading: str) -> str:
    """What the page says under it."""
    return re.split(r"^#+ .*$", PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]


def test_the_page_has_a_diff_for_each_recipe_and_no_other():
    assert list(DIFFS) == list({**RECIPES, DATA: None})


def test_each_diff_is_small():
    for heading, diff in DIFFS.items():
        assert 1 <= changed_lines(diff) <= 70, heading


@pytest.mark.parametrize("heading", RECIPES)
def test_the_command_of_a_recipe_runs_the_laws_and_the_keys_that_are_tested(heading):
    (command,) = re.findall(r"^make check .*$", section(heading), re.MULTILINE)
    which, keys = RECIPES[heading]
    arguments = shlex.split(shlex.split(command)[2].removeprefix("ARGS="))
    assert arguments == ["-k", which, *(word for key in keys for word in ("--override", key))]


@pytest.mark.parametrize("row", re.findall(r"^\| .* \| \[(.*)\]\(#(.*)\) \| (\d+) \| (.*) \|$", PAGE.read_text(), re.M))
def test_the_smallest_five_are_as_long_as_the_table_says_and_change_the_files_that_it_names(row):
    heading, anchor, lines, files = row
    assert anchor == heading.lower().replace(" ", "-")
    assert int(lines) == changed_lines(DIFFS[heading])
    assert sorted(re.findall(r"`(.*?)`", files)) == sorted(re.findall(r"^\+\+\+ b/(.*)$", DIFFS[heading], re.MULTILINE))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("heading", RECIPES)
def test_the_laws_hold_with_a_recipe(heading, tmp_path):
    """A key that no law has read would end the run with another status."""
    which, keys = RECIPES[heading]
    ran = laws(copy_with(DIFFS[heading], tmp_path / "fork"), which, *keys)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^([.sF]+) ", ran.stdout, re.MULTILINE).group(1) == "." * len(which.split(" or ")), ran.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("heading", MISTAKES)
def test_the_usual_mistake_is_caught_by_the_law_that_the_page_names(heading, tmp_path):
    replaced, which, said = MISTAKES[heading]
    code = copy_with(DIFFS[heading], tmp_path / "fork")
    text = (code / "parallel.py").read_text("utf-8")
    for right, wrong in replaced.items():
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    (code / "parallel.py").write_text(text, encoding="utf-8")
    ran = laws(code, which, *RECIPES[heading][1])
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert said in ran.stdout
    words = " ".join(section(heading).split())
    assert said in words
    assert f"Law {which[-1]}" in words


EXPORTED = """
import sys
import configs
from huggingface.config import config_json
from runtime.ranks import UserError

try:
    print(config_json(configs.load(sys.argv[1:]).model, "float32", {})["hidden_act"])
except UserError as error:
    print(error)
"""


def printed_by(code: Path, program: str, *arguments: str) -> str:
    """What the program prints in that copy of the code."""
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, cwd=code, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("heading", [name for name, (_, keys) in RECIPES.items() if keys[0].startswith("model.")])
def test_export_refuses_a_key_that_transformers_would_pass_over(heading, tmp_path):
    keys = RECIPES[heading][1]
    code = copy_with(DIFFS[heading], tmp_path / "fork")
    printed = printed_by(code, EXPORTED, *(f"--{key}" for key in keys))
    if heading == "An activation":
        assert printed == "gelu\n"
    else:
        assert printed.startswith("transformers' Llama has no ")
        assert all(key.partition("=")[0] in printed for key in keys)


# ---------------------------------------------------------------------------------------------------------------------
# The data format

TEXTS = ["one", "NA", "null", 'two\nlines, "quoted"', "", "é", "12"]
READ_BOTH_WAYS = """
import json, sys
from corpus.config import DataConfig
from corpus.sources import load_documents, texts_of_file

documents = load_documents(DataConfig(dataset=sys.argv[1]))
print(json.dumps([list(documents.texts(0, len(documents))), list(texts_of_file(sys.argv[1], "text"))]))
"""


def read_in(code: Path, folder: Path) -> list[list[str | None]]:
    """TEXTS, written as .csv and read by that code: as files on disk, and streamed."""
    with (folder / "documents.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["number", "text"], *enumerate(TEXTS)])
    program = f"import datasets; datasets.config.HF_DATASETS_CACHE = {str(folder / 'cache')!r}\n{READ_BOTH_WAYS}"
    return json.loads(printed_by(code, program, str(folder / "documents.csv")))


def test_the_data_format_loses_no_document_and_without_its_options_it_loses_three(tmp_path):
    code = copy_with(DIFFS[DATA], tmp_path / "fork")
    assert read_in(code, tmp_path) == [TEXTS, TEXTS]
    sources = code / "corpus" / "sources.py"
    text = sources.read_text("utf-8")
    assert text.count('{"keep_default_na": False}') == 1
    sources.write_text(text.replace('{"keep_default_na": False}', "{}"), encoding="utf-8")
    (tmp_path / "without").mkdir()
    lost = [None if text in ("NA", "null", "") else text for text in TEXTS]
    assert read_in(code, tmp_path / "without") == [lost, lost]
