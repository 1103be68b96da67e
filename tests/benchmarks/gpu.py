"""What the package does on a GPU, in one JSON file: tests, kernels against bandwidth, training, ensembles.

::

    python tests/benchmarks/gpu.py --out gpu.json                     # everything, at most ten minutes
    python tests/benchmarks/gpu.py --budget-seconds 240 --out gpu.json
    python tests/benchmarks/gpu.py kernels training --out gpu.json    # some parts
    python tests/benchmarks/gpu.py --device cpu --dry-run             # tiny sizes, without a GPU: does the script work?
    python tests/benchmarks/gpu.py --table gpu.json                   # what such a file holds, as a Markdown table

The file is written anew after every measurement, so that a run that is cut short leaves what it had. Times are medians
by device events, or of whole loops between two synchronizations. A part that is out of time says so and ends.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "study"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fashion import resnet8
from image_classification import resnet18

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleBank
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import StepSpec, backend_report, decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers import SGHMC, SGLD
from lightning_lpsgld.samplers.updates import langevin_steps_

ROOT = Path(__file__).resolve().parents[2]
KEY = DrawKey(1)


class Run:
    """Sizes, the clock, and the file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dry, self.out = args.device, args.dry_run, args.out
        self.began, self.budget = time.monotonic(), args.budget_seconds
        self.last = [*args.parts, *([] if args.parts else PARTS)][-1]
        self.report: dict[str, Any] = {"machine": machine(self.device), "parts": {}}

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.began)

    def put(self, part: str, what: str, row: dict[str, Any]) -> None:
        """Keep, write and print one measurement."""
        self.report["parts"].setdefault(part, {})[what] = row
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        self.report["backends"] = backend_report()
        if self.out:
            self.out.write_text(json.dumps(self.report, indent=1) + "\n")
        print(f"{self.report['seconds']:6.1f} s  {part:<9} {what:<58} {json.dumps(row)[:300]}", flush=True)

    def attempt(self, part: str, what: str, action: Callable[[], dict[str, Any]], needs: float = 3.0) -> None:
        """Make one measurement if there is time for it; an error is its result."""
        if self.left < needs:
            self.put(part, what, {"skipped": "out of time"})
            return
        try:
            row = action()
        except Exception as error:  # the next measurement may still work
            row = {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]}
        self.put(part, what, row)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int = 15) -> float:
        """Median seconds of an action on the device, after three calls that are not timed."""
        for _ in range(1 if self.dry else 3):
            action()
        self.wait()
        times = []
        for _ in range(2 if self.dry else repeats):
            if self.device == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                action()
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last) / 1e3)
            else:
                began = time.perf_counter()
                action()
                times.append(time.perf_counter() - began)
        return statistics.median(times)


