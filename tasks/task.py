"""The contract of a task: the members that scripts use, and those that all tasks share.

A task reads a training and a dev file as its own kind of examples: as windows that may hold
answers, or as texts to rank. To add a task, write a subclass of `Task` in a module beside this one
and name it in TASKS of `tasks/__init__.py`.
"""

from __future__ import annotations

import argparse
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bert.model_folder import AutoClass, OpenedModel, load_for_export, special_ids
from cli import UserError
from deploy import onnx_file
from deploy.onnx_check import Check
from squad_utils import SquadData, load_squad
from tasks.hidden_states import OutputLoss
from training.fine_tuning import FineTunable
from training.passes import Batches, LossFunction, as_tensors
from training.results import TaskCard
from training.run import Run
from training.stage import Evaluation
from training.states import write_json

CHECKED_ROWS = 8  # the exported file is compared with PyTorch on so many rows


@dataclass(frozen=True)
class Rows:
    """The rows that a model reads: windows or texts.

    Attributes:
        lengths: int64 [rows], in tokens.
        batch: from indices int64 [B] and a length L to the model's inputs, [B, L] each, padded.
    """

    lengths: np.ndarray
    batch: Callable[[np.ndarray, int], dict[str, np.ndarray]]


class Task(ABC):
    """A task for the scripts: its files, losses, evaluation, results and export.

    Attributes:
        auto_class: the class that loads its models.
        architectures: the names of its models in config.json.
        best_by: the figure that ranks evaluations; the higher, the better.
        drop_by: the figure whose loss by quantization --max_drop limits.
        score_names: from the main figures to their labels.
        packing_rate: learning rate of the last stage of packing, in steps of 16 examples.
        outputs: the outputs of its exported file.
        data: the files, each under the name that its hash has in a run's arguments.
        train_rows, dev_rows: the rows of both files (of several kinds, the longest), to calibrate
            and to check the exported file; set by `tokenize`.
        evaluation: set by `make_evaluation`.
    """

    auto_class: ClassVar[AutoClass]
    architectures: ClassVar[tuple[str, ...]]
    best_by: ClassVar[str]
    drop_by: ClassVar[str]
    score_names: ClassVar[dict[str, str]]
    packing_rate: ClassVar[float] = 1e-3
    outputs: ClassVar[onnx_file.Outputs]
    train_rows: Rows
    dev_rows: Rows
    evaluation: Evaluation

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the files that the flags name.

        Raises:
            UserError: a file cannot be used.
        """
        self.args = args
        self.train_data = load_squad(args.squad_train_data, "--squad_train_data")
        self.dev_data = load_squad(args.squad_dev_data, "--squad_dev_data")
        self.data: dict[str, SquadData] = {"train": self.train_data, "dev": self.dev_data}
        if not self.dev_data.answerable.any():
            raise UserError(
                f"--squad_dev_data: no question of {self.dev_data.path} has an answer, so there is"
                " nothing to evaluate on"
            )

    def hashes(self) -> dict[str, str]:
        """Hashes that distinguish the data from other files of the same name."""
        return {f"sha256_{name}": data.sha256[:16] for name, data in self.data.items()}

    @classmethod
    def check(cls, model: OpenedModel, every: Sequence[type[FineTunable]]) -> None:
        """Check that a model belongs to this task, or to none yet.

        Args:
            every: all tasks.

        Raises:
            UserError: the model belongs to another task.
        """
        others = [a for task in every for a in task.architectures if task is not cls]
        if model.architecture in others:
            raise UserError(
                f"{model.flag}: {model.name} is a model of another task ({model.architecture});"
                f" {' or '.join(cls.architectures)} is needed, or a BERT that is not fine-tuned"
            )

    @abstractmethod
    def tokenize(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenise all files, into windows or texts.

        Raises:
            UserError: there is nothing to train on.
        """

    def apply_flags(self, student: PreTrainedModel) -> None:  # noqa: B027 - most have none
        """Before fine-tuning, apply the flags that change the student itself.

        Raises:
            UserError: a flag would undo the student's training.
        """

    # -- training

    @abstractmethod
    def batches(self, step_size: int) -> Batches:
        """Batches of the training file for losses without labels, `step_size` examples per step."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Examples per epoch of `batches`."""

    @abstractmethod
    def fine_tuning(
        self, run: Run, teacher: PreTrainedModel | None, state_maps: nn.ModuleList | None
    ) -> tuple[LossFunction, Batches]:
        """The loss of fine-tuning, and the batches that it reads.

        Args:
            teacher: a model whose outputs and states are learned too, or None.
            state_maps: maps from the states of a merged student to the teacher's size, or None.
        """

    @abstractmethod
    def output_loss(self, run: Run, teachers: Sequence[PreTrainedModel]) -> OutputLoss | None:
        """The loss of outputs that distillation adds to the loss of states, or None by the flags.

        Args:
            teachers: the student learns the states of the first.
        """

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Indices of `count` random examples of `batches`, or of all if there are fewer."""

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `count` random examples of the training file, or of all if there are fewer:
        inputs [B, L], examples of similar length together."""
        size = self.args.per_gpu_eval_batch_size
        batches = self.batches(size)
        chosen = self.draw(np.random.default_rng([self.args.seed, 2]), count)
        chosen = chosen[np.argsort(batches.tokens(chosen), kind="stable")]
        for some in np.split(chosen, range(size, len(chosen), size)):
            batch = batches.batch(0, some)
            yield {name: batch[name] for name in onnx_file.INPUTS}

    def calibration(self, count: int) -> Iterator[dict[str, Tensor]]:
        """`count` training rows, or all if there are fewer, padded as the exported file reads
        them: inputs [1, max_seq_length_c] each."""
        rows = self.train_rows
        order = np.random.default_rng([self.args.seed, 3]).permutation(len(rows.lengths))
        for row in order[:count]:
            yield as_tensors(rows.batch(row[None], self.args.max_seq_length_c))

    # -- evaluation

    @abstractmethod
    def make_evaluation(self, run: Run) -> Evaluation:
        """The evaluation on the dev file."""

    def score_in_teacher_index(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> dict[str, dict[str, float]]:
        """Figures of a student that searches its teacher's index, by name, if the task has one."""
        return {}

    # -- results

    @abstractmethod
    def describe(self) -> str:
        """The sizes of the data, in one line."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Sizes of the data, for metrics.json."""

    def write_answers(self) -> None:  # noqa: B027 - embeddings have none
        """Write the answers of the last evaluation to the output folder."""

    @abstractmethod
    def card(self, figures: Mapping[str, float]) -> TaskCard:
        """The task's part of the model card, README.md, with a model's figures."""

    @abstractmethod
    def reader_settings(self, figures: Mapping[str, float]) -> dict[str, float | None]:
        """The settings with which a program must run the exported file: lengths, and a threshold
        among the figures of the final evaluation."""

    def write_reader(
        self, tokenizer: PreTrainedTokenizerFast, figures: Mapping[str, float]
    ) -> None:
        """Write `reader_settings`, and the ids of the special tokens, to reader.json."""
        ids = asdict(special_ids(tokenizer))
        entries = {**self.reader_settings(figures), "special_ids": ids}
        write_json(os.path.join(self.args.output_dir, "reader.json"), entries)

    def export(self) -> Check:
        """Export the checkpoint in the output folder to model.onnx beside it."""
        args = self.args
        return export(type(self), args.output_dir, self.dev_rows, args.max_seq_length_c)


def export(task: type[Task], folder: str, rows: Rows, length: int) -> Check:
    """Export the checkpoint in a folder to model.onnx beside it; see `onnx_file.export_onnx`.

    The saved checkpoint is loaded for the export, so the check covers saving and loading too.

    Args:
        rows: CHECKED_ROWS of them, from the shortest to the longest, are the inputs of the check.
        length: tokens of the file's inputs.
    """
    model, quantized = load_for_export(folder, task.auto_class)
    by_length = np.argsort(rows.lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(by_length) - 1, CHECKED_ROWS).astype(int)]
    return onnx_file.export_onnx(
        onnx_file.ExportedGraph(model, task.outputs),
        os.path.join(folder, "model.onnx"),
        [rows.batch(row[None], length) for row in chosen],
        quantized,
    )
