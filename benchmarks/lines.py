"""Lines of code of each file, without blanks, comments and docstrings: `python benchmarks/lines.py`."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ["model", "parallel", "data", "stream", "checkpoint", "shutdown", "train", "monitor", "configs/__init__"]
FILES += ["generate", "explain"]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    """Lines that hold at least one token which is neither a comment nor part of a docstring."""
    source = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def main() -> None:
    counts = {f"{name}.py": lines_of_code(ROOT / f"{name}.py") for name in FILES}
    for name, count in counts.items():
        print(f"| `{name}` | {count} |")
    print(f"| together | {sum(counts.values())} |")


if __name__ == "__main__":
    main()
