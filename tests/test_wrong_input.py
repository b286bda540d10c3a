"""Each mistake a user may make is told in one line, at once, before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call, error_line, first_questions, states
from conftest import command_of, run
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
)

from cli import UserError, in_one_line
from deploy.cpu import Cpu
from training import machine

QUICK = 15  # seconds of CPU time: those on the clock grow with the other work of the machine
SMALL = ("--num_train_epochs=0.01", "--total_train_batch_size=4", "--save_minutes=0")


@pytest.fixture(scope="module")
def few(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3 questions to train on and 2 to evaluate on."""
    folder = tmp_path_factory.mktemp("few")
    first_questions(sample / "train-v1.1.json", folder / "train-v1.1.json", 3)
    first_questions(sample / "dev-v1.1.json", folder / "dev-v1.1.json", 2)
    return folder


Wrong = Callable[..., str]


@pytest.fixture
def wrong(tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> Wrong:
    """A function that runs train_qa.py with flags in this process and returns its error line."""

    def check(*flags: str) -> str:
        out = tmp_path / "out"
        capfd.readouterr()
        began = time.process_time()
        code = call(command_of("train_qa", tiny_bert, few, out, *SMALL, *flags))
        assert time.process_time() - began < QUICK
        line = error_line(capfd.readouterr().err)
        assert code == 2
        assert states(out) == [] and not (out / "metrics.jsonl").exists()
        return line

    return check


# ------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("flag", ["--squad_train_data", "--squad_dev_data"])
def test_data_file_missing(wrong: Wrong, flag: str, tmp_path: Path) -> None:
    line = wrong(f"{flag}={tmp_path / 'none.json'}")
    assert flag in line and str(tmp_path / "none.json") in line and "no such file" in line


def test_data_is_a_folder(wrong: Wrong, tmp_path: Path) -> None:
    line = wrong(f"--squad_train_data={tmp_path}")
    assert "--squad_train_data" in line and f"{tmp_path} is a folder" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"data": "caf\xe9"}', "not UTF-8 text (byte 13)"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"data": [\n {"paragraphs": [\n}', "line 3 column 1 is not JSON"),
        (b"", "line 1 column 1 is not JSON"),
        (b"a,b\n1,2\n", "line 1 column 1 is not JSON"),
        (b"[" * 100_000, "is not"),
        (b'{"data": [' + b"1" * 5000 + b"]}", "is not"),
    ],
    ids=["latin-1", "utf-16", "cut", "empty", "csv", "deep", "huge-number"],
)
def test_data_is_not_json(wrong: Wrong, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    line = wrong(f"--squad_dev_data={path}")
    assert "--squad_dev_data" in line and str(path) in line and said in line


def squad(**qa: Any) -> Any:
    """SQuAD data whose last question has these keys; None takes one away."""
    good = {"id": "a", "question": "What?", "answers": [{"answer_start": 3, "text": "is"}]}
    last = {**good, "id": "b", **qa}
    last = {key: value for key, value in last.items() if value is not None}
    paragraphs = [
        {"context": "It is so.", "qas": [good]},
        {"context": "It is so.", "qas": [last]},
    ]
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}


QA = "data[0].paragraphs[1].qas[0]"


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ([], "the top must be an object"),
        ({"version": "1.1"}, "data is missing"),
        ({"data": {}}, "data must be a list"),
        ({"data": None}, "data must be a list"),
        ({"data": ["a"]}, "data[0] must be an object"),
        ({"data": [{"title": "T"}]}, "data[0].paragraphs is missing"),
        ({"data": [{"paragraphs": [{}]}]}, "data[0].paragraphs[0].context is missing"),
        (
            {"data": [{"paragraphs": [{"context": "a"}]}]},
            "data[0].paragraphs[0].qas is missing",
        ),
        (squad(question=3), f"{QA}.question must be a string"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": [[]]}]}]}, "qas[0] must be an object"),
        (squad(id=7), f"{QA}.id must be a string"),
        (squad(answers="is"), f"{QA}.answers must be a list"),
        (squad(answers=["is"]), f"{QA}.answers[0] must be an object"),
        (squad(answers=[{"text": "is"}]), f"{QA}.answers[0].answer_start is missing"),
        (
            squad(answers=[{"text": "is", "answer_start": "3"}]),
            f"{QA}.answers[0].answer_start must be a whole number",
        ),
        (
            squad(answers=[{"text": "is", "answer_start": 3.0}]),
            f"{QA}.answers[0].answer_start must be a whole number",
        ),
        (
            squad(answers=[{"text": "is", "answer_start": True}]),
            f"{QA}.answers[0].answer_start must be a whole number",
        ),
        (squad(answers=[{"answer_start": 3}]), f"{QA}.answers[0].text is missing"),
    ],
)
def test_data_is_not_squad(wrong: Wrong, tmp_path: Path, root: Any, said: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(root))
    line = wrong(f"--squad_train_data={path}")
    assert f"--squad_train_data: {path} is not SQuAD: " in line and said in line