def machine(device: str) -> dict[str, Any]:
    """Names and versions."""
    facts: dict[str, Any] = {
        "torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version(),
        "cores": os.cpu_count(), "processor": platform.processor() or platform.machine(),
    }  # fmt: skip
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
        facts["tf32"] = {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return facts | {"commit": commit.stdout.strip()}


# ---------------------------------------------------------------------------------------------------------------- tests


def tests(run: Run) -> None:
    """``tests/gpu`` in processes side by side; what was not reached in time is missing from the counts."""
    log = Path(run.out or "gpu.json").resolve().with_suffix(".tests.jsonl")
    log.unlink(missing_ok=True)
    seconds = max(10.0, run.left - 5 if run.last == "tests" else 0.5 * run.budget)
    workers = str(min(12, max(1, 3 * (os.cpu_count() or 2) // 4)))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
        "-n",
        workers,
        "--timeout=120",
    ]
    if run.dry:
        command += ["-k", "draws_are or block_is", "-n", "0"]
    env = os.environ | {"GPU_TESTS_LOG": str(log), "OMP_NUM_THREADS": "1", "GPU_TESTS_DEVICE": run.device}
    # Named, because inductor would move it within a process, and the kernels would be compiled again there.
    env.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    cut, began = False, time.monotonic()
    with (log.with_suffix(".txt")).open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            cut = True
            process.terminate()
            process.wait()
    run.put("tests", "tests/gpu", tested(log) | {"cut short": cut, "seconds": round(time.monotonic() - began, 1)})


def tested(log: Path) -> dict[str, Any]:
    """Counts, failures and the slowest of a log of test reports."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:8]
    return {
        "counts": counts,
        "failures": [{"test": row["test"], "why": row["why"][-1200:]} for row in rows if row["outcome"] == "failed"],
        "skips": sorted({row["why"][-160:] for row in rows if row["outcome"] == "skipped"}),
        "slowest": [f"{row['seconds']:.1f} s {row['test']}" for row in slowest],
    }


# -------------------------------------------------------------------------------------------------------------- kernels


def kernels(run: Run) -> None:
    """Each op on a tensor larger than any cache: bandwidth by the bytes it must move, and its share of a copy's."""
    count = 14336 if not run.dry else 8
    x = torch.randn(count, 4608, device=run.device)
    out, size = torch.empty_like(x), x.numel()
    copy = run.seconds(lambda: out.copy_(x))
    run.put("kernels", "copy", {"ms": 1e3 * copy, "GB/s": 8e-9 * size / copy})

    def measured(action: Callable[[], object], moved: float, elements: int = size) -> dict[str, Any]:
        seconds = run.seconds(action)
        rate = 1e-9 * moved * elements / seconds
        return {"ms": 1e3 * seconds, "GB/s": rate, "share of a copy": rate / (8e-9 * size / copy), "bytes": moved}

    for text in ("bfp8", "bfp8-clamp", "bfp8-tensor", "bfp8b32", "fixed8.6", "e4m3", "mxfp8e4m3"):
        for rounding in ("stochastic", "nearest") if text in ("bfp8", "fixed8.6") else ("stochastic",):
            action = lambda t=text, r=rounding: quantize(x, t, rounding=r, key=KEY)  # noqa: E731
            run.attempt("kernels", f"quantize {text} {rounding}", lambda a=action: measured(a, 8))
    half = x.to(torch.bfloat16)
    run.attempt("kernels", "quantize bfp8 bfloat16", lambda: measured(lambda: quantize(half, "bfp8", key=KEY), 4))
    shape = (128, 64, 32, 32) if not run.dry else (2, 4, 8, 8)
    image = torch.randn(shape, device=run.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        there = image.to(memory_format=layout)
        what = f"quantize bfp8, activation {'x'.join(map(str, shape))}, {str(layout)[6:]}"
        run.attempt("kernels", what, lambda t=there: measured(lambda: quantize(t, "bfp8", key=KEY), 8, image.numel()))
    for text in ("bfp8", "fixed8.6", "e4m3"):
        run.attempt("kernels", f"encode {text}", lambda t=text: measured(lambda: encode(x, t, rounding="nearest"), 5))
        codes = encode(x, text, rounding="nearest")
        run.attempt("kernels", f"decode {text}", lambda c=codes: measured(lambda: decode(c), 5))
        for variance in (1e-8, 1e-2):
            action = lambda t=text, v=variance: quantize_variance_corrected(x, v, t, key=KEY)  # noqa: E731
            run.attempt("kernels", f"Q^vc {text}, variance {variance:g}", lambda a=action: measured(a, 8))


def steps(run: Run) -> None:
    """The fused step on large weights and on ResNet-18's, and whole sampler steps against torch's fused SGD."""
    number = 28 if not run.dry else 1
    shape = (512, 4608) if not run.dry else (8, 64)
    large = [torch.randn(shape, device=run.device) * 0.05 for _ in range(number)]
    small = [p.detach().to(run.device) for p in (resnet8() if run.dry else resnet18(3, 10)).parameters()]
    for name, params in (("66 M in 28 tensors", large), ("ResNet-18", small)):
        grads = [torch.randn_like(p) * 2e-3 for p in params]
        sums = [p.clone() for p in params]
        elements = sum(p.numel() for p in params)
        for weights, gradients, mode in (
            ("bfp8", "bfp8", "vc"), ("bfp8", "bfp8", "naive"), ("bfp8", "bfp8", "full"), ("fixed8.6", "fixed8.6", "vc"),
            ("e4m3", "bfp8", "vc"), (None, None, "float"),
        ):  # fmt: skip
            formats = [None if text is None else parse_format(text) for text in (weights, gradients)]
            spec = StepSpec(1e-6, 5e-4, 1e-8, formats[0], formats[1], mode)  # type: ignore[arg-type]

            def action(spec: StepSpec = spec, params: Any = params, grads: Any = grads, sums: Any = sums) -> None:
                accumulators = sums if spec.accumulation == "full" else None
                langevin_steps_(params, grads, accumulators, spec, [KEY] * len(params), range(len(params)))

            def row(
                action: Any = action, moved: int = 16 if mode == "full" else 12, n: int = elements
            ) -> dict[str, Any]:
                seconds = run.seconds(action)
                return {"ms": 1e3 * seconds, "GB/s": 1e-9 * moved * n / seconds, "bytes": moved}

            run.attempt("steps", f"{mode} {weights}/{gradients}, {name}", row)
    optimizers(run)


def optimizers(run: Run) -> None:
    """``optimizer.step()`` as a user calls it, host work included: it is what small networks wait for."""
    make: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "SGD fused": lambda p: torch.optim.SGD(p, 1e-6, fused=run.device == "cuda"),
        "SGLD bfp8": lambda p: SGLD(p, 1e-6, num_data=50_000, weight_format="bfp8", gradient_format="bfp8"),
        "SGLD fixed8.6": lambda p: SGLD(p, 1e-6, num_data=50_000, weight_format="fixed8.6", gradient_format="fixed8.6"),
        "SGHMC bfp8": lambda p: SGHMC(
            p, 1e-3, num_data=50_000, friction=1.0, weight_format="bfp8", gradient_format="bfp8", velocity_format="bfp8"
        ),
    }
    for name, build in make.items():

        def row(build: Any = build) -> dict[str, Any]:
            net = resnet8() if run.dry else resnet18(3, 10)
            params = [nn.Parameter(p.detach().to(run.device)) for p in net.parameters()]
            for p in params:
                p.grad = torch.randn_like(p) * 2e-3
            optimizer = build(params)
            alone = run.seconds(optimizer.step)
            began, loops = time.perf_counter(), 2 if run.dry else 20
            for _ in range(loops):
                optimizer.step()
            run.wait()
            return {"ms, events": 1e3 * alone, "ms, in a row": 1e3 * (time.perf_counter() - began) / loops}

        run.attempt("steps", f"{name}, optimizer.step(), ResNet-18", row, needs=5)


# ------------------------------------------------------------------------------------------------- training, ensembles


class Images(L.LightningModule):
    """A classifier of images, trained by plain SGD."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the time is the ensemble's."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=5e-4)


class Clock(L.Callback):
    """Seconds a step between two waits for the device; the first steps compile and fill caches."""

    def __init__(self, run: Run, first: int) -> None:
        self.run, self.first, self.total, self.count = run, first, 0.0, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin after the first steps."""
        if batch_idx == self.first:
            self.run.wait()
            if self.run.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.began, self.count = time.perf_counter(), trainer.num_training_batches - self.first

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop."""
        self.run.wait()
        self.total = time.perf_counter() - self.began


@contextmanager
def profiled(run: Run, found: dict[str, Any]) -> Iterator[None]:
    """The costliest kernels, operators and Python functions of what runs within, as lines.

    Python's own profiler slows Python down, and is told of no other thread: backward is not among the functions.
    """
    functions = cProfile.Profile()
    if run.device != "cuda":
        with functions:
            yield
    else:
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen, functions:
            yield
            run.wait()
        events = seen.key_averages()
        for name, cost in (("kernels", "self_device_time_total"), ("operators", "self_cpu_time_total")):
            dear = sorted(events, key=lambda event: -getattr(event, cost))[:14]
            found[name] = [f"{getattr(e, cost) / 1e3:9.2f} ms {e.count:6d}x {e.key[:90]}" for e in dear]
    # entries are (code, calls, recursive calls, total time, own time, callees)
    dear = sorted(functions.getstats(), key=lambda entry: -entry.inlinetime)[:24]
    found["functions"] = [f"{1e3 * e.inlinetime:9.2f} ms {e.callcount:6d}x {code_name(e.code)}" for e in dear]


def code_name(code: Any) -> str:
    """File, line and function of a profiler's entry."""
    return code if isinstance(code, str) else f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_name}"


class Batches:
    """Random images on the device, a few batches again and again: no loading is timed.

    Args:
        run: Says which device.
        number: Batches of an epoch.
        size: Images of a batch.
        channels: Of an image.
        pixels: Height and width.
    """

    def __init__(self, run: Run, number: int, size: int, channels: int = 3, pixels: int = 32) -> None:
        shape, self.number = (size, channels, pixels, pixels), number
        self.kept = [
            (torch.randn(shape, device=run.device), torch.randint(0, 10, (size,), device=run.device)) for _ in range(4)
        ]

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.kept[i % len(self.kept)] for i in range(self.number))


def trained(run: Run, net: nn.Module, data: Any, plugin: Any = None, precision: Any = None, first: int = 8) -> Any:
    """Clock of one epoch through the Trainer."""
    clock = Clock(run, first if not run.dry else 1)
    trainer = L.Trainer(
        max_epochs=1, plugins=[] if plugin is None else [plugin], precision=precision, callbacks=[clock], logger=False,
        accelerator="gpu" if run.device == "cuda" else "cpu", devices=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Images(net), data)
    return clock


OURS = partial(LowPrecisionSGLD, num_data=50_000, seed=0)
PLUGINS: dict[str, tuple[Callable[[], Any], Any]] = {
    "fp32 SGD": (lambda: None, "32-true"),
    "bf16-mixed SGD": (lambda: None, "bf16-mixed"),
    "ours, simulated": (lambda: OURS(), None),
    "ours, arithmetic='auto'": (lambda: OURS(arithmetic="auto"), None),
    "ours, compute='bf16-mixed'": (lambda: OURS(compute="bf16-mixed"), None),
    "ours, saved_activations='codes'": (lambda: OURS(saved_activations="codes"), None),
    "ours, fixed8.6 weights and gradients only": (
        lambda: OURS("fixed8.6", "fixed8.6", None, None), None,
    ),
}  # fmt: skip


def training(run: Run) -> None:
    """ResNet-18 at 32x32, batch 128: seconds a step, peak memory, and the costliest kernels of ours."""
    size, number = (128, 40) if not run.dry else (4, 3)
    data = Batches(run, number, size)

    def costliest() -> dict[str, Any]:
        found: dict[str, Any] = {}
        net = resnet8(3) if run.dry else resnet18(3, 10)
        trained(run, net, Batches(run, 2, size), OURS(), first=1)  # what is compiled and planned once is not shown
        with profiled(run, found):
            trained(run, net, Batches(run, 4, size), OURS(), first=1)
        return {"four steps": found}

    for name, (make, precision) in PLUGINS.items():

        def row(make: Any = make, precision: Any = precision) -> dict[str, Any]:
            torch.manual_seed(0)
            clock = trained(run, resnet8(3) if run.dry else resnet18(3, 10), data, make(), precision)
            found: dict[str, Any] = {"ms a step": 1e3 * clock.total / clock.count}
            if run.device == "cuda":
                found["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
            return found

        run.attempt("training", name, row, needs=8)
        if name == "ours, simulated":
            run.attempt("training", "costliest of ours, simulated", costliest, needs=10)
    base = run.report["parts"].get("training", {}).get("fp32 SGD", {}).get("ms a step")
    for row_ in run.report["parts"].get("training", {}).values():
        if base and "ms a step" in row_:
            row_["of fp32 SGD"] = row_["ms a step"] / base

    little = Batches(run, 3 * number, 100, 1, 28) if not run.dry else Batches(run, 3, 4, 1, 28)
    for name in ("fp32 SGD", "ours, simulated"):
        make, precision = PLUGINS[name]
        action = lambda m=make, p=precision: trained(run, resnet8(), little, m(), p)  # noqa: E731
        run.attempt(
            "training", f"ResNet-8, 28x28, batch 100, {name}",
            lambda a=action: (lambda clock: {"ms a step": 1e3 * clock.total / clock.count})(a()), needs=6,
        )  # fmt: skip


def evaluation_seconds(run: Run, module: Images, bank: SampleBank, data: Any, arithmetic: str) -> float:
    """Seconds that ``trainer.test`` takes with an ensemble of the samples in a bank, all metrics on."""
    trainer = L.Trainer(
        plugins=[OURS()], logger=False, devices=1,
        accelerator="gpu" if run.device == "cuda" else "cpu",
        callbacks=[EnsembleEvaluation(bank, arithmetic=arithmetic)],  # type: ignore[arg-type]
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.wait()
    began = time.perf_counter()
    trainer.test(module, data, verbose=False)
    run.wait()
    return time.perf_counter() - began


def ensembles(run: Run) -> None:
    """Seconds of one more sample of an ensemble over the data, against plain forward passes in float32 and bfloat16."""
    size, number, samples = (500, 10, 6) if not run.dry else (4, 2, 1)
    module = Images(resnet8(3) if run.dry else resnet18(3, 10)).to(run.device)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(quantize(p, "bfp8", rounding="nearest"))
    banks = {1: SampleBank(), 1 + samples: SampleBank()}
    for many, bank in banks.items():
        for step in range(many):
            bank.add(module, step=step, formats={name: "bfp8" for name, _ in module.named_parameters()})
    data, net = Batches(run, number, size), module.net.eval()

    def passes(dtype: torch.dtype | None) -> None:
        with torch.no_grad(), torch.autocast(run.device, torch.bfloat16, enabled=dtype is not None):
            for x, _ in data:
                net(x)

    for name, dtype in (("plain fp32 pass", None), ("plain bf16 pass", torch.bfloat16)):
        action = lambda d=dtype: passes(d)  # noqa: E731
        run.attempt("ensembles", name, lambda a=action: {"ms a batch": 1e3 * run.seconds(a, 7) / number})
    for arithmetic in ("simulated", "auto"):

        def row(arithmetic: str = arithmetic) -> dict[str, Any]:
            times = []
            for _ in range(1 if run.dry else 3):
                few, many = (evaluation_seconds(run, module, bank, data, arithmetic) for bank in banks.values())
                times.append((many - few) / samples)
            return {"ms a batch and sample": 1e3 * min(times) / number, "all": [1e3 * t / number for t in times]}

        run.attempt("ensembles", f"one sample, EnsembleEvaluation, arithmetic={arithmetic!r}", row, needs=8)


# ---------------------------------------------------------------------------------------------------------------- table


def table(path: Path) -> str:
    """What a report holds, as Markdown: one row for each measurement, one column for its figures."""
    report = json.loads(path.read_text())
    known = report["machine"]
    names = ("gpu", "driver", "torch", "triton", "lightning", "python", "cores")
    lines = [", ".join(f"{name} {known.get(name)}" for name in names), "", "| | | |", "|---|---|---|"]
    for part, rows in report["parts"].items():
        for what, row in rows.items():
            figures = [f"{name}: {_figure(value)}" for name, value in row.items() if isinstance(value, (int, float))]
            if "counts" in row:
                figures = [f"{number} {outcome}" for outcome, number in row["counts"].items()]
            reason = row.get("skipped") or row.get("error")
            if figures or reason:
                lines.append(f"| {part} | {what} | {', '.join(figures) or reason} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


PARTS = {"kernels": kernels, "steps": steps, "training": training, "ensembles": ensembles, "tests": tests}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="parts to run (default: all, in that order)")
    parser.add_argument("--out", type=Path, help="JSON file; written anew after every measurement")
    parser.add_argument("--budget-seconds", type=float, default=570.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    run = Run(args)
    print(json.dumps(run.report["machine"]), flush=True)
    for name in args.parts or PARTS:
        try:
            PARTS[name](run)
        except Exception as error:  # one part's fault is not the others'
            run.put(
                name, "error", {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
            )


if __name__ == "__main__":
    main()
