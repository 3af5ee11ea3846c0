"""Hostile values, and damaged versions of valid ones: the inputs of the targets in `fuzz_targets`.

All random numbers come from a `random.Random`, so one generator serves seeded cases, hypothesis and atheris (`Bytes`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

TEXTS = (
    "", " ", "\n", "\x00", "a", "a b c", "def f(x):\n    return x", "\ud800", "\udc80 half", "\u2581\u2581",
    "\ufeff", "</s>", "<0x41>",
    "\x1b[2J\x1b]0;title\x07", "\u202e\u2028\u2029\u0085", "e\u0301\U0001f468\u200d\U0001f469",
    "<script>alert(1)</script>", "%s%n{0}{x}", "../../etc/passwd",
    "/etc/passwd", "C:\\x", "x" * 300, "text", "null", "NaN", "1e999", "-1", "0x10", "\u0661\u0662", "1_000",
    "kl:1e-3", "diagonal:4", "speculative:2:8",
    "train", "model", "vocab_size", "name", "one_step", "unrolled", "next_token", "auto", "inf",
)  # fmt: skip

NUMBERS: tuple[int | float, ...] = (
    0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 127, 255, 256, 1024, 65_535, 65_536, -1, -2, -(2**31), 2**31 - 1, 2**31, 2**32,
    2**53, 2**60, 2**63 - 1, 2**63,
    2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-30, 5e-324, 1e30, 1e308, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip

FRAGMENTS = (
    b"", b"\x00", b"\xff", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"',
    b":", b",", b"\\", b"\\u0000", b"\\ud800", b"null", b"true",
    b"NaN", b"-Infinity", b"1e999", b"9" * 40, b"9" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\r\n", b"\n\n",
    b"(" * 60, b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04.",
    b"\x1f\x8b\x08", b"PAR1", b"<f8", b"|O", b"<i8", b"-1", b"18446744073709551616", b"../", b"\x1b[2J", b"\x7f",
    b"'", b"#", b"=", b"[[", b"]]", b"F32", b"BOOL",
)  # fmt: skip


class Bytes(random.Random):
    """A generator that draws from given bytes, then zeros. A fuzzer that works on bytes controls the inputs through it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        size = (k + 7) // 8
        piece = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def text(rng: random.Random, most: int = 40) -> str:
    """Text from problematic words, ordinary letters, and code points of all kinds, lone surrogates included."""
    parts = []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        if kind == 0:
            parts.append(rng.choice(TEXTS))
        elif kind == 1:
            parts.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(most))))
        elif kind == 2:
            parts.append("".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(4))))
        else:
            parts.append(rng.choice("ab \n\t") * rng.randrange(most))
    return "".join(parts)


def number(rng: random.Random) -> int | float:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randrange(-4, 40)
    if kind == 1:
        return rng.choice((1, -1)) * 10 ** rng.uniform(-12, 12)
    return rng.choice(NUMBERS)


def value(rng: random.Random, depth: int = 0) -> Any:
    """A random JSON value."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind in (2, 3):
        return number(rng)
    if kind in (4, 5):
        return text(rng)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(item) for key, item in tree.items()}
    return [_copy(item) for item in tree] if isinstance(tree, list) else tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) pairs inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        at = todo.pop()
        for key, item in list(at.items() if isinstance(at, dict) else enumerate(at)):
            found.append((at, key))
            if isinstance(item, dict | list):
                todo.append(item)
    return found


def altered(rng: random.Random, tree: Any, times: int = 3) -> Any:
    """A copy of a JSON value in which one to ``times`` parts are replaced, removed, moved, added or renamed."""
    tree = _copy(tree)
    for _ in range(rng.randrange(1, times + 1)):
        if not isinstance(tree, dict | list) or not (places := _places(tree)):
            return value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 1:
            old = holder[key]
            if kind == 0 and isinstance(old, int | float):
                holder[key] = number(rng)
            elif kind == 0 and isinstance(old, str):
                holder[key] = text(rng)
            else:
                holder[key] = value(rng)
        elif kind == 2:
            del holder[key]
        elif kind == 3:
            other, name = rng.choice(places)
            try:
                holder[key] = _copy(other[name])
            except (KeyError, IndexError):
                continue
        elif isinstance(holder, dict):
            name = text(rng) if kind == 4 else str(key)[: rng.randrange(1 + len(str(key)))]
            holder[name] = holder.pop(key) if rng.random() < 0.5 else value(rng)
        else:
            holder.insert(key, value(rng))
    return tree


def as_json(rng: random.Random, tree: Any) -> bytes:
    """A JSON value in UTF-8, sometimes with damaged bytes."""
    raw = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", errors="surrogatepass")
    return damaged(rng, raw) if rng.random() < 0.25 else raw


def damaged(rng: random.Random, raw: bytes, times: int = 4, words: Sequence[bytes] = FRAGMENTS) -> bytes:
    """Bytes with one to ``times`` damages: flipped bits, or parts cut, repeated, moved, overwritten or inserted."""
    data = bytearray(raw)
    for _ in range(rng.randrange(1, times + 1)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + rng.choice((1, 1, 4, 16))] = b""
        elif kind == 2:
            data[at:at] = rng.choice(words)
        elif kind == 3:
            piece = rng.choice(words)
            data[at : at + len(piece)] = piece
        elif kind == 4:
            size = rng.choice((1, 2, 4, 8))
            data[at : at + size] = (int(rng.choice(NUMBERS[:30])) % (1 << (8 * size))).to_bytes(
                size, rng.choice(("little", "big"))
            )
        elif kind == 5:
            end = at + rng.randrange(1, 32)
            data[at:at] = bytes(data[at:end]) * rng.choice((1, 2, 40))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)
