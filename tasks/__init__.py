"""All tasks. A third one is a module beside these and a name in TASKS."""

from tasks.embedding import EmbeddingTask
from tasks.qa import QaTask
from tasks.task import Task

TASKS: tuple[type[Task], ...] = (QaTask, EmbeddingTask)
