"""A file that stores answers to an evaluation's requests, so that a killed evaluation can continue.

The file is JSON Lines and is only appended to. The first line identifies the format. Each further line holds one answer, a
hash of its owner (the checkpoint's content, K, and everything else that changes the answer) and a hash of its request.
Several models may share a file. Nothing in it is executed. A line that is incomplete after a kill, or damaged, is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from recurrent_db.errors import UserError

HEADER = {"format": "recurrent_db.evaluation.answer_cache", "version": 1}


def fingerprint(value: Any) -> str:
    """128-bit hash (BLAKE2b) of a JSON value, in hexadecimal. The order of a dictionary's keys does not matter."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


class AnswerCache:
    """The answers of one model in a file. Answers are JSON values.

    Several processes may append to one file at once, because each call of `add` is one write.

    Args:
        path: the file. It is created, with its folder, if it is missing.
        owner: everything that changes an answer, as JSON.

    Raises:
        UserError: the file cannot be read or written, or is not an answer cache.
    """

    def __init__(self, path: Path, owner: Mapping[str, Any]) -> None:
        self.path, self.owner = path, fingerprint(dict(owner))
        self.answers: dict[str, Any] = {}
        """Answers by the fingerprint of their request."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                header = (json.dumps(HEADER) + "\n").encode()
                if len(content) < len(header) and header.startswith(content):  # new, or killed in its first write
                    file.truncate(0)
                    content = b""
            if not content:
                self._append(header.decode())
        except OSError as error:
            raise UserError(f"cannot store answers in {path}: {error.strerror or error}") from None
        lines = content.split(b"\n")
        if content and _parse(lines[0]) != HEADER:
            raise UserError(f"cannot store answers in {path}: it is not an answer cache")
        # Text after the last line break is an incomplete line. The next answer must start on a new line.
        self._broken = bool(lines[-1])
        for line in lines[1:]:
            entry = _parse(line)
            if (
                isinstance(entry, dict)
                and entry.keys() == {"owner", "asked", "answer"}
                and entry["owner"] == self.owner
                and isinstance(entry["asked"], str)
            ):
                self.answers[entry["asked"]] = entry["answer"]

    def get(self, request: Any) -> Any | None:
        """The stored answer to a request (JSON), or None."""
        return self.answers.get(fingerprint(request))

    def add(self, answers: Mapping[str, Any]) -> None:
        """Store answers by the fingerprints of their requests."""
        self.answers.update(answers)
        lines = (
            json.dumps({"owner": self.owner, "asked": asked, "answer": answer}) + "\n"
            for asked, answer in answers.items()
        )
        self._append(("\n" if self._broken else "") + "".join(lines))
        self._broken = False

    def _append(self, text: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            data = text.encode()
            if os.write(descriptor, data) < len(data):
                raise UserError(f"cannot store answers in {self.path}: the disk is full")
        finally:
            os.close(descriptor)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
