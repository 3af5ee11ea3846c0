"""What a run's data is made of, as every checkpoint records it: a tokenizer, or the classes of images."""

from __future__ import annotations

import hashlib
import json
from typing import ClassVar, Protocol

from recurrent_db.data.image_shards import ImageData, problem_of_classes
from recurrent_db.errors import UserError


class Vocabulary(Protocol):
    """Such as `tokenizer.Tokenizer` and `ImageClasses`."""

    kind: ClassVar[str]
    """Its name in error messages, in the plural."""
    file_name: ClassVar[str]
    """Its file in a checkpoint."""
    model_bytes: bytes
    """The content of that file."""
    hash: str
    """The first 16 hexadecimal digits of the SHA-256 of `model_bytes`. Runs with different hashes do not fit together."""


class ImageClasses:
    """The class names and size of images, and the SHA-256 of the data that they come from."""

    kind: ClassVar[str] = "images"
    file_name: ClassVar[str] = "images.json"

    def __init__(self, classes: tuple[str, ...], size: tuple[int, int], data_hash: str) -> None:
        self.classes, self.size, self.data_hash = classes, size, data_hash
        content = {"classes": list(classes), "size": list(size), "data": data_hash}
        self.model_bytes = json.dumps(content, indent=1).encode()
        self.hash = hashlib.sha256(self.model_bytes).hexdigest()[:16]

    @classmethod
    def of(cls, data: ImageData) -> ImageClasses:
        """The classes of a data directory."""
        return cls(data.classes, data.size, data.hash)

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> ImageClasses:
        """Read the content of a checkpoint's file. Raises `UserError` if it is damaged."""
        try:
            content = json.loads(model_bytes)
            classes, size, data = content["classes"], content["size"], content["data"]
            height, width = size
            sound = problem_of_classes(classes) is None and isinstance(data, str)
            if sound and isinstance(height, int) and isinstance(width, int):
                return cls(tuple(classes), (height, width), data)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise UserError(f"{cls.file_name} of the checkpoint is damaged")
