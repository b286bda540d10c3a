"""The size of the product code: files, statements, lines, long functions, circles.

    python -m benchmarks.house [FOLDER]

The product is all code at the top level and in the rooms, without tests, benchmarks and examples.
Lines are counted without comments, docstrings and blank lines.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

OTHERS = ("tests", "benchmarks", "examples")
LONG, MANY = 60, 6  # lines of a function, arguments of one
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstring_lines(tree: ast.AST) -> set[int]:
    """The numbers of the lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    paths = [*root.glob("*.py"), *root.glob("*/*.py")]
    paths = [path for path in paths if path.relative_to(root).parts[0] not in OTHERS]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in paths}
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    functions = [n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef)]
    graph = {names[p]: imports(tree, set(names.values())) for p, tree in trees.items()}
    while leaves := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for module in leaves:
            del graph[module]
    lines = 0
    for path, text in texts.items():
        skipped = docstring_lines(trees[path])
        for number, line in enumerate(text.splitlines(), 1):
            lines += bool(line.strip()) and line.strip()[0] != "#" and number not in skipped
    statements = sum(isinstance(n, ast.stmt) for t in trees.values() for n in ast.walk(t))
    long = [f for f in functions if f.end_lineno - f.lineno >= LONG]
    many = [
        f
        for f in functions
        if sum(a.arg not in ("self", "cls") for a in f.args.args + f.args.kwonlyargs) > MANY
    ]
    inner = [
        n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    print(f"files at the top level: {sum(path.parent == root for path in paths)} of {len(paths)}")
    print(f"statements: {statements:,}; lines: {lines:,}")
    print(f"functions over {LONG} lines: {', '.join(f.name for f in long) or 'none'}")
    print(f"functions with over {MANY} arguments: {len(many)}")
    print(f"imports inside functions: {len(inner)}")
    print(f"modules that import one another: {', '.join(graph) or 'none'}")


if __name__ == "__main__":
    main()