@pytest.mark.parametrize("key", ["id", "question"])
def test_data_lacks_a_key(wrong: Wrong, tmp_path: Path, key: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(squad(**{key: None})))
    assert f"{QA}.{key} is missing" in wrong(f"--squad_train_data={path}")


@pytest.mark.parametrize(
    "root", [{"data": []}, {"data": [{"paragraphs": []}]}], ids=["none", "no paragraphs"]
)
def test_data_has_no_questions(wrong: Wrong, tmp_path: Path, root: Any) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(root))
    assert f"{path} has no questions" in wrong(f"--squad_dev_data={path}")


def test_data_has_half_a_surrogate_pair(wrong: Wrong, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(squad(question="What \ud83d?")))
    line = wrong(f"--squad_train_data={path}")
    assert str(path) in line and QA in line


def test_no_answer_of_the_training_data_is_in_place(wrong: Wrong, few: Path, tmp_path: Path):
    root = json.loads((few / "train-v1.1.json").read_text())
    for article in root["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["context"] = "Another text. " * 3
    path = tmp_path / "data.json"
    path.write_text(json.dumps(root))
    line = wrong(f"--squad_train_data={path}")
    assert "--squad_train_data" in line and str(path) in line and "answer" in line


def test_misplaced_answers_are_only_a_warning(
    tiny_bert: Path, few: Path, tmp_path: Path, sample: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "data.json"
    first_questions(sample / "train-v1.1.json", path, 8)
    root = json.loads(path.read_text())
    qas = [qa for a in root["data"] for p in a["paragraphs"] for qa in p["qas"]]
    for qa in qas[1:6]:
        qa["answers"] = [{"text": qa["answers"][0]["text"] + "x", "answer_start": 0}]
    path.write_text(json.dumps(root))
    flags = (*SMALL, f"--squad_train_data={path}", "--max_seq_length_c=384")
    assert call(command_of("train_qa", tiny_bert, few, tmp_path / "out", *flags)) == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if str(path) in line]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {path}: 5 answers")
    assert ", ".join(qa["id"] for qa in qas[1:4]) in warnings[0]
    assert qas[4]["id"] not in warnings[0]


# ------------------------------------------------------------------------------------------------
# Models


def test_model_folder_is_empty(wrong: Wrong, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    line = wrong(f"--model_student={folder}")
    assert f"--model_student: the folder {folder}" in line and "config.json is missing" in line


def test_model_is_a_file(wrong: Wrong, tiny_bert: Path) -> None:
    line = wrong(f"--model_student={tiny_bert / 'model.safetensors'}")
    assert "model.safetensors is a file" in line and "folder or hub name" in line


@pytest.mark.parametrize("name", ["no-such-model", "no/such/model", "./models/mine", "my model"])
def test_model_is_nowhere(wrong: Wrong, name: str) -> None:
    assert f"--model_student: {name} is neither a folder here nor a model" in wrong(
        f"--model_student={name}"
    )


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def test_model_without_weights(wrong: Wrong, model: Path) -> None:
    (model / "model.safetensors").unlink()
    line = wrong(f"--model_student={model}")
    assert f"--model_student: the folder {model} holds no weights" in line
    assert "model.safetensors" in line


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model_type": "bert"', b"[]", b'{"a": 1}'])
def test_model_with_broken_config(wrong: Wrong, model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    line = wrong(f"--model_student={model}")
    assert "--model_student" in line and str(model) in line and "config" in line


@pytest.mark.parametrize("keep", [0, 100, 100_000])
def test_model_with_broken_weights(wrong: Wrong, model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = wrong(f"--model_student={model}")
    assert f"--model_student: the weights of {model} do not load" in line


def test_model_with_broken_pickle(wrong: Wrong, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    line = wrong(f"--model_student={model}")
    assert f"--model_student: the weights of {model} do not load" in line


def test_model_with_weights_of_other_shapes(wrong: Wrong, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["qa_outputs.weight"] = torch.zeros(2, 16)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = wrong(f"--model_student={model}")
    assert f"--model_student: the weights of {model} do not load" in line


@pytest.mark.parametrize("lost", [("tokenizer.json", "vocab.txt"), ("all",)])
def test_model_without_tokenizer(wrong: Wrong, model: Path, lost: tuple[str, ...]) -> None:
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        if lost == ("all",) or name in lost:
            (model / name).unlink()
    line = wrong(f"--model_student={model}")
    assert "--model_student" in line and "tokenizer" in line and "vocab.txt" in line


def test_model_with_broken_tokenizer(wrong: Wrong, model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    line = wrong(f"--model_student={model}")
    assert f"--model_student: the tokenizer of {model} does not load" in line


def test_tokenizer_of_another_model(wrong: Wrong, model: Path, tiny_bert: Path) -> None:
    config = BertConfig.from_pretrained(tiny_bert, vocab_size=100)
    BertForQuestionAnswering(config).save_pretrained(model)
    line = wrong(f"--model_student={model}")
    assert str(model) in line and "100" in line and str(config_vocabulary(tiny_bert)) in line


def config_vocabulary(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def test_model_is_not_bert(wrong: Wrong, model: Path) -> None:
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    DistilBertForQuestionAnswering(config).save_pretrained(model)
    line = wrong(f"--model_student={model}")
    assert f"--model_student: {model} is a distilbert model; BERT is needed" in line


def test_teacher_of_another_hidden_size(wrong: Wrong, tiny_bert: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_bert, teacher)
    config = BertConfig.from_pretrained(tiny_bert, hidden_size=64)
    BertForQuestionAnswering(config).save_pretrained(teacher)
    line = wrong(f"--model_teacher={teacher}", "--supervision_weight=0.1")
    assert "--model_teacher has hidden size 64, --model_student 32" in line


def test_teacher_is_missing(wrong: Wrong, tmp_path: Path) -> None:
    line = wrong(f"--model_teacher={tmp_path / 'none'}", "--supervision_weight=0.1")
    assert line.startswith(f"error: --model_teacher: {tmp_path / 'none'} is neither")


# ------------------------------------------------------------------------------------------------
# Lengths, batches, numbers, choices


def test_length_over_the_positions(wrong: Wrong, tiny_bert: Path) -> None:
    line = wrong("--max_seq_length_c=513")
    assert "--max_seq_length_c=513 is over the 512 positions" in line and str(tiny_bert) in line


def test_length_too_short_for_the_question(wrong: Wrong) -> None:
    line = wrong("--max_seq_length_c=67", "--max_seq_length_q=64")
    assert "--max_seq_length_c=67" in line and "--max_seq_length_q=64" in line
    assert "at least 68" in line


@pytest.mark.parametrize(
    "flag",
    [
        "--learning_rate=0",
        "--learning_rate=-1e-5",
        "--learning_rate=1.5",
        "--learning_rate=small",
        "--learning_rate=nan",
        "--learning_rate=3e-5,",
        "--num_train_epochs=-1",
        "--num_train_epochs=-1",
        "--num_train_epochs=inf",
        "--max_seq_length_q=0",
        "--max_seq_length_q=6.5",
        "--max_seq_length_c=-384",
        "--doc_stride=0",
        "--doc_stride=",
        "--total_train_batch_size=0",
        "--per_gpu_train_batch_size=none",
        "--per_gpu_eval_batch_size=0",
        "--dropout=1",
        "--dropout=-0.1",
        "--seed=-1",
        "--seed=5000000000",
        "--seed=x",
        "--save_minutes=-1",
        "--save_minutes=nan",
        "--log_steps=0",
        "--supervision_weight=-1",
        "--kd_weight=inf",
    ],
)
def test_number_out_of_range(wrong: Wrong, flag: str) -> None:
    name, value = flag.split("=")
    line = wrong(flag)
    assert name in line and repr(value) in line
    assert "a number" in line or "a whole number" in line


@pytest.mark.parametrize(
    "flag",
    [
        "--doc_stride=99999999999999999999",
        "--per_gpu_eval_batch_size=99999999999999999999",
        "--max_seq_length_q=99999999999999999999",
        "--max_seq_length_c=99999999999999999999",
        "--num_train_epochs=1e300",
    ],
)
def test_number_far_too_large(
    flag: str, tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    # Either it means something, such as a batch of all there is, or it is an error of one line.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "training.loop.Training.__init__",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        code = call(command_of("train_qa", tiny_bert, few, tmp_path / "out", *SMALL, flag))
    assert code in (2, 130)
    if code == 2:
        assert flag.split("=")[0] in error_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("flag", "close"),
    [
        ("--learning_rat=1e-5", "--learning_rate"),
        ("--learning-rate=1e-5", "--learning_rate"),
        ("--per_gpu_batch_size=8", "--per_gpu_train_batch_size"),
        ("--no-cuda", "--no_cuda"),
        ("--max_seq_length=384", "--max_seq_length_c"),
        ("--zzz", "--help"),
        ("data.json", "data.json"),
    ],
)
def test_unknown_flag(wrong: Wrong, flag: str, close: str) -> None:
    line = wrong(flag)
    assert f"unknown argument {flag}" in line and close in line


@pytest.mark.parametrize("flag", ["--model_student", "--output_dir", "--squad_dev_data"])
def test_required_flag_is_left_out(
    flag: str, tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = command_of("train_qa", tiny_bert, few, tmp_path / "out")
    assert call([part for part in command if not part.startswith(flag)]) == 2
    assert flag in error_line(capfd.readouterr().err)


@pytest.mark.parametrize("flag", ["--precision=fp8", "--report_to=wandb"])
def test_unknown_choice(wrong: Wrong, flag: str) -> None:
    name, value = flag.split("=")
    line = wrong(flag)
    assert name in line and value in line
    right = {"--precision": ("auto", "fp32", "bf16", "fp16"), "--report_to": ("tensorboard",)}
    assert all(choice in line for choice in right[name])


def test_fp16_on_a_cpu(wrong: Wrong) -> None:
    line = wrong("--precision=fp16")
    assert "--precision=fp16 needs a GPU" in line and "fp32" in line


def test_bf16_without_the_hardware(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_cpu", lambda: Cpu("a CPU", ("avx2",)))
    line = wrong("--precision=bf16")
    assert "--precision=bf16: this CPU has no bf16" in line and "fp32" in line


def test_tensorboard_is_not_installed(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorboard" else find(name, *rest),
    )
    line = wrong("--report_to=tensorboard")
    assert "--report_to=tensorboard" in line and "pip install tensorboard" in line


@pytest.mark.parametrize(
    ("listed", "close"),
    [
        ("embeding", "embeddings"),
        ("Embeddings", "embeddings"),
        ("encoder.layers.0", "encoder"),
        ("embeddings,pooller", "try"),
        ("None", "try"),
    ],
)
def test_freeze_list_matches_nothing(wrong: Wrong, listed: str, close: str) -> None:
    line = wrong(f"--freeze_list={listed}")
    assert f"no parameter's name has {listed.split(',')[-1]!r}" in line
    assert close in line.split("; try ")[1] or close == "try"


def test_freeze_list_leaves_nothing(wrong: Wrong) -> None:
    line = wrong("--freeze_list=embeddings,encoder,qa_outputs")
    assert "--freeze_list" in line and "leaves nothing to train" in line


# ------------------------------------------------------------------------------------------------
# Folders


def test_output_dir_under_a_file(wrong: Wrong, few: Path) -> None:
    path = few / "train-v1.1.json" / "out"
    line = wrong(f"--output_dir={path}")
    assert f"--output_dir: cannot write to {path}" in line and "directory" in line.lower()


@pytest.mark.parametrize("end", ["", "/", "/."])
def test_output_dir_is_the_model(wrong: Wrong, model: Path, end: str) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    flags = (f"--model_student={model}", f"--output_dir={model}{end}", "--overwrite_output_dir")
    assert "--output_dir is the folder of --model_student" in wrong(*flags)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_output_dir_is_the_teacher(wrong: Wrong, model: Path) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    flags = (f"--model_teacher={model}", f"--output_dir={model}", "--supervision_weight=0.1")
    assert "--output_dir is the folder of --model_teacher" in wrong(
        *flags, "--overwrite_output_dir"
    )
    assert {path: path.read_bytes() for path in model.iterdir()} == before


# ------------------------------------------------------------------------------------------------
# The evaluation script


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("score.py", "def score(a, b): pass\n", "has neither evaluate (SQuAD 1.1) nor"),
        ("score.py", "evaluate = 3\n", "has neither evaluate (SQuAD 1.1) nor"),
        ("score.py", "import no_such_package\n", "does not load: ModuleNotFoundError"),
        ("score.py", "raise ValueError('a\\nb')\n", "does not load: ValueError"),
        ("score.py", "def evaluate(:\n", "does not load: SyntaxError"),
        ("score.py", "import sys\nsys.exit(1)\n", "does not load: SystemExit"),
        ("score.txt", "def evaluate(a, b): pass\n", "is not a Python file (*.py)"),
        ("score.py", "def get_raw_scores(a, b): pass\n", "missing: make_qid_to_has_ans"),
        ("score.py", "def evaluate(data, predictions): return {'F1': 1.0}\n", "score.py"),
        ("score.py", "def evaluate(path): return {}\n", "score.py"),
        ("score.py", "def evaluate(d, p): return d['data']\n", "score.py"),
    ],
)
def test_evaluation_script(
    wrong: Wrong, tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    line = wrong(f"--squad_eval_script={path}")
    assert f"--squad_eval_script: {path}" in line and said in line


def test_evaluation_script_is_missing(wrong: Wrong, tmp_path: Path) -> None:
    line = wrong(f"--squad_eval_script={tmp_path / 'none.py'}")
    assert f"--squad_eval_script: no such file: {tmp_path / 'none.py'}" in line


def test_squad_2_with_a_v1_script(wrong: Wrong, tmp_path: Path) -> None:
    data, script = tmp_path / "dev-v2.0.json", tmp_path / "evaluate-v1.1.py"
    data.write_text(json.dumps(squad(answers=[])))
    script.write_text("def evaluate(dataset, predictions): return {}\n")
    line = wrong(f"--squad_dev_data={data}", f"--squad_eval_script={script}")
    assert f"{script} is for SQuAD 1.1" in line and str(data) in line
    assert "evaluate-v2.0.py" in line


# ------------------------------------------------------------------------------------------------
# Errors of libraries


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no header\n  at byte 0"), "a file does not load: no header"),
        (ValueError(" \n"), "a file does not load: ValueError(' \\n')"),
        (UserError("--flag: is wrong"), "--flag: is wrong"),
    ],
)
def test_a_librarys_error_becomes_one_line_and_ours_stay(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as found, in_one_line("a file does not load"):
        raise error
    assert str(found.value) == said


def test_errors_of_other_kinds_are_not_the_users() -> None:
    with pytest.raises(KeyError), in_one_line("a file does not load", (ValueError,)):
        raise KeyError("a mistake of ours")


# ------------------------------------------------------------------------------------------------
# The same in processes of their own: from the start of Python to its end


def children_seconds() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--learning_rat=1",), "did you mean --learning_rate"),
        (("--squad_train_data=none.json",), "--squad_train_data: no such file: none.json"),
        (("--model_student=no-such/model",), "neither a folder here nor a model that the hub"),
    ],
)
def test_process(
    flags: tuple[str, ...], said: str, tiny_bert: Path, few: Path, tmp_path: Path
) -> None:
    began = children_seconds()
    # Here the hub may be asked; without a network it must give up soon.
    command = command_of("train_qa", tiny_bert, few, tmp_path / "out", *flags)
    done = run(command, timeout=120, fresh=True, env={"HF_HUB_OFFLINE": "0"})
    assert children_seconds() - began < QUICK
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in error_line(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "some"),
    [
        ("train_qa", ("--model_student", "--kd_weight", "--freeze_list", "--overwrite_output_dir")),
        ("train_qcemb", ("--model_teacher", "--hnm_num", "--pooling", "--nncf_config")),
        ("pack_and_distill", ("--pack_cfg", "--stages", "--warm_up_steps", "--precision")),
        ("ask", ("--model", "--context", "--question", "--json")),
    ],
)
def test_help_says_of_each_flag_what_its_default_is_or_that_it_is_required(
    script: str, some: tuple[str, ...], capfd: pytest.CaptureFixture
) -> None:
    assert call(["python", f"{script}.py", "--help"]) == 0
    _, *flags = re.split(r"\n  (?=--)", capfd.readouterr().out)
    assert {flag.split()[0] for flag in flags} > set(some)
    for flag in flags:
        text = " ".join(re.split(r"\n\n", flag)[0].split())  # a title of a group comes behind it
        assert re.search(r"\((default: .+|required)\)$", text), text


def test_help_groups_flags_by_subject(capfd: pytest.CaptureFixture) -> None:
    assert call(["python", "train_qa.py", "--help"]) == 0
    titles = re.findall(r"^(\S.*):$", capfd.readouterr().out, re.MULTILINE)
    assert titles[1:] == [
        "models and folder",
        "data",
        "training",
        "hard negatives",
        "quantization",
        "the machine",
        "results and logs",
    ]
