"""What the benchmarks read from the data folder, and torchvision's models beside a CPU torch."""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import os
import tarfile
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

DEFAULT_DATA_DIR = Path(__file__).resolve().parents[2] / "shared" / "data"
IMAGE_MAGIC, LABEL_MAGIC = 2051, 2049

_libraries: list[torch.library.Library] = []  # what a Library defines is gone once the object is


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--data-dir``, by default the environment variable ``NNS_DATA_DIR``, else ``../shared/data``."""
    default = Path(os.environ.get("NNS_DATA_DIR") or DEFAULT_DATA_DIR)
    parser.add_argument("--data-dir", type=Path, default=default, help="folder with the data (default: %(default)s)")


def read_mnist(data_dir: Path, split: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """One half of MNIST: images ``[N, 784]`` float32 in [0, 1] and labels ``[N]`` int64.

    Raises:
        SystemExit: If a file is missing or is no IDX file of the expected kind.
    """
    images = _read_idx(data_dir / "mnist" / f"{split}-images-idx3-ubyte.gz", IMAGE_MAGIC, dimensions=3)
    labels = _read_idx(data_dir / "mnist" / f"{split}-labels-idx1-ubyte.gz", LABEL_MAGIC, dimensions=1)
    return images.flatten(1).float() / 255, labels.long()


def moved_by_a_pixel(images: Tensor, share: float) -> Tensor:
    """A batch of images, in a share of all calls moved by a pixel at random; what leaves comes back opposite.

    Args:
        images: ``[N, C, H, W]``, or MNIST's ``[N, 784]``, whose borders are mostly black.
        share: Of the calls.
    """
    if float(torch.rand(())) >= share:
        return images
    down, right = torch.randint(-1, 2, (2,)).tolist()
    height, width = images.shape[2:] if images.dim() == 4 else (28, 28)
    return images.view(len(images), -1, height, width).roll((down, right), (2, 3)).view(images.shape)


def read_cifar10(
    data_dir: Path, split: Literal["train", "test"], classes: Collection[str] | None = None
) -> tuple[Tensor, Tensor]:
    """One half of the CIFAR-10 images, ``[N, 3, 32, 32]`` uint8, and labels ``[N]`` int64 in the classes' alphabet.

    Args:
        data_dir: Holds ``cifar10/cifar10-images.tar.xz``.
        split: Which half.
        classes: Only these.

    Raises:
        SystemExit: If the file cannot be read, or Pillow is missing.
    """
    try:
        image_module = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise SystemExit("the CIFAR-10 images are JPEG files: run pip install pillow") from error
    path = data_dir / "cifar10" / "cifar10-images.tar.xz"
    found: dict[str, tuple[str, np.ndarray]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = Path(member.name).parts
                if not member.isfile() or parts[-3] != split or (classes is not None and parts[-2] not in classes):
                    continue
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = (
                    parts[-2],
                    np.asarray(image_module.open(io.BytesIO(content.read())).convert("RGB")),
                )
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error}; name the folder that holds cifar10/ with --data-dir") from error
    names = sorted({name for name, _ in found.values()})
    chosen = [found[key] for key in sorted(found)]
    images = torch.from_numpy(np.stack([image for _, image in chosen])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([names.index(name) for name, _ in chosen])


def torchvision_models() -> ModuleType:
    """``torchvision.models``, also where torchvision's compiled operators do not load beside this torch."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # The import fails only because it describes the operators of object detection; their names are enough.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision.models")


def _read_idx(path: Path, magic: int, dimensions: int) -> Tensor:
    try:
        content = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error}; name the folder that holds mnist/ with --data-dir") from error
    header = np.frombuffer(content, ">i4", count=1 + dimensions)
    if header[0] != magic:
        raise SystemExit(f"{path} starts with the number {header[0]}; expected {magic}, an IDX file")
    values = np.frombuffer(content, np.uint8, offset=header.nbytes)
    return torch.from_numpy(values.reshape(header[1:].tolist()).copy())
