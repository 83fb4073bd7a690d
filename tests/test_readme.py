"""What README.md says is true: its commands, its files and its line counts."""

import re
import shlex
from pathlib import Path

import pytest

import configs
from benchmarks.lines import ROOT, table

README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADERS = [path.read_text(encoding="utf-8").partition("\n[")[0] for path in sorted((ROOT / "configs").glob("*.toml"))]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
COMMANDS += [
    shlex.split(line) for text in HEADERS for line in re.findall(r"^#   (\w+ .*?)(?:   .*)?$", text, re.MULTILINE)
]
COMMANDS = [command for command in COMMANDS if command]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c], ids=" ".join)
def test_every_training_command_is_accepted(command, monkeypatch):
    """On as many processes as it starts; `tests/test_train.py` runs such commands for real."""
    options = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--n") and "=" in word)
    local = int(options.get("nproc_per_node", 1))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(configs.pretrained, "keys", lambda name: {})  # what is exported by the line before is not there
    configs.load(command[command.index("train.py") + 1 :], local * int(options.get("nnodes", 1)), local)


def test_there_are_commands():
    assert len([c for c in COMMANDS if "train.py" in c]) > 10


@pytest.mark.parametrize("target", [c[1] for c in COMMANDS if c[0] == "make"])
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_named_exists():
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|toml))`", README) + re.findall(r"\]\(([\w/]+\.png)\)", README)
    names += [command[1] for command in COMMANDS if command[0] == "python" and command[1] != "-m"]
    modules = [command[2] for command in COMMANDS if command[:2] == ["python", "-m"]]
    names += [f"{module.replace('.', '/')}.py" for module in modules if module != "pytest"]
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_every_test_that_is_named_exists():
    for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", README):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_the_table_of_lines_is_what_the_command_prints():
    """Counts may be off by a tenth, or ten lines: an edit of a file is no edit of the README, but a new file is."""
    rows = re.findall(r"^\| (`[\w/]+\.py`|\*\*[\w ]+ together\*\*) \| ([\d,]+) \| ([\d,]*) \|$", README, re.MULTILINE)
    found = {name: (int(count.replace(",", "")), limit.replace(",", "")) for name, count, limit in rows}
    printed = {name: (count, str(limit or "")) for name, count, limit in table()}
    assert list(found) == list(printed), "python benchmarks/lines.py prints the table"
    for name, (count, limit) in printed.items():
        assert found[name][1] == limit, name
        assert abs(found[name][0] - count) <= max(10, count / 10), f"{name} has {count} lines by now"


def test_no_path_of_one_machine_is_written_down():
    for path in [*ROOT.glob("*.*"), *ROOT.glob("*/*.*")]:
        if path.suffix in {".py", ".md", ".toml", ".txt"} and ".venv" not in path.parts:
            assert str(Path.home()) + "/" not in path.read_text(encoding="utf-8"), path
