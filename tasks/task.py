"""The contract of a task: what it tells the scripts, and what all tasks share.

A task sees a training and a dev file in one way: as windows to find answers in, or as texts to find
among others. To add one, write a subclass in a module beside this one and name it in TASKS of
`tasks/__init__.py`.
"""

from __future__ import annotations

import argparse
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bert.model_folder import AutoClass, OpenedModel, load_for_export, special_ids
from cli import UserError
from deploy import onnx_file
from deploy.onnx_check import Check
from squad_utils import SquadData, load_squad
from tasks.hidden_states import OutputLoss
from training.fine_tuning import FineTunable
from training.loop import Evaluation
from training.passes import Batches, LossFunction
from training.results import TaskCard
from training.run import Run
from training.states import write_json

CHECKED_ROWS = 8  # on which the exported file is compared with PyTorch
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """What a model reads, row by row.

    Attributes:
        lengths: int64 [rows], in tokens.
        batch: inputs [B, L] of some rows, padded to a length.
    """

    lengths: np.ndarray
    batch: Callable[[np.ndarray, int], Arrays]


class Task(ABC):
    """A task for the scripts: what is read, trained on, evaluated, written and exported.

    Attributes:
        auto_class: what loads its models.
        architectures: of its models, as config.json names them.
        best_by: of two evaluations, the one with more of this figure is better.
        score_names: what to call the figures that people look at.
        outputs: those of its exported file.
        data: the files, by what their hash is called in a run's arguments.
        evaluation: after `make_evaluation`.
    """

    auto_class: ClassVar[AutoClass]
    architectures: ClassVar[tuple[str, ...]]
    best_by: ClassVar[str]
    score_names: ClassVar[dict[str, str]]
    outputs: ClassVar[onnx_file.Outputs]
    evaluation: Evaluation

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the files that args names.

        Raises:
            UserError: one of them is not what it should be.
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
        """What tells the data from other files of the same name."""
        return {f"sha256_{name}": data.sha256[:16] for name, data in self.data.items()}

    @classmethod
    def check(cls, model: OpenedModel, every: Sequence[type[FineTunable]]) -> None:
        """Check that a model is of this task, or of none yet.

        Args:
            every: all tasks that there are.

        Raises:
            UserError: it is of another task.
        """
        others = [a for task in every for a in task.architectures if task is not cls]
        if model.architecture in others:
            raise UserError(
                f"{model.flag}: {model.name} is a model of another task ({model.architecture});"
                f" {' or '.join(cls.architectures)} is needed, or a BERT that is not fine-tuned"
            )

    @abstractmethod
    def tokenize(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Make what a model reads of all files.

        Raises:
            UserError: there is nothing to train on.
        """

    def apply_flags(self, student: PreTrainedModel) -> None:  # noqa: B027 - most have none
        """Give a student that is to be fine-tuned what flags say of the model itself.

        Raises:
            UserError: it would undo what the student has learned.
        """

    # -- training

    @abstractmethod
    def batches(self, step_size: int) -> Batches:
        """Batches of the training file, for losses that need no labels."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Examples of an epoch of `batches`."""

    @abstractmethod
    def fine_tuning(
        self, run: Run, teacher: PreTrainedModel | None, state_maps: nn.ModuleList | None
    ) -> tuple[LossFunction, Batches]:
        """The loss of fine-tuning, and batches with what it needs.

        Args:
            teacher: to learn from as well, or None.
            state_maps: from the states of a merged student to the size of the teacher's, or None.
        """

    @abstractmethod
    def output_loss(self, run: Run, teachers: Sequence[PreTrainedModel]) -> OutputLoss | None:
        """What distillation compares beside hidden states, as the flags say; None for nothing.

        Args:
            teachers: the first is the one whose states are learned.
        """

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` random examples of `batches`, or all where there are fewer."""

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `count` random rows of the training file, or of all where there are fewer:
        inputs [B, L], rows of similar length together."""
        size = self.args.per_gpu_eval_batch_size
        batches = self.batches(size)
        chosen = self.draw(np.random.default_rng([self.args.seed, 2]), count)
        chosen = chosen[np.argsort(batches.tokens(chosen), kind="stable")]
        for some in np.split(chosen, range(size, len(chosen), size)):
            batch = batches.batch(0, some)
            yield {name: batch[name] for name in onnx_file.INPUTS}

    @abstractmethod
    def train_rows(self) -> Rows:
        """The longest kind of what a model reads of the training file."""

    def calibration(self, count: int) -> Iterator[dict[str, Tensor]]:
        """`count` training rows, or all where there are fewer, as they are at run time: inputs
        [1, max_seq_length_c] each, padded."""
        rows = self.train_rows()
        order = np.random.default_rng([self.args.seed, 3]).permutation(len(rows.lengths))
        for row in order[:count]:
            arrays = rows.batch(row[None], self.args.max_seq_length_c)
            yield {name: torch.from_numpy(arrays[name]) for name in onnx_file.INPUTS}

    # -- evaluation

    @abstractmethod
    def make_evaluation(self, run: Run) -> Evaluation:
        """The evaluation on the dev file."""

    def score_in_teacher_index(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> dict[str, dict[str, float]]:
        """Further figures, where what a student finds may depend on its teacher's index."""
        return {}

    # -- what is left behind

    @abstractmethod
    def describe(self) -> str:
        """One line on the data."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Sizes of the data, for metrics.json."""

    def write_answers(self) -> None:  # noqa: B027 - vectors are not kept
        """Write what the last evaluation has found to the output folder."""

    @abstractmethod
    def card(self, figures: Mapping[str, float]) -> TaskCard:
        """What the model card, README.md, tells of the task and a model's figures."""

    @abstractmethod
    def reader_settings(self, figures: Mapping[str, float]) -> dict[str, float | None]:
        """What a program needs to know to run the exported file: lengths, and a threshold of the
        final evaluation's figures."""

    def write_reader(
        self, tokenizer: PreTrainedTokenizerFast, figures: Mapping[str, float]
    ) -> None:
        """Write `reader_settings`, and the ids of the special tokens, to reader.json."""
        settings = self.reader_settings(figures)
        entries = {**settings, "special_ids": asdict(special_ids(tokenizer))}
        write_json(os.path.join(self.args.output_dir, "reader.json"), entries)

    @abstractmethod
    def dev_rows(self) -> Rows:
        """What a model reads of the dev file, of which some is used to check the exported file."""

    def export(self) -> Check:
        """Export the checkpoint in the output folder to model.onnx beside it."""
        args = self.args
        return export(type(self), args.output_dir, self.dev_rows(), args.max_seq_length_c)


def export(task: type[Task], folder: str, rows: Rows, length: int) -> Check:
    """Export the checkpoint in a folder to model.onnx beside it; see `onnx_file.export_onnx`.

    It is the saved checkpoint that is exported, so the check covers saving and loading too.

    Args:
        rows: from which the inputs of the check are taken, from the shortest to the longest.
        length: of the file's inputs.
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
