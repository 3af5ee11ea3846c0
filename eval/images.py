"""Score a run that was trained on images: accuracy of a classifier, or samples of a generator.

python eval/images.py RUN --data DIR [--split test] [--steps 1,3,6] [--json OUT]
python eval/images.py RUN --data DIR --samples 5000 --guidance 2 --extractor FILE [--grid samples.png] [--json OUT]

A classifier (objectives classify and denoise_class): prints accuracy and nats per image on the split, by number of steps of
the walk, and by block. A block's scores are those of its read-out in a walk where each block makes one step.

A generator (objective denoise_image): samples images, with classes in equal shares, and draws a picture with a row for each
class. With --extractor it prints the Fréchet distance and KID between the samples and the split, in the features of our own
extractor (benchmarks/paper/image_metric.py trains one). Beside them is the floor: the distance of as many real training
images. Distances are comparable only under one extractor and for equally many samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from recurrent_db.arguments import run_command  # before torch: sets how idle threads wait

# isort: split
import torch
import tyro
from tqdm import tqdm

from recurrent_db.data import ImageData, open_images
from recurrent_db.data.image_shards import read_image_manifest
from recurrent_db.errors import UserError
from recurrent_db.evaluation.image_metrics import FEATURES, LEAST_SAMPLES, ImageScores, floor, load_extractor
from recurrent_db.evaluation.images import (
    check_fits,
    check_samples,
    classify_images,
    draw_grid,
    load_pillow,
    sample_images,
    score_samples,
    walk_flops,
)
from recurrent_db.files import check_output, write_atomic
from recurrent_db.schema import Count, PositiveInt
from recurrent_db.store.loading import ImageRun, load_image_run


@dataclass
class Args:
    """Score a run's newest good checkpoint on images, with its averaged weights if it has any."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder made by train/prepare_images.py, with the run's classes and image size."""
    split: Literal["test", "validation", "train"] | None = None
    """Split to score on; by default test, or validation where there is no test split."""
    steps: tuple[PositiveInt, ...] = ()
    """Classifier: numbers of steps of the walk; by default 1, one for each block, and two for each block."""
    draws: Count = 0
    """Classifier: walks from noise whose probabilities are averaged. 0 makes one walk from zero, the mean of the noise."""
    samples: PositiveInt = 5000
    """Generator: number of images to sample."""
    guidance: float = 1.0
    """Generator: strength of classifier-free guidance. 1 means none; other strengths evaluate every block twice."""
    sampler: Literal["euler", "heun"] = "euler"
    """Generator: sampler of the walk."""
    sampler_steps: PositiveInt = 50
    """Generator: steps of the walk."""
    extractor: Path | None = None
    """Generator: file of the extractor under which samples are scored; without it they are not scored."""
    grid: Path | None = None
    """Generator: PNG file for the picture. It is also written beside the result."""
    batch_size: PositiveInt = 100
    """Images in a batch."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    threads: Count = 0
    """CPU threads; 0 keeps PyTorch's choice."""
    json: Path | None = None
    """File for the result; by default RUN/eval/images.json, where the report reads it."""


OF_CLASSIFIERS = ("steps", "draws")
OF_GENERATORS = ("samples", "guidance", "sampler", "sampler_steps", "extractor", "grid")


def refuse_options(args: Args, names: tuple[str, ...], run: ImageRun) -> None:
    """Raise `UserError` if an option in ``names``, which this kind of run does not use, is set."""
    for name in names:
        if getattr(args, name) != getattr(Args, name):
            option, objective = f"--{name.replace('_', '-')}", run.config.objective.name
            other = "classifiers" if name in OF_CLASSIFIERS else "generators"
            raise UserError(f"{option} is for {other}, but {args.run} is a {objective} run")


def open_split(args: Args) -> ImageData:
    there = read_image_manifest(args.data)["splits"]
    return open_images(args.data, args.split or ("test" if there.get("test") else "validation"), verify=True)


