"""The judge of generated text: a flat next-token model trained on other documents than the models it judges.

A judge that has read a model's training documents rewards the model for reciting them. A judge that has read the held-out
text rates that text too high. Documents are compared by their marks. A mark is a hash of the document's first bytes; it
does not depend on tokenizer, order or folder. `eval/train_judge.py` stores the marks of the judge's training documents in
its run directory.

Shapes: N texts, B texts in a batch, T positions, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recurrent_db.config import Config
from recurrent_db.data import TokenData, document, load_tokenizer, open_data, read_manifest
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.model.head import linear_cross_entropy
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.loading import load_with_config

RECORD = "judge.json"
MARKED_BYTES = 1024
"""Number of bytes at a document's beginning that its mark hashes. This is longer than a licence text, and shorter than the
part of a document that remains when its end is held out."""
COMPARED_DOCUMENTS = 2000
"""Number of a run's training documents, spread evenly, that are looked up among the judge's."""


# ---------------------------------------------------------------------------------------------------------------
# Training documents of the judge


def mark(ids: Sequence[int] | NDArray[Any], tokenizer: Tokenizer) -> str:
    """A document's mark: 64-bit hash of the text's first `MARKED_BYTES` bytes, as 16 hexadecimal digits."""
    # Every token except a separator has at least one byte.
    text = tokenizer.decode_bytes(ids[: MARKED_BYTES + 1])[:MARKED_BYTES]
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def marks(data: TokenData, tokenizer: Tokenizer, most: int | None = None) -> list[str]:
    """Marks of all documents of a split, or of ``most`` evenly spaced ones."""
    names = [(source, number) for source in data.sources.values() for number in range(source.documents)]
    chosen = range(len(names)) if most is None or most >= len(names) else np.arange(most) * len(names) // most
    return [mark(document(*names[index]), tokenizer) for index in chosen]


def text_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of the training text of a data directory, by source, from its manifest."""
    return {name: entry.get("text_sha256", "") for name, entry in read_manifest(directory)["splits"]["train"].items()}


def record(data_path: Path) -> dict[str, Any]:
    """The record of a judge's training data that its run directory keeps (`RECORD`)."""
    documents = marks(open_data(data_path, "train"), load_tokenizer(data_path))
    return {"data": str(data_path), "text_sha256": text_hashes(data_path), "documents": sorted(set(documents))}


def write_record(run: Path, kept: dict[str, Any]) -> None:
    write_atomic(run / RECORD, json.dumps(kept))


def check_apart(kept: dict[str, Any], other: Path, split: str, most: int | None = None) -> float:
    """Share of another data directory's documents that the judge was trained on. Looks at ``most`` of them, or at all.

    Raises:
        UserError: the directory cannot be read, or its training text equals the judge's.
    """
    if split == "train" and set(text_hashes(other).values()) & set(kept["text_sha256"].values()):
        raise UserError(
            f"the judge was trained on the same text as {other}: prepare its data from other documents (--part)"
        )
    mine = set(kept["documents"])
    found = marks(open_data(other, split), load_tokenizer(other), most)
    return sum(one in mine for one in found) / max(1, len(found))


# ---------------------------------------------------------------------------------------------------------------
# Reading texts


@dataclass
class Reading:
    """The judge's scores and features of N continuations."""

    nats: NDArray[np.float64]
    """-log p of each continuation given its prompt, (N,). The end of a text is not scored."""
    tokens: NDArray[np.int64]
    """Number of the judge's tokens in each continuation, (N,)."""
    bytes: NDArray[np.int64]
    """Number of UTF-8 bytes of those tokens, (N,)."""
    features: NDArray[np.float32]
    """Hidden vector (after the final norm) at the last token of prompt and continuation, (N, D)."""
    mean_features: NDArray[np.float32]
    """Mean of the hidden vectors over the continuation, (N, D). For an empty continuation it equals ``features``."""
    ids: list[list[int]] = field(default_factory=list)
    """Each continuation in the judge's tokens."""


