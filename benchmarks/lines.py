"""Lines of code of each file, by groups, without blanks, comments and docstrings: `python benchmarks/lines.py`.

The table of docs/measurements.md is what it prints; README.md has its sums. DESIGN's limits stand beside the sums and
files that have one.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIVE_FILES = {"model.py": 190, "parallel.py": 180, "data.py": 180, "checkpoint.py": 180, "train.py": 170}  # at most
FIVE_TOGETHER, PRODUCT_TOGETHER = 900, 4700  # at most
NO_PRODUCT = {"benchmarks", "docs", "tests"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold at least one token which is neither a comment nor part of a docstring."""
    source = path.read_text(encoding="utf-8")
    docstrings, lines = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def lines_of_code(path: Path) -> int:
    return len(code_lines(path))


def product() -> dict[str, list[Path]]:
    """The product's files by group: the five files, the commands beside them, and each folder."""
    groups: dict[str, list[Path]] = {"the five files": [ROOT / name for name in FIVE_FILES]}
    groups["commands"] = [path for path in sorted(ROOT.glob("*.py")) if path.name not in FIVE_FILES]
    for path in sorted(ROOT.glob("*/*.py")):
        if path.parent.name not in NO_PRODUCT and not path.parent.name.startswith("."):
            groups.setdefault(path.parent.name, []).append(path)
    return groups


def table() -> list[tuple[str, int, int | None]]:
    """(name, lines of code, limit if there is one), in the order in which it is printed."""
    rows, total = [], 0
    for group, paths in product().items():
        counts = {path.relative_to(ROOT).as_posix(): lines_of_code(path) for path in paths}
        rows += [(f"`{name}`", count, FIVE_FILES.get(name)) for name, count in counts.items() if count]
        limit = FIVE_TOGETHER if group == "the five files" else None
        rows.append((f"**{group} together**", sum(counts.values()), limit))
        total += sum(counts.values())
    return [*rows, ("**the product together**", total, PRODUCT_TOGETHER)]


def main() -> None:
    print("| file | lines of code | at most |\n| --- | --- | --- |")
    for name, count, limit in table():
        print(f"| {name} | {count:,} | {f'{limit:,}' if limit else ''} |")


if __name__ == "__main__":
    main()
