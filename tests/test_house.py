"""Who imports whom: the order of the rooms, no circle, a reason for imports inside functions.

And types: where a signature may say Any, and a reason for each `type: ignore`.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ("train_qa", "train_qcemb", "pack_and_distill")
# From the ground up. A module imports its own room and those in front of it.
ORDER = (
    ("cli",),
    ("files",),
    ("squad_utils",),
    ("int8", "deploy"),
    ("bert",),
    ("bert_pack", "training"),
    ("tasks",),
    (*SCRIPTS, "ask"),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
WITHOUT_TORCH = (
    "cli",
    "files.squad_layouts",
    "squad_utils",
    "ask",
    "deploy.cpu",
    "deploy.documents",
    "deploy.formats",
    "deploy.web",
    "deploy.settings",
    "deploy.runtime",
    "deploy.search",
    "deploy.squad_scores",
    "deploy.qa_model",
    "deploy.evaluate",
    "deploy.reader",
    "deploy.feedback",
    "deploy.server",
    "deploy.int8_file",
    "deploy.timing",
    "deploy.compare",
)
TYPED = ("tasks", "training", "int8")  # rooms whose signatures say what they take and give
LOG = "a record has figures of any names beside stage and step"
CONTEXT = "autograd's context takes attributes of any name"
ANY = {  # function -> why its signature says Any
    "training.states.read_json": "what a JSON file holds, before anyone knows which file it is",
    "training.run.Run.evaluated": LOG,
    "training.run.read_log": LOG,
    "training.results.stage_table": LOG,
    "training.results.show_table": LOG,
    "training.results._draw_losses": LOG,
    "training.results._draw_scores": LOG,
    "training.results._one_after_another": LOG,
    "int8.settings._weight_range": "arguments of nncf.quantize, each of a type of its own",
    "int8.settings._build": "it gives a value of the type that is its argument",
    "int8.fake_quantize.FakeQuantize.forward": CONTEXT,
    "int8.fake_quantize.FakeQuantize.backward": CONTEXT,
    "tasks.hidden_states.SquaredError.forward": CONTEXT,
    "tasks.hidden_states.SquaredError.backward": CONTEXT,
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0].removesuffix(".py") in LEVEL
}


def imports(path: Path) -> list[tuple[ast.stmt, str]]:
    """Each import of a file: its statement, and the module that it names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node, m if m in FILES else str(node.module)) for m in modules]
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def signatures(node: ast.AST, where: str) -> Iterator[tuple[str, list[ast.expr]]]:
    """Each function under a node: its full name, and the annotations of its signature."""
    for child in ast.iter_child_nodes(node):
        name = where
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            name = f"{where}.{child.name}"
        if isinstance(child, ast.FunctionDef):
            of_arguments = [a.annotation for a in ast.walk(child.args) if isinstance(a, ast.arg)]
            yield name, [each for each in (*of_arguments, child.returns) if each is not None]
        yield from signatures(child, name)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_rooms_below_its_own(module: str) -> None:
    for _, imported in imports(FILES[module]):
        if room(imported) in LEVEL and room(imported) != room(module):
            assert LEVEL[room(imported)] < LEVEL[room(module)], f"{module} imports {imported}"
    if module == "ask":
        ours = {room(imported) for _, imported in imports(FILES[module])} & LEVEL.keys()
        assert ours <= {"cli", "squad_utils", "deploy"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {m: {i for _, i in imports(path) if i in FILES} for m, path in FILES.items()}
    while leaves := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import one another: {', '.join(graph)}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_answers_questions_needs_no_torch(module: str) -> None:
    assert not {"torch", "transformers", "nncf"} & {room(i) for _, i in imports(FILES[module])}


@pytest.mark.parametrize("module", FILES)
def test_an_import_inside_a_function_gives_its_reason(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").splitlines()
    for node, imported in imports(FILES[module]):
        if node.col_offset:
            near = lines[node.lineno - 2 : node.lineno]
            assert any("#" in line for line in near), f"{module}, line {node.lineno}: {imported}"


def test_signatures_say_any_only_where_there_is_a_reason() -> None:
    says_any = {
        function
        for module, path in FILES.items()
        if room(module) in TYPED
        for function, annotations in signatures(ast.parse(path.read_text("utf-8")), module)
        for annotation in annotations
        if re.search(r"\bAny\b", ast.unparse(annotation))
    }
    assert says_any == ANY.keys()


@pytest.mark.parametrize("module", FILES)
def test_a_type_error_that_is_ignored_is_named_and_has_its_reason(module: str) -> None:
    for line in FILES[module].read_text(encoding="utf-8").splitlines():
        if "type: ignore" in line:
            assert re.search(r"# type: ignore\[[a-z-]+\]  # \w", line), line.strip()


def test_make_alone_prints_what_each_target_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    # Called by make, another make would tell its folder.
    command = ["make", "--no-print-directory"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split(maxsplit=1)[0] for line in shown.splitlines()] == targets
