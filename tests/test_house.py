"""The house: how long its files are, which way imports go, and what no module may do. Read from the source alone."""

import ast
import re
import sys
from fnmatch import fnmatch

import pytest

from benchmarks import imports
from benchmarks.lines import FIVE_FILES, FIVE_TOGETHER, PRODUCT_TOGETHER, ROOT, code_lines, lines_of_code, product

MODULES = imports.modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
FIVE = [name.removesuffix(".py") for name in FIVE_FILES]
COMMANDS = [imports.module_name(path) for path in product()["commands"]] + ["train", "corpus.look"]

# ---------------------------------------------------------------------------------------------------------------------
# Length


@pytest.mark.parametrize(("name", "limit"), FIVE_FILES.items())
def test_each_of_the_five_files_keeps_its_limit(name, limit):
    assert lines_of_code(ROOT / name) <= limit


def test_the_five_files_can_be_read_in_an_afternoon():
    assert sum(lines_of_code(ROOT / name) for name in FIVE_FILES) <= FIVE_TOGETHER


def test_the_product_as_a_whole_keeps_its_limit():
    files = [path for paths in product().values() for path in paths]
    assert {"model.py", "generate.py"} <= {path.name for path in files}
    assert {"configs", "corpus", "runtime"} <= {path.parent.name for path in files}
    assert sum(map(lines_of_code, files)) <= PRODUCT_TOGETHER


def test_only_lines_with_code_count(tmp_path):
    source = ['"""Two', 'lines."""', "", "import os  # why", "", "# what", "def f(", "    x,", "):"]
    source += ['    """Doc."""', '    return """a', "", 'b"""']
    (tmp_path / "some.py").write_text("\n".join(source) + "\n")
    assert sorted(code_lines(tmp_path / "some.py")) == [4, 7, 8, 9, 11, 12, 13]


def length(node: ast.AST) -> int:
    """Of a function or a loop of train.py."""
    return len([line for line in code_lines(ROOT / "train.py") if node.lineno <= line <= node.end_lineno])


def train_function() -> ast.FunctionDef:
    (function,) = (n for n in TREES["train"].body if isinstance(n, ast.FunctionDef) and n.name == "train")
    return function


def the_loop() -> ast.While:
    return max((node for node in ast.walk(train_function()) if isinstance(node, ast.While)), key=length)


def test_train_fits_on_a_page_and_a_half_and_its_loop_on_one():
    assert length(train_function()) <= 100
    assert length(the_loop()) <= 60


def called(node: ast.AST) -> set[str]:
    """Last names of what is called inside of it."""
    calls = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}


def test_the_work_is_done_in_train_and_not_in_a_twin_that_it_calls():
    assert called(train_function()) >= {"Llama", "parallelize", "to_empty", "init_weights", "make_optimizer", "batches"}
    step = {"model", "backward", "gradient_square", "sum_over_ranks", "scale_gradients", "learning_rate", "step"}
    assert called(the_loop()) >= step | {"zero_grad", "evaluate", "save", "log"}


# ---------------------------------------------------------------------------------------------------------------------
# Arrows

# What each module may import of the project; the first line that fits its name counts.
ALLOWED = [
    ("model", ""),
    ("parallel", "model"),
    ("data", "model"),
    ("checkpoint", "runtime.ranks runtime.storage"),
    ("configs", "model parallel corpus.config checkpoint huggingface.config runtime.hardware runtime.ranks"),
    ("corpus.config", ""),
    ("corpus.look", "corpus corpus.* configs data model runtime.ranks"),  # a command
    ("corpus*", "corpus corpus.* data model runtime.ranks"),
    ("runtime", ""),
    ("runtime.ranks", ""),
    ("runtime.hardware", ""),
    ("runtime.monitor", "runtime.*"),
    ("runtime.rundir", "runtime.* checkpoint configs huggingface.*"),
    ("runtime.*", "runtime.* checkpoint configs"),
    ("huggingface", ""),
    ("huggingface.*", "huggingface.* model runtime.ranks runtime.storage"),
    ("integrations.*", "*"),
    ("train", "model parallel data checkpoint configs corpus corpus.* runtime runtime.*"),
    ("cost", ""),
    ("cost.*", "cost.* cost model parallel configs runtime.ranks"),
    ("explain", "cost cost.* configs runtime.* train"),
    ("generate", "model parallel data checkpoint configs corpus corpus.* runtime.*"),
    ("export", "model corpus.* huggingface.* runtime.*"),
]
# And of everything else, beyond the standard library.
FOREIGN = [
    ("model", "torch"),
    ("parallel", "torch"),
    ("data", "torch numpy"),
    ("checkpoint", "torch"),
    ("configs", "torch"),
    ("runtime.ranks", "torch"),
    ("runtime.monitor", "torch tqdm wandb"),
    ("runtime*", "torch"),
    ("corpus*", "torch numpy tokenizers datasets pyarrow tqdm"),
    ("huggingface*", "torch huggingface_hub"),
    ("generate", "torch tokenizers"),
    ("export", "torch tokenizers"),
    ("explain", "torch docs"),  # draws its report, with what only development needs
    ("integrations.ray_train", "torch ray"),
    ("integrations.lightning_*", "torch lightning"),
    ("*", "torch"),
]


