"""Memory and time of training a transformer whose weights are codes, beside floats, fp32 SGD and AdamW.

    OMP_NUM_THREADS=2 python tests/benchmarks/storage.py --json storage.json

Each kind of training runs in a process of its own, through the Trainer, batch 1 x 128 tokens. Memory is the largest
resident set over steps 3 to 10 above that of the process before the model was built; time is the median of the same
steps; the weights after the last step are compared by checksum between both storages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.ops.coded import plain

KINDS = ("float", "codes", "sgd", "adamw")
TOKENS, VOCABULARY = 128, 256


class LanguageModel(L.LightningModule):
    """A decoder over bytes: torch's own encoder layers under a causal mask, input and output embeddings tied."""

    def __init__(self, layers: int, width: int, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(TOKENS, width)
        blocks = [
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        x = self.embed(tokens[:, :-1]) + self.place.weight
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self):
        make = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.SGD
        return make(self.parameters(), lr=1e-4 if self.optimizer == "adamw" else 0.05)


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(Callback):
    """Largest resident set and the times of steps 3 to 10."""

    def __init__(self) -> None:
        self.peak, self.times, self.begin = 0, [], 0.0
        self.watching = False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            self.watching = True
            threading.Thread(target=self.poll, daemon=True).start()
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, *args):
        if 3 <= trainer.global_step <= 10:
            self.times.append(time.perf_counter() - self.begin)
        if trainer.global_step == 10:
            self.watching = False

    def poll(self) -> None:
        while self.watching:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)


def digest(module: nn.Module) -> str:
    """Checksum of all parameters' float32 bytes."""
    found = hashlib.blake2b(digest_size=16)
    for param in module.parameters():
        found.update(plain(param.detach()).contiguous().numpy().data)
    return found.hexdigest()


def train(kind: str, layers: int, width: int, steps: int) -> dict[str, object]:
    """One training in this process."""
    watch = Watch()
    plugins = []
    if kind in ("float", "codes"):
        plugins = [LowPrecisionSGLD(seed=0, num_data=10_000, loss_scale=1.0, storage=kind, saved_activations="codes")]
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", plugins=plugins, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (steps, TOKENS + 1), generator=generator)
    loader = DataLoader(TensorDataset(tokens), batch_size=1)
    before = resident()
    torch.manual_seed(0)
    if kind == "codes":
        with trainer.init_module():
            module = LanguageModel(layers, width, kind)
    else:
        module = LanguageModel(layers, width, kind)
    trainer.fit(module, loader)
    return {
        "kind": kind, "parameters": sum(p.numel() for p in module.parameters()), "peak_bytes": watch.peak - before,
        "seconds": statistics.median(watch.times), "digest": digest(module),
    }  # fmt: skip


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "lightning": L.__version__,
        "python": platform.python_version(), "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def bars(rows: dict[str, dict]) -> list[dict[str, object]]:
    """The promises: memory against SGD and AdamW, time and bits against float storage."""
    codes, floats = rows["codes"], rows["float"]
    ratios = {
        "peak memory, codes / fp32 SGD": (codes["peak_bytes"] / rows["sgd"]["peak_bytes"], 0.30),
        "peak memory, codes / AdamW": (codes["peak_bytes"] / rows["adamw"]["peak_bytes"], 0.15),
        "time per step, codes / float": (codes["seconds"] / floats["seconds"], 1.5),
    }
    found = [{"what": what, "value": v, "bar": f"<= {bar}", "met": v <= bar} for what, (v, bar) in ratios.items()]
    same = codes["digest"] == floats["digest"]
    return [*found, {"what": "weights after the last step", "value": same, "bar": "bitwise equal", "met": same}]


def main() -> None:
    """Run all kinds, print a table, say whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="one training, in this process; prints JSON")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(train(args.kind, args.layers, args.width, args.steps)))
        return
    rows = {}
    sizes = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "steps")]
    for kind in KINDS:
        command = [sys.executable, __file__, f"--kind={kind}", *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[kind] = json.loads(done.stdout.strip().splitlines()[-1])
        row = rows[kind]
        print(f"{kind:6} {row['peak_bytes'] / 1e6:7.0f} MB {row['seconds']:7.3f} s a step", flush=True)
    report = {"machine": machine(), "rows": rows, "bars": bars(rows)}
    for bar in report["bars"]:
        print(f"{bar['what']:32} {bar['value']!s:.6} (bar: {bar['bar']}) {'met' if bar['met'] else 'MISSED'}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
