"""The comparison of ``digits.py`` on Fashion-MNIST, CIFAR-10 and CIFAR-100, by a small net or ResNet-18.

::

    python examples/image_classification.py --data fashion-mnist --net small --epochs 6
    python examples/image_classification.py --data cifar10 --net resnet18 --epochs 245 --batch-size 128

The data are torchvision's; ``--download`` fetches them. Fashion-MNIST is also read from a folder that holds its four
``idx`` archives (``--data-dir``), which is how Debian's package ``dataset-fashion-mnist`` installs it.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torchvision
from comparison import METHODS, draw_figure, print_table, train_and_evaluate
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms import v2

#: Name -> torchvision class, classes, channels, mean and standard deviation of the training pixels.
DATA = {
    "fashion-mnist": (torchvision.datasets.FashionMNIST, 10, 1, (0.2860,), (0.3530,)),
    "cifar10": (torchvision.datasets.CIFAR10, 10, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (torchvision.datasets.CIFAR100, 100, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def idx_folder(root: Path, train: bool) -> TensorDataset | None:
    """Fashion-MNIST from the plain archives in ``root``, or ``None`` if they are not there."""
    stem = "train" if train else "t10k"
    files = [
        next(
            (root / f"{stem}-{kind}{suffix}" for suffix in ("", ".gz") if (root / f"{stem}-{kind}{suffix}").exists()),
            None,
        )
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    if None in files:
        return None
    images, labels = read_image_file(str(unpacked(files[0]))), read_label_file(str(unpacked(files[1])))
    return TensorDataset(images.unsqueeze(1), labels)


def unpacked(path: Path) -> Path:
    """``path`` itself, or a temporary copy of the unpacked archive."""
    if path.suffix != ".gz":
        return path
    import gzip
    import tempfile

    target = Path(tempfile.mkdtemp()) / path.stem
    target.write_bytes(gzip.decompress(path.read_bytes()))
    return target


class Transformed(Dataset):
    """A data set whose images go through a transform."""

    def __init__(self, data: Dataset, transform: v2.Transform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        image, label = self.data[index]
        return self.transform(image), int(label)


class Images(L.LightningDataModule):
    """Train and test images of one of :data:`DATA`; crop and flip as in the paper for CIFAR, if ``augment``."""

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        batch_size: int,
        download: bool = False,
        limit: int | None = None,
        workers: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.root, self.batch_size = name, root, batch_size
        self.download, self.limit, self.workers, self.augment = download, limit, workers, augment

    def prepare_data(self) -> None:
        """Download, if asked to."""
        if self.download:
            for train in (True, False):
                DATA[self.name][0](self.root, train=train, download=True)

    def setup(self, stage: str) -> None:
        """Read the data and attach the transforms."""
        kind, _, _, mean, std = DATA[self.name]
        plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        moved = self.augment and self.name.startswith("cifar")
        augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if moved else []
        parts = []
        for train in (True, False):
            data = idx_folder(self.root, train) if self.name == "fashion-mnist" else None
            data = data or kind(self.root, train=train)
            if isinstance(data, TensorDataset):  # all images at once: much faster than one by one
                images, labels = data.tensors
                scaled = (images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
                parts.append(TensorDataset(scaled[: self.limit], labels[: self.limit].long()))
                continue
            if self.limit is not None:
                data = Subset(data, range(min(self.limit, len(data))))
            steps = ([v2.ToImage(), *augment] if train else []) + plain
            parts.append(Transformed(data, v2.Compose(steps)))
        self.train, self.test = parts

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(
            self.train, self.batch_size, shuffle=True, num_workers=self.workers, persistent_workers=self.workers > 0
        )

    def test_dataloader(self) -> DataLoader:
        """The test images in order."""
        return DataLoader(self.test, 500, num_workers=self.workers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual block."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 for small images: 3x3 stem, no max-pooling; 11,173,962 parameters for 3 channels and 10 classes."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def small_net(channels: int, classes: int) -> nn.Module:
    """Three convolutions with batch normalization; minutes on two cores."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


NETS = {"small": small_net, "resnet18": resnet18}


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="torchvision root, or a folder of idx archives"
    )
    parser.add_argument("--download", action="store_true", help="let torchvision download the data")
    parser.add_argument("--net", choices=NETS, default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--burn-in", type=float, default=0.5, help="share of the run before the first sample")
    parser.add_argument("--temperature", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, help="use only the first images of train and test (a quick look)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the figure and the JSON results")
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not args.progress:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    _, classes, channels, _, _ = DATA[args.data]
    results = []
    for label in args.methods:
        data = Images(
            args.data, args.data_dir, batch_size=args.batch_size, download=args.download, limit=args.limit,
            workers=args.workers,
        )  # fmt: skip
        make_net = partial(NETS[args.net], channels, classes)
        result = train_and_evaluate(
            label, METHODS[label], make_net, data, epochs=args.epochs, lr=args.lr, weight_decay=args.weight_decay,
            burn_in=args.burn_in, temperature=args.temperature, seed=args.seed, progress=args.progress,
        )  # fmt: skip
        results.append(result)
        print(f"{label}: done in {result.seconds:.0f} s", flush=True)
    print_table(results)
    name = f"{args.data}-{args.net}"
    draw_figure(results, args.out / f"{name}.png")
    versions = {"torch": torch.__version__, "lightning": L.__version__, "machine": platform.machine()}
    record = {"arguments": {k: str(v) for k, v in vars(args).items() if k != "out"}, "versions": versions}
    record["results"] = [{k: v for k, v in asdict(r).items() if k != "reliability"} for r in results]
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
