"""The diffs that docs/ shows: read from the page, applied to a copy of the code, and the laws run on that copy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.lines import ROOT

LEFT_OUT = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.png", "results")


def diffs(page: Path) -> dict[str, str]:
    """By the heading that each stands under: the page's ```diff blocks, joined where a heading has several."""
    found: dict[str, str] = {}
    heading = ""
    for title, diff in re.findall(
        r"^#+ ([^\n]*)$|^```diff\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        heading = title or heading
        if diff:
            found[heading] = found.get(heading, "") + diff
    return found


def changed_lines(diff: str) -> int:
    """Lines that the diff takes out or puts in, whichever are more."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    return max(sum(line.startswith(sign) for line in lines) for sign in "+-")


def copy_with(diff: str, folder: Path) -> Path:
    """A copy of the code with the diff applied. AssertionError, in git's words: it does not fit the code any more."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    command = ["git", "apply", "--recount", "--whitespace=nowarn"]
    applied = subprocess.run(command, cwd=folder, input=diff, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    return folder


def laws(code: Path, which: str, *overrides: str) -> subprocess.CompletedProcess:
    """`make check` in that copy, of the laws that `which` names, in pytest's words: "law_1 or law_8".

    Their runs stay in the copy: laws/check0/"on 1" and "on 4" are law 1's.
    """
    options = ["--no-header", "--show-capture=no", "-p", "no:cacheprovider", f"--basetemp={code / 'laws'}"]
    options += ["-k", which]
    command = [sys.executable, "-m", "pytest", "tests/test_check.py", *options]
    command += [f"--override={override}" for override in overrides]
    # pytest says the same in other words where one of these is set, as continuous integration does.
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")}
    return subprocess.run(command, cwd=code, env=env, capture_output=True, text=True, timeout=600)
