"""docs/exercises.md: each of its breaks, applied to a copy of the code, makes the law fail that the page names.

`make test-exercises` runs the laws. What needs no run (the diffs fit, page and table agree) is part of `make test`.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from patches import changed_lines, copy_with, diffs, laws

from benchmarks.lines import ROOT

PAGE = ROOT / "docs/exercises.md"
TEXT = PAGE.read_text("utf-8")
DIFFS = diffs(PAGE)


@dataclass(frozen=True)
class Catch:
    """The law that catches a break, and what it says: words of its failure, which the page quotes."""

    law: int
    says: str
    overrides: tuple[str, ...] = ()


SMALL = ("model.num_hidden_layers=1", "train.micro_batch_size=4")  # a law takes less time with them
STEP_1 = "AssertionError: step 1, grad_norm"
CATCHES = {
    "1. Rows by world rank": Catch(8, "AssertionError: TP peers of dp rank 0 saw different rows", SMALL[:1]),
    "2. A mean instead of a sum": Catch(1, STEP_1, SMALL),
    "3. A norm left out of the plan": Catch(1, STEP_1, SMALL),
    "4. A replicated projection without a partial gradient": Catch(1, STEP_1, (*SMALL, "model.num_key_value_heads=3")),
    "5. Clip per rank": Catch(1, STEP_1, SMALL),
    "6. FSDP before TP": Catch(5, "ValueError: Cannot distribute a DTensor with device mesh", SMALL),
    "7. RoPE in bf16": Catch(4, "AssertionError: Tensor-likes are not close!"),
    "8. Resume without moments": Catch(2, "At index 12 diff: {'step': 12,", SMALL),
    "9. Rows that do not overlap": Catch(3, "AssertionError: assert Counter("),
    "10. A log that is only appended to": Catch(
        6, "Left contains 11 more items, first extra item: {'step': 11,", SMALL[:1]
    ),
    "11. A rule left out": Catch(7, "AssertionError: assert 2 == 3"),
}
SILENT_AT_FIRST = [heading for heading, catch in CATCHES.items() if catch.says == STEP_1]
CHANGES_NOTHING = """\
--- a/train.py
+++ b/train.py
@@ -183,2 +183,3 @@
             square = parallel.gradient_square(model)
+            # A line that changes nothing
             loss, tokens, square = parallel.sum_over_ranks(loss / tp, tokens / tp, square)
"""


def lines_of(run_dir: Path) -> dict[int, dict]:
    """What a run has logged of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def answers() -> dict[str, str]:
    """By the exercise's number: the paragraph that says what has caught its break."""
    found = re.findall(r"^\*\*(\d+)\.\*\* (.*?)(?=^\*\*\d+\.\*\*|\Z)", TEXT.partition("## Answers\n")[2], re.M | re.S)
    return dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_has_the_exercises_of_the_table_and_an_answer_to_each():
    assert list(DIFFS) == list(CATCHES)
    assert list(answers()) == [heading.partition(".")[0] for heading in CATCHES]


def test_each_law_is_seen_to_catch_something():
    assert {catch.law for catch in CATCHES.values()} == set(range(1, 9))


@pytest.mark.parametrize("heading", CATCHES)
def test_an_answer_names_the_law_of_the_table_and_quotes_what_it_says(heading):
    catch, answer = CATCHES[heading], answers()[heading.partition(".")[0]]
    assert {int(number) for number in re.findall(r"\b[Ll]aw (\d)", answer)} == {catch.law}
    assert catch.says in " ".join(answer.split())


def test_the_laws_of_the_page_are_the_readmes():
    names = dict(re.findall(r"^(\d)\. ([^*\n]+)\.$", TEXT.partition("\n## ")[0], re.M))
    assert list(names) == [str(number) for number in range(1, 9)]
    for name in names.values():
        assert name in (ROOT / "README.md").read_text("utf-8"), name


@pytest.mark.parametrize("heading", DIFFS)
def test_a_break_is_at_most_three_lines_and_fits_the_code(heading, tmp_path):
    assert 1 <= changed_lines(DIFFS[heading]) <= 3
    copy_with(DIFFS[heading], tmp_path / "code")


@pytest.mark.exercise
def test_what_is_not_in_the_plan_is_refused_by_name_unless_the_refusal_is_taken_out(tmp_path):
    """explain.py applies the real plan, without processes."""
    code = copy_with(DIFFS["3. A norm left out of the plan"], tmp_path / "code")
    command = [sys.executable, "explain.py", "--world-size=4", "--parallel.tp=2"]
    refusal = "the TP plans have no line for model.layers.0.input_layernorm.weight"
    told = subprocess.run(command, cwd=code, capture_output=True, text=True)
    assert told.returncode == 0 and refusal in told.stdout
    source = (code / "parallel.py").read_text("utf-8")
    (code / "parallel.py").write_text(source.replace('print(f"the TP', 'raise RuntimeError(f"the TP'), "utf-8")
    refused = subprocess.run(command, cwd=code, capture_output=True, text=True)
    assert refused.returncode == 1 and f"RuntimeError: {refusal}" in refused.stderr
    assert f"RuntimeError: {refusal}" in TEXT


# ---------------------------------------------------------------------------------------------------------------------
# The laws


@pytest.mark.exercise
@pytest.mark.parametrize("heading", CATCHES)
def test_a_break_is_caught_by_its_law_for_the_reason_that_the_page_gives(heading, tmp_path):
    catch = CATCHES[heading]
    code = copy_with(DIFFS[heading], tmp_path / "code")
    result = laws(code, f"law_{catch.law}", *catch.overrides)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout + result.stderr
    assert catch.says in result.stdout
    if heading in SILENT_AT_FIRST:
        one_rank, mesh = (lines_of(code / f"laws/check0/on {ranks}") for ranks in (1, 4))
        assert mesh[1]["loss"] == pytest.approx(one_rank[1]["loss"], rel=1e-6)
        assert mesh[1]["grad_norm"] != pytest.approx(one_rank[1]["grad_norm"], rel=1e-5)


@pytest.mark.exercise
def test_a_change_that_changes_nothing_passes_the_same_laws(tmp_path):
    """Else a copy might break them by itself. With all overrides at once."""
    code = copy_with(CHANGES_NOTHING, tmp_path / "code")
    which = " or ".join(sorted({f"law_{catch.law}" for catch in CATCHES.values()}))
    overrides = dict.fromkeys(override for catch in CATCHES.values() for override in catch.overrides)
    result = laws(code, which, *overrides)
    assert result.returncode == pytest.ExitCode.OK, result.stdout + result.stderr
    assert "8 passed" in result.stdout
