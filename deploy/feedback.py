"""Right answers of the page's users, kept as a SQuAD file that train_qa.py reads. No torch."""

from __future__ import annotations

import json
import os
import threading
import uuid
from typing import Any

from cli import UserError, read_object


class Feedback:
    """A SQuAD file that grows by confirmed answers; safe to use from several threads.

    Args:
        path: the file; it is written with the first answer. If it is there already, answers are
            added to it.

    Raises:
        UserError: the file is there and is not a SQuAD file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._squad: dict[str, Any] = {"version": "1.1", "data": []}
        if os.path.exists(path):
            self._squad = read_object(path, "--feedback")
        try:
            self._count = sum(
                len(paragraph["qas"])
                for article in self._squad["data"]
                for paragraph in article["paragraphs"]
                if isinstance(paragraph["context"], str) and isinstance(article["title"], str)
            )
        except (KeyError, TypeError):
            raise UserError(f"--feedback: {path} is not a SQuAD file with titles") from None

    def __len__(self) -> int:
        """The number of questions in the file."""
        return self._count

    def as_squad(self) -> dict[str, Any]:
        """What the file holds; not to be changed."""
        return self._squad

    def confirm(self, question: str, context: str, start: int, end: int, title: str) -> None:
        """Keep context[start:end] as the answer to a question, in place of an earlier answer to the
        same question from the same context.

        Args:
            title: the document that the context is from.

        Raises:
            OSError: the file cannot be written; it is as it was before.
        """
        answers = [{"text": context[start:end], "answer_start": start}]
        with self._lock:
            articles = json.loads(json.dumps(self._squad["data"]))
            paragraphs = _item(articles, "title", title, "paragraphs")
            asked = _item(paragraphs, "context", context, "qas")
            same = [each for each in asked if each.get("question") == question]
            if same:
                same[0]["answers"] = answers
            else:
                asked.append({"id": uuid.uuid4().hex, "question": question, "answers": answers})
            squad = self._squad | {"data": articles}
            with open(f"{self.path}.tmp", "w", encoding="utf-8") as file:
                json.dump(squad, file, ensure_ascii=False, indent=1)
            os.replace(f"{self.path}.tmp", self.path)
            self._squad, self._count = squad, self._count + (not same)


def _item(items: list[dict[str, Any]], key: str, value: str, inside: str) -> list[dict[str, Any]]:
    """The list `inside` the item whose `key` has this value; an item is added if there is none."""
    for each in items:
        if each[key] == value:
            return each[inside]
    items.append({key: value, inside: []})
    return items[-1][inside]