def classification(args: Args, run: ImageRun, data: ImageData) -> dict[str, Any]:
    """Print a classifier's scores. Returns the entries of the result."""
    with tqdm(total=len(data), desc="scoring", unit="image", disable=None, leave=False) as bar:
        scores = classify_images(run, data, args.steps, args.draws, args.seed, args.batch_size, bar.update)
    draws = args.draws if scores.by_block else 0
    tables: dict[str, dict[str, Any]] = {"by_steps": {}, "by_block": {}}
    print(f"{run.path}: {run.config.objective.name}, {len(data):,} images of {data.where}, {draws or 'no'} draws")
    print(f"{'':10} {'accuracy':>9} {'stderr':>7} {'nats/image':>11} {'stderr':>7} {'FLOPs/image':>12}")
    for key, name, table in (("by_steps", "steps", scores.by_steps), ("by_block", "block", scores.by_block)):
        for number, log_probs in table.items():
            s = scores.summary(log_probs)
            cost = {"flops_per_image": scores.flops[number]} if key == "by_steps" else {}
            tables[key][str(number)] = asdict(s) | cost
            line = (
                f"{name:5} {number:>4} {s.accuracy:>9.4f} {s.accuracy_stderr:>7.4f} {s.nll:>11.4f} {s.nll_stderr:>7.4f}"
            )
            print(line + (f" {scores.flops[number]:>12.3e}" if cost else ""))
    return {"draws": draws, **tables}


def check_generation(args: Args, run: ImageRun) -> None:
    check_samples(run, args.guidance, args.sampler)
    load_pillow()
    if args.extractor is not None and args.samples < LEAST_SAMPLES:
        raise UserError(
            f"--samples {args.samples} is too few for a distance: at least {LEAST_SAMPLES} are needed, ten for each of the"
            f" {FEATURES} features"
        )


def generation(args: Args, run: ImageRun, data: ImageData, picture: Path) -> dict[str, Any]:
    """Sample, print the distances and write the picture. Returns the entries of the result."""
    check_fits(run, data)
    flops = walk_flops(run, args.sampler_steps, args.sampler, args.guidance)
    low: ImageScores | None = None
    if args.extractor is not None:  # before sampling, which takes longest
        extractor = load_extractor(args.extractor)
        real_ND = extractor.features_of(data)
        low = floor(extractor, open_images(args.data, "train", verify=True), real_ND, args.samples)
    with tqdm(total=args.samples, desc="sampling", unit="image", disable=None, leave=False) as bar:
        samples = sample_images(
            run, args.samples, args.guidance, args.sampler_steps, args.sampler, args.seed, args.batch_size, bar.update
        )
    drawn = draw_grid(samples, len(data.classes))
    for path in {picture, args.grid or picture}:
        write_atomic(path, drawn)
    print(
        f"{run.path}: {run.config.objective.name}, {args.samples:,} samples, {args.sampler} in {args.sampler_steps} steps,"
        f" guidance {args.guidance:g}, {flops:.3e} FLOPs per sample; picture in {args.grid or picture}"
    )
    result: dict[str, Any] = {
        "samples": args.samples, "guidance": args.guidance, "sampler": args.sampler, "sampler_steps": args.sampler_steps,
        "flops_per_image": flops,
    }  # fmt: skip
    if low is not None:
        scores = score_samples(extractor, real_ND, samples)
        print(f"samples: {scores}")
        print(f"floor (real training images): {low}")
        result |= {"distance": asdict(scores), "floor": asdict(low)}
    return result


def main(args: Args) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    run = load_image_run(args.run, args.device)
    folder = run.path.parents[1] if run.path.parent.name == "checkpoints" else run.path
    out = args.json or folder / "eval" / "images.json"
    picture = out.with_suffix(".png")
    generates = run.config.model.network == "dit"
    refuse_options(args, OF_CLASSIFIERS if generates else OF_GENERATORS, run)
    if generates:
        check_generation(args, run)
    for path in (out, *([picture, args.grid or picture] if generates else [])):
        check_output(path)
    data = open_split(args)
    result = {
        "objective": run.config.objective.name, "checkpoint": str(run.path), "data": data.hash, "split": data.split,
        "images": len(data), "classes": list(data.classes), "seed": args.seed,
    }  # fmt: skip
    result |= generation(args, run, data, picture) if generates else classification(args, run, data)
    write_atomic(out, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
