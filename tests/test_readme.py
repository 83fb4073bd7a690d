"""What README.md and the pages of docs/ say is true: their commands, files, keys, tests, links and line counts."""

import re
import shlex
import subprocess
import sys

import pytest

import checkpoint
import configs
import data
import explain
import model
import parallel
import train
from benchmarks.lines import FIVE_FILES, ROOT, table
from cost import hardware

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
HEADERS = {
    path: path.read_text(encoding="utf-8").partition("\n[")[0] for path in sorted((ROOT / "configs").glob("*.toml"))
}
# Code in a line of text, which may be broken in two
SPANS = {
    page: [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    for page, text in PAGES.items()
}
SCRIPT = re.compile(r"(?:\w+/)*\w+\.(?:py|toml|sh|yaml|md)")
OF_A_RUN = {"config.toml"}  # files that a page may name and that only a run directory has
# Files and keys that are there once a page's own diffs are applied, which the tests of these pages do
ADDED = {
    page: re.findall(
        r"^\+\+\+ b/(\S+)|^\+ +(\w+): ", "".join(re.findall(r"```diff\n(.*?)```", text, re.DOTALL)), re.MULTILINE
    )
    for page, text in PAGES.items()
}


def in_blocks(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, without what they set in the environment."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := words_of(re.sub(r"^(\w+=\S* )+", "", line)))]


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def in_text(page: str) -> list[list[str]]:
    """Those in a line of text, of which a part may be left open, as in `python explain.py --gpu=...`."""
    return [words_of(span) for span in SPANS[page] if re.match(r"(python|torchrun|make|sbatch) ", span)]


COMMANDS = [(page, command) for page in PAGES for command in in_blocks(page)]
COMMANDS += [
    (path.name, words_of(line))
    for path, text in HEADERS.items()
    for line in re.findall(r"^#   (\w+ .*?)(?:   .*)?$", text, re.MULTILINE)
]
MENTIONED = COMMANDS + [(page, command) for page in PAGES for command in in_text(page)]


def calling(script: str) -> list:
    """Cases for the commands that run it."""
    found = [
        (page, command) for page, command in COMMANDS if script in command and not uses_what_is_added(page, command)
    ]
    return [pytest.param(command, id=f"{page}: {' '.join(command)}") for page, command in found]


def is_added(page: str, name: str) -> bool:
    """By a diff on the page: a file, or a key of any section."""
    return any(name in (file, key) for file, key in ADDED.get(page, ()))


def uses_what_is_added(page: str, command: list[str]) -> bool:
    keys = [key for word in command for key in re.findall(r"^--\w+\.(\w+)=", word)]
    return any(is_added(page, key) for key in keys)


def of_each_page(check) -> list[str]:
    """What `check` finds wrong, with the page's name."""
    return [f"{page}: {wrong}" for page in PAGES for wrong in check(page)]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("command", calling("train.py"))
def test_every_training_command_is_accepted(command, monkeypatch):
    """On as many processes as it starts; `tests/test_train.py` runs such commands for real."""
    options = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--n") and "=" in word)
    local = int(options.get("nproc_per_node", 1))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(configs.pretrained, "keys", lambda name: {})  # what is exported by the line before is not there
    configs.load(command[command.index("train.py") + 1 :], local * int(options.get("nnodes", 1)), local)


@pytest.mark.parametrize("command", calling("explain.py"))
def test_every_explain_command_is_accepted(command, monkeypatch):
    """As far as its keys, its mesh and its GPU go; `tests/test_explain.py` runs such commands for real."""
    options = {"--world-size": "8"}
    arguments = []
    for word in command[command.index("explain.py") + 1 :]:
        name, _, value = word.partition("=")
        if name.startswith("--") and "." not in name:
            options[name] = value
        else:
            arguments.append(word)
    monkeypatch.chdir(ROOT)
    world, on_gpus = int(options["--world-size"]), "--gpu" in options
    local = int(options.get("--local-world-size", min(world, 8) if on_gpus else world))
    (explain.any_mesh if "--choose" in options else explain.load)(arguments, world, local, on_gpus)
    assert options.get("--gpu", "h100") in hardware.known()


def test_the_lines_of_explain_on_the_readme_are_what_it_prints():
    """Without what is written beside them, behind a #."""
    command = re.search(r"Twelve lines of\s+`python (explain\.py [^`]+)`", PAGES["README.md"])[1]
    block = next(text for text in re.findall(r"```text\n(.*?)```", PAGES["README.md"], re.DOTALL) if "MODULE" in text)
    shown = [line.partition("#")[0].rstrip() for line in block.splitlines()]
    assert len(shown) == 12
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert [line for line in shown if line not in done.stdout.splitlines()] == []


def test_the_readme_can_be_read_in_ten_minutes():
    assert len(PAGES["README.md"].split()) <= 1800


def test_there_are_commands():
    assert len(calling("train.py")) > 20
    assert len(calling("explain.py")) > 10
    assert {"README.md", "docs/running.md", "docs/cluster.md", "docs/huggingface.md"} <= {page for page, _ in COMMANDS}


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = [(page, command[1]) for page, command in MENTIONED if command[0] == "make" and "=" not in command[1]]
    assert len(targets) > 10
    for page, target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{page}: make {target}"


# ---------------------------------------------------------------------------------------------------------------------
# What is named


def named_files(page: str) -> list[str]:
    """In text and in commands, modules of `python -m` among them; what lies in a run directory is not there yet."""
    names = [span for span in SPANS[page] if SCRIPT.fullmatch(span)]
    for where, command in MENTIONED:
        if where == page and command[0] in ("python", "torchrun", "sbatch"):
            names += [word for word in command[1:] if SCRIPT.fullmatch(word)]
            if "-m" in command and (module := command[command.index("-m") + 1]) != "pytest":
                names.append(f"{module.replace('.', '/')}.py")
    return [name for name in names if name not in OF_A_RUN and not name.startswith("runs/")]


def test_every_file_that_is_named_exists():
    assert all(named_files(page) for page in PAGES)
    assert min(len(named_files(page)) for page in ("docs/running.md", "docs/measurements.md")) > 10
    missing = of_each_page(lambda page: [n for n in named_files(page) if not is_there(n) and not is_added(page, n)])
    assert missing == []


def is_there(name: str) -> bool:
    return (ROOT / name).exists() or (ROOT / "tests" / name).exists()


def test_every_test_that_is_named_exists():
    named = {page: re.findall(r"`(tests/\w+\.py)::(\w+)`", text) for page, text in PAGES.items()}
    assert len(named["docs/promises.md"]) > 80
    missing = of_each_page(
        lambda page: [n for path, n in named[page] if f"def {n}(" not in (ROOT / path).read_text(encoding="utf-8")]
    )
    assert missing == []


def unknown_keys(page: str) -> list[str]:
    """Those that are not a name in the module of that section either, and that no diff on the page adds."""
    found = [re.match(rf"(?:--)?(({'|'.join(configs.SECTIONS)})\.([a-z_]+))(?:\s?=.*)?$", span) for span in SPANS[page]]
    modules = {
        "model": model,
        "parallel": parallel,
        "data": data,
        "train": train,
        "checkpoint": checkpoint,
    }
    return [
        name
        for name, section, key in (match.groups() for match in found if match)
        if name not in configs.HINTS
        and not hasattr(modules.get(section), key)
        and key != "py"
        and not is_added(page, key)
    ]


def test_every_key_that_is_named_exists():
    assert of_each_page(unknown_keys) == []


def anchors(text: str) -> set[str]:
    """What a page's headings are linked by, as GitHub writes it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str) -> list[str]:
    broken = []
    for name, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", PAGES[page]):
        path = (ROOT / page).parent / name if name else ROOT / page
        target = path.resolve()
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(f"{name}#{anchor}" if anchor else name)
    return broken


def test_every_link_leads_somewhere():
    assert of_each_page(broken_links) == []


# ---------------------------------------------------------------------------------------------------------------------
# Lines of code


def lines_on(page: str) -> dict[str, tuple[int, str]]:
    """Count and limit by the name of a row, as the page has them."""
    row = r"^\| (`[\w/]+\.py`|\*\*[\w ]+ together\*\*) \| ([\d,]+) \| ([\d,]*) \|$"
    rows = re.findall(row, PAGES[page], re.MULTILINE)
    return {name: (int(count.replace(",", "")), limit.replace(",", "")) for name, count, limit in rows}


def test_the_table_of_lines_is_what_the_command_prints():
    """docs/measurements.md has all of it, README.md at least the five files and the sums.

    Counts may be off by a tenth, or ten lines: an edit of a file is no edit of the pages, but a new file is.
    """
    printed = {name: (count, str(limit or "")) for name, count, limit in table()}
    least = [name for name in printed if name.strip("`") in FIVE_FILES or name.startswith("**")]
    long, short = lines_on("docs/measurements.md"), lines_on("README.md")
    assert list(long) == list(printed), "python benchmarks/lines.py prints the table"
    assert [name for name in short if name in least] == least, (
        "python benchmarks/lines.py prints these rows among others"
    )
    for found in (long, short):
        for name, (count, limit) in found.items():
            assert limit == printed[name][1], name
            assert abs(count - printed[name][0]) <= max(10, printed[name][0] / 10), f"{name}: {printed[name][0]} lines"


def test_no_path_of_one_machine_is_written_down():
    for path in [*ROOT.glob("*.*"), *ROOT.glob("*/*.*")]:
        if path.suffix in {".py", ".md", ".toml", ".txt"} and ".venv" not in path.parts:
            assert str(path.home()) + "/" not in path.read_text(encoding="utf-8"), path
