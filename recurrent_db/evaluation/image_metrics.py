"""Quality of generated images: distances between two sets of images in the features of a small network of our own.

- `train_extractor` trains the network as a classifier of real images. Its last hidden layer gives 64 features per image.
- `frechet_distance`: Fréchet distance of the normal distributions fitted to two sets of features
  (Heusel et al., arXiv:1706.08500, equation 6).
- `kernel_distance`: squared maximum mean discrepancy of two sets of features with a polynomial kernel of degree 3
  (Binkowski et al., arXiv:1801.01401). The literature calls it KID.

Both depend on the extractor and on the number of images. Results are comparable only under one extractor, which `hash`
names, and for equally many images. They are not comparable with published values, which use features of Inception.
`floor` gives the value that perfect samples would get.

Shapes: N images, B images in a batch, C = 3 channels (red, green, blue), H and W pixels, D = 64 features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from recurrent_db.data import ImageData, ImageLoader, image_batches
from recurrent_db.data.image_shards import MOST_CLASSES
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, sealed, write_atomic
from recurrent_db.rng import key

FEATURES = 64
LEAST_SAMPLES = 10 * FEATURES
"""Fewest images of a set that `compare` accepts. A covariance of 64 features from fewer images is mostly noise."""
SMALLEST = 8
"""Smallest height and width of an image, in pixels: the network halves them three times."""

_WIDTHS = (3, 32, 64, 128, FEATURES)
_BATCH = 128
_FORMAT = "recurrent_db.extractor"


# ---------------------------------------------------------------------------------------------------------------
# The extractor


class Extractor(nn.Module):
    """A small convolutional classifier whose last hidden layer gives the features of an image.

    Args:
        classes: number of classes.
        seed: seed of the initial weights.
    """

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.record: dict[str, Any] = {}
        """How the extractor was trained: "data" (hash of the training data), "seed", "epochs", and "accuracy" on held-out
        images where it was measured. Saved with the weights."""
        generator = torch.Generator().manual_seed(key("extractor", seed))
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(_WIDTHS):
            convolution = nn.utils.skip_init(nn.Conv2d, narrow, wide, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu", generator=generator)
            layers += [convolution, nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers[:-1])
        self.head = nn.utils.skip_init(nn.Linear, FEATURES, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # On a CPU 1.6 times faster. The stubs of PyTorch lack this overload.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def hidden(self, images_BCHW: Tensor) -> Tensor:
        """The features (B, D) in the precision of the weights, with gradient."""
        weight = self.head.weight
        images_BCHW = images_BCHW.to(weight.device, weight.dtype, memory_format=torch.channels_last)
        features_BD: Tensor = self.body(images_BCHW).mean((2, 3))
        return features_BD

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The logits (B, classes) of images in [-1, 1]."""
        logits: Tensor = self.head(self.hidden(images_BCHW))
        return logits

    @torch.no_grad()
    def features(self, images_NCHW: Tensor, batch_size: int = 256) -> Tensor:
        """The features of images: float64 on the CPU, shape (N, D).

        Args:
            images_NCHW: floating-point images of at least 8 x 8 pixels. Values outside [-1, 1] are clamped, as they are
                when an image is saved.

        Raises:
            UserError: the images have another shape or type, or contain NaN or infinity.
        """
        shape = tuple(images_NCHW.shape)
        if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < SMALLEST or not images_NCHW.is_floating_point():
            raise UserError(
                f"the extractor needs floating-point images of shape (N, 3, H, W) with H and W of at least {SMALLEST},"
                f" not {images_NCHW.dtype} of shape {shape}"
            )
        if not bool(torch.isfinite(images_NCHW).all()):
            raise UserError("the images contain NaN or infinity")
        training = self.training
        self.eval()
        parts = [self.hidden(part.clamp(-1, 1)).double().cpu() for part in images_NCHW.split(batch_size)]
        self.train(training)
        return torch.cat(parts)

    def features_of(self, data: ImageData, most: int | None = None) -> Tensor:
        """The features (N, D) of a split's images, or of ``most`` evenly spaced ones."""
        return torch.cat([self.features(batch.images_BCHW) for batch in image_batches(data, 256, most)])

    @torch.no_grad()
    def accuracy(self, data: ImageData) -> float:
        """Share of a split's images that the extractor classifies correctly."""
        right = 0
        for batch in image_batches(data, 256):
            features_BD = self.features(batch.images_BCHW).to(self.head.weight)
            right += int((self.head(features_BD).argmax(1).cpu() == batch.labels_B).sum())
        return right / len(data)

    @property
    def hash(self) -> str:
        """SHA-256 of the weights, 64 hexadecimal digits. It names the extractor; texts print the first 12 digits."""
        return _hash(self.state_dict())


