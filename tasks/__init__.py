"""All tasks. To add one, write a module beside these and name its class in TASKS."""

from tasks.embedding import EmbeddingTask
from tasks.qa import QaTask
from tasks.task import Task

TASKS: tuple[type[Task], ...] = (QaTask, EmbeddingTask)
