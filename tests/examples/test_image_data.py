"""The example's data sets, read from small archives made here in the original layouts."""

import gzip
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def idx(values: np.ndarray) -> bytes:
    """The idx format of the MNIST family: magic number (unsigned byte, dims), sizes, bytes."""
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, packed: bool, train: int = 96, test: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    parts = {}
    for stem, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count)
        images = (labels[:, None, None] * 20 + rng.integers(0, 40, (count, 28, 28))).clip(0, 255)
        for kind, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            name = f"{stem}-{kind}"
            data = idx(values)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
            parts[name] = values
    return parts


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_fashion_mnist_from_idx_archives(tmp_path, packed):
    from image_classification import Images

    parts = write_fashion_mnist(tmp_path, packed)
    data = Images("fashion-mnist", tmp_path, batch_size=32)
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (96, 40)
    image, label = data.test[3]
    assert label == parts["t10k-labels-idx1-ubyte"][3]
    raw = torch.tensor(parts["t10k-images-idx3-ubyte"][3], dtype=torch.float32).unsqueeze(0) / 255
    torch.testing.assert_close(image, (raw - 0.2860) / 0.3530)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (32, 1, 28, 28)
    assert y.dtype == torch.int64


def write_cifar(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The "python version" archives: pickled dicts of (n, 3072) bytes, red then green then blue."""
    rng = np.random.default_rng(1)
    ten = name == "cifar10"
    root = folder / ("cifar-10-batches-py" if ten else "cifar-100-python")
    root.mkdir()
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    key = "labels" if ten else "fine_labels"
    for file in files:
        labels = rng.integers(0, 10 if ten else 100, 12)
        entry = {"data": rng.integers(0, 256, (12, 3072), dtype=np.uint8), key: labels.tolist()}
        (root / file).write_bytes(pickle.dumps(entry))
    meta = {"label_names" if ten else "fine_label_names": [str(i) for i in range(10 if ten else 100)]}
    (root / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))
    return entry


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_the_published_layout(tmp_path, name, monkeypatch):
    """Only torchvision's checksums of the real files are switched off; they cannot hold for a small archive."""
    import torchvision
    from image_classification import DATA, Images

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    last = write_cifar(tmp_path, name)
    data = Images(name, tmp_path, batch_size=4)
    data.setup("fit")
    assert (len(data.train), len(data.test)) == ((60, 12) if name == "cifar10" else (12, 12))
    _, _, _, mean, std = DATA[name]
    image, _ = data.test[0]
    raw = torch.tensor(last["data"][0].reshape(3, 32, 32), dtype=torch.float32) / 255
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(image, expected)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)


def test_nets_have_the_published_size():
    from image_classification import resnet18, small_net

    assert sum(p.numel() for p in resnet18(3, 10).parameters()) == 11_173_962
    assert small_net(1, 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert small_net(3, 100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_image_example_runs_end_to_end(tmp_path):
    write_fashion_mnist(tmp_path, packed=True)
    command = [
        sys.executable, str(EXAMPLES / "image_classification.py"), "--data", "fashion-mnist",
        "--data-dir", str(tmp_path), "--epochs", "2", "--batch-size", "32", "--methods", "VC SGLDLP-L, bfp8",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "VC SGLDLP-L, bfp8" in done.stdout
    assert (tmp_path / "out" / "fashion-mnist-small.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "fashion-mnist-small.json").exists()


def test_digits_example_prints_its_table_and_draws_its_figure(tmp_path):
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--epochs", "2", "--figure", str(tmp_path / "digits.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for label in ("SGD, fp32", "SGLD, fp32", "naive SGLDLP-L, bfp8", "VC SGLDLP-L, bfp8", "SGLDLP-F, bfp8"):
        assert label in done.stdout
    assert (tmp_path / "digits.png").stat().st_size > 10_000
