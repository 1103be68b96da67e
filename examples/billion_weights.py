"""Sample all weights of a transformer of a billion in less memory than its float32 weights alone would take.

    python examples/billion_weights.py --json examples/results/billion_weights.json

Between uses each weight is a byte (``storage="codes"``): the network is built as codes, every layer's weights are
decoded when it runs, and each is moved, with its Langevin noise, as soon as its gradient is there. The text is the
source of this package, byte by byte; the weights begin random, or with ``--weights`` from a ``state_dict``. Printed:
the largest resident memory above the process before the network was built, and seconds a step, beside what float32 SGD
and AdamW would need for weights, gradients and moments alone.

``--bank FOLDER`` also keeps the last step's weights as a posterior sample (one byte a weight).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lpsgld
from lightning_lpsgld import LowPrecisionSGLD, SampleCollector

TOKENS, BYTES = 128, 256


class ByteModel(L.LightningModule):
    """A decoder over bytes: torch's own encoder layers under a causal mask, input and output embeddings tied."""

    def __init__(self, layers: int, width: int, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.embed = nn.Embedding(BYTES, width)
        self.place = nn.Embedding(TOKENS, width)
        blocks = [
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        """Mean negative log likelihood of the next byte."""
        (text,) = batch
        x = self.embed(text[:, :-1]) + self.place.weight
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        loss = nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """What the plugin makes a sampler of."""
        return self.optimizer(self.parameters(), lr=1e-4 if self.optimizer is torch.optim.AdamW else 0.002)


def text() -> DataLoader:
    """The package's source in rows of 129 bytes, one a batch, shuffled once."""
    files = sorted(Path(lightning_lpsgld.__file__).parent.rglob("*.py"))
    everything = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    rows = everything[: len(everything) // (TOKENS + 1) * (TOKENS + 1)].view(-1, TOKENS + 1).long()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(rows[order]), batch_size=1)


class Source(L.LightningDataModule):
    """The same text for the command line (``configs/billion-weights.yaml``)."""

    def train_dataloader(self) -> DataLoader:
        """Row by row."""
        return text()


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Largest resident memory within a block, or from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self.bytes, self._over = 0, threading.Event()

    def start(self) -> None:
        """Begin to look."""
        self.bytes = resident()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._over.set()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._thread.join()

    def _poll(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, resident())


class Watch(Callback):
    """Largest resident memory, seconds and losses from one step to another, counted from 1 and both included."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.seconds, self.losses = [], []
        self._begin, self._memory = 0.0, Peak()

    @property
    def peak(self) -> int:
        """Bytes."""
        return self._memory.bytes

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Begin to look where that is due."""
        if trainer.global_step + 1 == self.first:
            self._memory.start()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, *args):
        """Note the step."""
        self.losses.append(float(outputs["loss"]))
        if self.first <= trainer.global_step <= self.last:
            self.seconds.append(time.perf_counter() - self._begin)
            print(f"step {trainer.global_step}: loss {self.losses[-1]:.3f}, {self.seconds[-1]:.1f} s", flush=True)
        if trainer.global_step == self.last:
            self._memory.stop()

    def on_exception(self, trainer, module, exception):
        """Look no longer."""
        self._memory.stop()


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model, "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version(),
    }  # fmt: skip


def sample(layers: int, width: int, steps: int, weights: Path | None = None, bank: Path | None = None) -> dict:
    """Build, sample, measure.

    Args:
        layers: Blocks.
        width: Of the residual stream; a multiple of 64.
        steps: Number of steps; the first one is not measured.
        weights: File of a ``state_dict`` to begin with.
        bank: Folder for the sample of the last step.
    """
    watch = Watch(2, steps)
    callbacks = [watch] if bank is None else [watch, SampleCollector(bank, start=steps - 1)]
    plugin = LowPrecisionSGLD(
        storage="codes", saved_activations="codes", seed=0, loss_scale=1.0, start_from=weights
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", plugins=[plugin], callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    before = resident()
    begin = time.perf_counter()
    with trainer.init_module():
        module = ByteModel(layers, width)
    built = time.perf_counter() - begin
    trainer.fit(module, text())
    count = sum(param.numel() for param in module.parameters())
    return {
        "weights": count,
        "stored_bytes": sum(param.nbytes_stored for param in module.parameters()),
        "peak_bytes": watch.peak - before,
        "sgd_bytes": 2 * 4 * count,  # weights and gradients
        "adamw_bytes": 4 * 4 * count,  # and two moments
        "seconds_to_build": built,
        "seconds_a_step": statistics.median(watch.seconds),
        "losses": watch.losses,
    }


def main() -> None:
    """Sample, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--weights", type=Path, help="state_dict to begin with")
    parser.add_argument("--bank", type=Path, help="folder for the sample of the last step")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.manual_seed(0)
    figures = sample(args.layers, args.width, args.steps, args.weights, args.bank)
    print(f"\n{figures['weights'] / 1e6:.1f} million weights, {figures['seconds_a_step']:.1f} s a step\n")
    print("| what | memory |\n|---|---|")
    print(f"| sampled as codes, measured: everything above the empty process | {figures['peak_bytes'] / 1e9:.2f} GB |")
    print(f"| of which codes | {figures['stored_bytes'] / 1e9:.2f} GB |")
    print(f"| float32 SGD, computed: weights and gradients alone | {figures['sgd_bytes'] / 1e9:.2f} GB |")
    print(f"| float32 AdamW, computed: and two moments | {figures['adamw_bytes'] / 1e9:.2f} GB |")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
