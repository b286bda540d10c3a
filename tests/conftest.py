"""What the tests share: a tiny BERT with its own vocabulary, sample data, a way to run scripts."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fork_server
import pytest

if TYPE_CHECKING:
    from accelerate import Accelerator

# The process that shares tests out among others loads this file and runs none: no torch up here.

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network


# Fixtures of a whole run of a script. Tests that take one are slow; others say so themselves.
WHOLE_RUNS = {"alone", "packed", "quantized", "reference", "tuned", "unfinished"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Before those that a command leaves out go."""
    for item in items:
        if WHOLE_RUNS.intersection(item.fixturenames):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Before the first test, in a process that runs some: all libraries are loaded by now."""
    import torch

    torch.set_num_threads(1)  # of tiny models, threads only wait for one another
    fork_server.time_in_one_runtime()
    gc.collect()
    gc.freeze()  # else each run in this process, which collects, goes through the libraries again


def pytest_unconfigure() -> None:
    fork_server.close()


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train-v1.1.json (about 120 questions) and dev-v1.1.json (about 40)."""
    from examples import make_sample

    folder = tmp_path_factory.mktemp("sample")
    make_sample.main(["--num_train=120", "--num_dev=40", f"--output_dir={folder}"])
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """A folder with a BERT of 2 layers, hidden size 32, 4 heads, 512 positions, random weights."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

    words: Counter[str] = Counter()
    for article in json.loads((sample / "train-v1.1.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            words.update(paragraph["context"].lower().split())
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    vocabulary += [word for word, _ in words.most_common(600) if word.isalpha() and len(word) > 1]
    folder = tmp_path_factory.mktemp("tiny_bert")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def few(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 questions to train on and 6 to evaluate on."""
    from calls import first_questions  # which needs the path set above

    folder = tmp_path_factory.mktemp("few")
    first_questions(sample / "train-v1.1.json", folder / "train-v1.1.json", 30)
    first_questions(sample / "dev-v1.1.json", folder / "dev-v1.1.json", 6)
    return folder


@pytest.fixture(scope="session")
def teacher(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with weights large enough for its layers to do something."""
    import torch
    from transformers import BertForQuestionAnswering

    folder = tmp_path_factory.mktemp("teacher") / "bert"
    shutil.copytree(tiny_bert, folder)
    model = BertForQuestionAnswering.from_pretrained(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that is not fine-tuned, with a pooler."""
    import torch
    from transformers import BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "bert"
    torch.manual_seed(1)
    BertModel.from_pretrained(teacher).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(teacher).save_pretrained(folder)
    return folder


# Flags of a short run of the tiny BERT on the CPU, in FP32; for all scripts, and for each.
FLAGS = (
    "--learning_rate=1e-3",
    "--num_train_epochs=1",
    "--max_seq_length_q=24",
    "--max_seq_length_c=160",
    "--per_gpu_train_batch_size=4",
    "--no_cuda",
    "--precision=fp32",
    "--log_steps=1",
)
FLAGS_OF = {
    # A model of random weights loses or gains points by chance.
    "train_qa": ("--doc_stride=64", "--total_train_batch_size=16", "--max_drop=100"),
    "train_qcemb": (
        "--max_drop=100",
        "--doc_stride=32",
        "--total_train_batch_size=8",
        "--hnm_num=4",
        "--hnm_batch_size=2",
        "--hnm_hist_num=3",
    ),
    "pack_and_distill": (
        "--doc_stride=64",
        "--total_train_batch_size=4",
        "--total_train_batch_size_for_tune=8",
        "--learning_rate_for_tune=2e-3",
        "--pack_cfg=num_hidden_layers:2,ff_iter_num:2,num_attention_heads:2,hidden_size:16,"
        "pack_emb:1,hidden_act:orig",
    ),
}


def run_flags(folder: Path, save_minutes: float = 60.0) -> argparse.Namespace:
    """What `training.run.Run` reads of a script's flags; each step is logged."""
    return argparse.Namespace(
        output_dir=str(folder),
        save_minutes=save_minutes,
        log_steps=1,
        report_to="none",
        overwrite_output_dir=False,
    )


def command_of(script: str, model: Path, data: Path, output_dir: Path, *flags: str) -> list[str]:
    """A short run of a script, with the model as teacher where it packs; later flags override."""
    teacher = [f"--model_teacher={model}"] if script == "pack_and_distill" else []
    return [
        sys.executable,
        str(ROOT / f"{script}.py"),
        f"--model_student={model}",
        *teacher,
        f"--output_dir={output_dir}",
        f"--squad_train_data={data / 'train-v1.1.json'}",
        f"--squad_dev_data={data / 'dev-v1.1.json'}",
        *FLAGS,
        *FLAGS_OF[script],
        *flags,
    ]


def run(
    command: list[str],
    timeout: float = 240,
    fresh: bool = False,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command with one thread a process; stdout and stderr are captured as text.

    A script is forked by a process that has imported the libraries. A new interpreter runs what is
    no script (`-m`, `-c`), has variables or other settings of its own, or is to be `fresh`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if fresh or env or kwargs or not fork_server.is_script(command):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, **kwargs
        )
    with contextlib.closing(fork_server.server().start(command, environment)) as process:
        stdout, stderr = process.communicate(timeout)
        return subprocess.CompletedProcess(command, process.wait(), stdout, stderr)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One CPU process in FP32, whatever ran before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
