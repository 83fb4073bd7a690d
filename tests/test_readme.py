"""What README.md says is true: its commands, its files and its line counts."""

import re
import shlex
from pathlib import Path

import pytest

import configs
from benchmarks.lines import FILES, ROOT, lines_of_code

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
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("WORLD_SIZE", str(local * int(options.get("nnodes", 1))))
    monkeypatch.chdir(ROOT)
    configs.load(command[command.index("train.py") + 1 :])


def test_there_are_commands():
    assert len([c for c in COMMANDS if "train.py" in c]) > 10


@pytest.mark.parametrize("target", [c[1] for c in COMMANDS if c[0] == "make"])
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_named_exists():
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|toml))`", README) + re.findall(r"\]\(([\w/]+\.png)\)", README)
    names += [command[1] for command in COMMANDS if command[0] == "python"]
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_every_test_that_is_named_exists():
    for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", README):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_line_counts_are_those_of_the_files():
    found = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|$", README, re.MULTILINE))
    assert found == {f"{name}.py": str(lines_of_code(ROOT / f"{name}.py")) for name in FILES}


def test_no_path_of_one_machine_is_written_down():
    for path in [*ROOT.glob("*.*"), *ROOT.glob("*/*.*")]:
        if path.suffix in {".py", ".md", ".toml", ".txt"} and ".venv" not in path.parts:
            assert str(Path.home()) + "/" not in path.read_text(encoding="utf-8"), path
