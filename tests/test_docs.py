"""README and docs: short, with links that lead somewhere and commands that the scripts take."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("files", "bert", "tasks", "training", "int8", "deploy")
OTHERS_FLAGS = {  # of programs that are not ours
    "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port",
    "--num_processes", "--shutdown_timeout", "--input_model", "--help", "--flag",
}  # fmt: skip


def blocks(page: Path) -> list[str]:
    """The commands in the code blocks of a page."""
    return re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_has_at_most_250_lines_of_at_most_120_characters() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    assert [line for line in lines if len(line) > 120] == []


def test_scripts_take_the_six_commands_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [
        shlex.split(line)
        for block in blocks(README)
        for line in block.replace("\\\n", " ").splitlines()
        if "--squad_train_data" in line
    ]
    scripts = [command[1].removesuffix(".py") for command in commands]
    stages = (("train_qa", "pack_and_distill", "train_qa"),
              ("train_qcemb", "pack_and_distill", "train_qcemb"))  # fmt: skip
    assert scripts == [*stages[0], *stages[1]]
    for script, (_, *argv) in zip(scripts, commands, strict=True):
        monkeypatch.setattr(sys, "argv", argv)
        args = importlib.import_module(script).parse_arguments()
        assert args.output_dir.startswith("models/bert-") and args.max_seq_length_c == 384


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            words = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in words, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_benchmarks_of_a_page_exist(page: Path) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for folder in ("training", "deploy", "benchmarks", "examples"):
        sources += "".join(p.read_text(encoding="utf-8") for p in (ROOT / folder).glob("*.py"))
    text = page.read_text(encoding="utf-8")
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]+", text)) - OTHERS_FLAGS:
        assert f'"{flag}"' in sources, flag
    for name in re.findall(r"-m benchmarks\.(\w+)", text.replace("benchmarks.NAME", "")):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
    assert "python benchmarks/" not in text


def test_design_names_every_module_that_there_is_and_no_other() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") : text.index("## Decisions")]
    named = re.findall(r"^\| .*?\| `(\w+\.py)` \|", table, re.MULTILINE)
    there = [path.name for room in ROOMS for path in (ROOT / room).glob("[!_]*.py")]
    there += ["cli.py", "squad_utils.py", "bert_pack.py"]
    assert sorted(named) == sorted(there)
