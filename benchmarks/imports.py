"""Which module of the project imports which, and whether they go in a circle: `python benchmarks/imports.py`.

Read from the source: imports inside functions and for type checkers count like any other.
"""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lines import ROOT, product


def module_name(path: Path) -> str:
    """As in "corpus.config"; a package goes by its folder's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    """All modules of the product, by name."""
    return {module_name(path): path for paths in product().values() for path in paths}


def imported_names(module: str, path: Path) -> set[str]:
    """Everything that the file imports, in full, as in {"torch.nn", "corpus.config.DataConfig"}."""
    names = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = package.split(".")
            base = (
                ".".join([*folders[: len(folders) + 1 - node.level], node.module or ""]) if node.level else node.module
            )
            names |= {f"{base.strip('.')}.{alias.name}" for alias in node.names}
    return names


def arrows() -> dict[str, set[str]]:
    """{module: modules of the project that it imports}"""
    found: dict[str, set[str]] = {}
    every = modules()
    for module, path in every.items():
        targets = set()
        for name in imported_names(module, path):
            while name and name not in every:
                name = name.rpartition(".")[0]
            targets.add(name)
        found[module] = targets - {module, ""}
    return found


def packages(module: str) -> set[str]:
    """What Python imports before it: {"a", "a.b"} for "a.b.c"."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; [] where there is none.

    Importing "corpus.config" runs "corpus" first, so that counts too, but not inside of the package itself.
    """
    graph = {
        module: targets | {package for target in targets for package in packages(target) - packages(module) - {module}}
        for module, targets in found.items()
    }
    finished: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for target in sorted(graph.get(path[-1], ())):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in finished and (around := follow([*path, target])):
                return around
        finished.add(path[-1])
        return []

    return next((around for module in graph if (around := follow([module]))), [])


def main() -> None:
    found = arrows()
    for module in sorted(found):
        print(f"{module:20} -> {', '.join(sorted(found[module])) or '-'}")
    around = circle(found)
    print(f"\ncircle: {' -> '.join(around)}" if around else "\nno circle")


if __name__ == "__main__":
    main()