def rule(rules: list[tuple[str, str]], module: str) -> list[str]:
    return next((allowed.split() for pattern, allowed in rules if fnmatch(module, pattern)), [])


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_one_way(module):
    allowed = rule(ALLOWED, module)
    for target in imports.arrows()[module]:
        assert any(fnmatch(target, pattern) for pattern in allowed), f"{module} imports {target}"


@pytest.mark.parametrize("module", MODULES)
def test_only_what_is_named_is_imported_from_elsewhere(module):
    tops = {name.partition(".")[0] for name in imports.imported_names(module, MODULES[module])}
    ours = {name.partition(".")[0] for name in MODULES}
    assert tops - ours - set(sys.stdlib_module_names) <= set(rule(FOREIGN, module))


def test_imports_make_no_circle():
    assert imports.circle(imports.arrows()) == []


def test_no_module_imports_a_command_but_explain_the_optimizer_of_train_and_launchers_train():
    for module, targets in imports.arrows().items():
        may = module == "explain" or module.startswith("integrations.")
        assert targets & set(COMMANDS) <= ({"train"} if may else set()), module


def test_nothing_imports_an_integration():
    assert not [module for module, targets in imports.arrows().items() for t in targets if t.startswith("integrations")]


def test_the_arrows_are_found_wherever_they_start(tmp_path, monkeypatch):
    """At the top, inside a function, of a module, of a name in it, and relative ones."""
    (tmp_path / "a").mkdir()
    files = {
        "b.py": "import a.d\n\ndef f():\n    from a.c import thing\n",
        "a/__init__.py": "from .c import thing\n",
        "a/c.py": "import os.path\nfrom . import d\n",
        "a/d.py": "import json\n\ndef f():\n    import b\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(imports, "ROOT", tmp_path)
    monkeypatch.setattr(imports, "product", lambda: {"": [tmp_path / name for name in files]})
    found = imports.arrows()
    assert found == {"b": {"a.d", "a.c"}, "a": {"a.c"}, "a.c": {"a.d"}, "a.d": {"b"}}
    assert imports.circle(found) == ["b", "a", "a.c", "a.d", "b"], "importing a.d runs a first"
    assert imports.circle(found | {"a.d": set()}) == []


# ---------------------------------------------------------------------------------------------------------------------
# What no module may do


def test_only_the_owner_of_the_process_ends_it():
    """A launcher that calls train() gets an exception, not a dead process."""
    for module, tree in TREES.items():
        ends = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("_exit", "abort")]
        assert not ends or module in ("runtime.ranks", "runtime.shutdown"), f"{module}, line {ends[0].lineno}"


def test_no_module_does_work_at_import():
    """Functions, classes, constants and imports; what a script does stands under `if __name__ == "__main__"`."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
    for module, tree in TREES.items():
        for node in tree.body[1:]:
            assert isinstance(node, kinds), f"{module}, line {node.lineno}"


def test_every_module_says_what_it_is():
    assert [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []


def test_no_comment_is_a_to_do_list():
    for path in [*MODULES.values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        comments = "\n".join(re.findall(r"#.*", path.read_text(encoding="utf-8")))
        assert not re.search(r"\b(TO[D]O|FIX[M]E|XX[X]|HA[C]K)\b", comments), path