def _hash(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_extractor(
    data: ImageData, seed: int = 0, epochs: int = 10, progress: Callable[[str], None] | None = None
) -> Extractor:
    """Train an extractor on labelled images, with flips and crops. The same call gives the same weights.

    The optimizer is SGD with Nesterov momentum; its learning rate rises linearly for a fifth of the steps, then falls to 0.
    10 epochs of 30,000 images of 32 x 32 pixels take about 5 minutes on one core.

    Args:
        seed: seed of the initial weights and of the order, flips and crops of the images.
        progress: called with one line of text after every epoch.

    Raises:
        UserError: the images are smaller than 8 x 8 pixels, or there is none.
    """
    if min(data.size) < SMALLEST:
        raise UserError(
            f"{data.where}: images of {data.size[0]} x {data.size[1]} pixels, but the extractor needs 8 x 8"
        )
    loader = ImageLoader(data, _BATCH, seed, flip=True, crop_padding=min(data.size) // 8)
    extractor = Extractor(len(data.classes), seed).train()
    per_epoch = math.ceil(len(data) / _BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.SGD(extractor.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))
        batch = loader.batch(step)
        loss = F.cross_entropy(extractor(batch.images_BCHW), batch.labels_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None and (step + 1) % per_epoch == 0:
            progress(f"extractor: epoch {(step + 1) // per_epoch} of {epochs}, training loss {loss.item():.3f}")
    extractor.record = {"data": data.hash, "seed": seed, "epochs": epochs}
    return extractor.eval()


def save_extractor(extractor: Extractor, path: Path) -> None:
    """Save the weights as safetensors, with the record as JSON in the file's metadata.

    Raises:
        UserError: the file cannot be written.
    """
    check_output(path)
    about = sealed({**extractor.record, "classes": extractor.classes, "hash": extractor.hash})
    weights = {name: tensor.contiguous() for name, tensor in extractor.state_dict().items()}
    write_atomic(path, safetensors.torch.save(weights, {"format": _FORMAT, "about": about}))


def load_extractor(path: Path) -> Extractor:
    """Load what `save_extractor` wrote. The file may come from an untrusted source.

    Raises:
        UserError: the file is missing, damaged, or not an extractor.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; an extractor is made by benchmarks/paper/image_metric.py")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not safetensors, or damaged ({str(error)[:120]})") from None
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path}: not an extractor of image features")
    try:
        record = json.loads(metadata["about"])
        record.pop("digest")
        intact = sealed(record) == metadata["about"] and record.pop("hash") == _hash(weights)
        classes = record.pop("classes")
        extractor = Extractor(classes) if 1 <= classes <= MOST_CLASSES else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, extractor = False, None
    if not intact or extractor is None:
        raise UserError(f"{path}: damaged: its checksum is wrong")
    wanted = extractor.state_dict()
    if {name: (t.shape, t.dtype) for name, t in weights.items()} != {n: (t.shape, t.dtype) for n, t in wanted.items()}:
        raise UserError(f"{path}: its weights have other names, shapes or types than an extractor's")
    extractor.load_state_dict(weights)
    extractor.record = record
    return extractor.eval()


# ---------------------------------------------------------------------------------------------------------------
# Distances


class _Given(nn.Identity):
    """Stands where torchmetrics expects a network: its input is the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _checked(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features in float64 on the CPU. Raises `UserError` if they are unusable."""
    for features in (a_ND, b_ND):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a_ND.shape[1]:
            raise UserError(
                f"features of shapes {tuple(a_ND.shape)} and {tuple(b_ND.shape)}: they must be (N, D) with equal D, and"
                " at least 2 samples"
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError("the features contain NaN or infinity")
    return a_ND.double().cpu(), b_ND.double().cpu()


def _torchmetrics(name: str) -> Any:
    try:
        from torchmetrics.image import fid, kid
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit PyTorch
        raise UserError(
            f"distances between images need the library torchmetrics ({str(error)[:120]}):"
            " pip install 'recurrent-db[vision]'"
        ) from None
    return getattr(fid, name, None) or getattr(kid, name)


def frechet_distance(a_ND: Tensor, b_ND: Tensor) -> float:
    """Fréchet distance of two sets of features, in float64. Symmetric; 0 for equal sets.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with means m and covariances S

    Raises:
        UserError: shapes do not fit, a value is not finite, or torchmetrics is missing.
    """
    a_ND, b_ND = _checked(a_ND, b_ND)
    metric = _torchmetrics("FrechetInceptionDistance")(feature=_Given(a_ND.shape[1]))
    metric.update(a_ND, real=True)
    metric.update(b_ND, real=False)
    return max(0.0, float(metric.compute()))  # rounding can give -1e-12


def kernel_distance(a_ND: Tensor, b_ND: Tensor, subsets: int = 100, subset_size: int = 1000) -> tuple[float, float]:
    """Kernel distance (KID) of two sets of features: its mean and standard deviation over random subsets, in float64.

    The kernel is (x . y / D + 1)^3. The estimate is unbiased, so it can be below 0 for similar sets.

    Args:
        subsets: number of pairs of subsets. They are the same in every call.
        subset_size: samples of a subset. Smaller sets are used whole.

    Raises:
        UserError: shapes do not fit, a value is not finite, or torchmetrics is missing.
    """
    a_ND, b_ND = _checked(a_ND, b_ND)
    size = min(subset_size, len(a_ND), len(b_ND))
    build = _torchmetrics("KernelInceptionDistance")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns that it keeps the features in memory
        torch.manual_seed(0)
        metric = build(feature=_Given(a_ND.shape[1]), subsets=subsets, subset_size=size)
        metric.update(a_ND, real=True)
        metric.update(b_ND, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


# ---------------------------------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True)
class ImageScores:
    """Distances between a set of real images and another set."""

    frechet: float
    """Fréchet distance in the features of our own extractor."""
    kid: float
    """Kernel distance: mean over subsets."""
    kid_std: float
    """Kernel distance: standard deviation over subsets."""
    samples: int
    """Number of images that were compared with the real ones."""
    real: int
    """Number of real images."""
    extractor: str
    """`Extractor.hash`."""

    def __str__(self) -> str:
        return (
            f"Fréchet distance {self.frechet:.4f}, KID {self.kid:.5f} ± {self.kid_std:.5f} in the features of our own"
            f" extractor {self.extractor[:12]}, {self.samples:,} images against {self.real:,} real ones"
        )


def compare(extractor: Extractor, real: Tensor, fake: Tensor) -> ImageScores:
    """Distances between real images and generated ones.

    Args:
        real, fake: images (N, 3, H, W) in [-1, 1], or their features (N, D).

    Raises:
        UserError: a set has fewer than `LEAST_SAMPLES` images, they do not fit the extractor, a value is not finite, or
            torchmetrics is missing.
    """
    for name, images in (("real", real), ("generated", fake)):
        if len(images) < LEAST_SAMPLES:
            raise UserError(
                f"{len(images)} {name} images, but the distance needs at least {LEAST_SAMPLES}, ten for each of the"
                f" {FEATURES} features"
            )
    real_ND, fake_ND = (extractor.features(part) if part.ndim == 4 else part for part in (real, fake))
    frechet, (kid, deviation) = frechet_distance(real_ND, fake_ND), kernel_distance(real_ND, fake_ND)
    return ImageScores(frechet, kid, deviation, len(fake_ND), len(real_ND), extractor.hash)


def floor(extractor: Extractor, train: ImageData, real: Tensor, samples: int) -> ImageScores:
    """Distances between ``real`` and ``samples`` evenly spaced training images: what that many perfect samples would score.
    The extractor was trained on these images, so the floor includes its overfitting.

    Args:
        real: images or features of the test split, as in `compare`.
    """
    if samples > len(train):
        raise UserError(f"{samples} training images are asked for, but {train.where} has {len(train)}")
    return compare(extractor, real, extractor.features_of(train, samples))