@dataclass
class Judge:
    """A trained flat model that scores continuations."""

    model: LoopedLM
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path
    kept: dict[str, Any]
    """`record` of its training data."""

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> Judge:
        """Load a judge from its run directory.

        Raises:
            UserError: there is no run, it is not a flat next-token model, or its training documents are unknown, because it
                has no record (`eval/train_judge.py` writes one) and its data directory is gone.
        """
        model, tokenizer, config, checkpoint = load_with_config(path, device)
        if not build_objective(config).flat:
            raise UserError(f"{path} is a {config.objective.name} run, but a judge is a flat model")
        run = checkpoint.parents[1]
        if (run / RECORD).exists():
            try:
                kept = json.loads((run / RECORD).read_text(encoding="utf-8"))
                known = isinstance(kept["documents"], list) and isinstance(kept["text_sha256"], dict)
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise UserError(f"{run / RECORD} is damaged: write it again with eval/train_judge.py --resume")
        else:
            try:
                kept = record(Path(config.data.path))
            except UserError as error:
                raise UserError(
                    f"{path} cannot be a judge, because its training documents are unknown ({error});"
                    f" train one with eval/train_judge.py"
                ) from None
        return cls(model, tokenizer, config, checkpoint, kept)

    def saw(self, marked: Iterable[str]) -> list[str]:
        """The marks in ``marked`` that belong to the judge's training documents."""
        mine = set(self.kept["documents"])
        return [one for one in marked if one in mine]

    def windows(self, prompts: Sequence[str], texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Pairs (prompt, continuation) in the judge's tokens, cut to its context. A prompt loses its beginning; a
        continuation that alone fills the context loses its end.

        Prompt and continuation are tokenized separately, for real and for generated text, so that scores are comparable.
        """
        encode, room = self.tokenizer.encode_batch, self.model.config.max_seq_len
        cut = []
        for prompt, ids in zip(encode(prompts), encode(texts), strict=True):
            ids = ids[: room - 1]
            cut.append(((prompt or [self.tokenizer.eos_id])[len(ids) - room :], ids))
        return cut

    @torch.no_grad()
    def read(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        batch_size: int = 32,
    ) -> Reading:
        """Score each text as the continuation of its prompt, and compute its features. Batching only changes rounding."""
        model, device = self.model, self.model.embedding.weight.device
        windows = self.windows(prompts, texts)
        count, width = len(windows), model.config.d_model
        nats = np.zeros(count)
        features, means = np.zeros((count, width), dtype=np.float32), np.zeros((count, width), dtype=np.float32)
        order = sorted(range(count), key=lambda i: len(windows[i][0]) + len(windows[i][1]))
        for start in range(0, count, batch_size):
            chosen = order[start : start + batch_size]
            rows = [windows[i][0] + windows[i][1] for i in chosen]
            length = max(map(len, rows))
            # Right padding is harmless: no position of a causal model sees what comes after it.
            tokens_BT = torch.tensor(
                [row + [self.tokenizer.pad_id] * (length - len(row)) for row in rows], device=device
            )
            noise = NoiseSource(Rng(0, EVALUATION_STEP), torch.zeros(len(rows), dtype=torch.long), length)
            [(_, hidden_BTD)] = model.recurrence.hidden(model, tokens_BT, model.encode(tokens_BT), [1], noise)
            for b, i in enumerate(chosen):
                prompt, continuation = windows[i]
                end = len(prompt) + len(continuation)
                features[i] = hidden_BTD[b, end - 1].float().cpu().numpy()
                means[i] = hidden_BTD[b, min(len(prompt), end - 1) : end].float().mean(0).cpu().numpy()
            at = [(b, len(windows[i][0]) + j) for b, i in enumerate(chosen) for j in range(len(windows[i][1]))]
            if at:
                b_N, t_N = torch.tensor(at, device=device).T
                ones = torch.ones(len(at), device=device)
                hidden_ND, targets_N = hidden_BTD[b_N, t_N - 1], tokens_BT[b_N, t_N]
                _, losses_N = linear_cross_entropy(hidden_ND, model.head_weight, targets_N, ones)
                np.add.at(nats, np.array(chosen)[b_N.cpu().numpy()], losses_N.double().cpu().numpy())
        ids, lengths = [continuation for _, continuation in windows], self.tokenizer.byte_lengths()
        return Reading(
            nats,
            np.array([len(one) for one in ids], dtype=np.int64),
            np.array([lengths[one].sum() for one in ids], dtype=np.int64),
            features,
            means,
            ids,
        )
