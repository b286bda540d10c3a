"""Tests of the generated sample data, of the demo's article and of the models it starts from."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

import ask
from examples import demo, make_sample

EXAMPLES = Path(make_sample.__file__).parent
# Figures of the demo can be compared with earlier ones only where the dev questions are the same.
DEV_SHA256 = "6f361f6acd3cf63c4dff3bad4f4e26924eed45f7f11eab956def087b17590311"


def generate(folder: Path, *options: str) -> dict[str, dict]:
    """Run the generator and read both of its files."""
    make_sample.main(["--output_dir", str(folder), *options])
    return {
        split: json.loads((folder / f"{split}-v1.1.json").read_text(encoding="utf-8"))
        for split in ("train", "dev")
    }


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Both files with the default options."""
    return generate(tmp_path_factory.mktemp("sample"))


def paragraphs(data: dict) -> list[dict]:
    """All paragraphs of a file."""
    return [paragraph for article in data["data"] for paragraph in article["paragraphs"]]


def questions(data: dict) -> list[dict]:
    """All questions of a file."""
    return [qa for paragraph in paragraphs(data) for qa in paragraph["qas"]]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    small = ("--num_train", "150", "--num_dev", "60")
    for folder, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        generate(tmp_path / folder, *small, "--seed", seed)
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        first, second, other = ((tmp_path / f / name).read_bytes() for f in "abc")
        assert first == second
        assert first != other


def test_dev_file_is_what_it_was(tmp_path: Path) -> None:
    generate(tmp_path)
    dev = (tmp_path / "dev-v1.1.json").read_bytes()
    assert hashlib.sha256(dev).hexdigest() == DEV_SHA256


def test_default_counts(sample: dict[str, dict]) -> None:
    assert len(questions(sample["train"])) >= 1500
    assert len(questions(sample["dev"])) >= 200


def test_every_answer_is_at_its_offset(sample: dict[str, dict]) -> None:
    for data in sample.values():
        for paragraph in paragraphs(data):
            assert 5 <= len(paragraph["qas"]) <= 8
            for qa in paragraph["qas"]:
                lengths = [len(answer["text"]) for answer in qa["answers"]]
                assert lengths and min(lengths) > 0
                assert lengths == sorted(lengths, reverse=True)
                for answer in qa["answers"]:
                    start = answer["answer_start"]
                    end = start + len(answer["text"])
                    assert paragraph["context"][start:end] == answer["text"]


def test_some_answers_occur_before_their_offset(sample: dict[str, dict]) -> None:
    repeated = [
        qa
        for paragraph in paragraphs(sample["train"])
        for qa in paragraph["qas"]
        if paragraph["context"].index(qa["answers"][0]["text"]) < qa["answers"][0]["answer_start"]
    ]
    assert repeated


def test_dev_has_second_answers(sample: dict[str, dict]) -> None:
    share = sum(len(qa["answers"]) > 1 for qa in questions(sample["dev"]))
    assert share > 0.1 * len(questions(sample["dev"]))


def test_ids_and_questions_are_unique(sample: dict[str, dict]) -> None:
    ids = [qa["id"] for data in sample.values() for qa in questions(data)]
    assert len(ids) == len(set(ids))
    for data in sample.values():
        for paragraph in paragraphs(data):
            texts = [qa["question"] for qa in paragraph["qas"]]
            assert len(texts) == len(set(texts))


def test_train_and_dev_share_nothing(sample: dict[str, dict]) -> None:
    titles = [{article["title"] for article in data["data"]} for data in sample.values()]
    assert not titles[0] & titles[1]
    contexts = [{p["context"] for p in paragraphs(data)} for data in sample.values()]
    assert not contexts[0] & contexts[1]
    for title in titles[1]:
        assert not any(title in context for context in contexts[0])


def test_long_contexts(sample: dict[str, dict]) -> None:
    for data in sample.values():
        lengths = [len(paragraph["context"].split()) for paragraph in paragraphs(data)]
        share = sum(length > 330 for length in lengths) / len(lengths)
        assert 0.05 < share < 0.12
        assert max(lengths) <= 600


def test_question_words(sample: dict[str, dict]) -> None:
    words = ("what", "which", "who", "when", "where", "why", "how many", "how much", "how long")
    for data in sample.values():
        asked = [qa["question"].lower() for qa in questions(data)]
        for word in words:
            assert sum(question.startswith(word) for question in asked) >= 2, word


