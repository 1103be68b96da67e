"""Memory and time of training a transformer whose weights are codes, beside floats, fp32 SGD and AdamW.

    OMP_NUM_THREADS=2 python tests/benchmarks/storage.py --json storage.json

Each kind of training runs in a process of its own, through the Trainer, batch 1 x 128 tokens. Memory is the largest
resident set over steps 3 to 10 above that of the process before the model was built; time is the median of the same
steps; the weights after the last step are compared by checksum between both storages. One kind alone, of another
format (four bits) and with sums beside the weights:

    OMP_NUM_THREADS=2 python tests/benchmarks/storage.py --kind codes --weights bfp4 --accumulator bfp16
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.ops.coded import plain

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from billion_weights import BYTES, TOKENS, ByteModel, Watch, machine, resident

KINDS = ("float", "codes", "sgd", "adamw")


def digest(module: nn.Module) -> str:
    """Checksum of all parameters' float32 bytes."""
    found = hashlib.blake2b(digest_size=16)
    for param in module.parameters():
        found.update(plain(param.detach()).contiguous().numpy().data)
    return found.hexdigest()


def train(
    kind: str, layers: int, width: int, steps: int, weights: str = "bfp8", accumulator: str = "low"
) -> dict[str, object]:
    """One training in this process; activations have the format of the weights."""
    watch = Watch(3, 10)
    plugins = []
    if kind in ("float", "codes"):
        formats = {"weights": weights, "activations": weights, "accumulator": accumulator}
        options = {"num_data": 10_000, "loss_scale": 1.0, "storage": kind, "saved_activations": "codes"}
        plugins = [LowPrecisionSGLD(seed=0, **formats, **options)]
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", plugins=plugins, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, BYTES, (steps, TOKENS + 1), generator=generator)
    loader = DataLoader(TensorDataset(tokens), batch_size=1)
    before = resident()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    with trainer.init_module():  # with storage="codes" of codes
        module = ByteModel(layers, width, optimizer)
    trainer.fit(module, loader)
    return {
        "kind": kind, "stored_bytes": sum(getattr(p, "nbytes_stored", p.nbytes) for p in module.parameters()),
        "parameters": sum(p.numel() for p in module.parameters()), "peak_bytes": watch.peak - before,
        "seconds": statistics.median(watch.seconds), "digest": digest(module),
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
    parser.add_argument("--weights", default="bfp8", help="with --kind: format of weights and activations")
    parser.add_argument("--accumulator", default="low", help="with --kind: where steps are summed")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(train(args.kind, args.layers, args.width, args.steps, args.weights, args.accumulator)))
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
