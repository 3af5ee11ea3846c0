"""The task of training on images. `tasks.Task` is its contract."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from recurrent_db.accounting.image_flops import positions
from recurrent_db.config import Config, validate
from recurrent_db.data import ImageBatch, ImageLoader, image_batches, open_images
from recurrent_db.data.vocabulary import ImageClasses
from recurrent_db.distributed.team import Team
from recurrent_db.errors import UserError
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.objectives import Objective
from recurrent_db.training.loader_task import LoaderTask

SCORED_AT_ONCE = 128
"""Held-out images per forward pass."""


class ImageTask(LoaderTask[ImageBatch]):
    """Training on image shards.

    Args:
        config: the run's configuration. ``model.image_size`` and ``model.n_classes`` are set from the data.
        team: the processes that share the batches.

    Raises:
        UserError: the data is missing or damaged, training and validation data have different sizes or classes, the images
            cannot be cut into patches, or a setting is for text only.
    """

    def __init__(self, config: Config, team: Team) -> None:
        data, run = config.data, config.run
        if not data.path:
            raise UserError("data.path is not set: name a folder made by train/prepare_images.py with --data.path DIR")
        for key, is_set in (
            ("data.mixture", data.mixture), ("run.compile", run.compile),
            ("run.activation_checkpointing", run.activation_checkpointing),
        ):  # fmt: skip
            if is_set:
                raise UserError(f"{key} is for language models; objective {config.objective.name} trains on images")
        super().__init__(config, team)
        self.images = open_images(data.path, "train", verify=True)
        self.vocabulary = ImageClasses.of(self.images)
        self.validation = open_images(data.val_path or data.path, "validation", verify=True)
        for what, ours, theirs in (
            ("classes", self.images.classes, self.validation.classes), ("sizes", self.images.size, self.validation.size),
        ):  # fmt: skip
            if ours != theirs:
                raise UserError(
                    f"data.path {data.path} and data.val_path {data.val_path} have images of different {what}"
                )
        config.model.image_size, config.model.n_classes = list(self.images.size), len(self.images.classes)
        validate(config)
        self.loader = ImageLoader(self.images, data.batch_size, config.seed, data.flip, data.crop_padding)
        self.tokens_per_step = data.batch_size * positions(config.model)
        shares = np.bincount(self.images.labels, minlength=len(self.images.classes)) / len(self.images)
        entropy = float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
        self.floor = entropy if config.objective.own.network == "vit" else math.inf

    def build_model(self, objective: Objective, bfloat16: bool) -> nn.Module:
        model = build_image_network(self.config, self.config.seed, self.team.device)
        objective.prepare(model)
        return model

    def describe(self, model: nn.Module) -> Iterator[str]:
        total = sum(parameter.numel() for parameter in model.parameters())
        height, width = self.images.size
        yield f"{self.config.objective.name} on {self.team}: {total:,} parameters"
        yield (
            f"{len(self.images):,} training images of {height} x {width} pixels, {len(self.images.classes)} classes,"
            f" {self.config.data.batch_size} per step"
        )

    def evaluate(self, model: nn.Module, objective: Objective) -> dict[str, float]:
        """The objective's held-out scores. Every process computes all of them."""
        count = max(1, self.config.eval.tokens // positions(self.config.model))
        batches = (batch.to(self.team.device) for batch in image_batches(self.validation, SCORED_AT_ONCE, count))
        return objective.held_out(model, self.team.beating(batches), self.vocabulary, self.config.seed)

    def state_rms(self, model: Any, batch: ImageBatch) -> list[float]:
        return []