def test_text_is_clean(sample: dict[str, dict]) -> None:
    for data in sample.values():
        for paragraph in paragraphs(data):
            for text in [paragraph["context"], *(qa["question"] for qa in paragraph["qas"])]:
                assert "{" not in text and "  " not in text and " ." not in text
                words = text.split()
                assert not any(a == b for a, b in pairwise(words)), text
                assert text[0].isupper() or not text[0].islower()


def test_templates_are_complete() -> None:
    domains = make_sample.load_domains()
    assert len(domains) >= 14
    for domain in domains:
        assert len(domain.facts) >= 7
        for fact in domain.facts:
            common = [text for text, dev_only in fact.say if not dev_only]
            assert len(common) >= 3 and fact.aside and len(fact.ask) >= 4
            assert any(make_sample.names_subject(text) for text in common)
            assert {slot.split(".")[0] for slot, _, _ in fact.ask} <= set(fact.slots)


def test_article_is_new(sample: dict[str, dict]) -> None:
    article = (EXAMPLES / "article.txt").read_text(encoding="utf-8")
    asked = (EXAMPLES / "questions.txt").read_text(encoding="utf-8").splitlines()
    assert 350 <= len(article.split()) <= 500
    assert len(asked) == 5 and all(question.endswith("?") for question in asked)
    for data in sample.values():
        assert not any("Skerravoe" in paragraph["context"] for paragraph in paragraphs(data))


# ------------------------------------------------------------------------------------------------
# --model of the demo


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the demo starts from, and the ending of its output folders."""
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(demo, "step", lambda *command: None)
    monkeypatch.setattr(demo, "answer", lambda model, name: calls.append((model, name)))
    return calls


def test_a_relative_model_is_looked_up_where_the_user_stands(
    started: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("mine/bert", "mine/bert/", "prajjwal1/bert-tiny"):
        monkeypatch.setattr(sys, "argv", ["demo.py", f"--model={model}"])
        demo.main()
    folder = str(tmp_path / "mine" / "bert")
    assert [model for model, _ in started] == [folder, folder, "prajjwal1/bert-tiny"]


def test_models_of_one_base_name_have_output_folders_of_their_own(
    started: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(tmp_path / name / "bert") for name in ("a", "b")]
    for model in (*models, "one/bert", "another/bert"):
        monkeypatch.setattr(sys, "argv", ["demo.py", f"--model={model}"])
        demo.main()
    names = [name for _, name in started]
    assert len(set(names)) == 4 and all(name.startswith("-bert") for name in names)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_demo_starts_where_the_user_stands(tmp_path: Path) -> None:
    """With `make -C <the project>`; the interpreter tells where it is and what it was given."""
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    for name in ("run", "demo"):  # newer than what they are made of
        (environment / name).touch()
    python = environment / "bin" / "python"
    python.write_text('#!/bin/sh\npwd\nfor each in "$@"; do echo "$each"; done\n')
    python.chmod(0o755)
    user = tmp_path / "the user"
    user.mkdir()
    command = ["make", "-s", "-C", str(ROOT), f"VENV={environment}", "demo", "MODEL=my bert"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=user, env={**os.environ, "PWD": str(user)}
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told == [str(user), str(ROOT / "examples" / "demo.py"), "--model=my bert"]


@pytest.mark.parametrize("task", ["answer", "search"])
def test_int8_stages_calibrate_on_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """From a clone in which nothing was made yet."""
    shutil.copy(ROOT / "nncf_config.json", tmp_path)
    monkeypatch.setattr(demo, "ROOT", str(tmp_path))
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "step", lambda *command, **_: commands.append(command))
    for name in ("show", "write_texts"):
        monkeypatch.setattr(demo, name, lambda *_: "texts")
    monkeypatch.setattr(demo, "pack_cfg", lambda _: "")
    getattr(demo, task)("bert", "-name")
    flag = "--nncf_config="
    (path,) = {each for command in commands for each in command if each.startswith(flag)}
    quick = json.loads((tmp_path / path.removeprefix(flag)).read_text())
    given = json.loads((ROOT / "nncf_config.json").read_text())
    assert quick == given | {"subset_size": 100}


def test_the_demo_ends_with_the_command_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("step", "show"):
        monkeypatch.setattr(demo, name, lambda *_, **__: None)
    for name in ("pack_cfg", "quick_nncf_config"):
        monkeypatch.setattr(demo, name, lambda *_: "")
    demo.answer("bert", "-name")
    _, script, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(sys, "argv", [script, *flags])
    args = ask.parse_arguments()
    assert (script, args.serve, args.model) == ("ask.py", True, "models/demo-int8-name")
    assert (ROOT / args.context[0]).is_file()
