"""The speed and size bars of the project, each as a ratio to its named rival in the same process.

::

    python tests/benchmarks/bars.py                 # all groups, about ten minutes on two cores
    python tests/benchmarks/bars.py step quantize   # some groups
    python tests/benchmarks/bars.py --json bars.json

Times are medians over interleaved repetitions. The rivals: the published step (re-implemented from its equations in
``published_step.py``), QPyTorch's CPU ops, ``torch.optim.SGD(fused=True)``, a plain copy, and the same training step
through the Trainer in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_classification import resnet18

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleBank
from lightning_lpsgld.ops import backend_report, quantize
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

ROWS: list[dict[str, object]] = []


def medians(repeats: int, **actions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a slow minute slows all of them."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def report(what: str, value: float, bar: str, passed: bool, detail: str) -> None:
    """Keep and print one row."""
    ROWS.append({"what": what, "value": round(value, 3), "bar": bar, "met": passed, "detail": detail})
    print(f"{'ok  ' if passed else 'MISS'} {what:<68} {value:8.2f}  (bar {bar})  {detail}", flush=True)


def model_tensors() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """ResNet-18's parameters and gradients of a plausible size."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(p.detach().clone()) for p in resnet18(3, 10).parameters()]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 2e-3
    return params, [p.grad for p in params]


def step_bars() -> None:
    """The sampler step, with the noise of the published CIFAR setting at the start of its schedule."""
    import published_step

    for kind, fmt, bar in (("bfp8", "bfp8", 100.0), ("fixed8", "fixed8.8", 60.0)):
        lr, temperature, n = 0.5, 1e-3, 50_000
        params, _ = model_tensors()
        ours = SGLD(
            params, lr, num_data=n, temperature=temperature, weight_decay=5e-4, weight_format=fmt, gradient_format=fmt
        )
        ours.round_parameters_()
        plain, _ = model_tensors()
        fused = torch.optim.SGD(plain, lr=lr, weight_decay=5e-4, fused=True)
        theirs, their_grads = model_tensors()
        detached = [p.detach() for p in theirs]
        variance = 2 * lr * temperature / n

        def published(kind=kind, tensors=detached, gs=their_grads, variance=variance) -> None:
            published_step.step(tensors, gs, kind, lr=0.5, weight_decay=5e-4, variance=variance)

        bare = [nn.Parameter(p.detach().clone()) for p in params]
        for p, q in zip(params, bare):
            q.grad = p.grad
        options = {"num_data": n, "temperature": temperature, "weight_decay": 5e-4, "check_finite": False}
        unchecked = SGLD(bare, lr, **options, weight_format=fmt, gradient_format=fmt)
        fast = medians(25, ours=ours.step, fused=fused.step, unchecked=unchecked.step)
        slow = medians(3, published=published)
        ratio = slow["published"] / fast["ours"]
        detail = f"{1e3 * slow['published']:.0f} ms / {1e3 * fast['ours']:.1f} ms"
        report(f"VC step, {kind}, ResNet-18: published / ours", ratio, f">= {bar:.0f}", ratio >= bar, detail)
        ratio = fast["ours"] / fast["fused"]
        detail = f"{1e3 * fast['ours']:.1f} ms / {1e3 * fast['fused']:.1f} ms"
        report(f"VC step, {kind}, ResNet-18: ours / torch fused SGD", ratio, "<= 4", ratio <= 4, detail)
        ratio = fast["unchecked"] / fast["fused"]
        detail = f"{1e3 * fast['unchecked']:.1f} ms / {1e3 * fast['fused']:.1f} ms"
        what = f"the same, {kind}, without the check for NaN, which SGD has not / torch fused SGD"
        report(what, ratio, "<= 4", ratio <= 4, detail)


def beyond_bars() -> None:
    """Where the step's bar was not set: T = 1, a small floating-point format, and the plain-torch reference."""
    for fmt, temperature in (("bfp8", 1.0), ("fixed8.8", 1.0), ("e4m3", 1e-3), ("mxfp8e4m3-fit", 1e-3)):
        params, _ = model_tensors()
        ours = SGLD(params, 0.5, num_data=50_000, temperature=temperature, weight_format=fmt, gradient_format=fmt)
        ours.round_parameters_()
        plain, _ = model_tensors()
        fused = torch.optim.SGD(plain, lr=0.5, fused=True)
        fast = medians(15, ours=ours.step, fused=fused.step)
        detail = f"{1e3 * fast['ours']:.1f} ms / {1e3 * fast['fused']:.1f} ms"
        what = f"VC step, {fmt}, T = {temperature:g}: ours / torch fused SGD"
        report(what, fast["ours"] / fast["fused"], "none", True, detail)
    x = torch.randn(64, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    slow = medians(3, reference=lambda: quantize(x, "bfp8", key=DrawKey(0), backend="reference"))["reference"]
    detail = f"{1e3 * slow:.0f} ms for {x.numel() / 1e6:.1f} M"
    report("quantize bfp8 stochastic, reference backend, ns an element", 1e9 * slow / x.numel(), "none", True, detail)


def family_bars() -> None:
    """Steps of all families in 8 bits against SGLD's without any format, on a small and on a large network."""
    small = [p for width in ((50, 100), (100, 100), (100, 10)) for p in nn.Linear(*width).parameters()]
    for which, shapes in (("6 tensors, 16,210 weights", small), ("ResNet-18", model_tensors()[0])):
        params: list[list[torch.Tensor]] = []
        for _ in range(4):
            params.append([nn.Parameter(p.detach().clone()) for p in shapes])
            for p in params[-1]:
                p.grad = torch.full_like(p, 2e-3)
        common = {"num_data": 50_000, "temperature": 1e-3}
        grids = {"weight_format": "bfp8", "gradient_format": "bfp8"}
        rivals = {
            "SGLD": SGLD(params[0], 0.1, **common, **grids),
            "SGHMC": SGHMC(params[1], 0.1, friction=2.0, velocity_format="bfp8", **common, **grids),
            "pSGLD": PreconditionedSGLD(params[2], 1e-3, **common, **grids),
        }
        plain = SGLD(params[3], 0.1, **common)
        times = medians(15, plain=plain.step, **{name: sampler.step for name, sampler in rivals.items()})
        for name in rivals:
            ratio = times[name] / times["plain"]
            detail = f"{1e3 * times[name]:.2f} ms / {1e3 * times['plain']:.2f} ms"
            report(f"VC {name} step, bfp8 everywhere, {which}: / fp32 SGLD", ratio, "none", True, detail)


def quantize_bars() -> None:
    """bfp8 rounding of 128x64x32x32 float32 values."""
    from qtorch.quant import block_quantize

    x = torch.randn(128, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    for rounding, bar in (("stochastic", 20.0), ("nearest", 10.0)):
        slow = medians(3, qtorch=lambda r=rounding: block_quantize(x, wl=8, dim=0, rounding=r))
        fast = medians(
            15,
            ours=lambda r=rounding: quantize(x, "bfp8", rounding=r, key=DrawKey(0)),
            copy=lambda: out.copy_(x),
        )
        ratio = slow["qtorch"] / fast["ours"]
        detail = f"{1e3 * slow['qtorch']:.0f} ms / {1e3 * fast['ours']:.1f} ms"
        report(f"quantize bfp8 {rounding}, 8.4 M: QPyTorch / ours", ratio, f">= {bar:.0f}", ratio >= bar, detail)
        ratio = fast["ours"] / fast["copy"]
        detail = f"{1e3 * fast['ours']:.1f} ms / {1e3 * fast['copy']:.1f} ms"
        report(f"quantize bfp8 {rounding}, 8.4 M: ours / copy", ratio, "<= 8", ratio <= 8, detail)


class Images(L.LightningModule):
    """ResNet-18 on 3x32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(3, 10)

    def training_step(self, batch, batch_idx):
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=5e-4)


class StepTimes(L.Callback):
    """Seconds between starts of successive batches."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *args) -> None:
        """Take the time."""
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Durations, the first two steps left out."""
        return [b - a for a, b in zip(self.marks, self.marks[1:])][2:]


def training_seconds(plugin: LowPrecisionSGLD | None, steps: int = 6, precision: str | None = None) -> list[float]:
    """Seconds of training steps through the Trainer; ``precision`` is that of plain SGD."""
    L.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(64 * steps, 3, 32, 32), torch.randint(0, 10, (64 * steps,)))
    times = StepTimes()
    trainer = L.Trainer(
        max_epochs=1, plugins=[] if plugin is None else [plugin], precision=precision, callbacks=[times], logger=False,
        accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Images(), DataLoader(data, 64))
    return times.seconds()


def training_bars(rounds: int = 3) -> None:
    """Whole training steps, float32 against 8 bits everywhere, without and with codes saved for backward."""
    runs = {
        "fp32": lambda: None,
        "bfp8": lambda: LowPrecisionSGLD(seed=0),
        "codes": lambda: LowPrecisionSGLD(seed=0, saved_activations="codes"),
        "integers": lambda: LowPrecisionSGLD(seed=0, arithmetic="auto"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, make in runs.items():
            times[name] += training_seconds(make())
    times["bf16"] = training_seconds(None, steps=4, precision="bf16-mixed")  # slow where the processor has no bfloat16
    middle = {name: statistics.median(values) for name, values in times.items()}
    words = {
        "bfp8": "8 bits everywhere",
        "codes": "the same, saved_activations='codes'",
        "integers": "the same, arithmetic='auto'",
    }
    for name, bar in (("bfp8", 1.15), ("codes", 1.4), ("integers", training_bar())):
        ratio, what = middle[name] / middle["fp32"], words[name]
        detail = f"{1e3 * middle[name]:.0f} ms / {1e3 * middle['fp32']:.0f} ms"
        report(f"training step, ResNet-18, batch 64, {what} / fp32", ratio, f"<= {bar}", ratio <= bar, detail)
    ratio = middle["integers"] / middle["bf16"]
    detail = f"{1e3 * middle['integers']:.0f} ms / {1e3 * middle['bf16']:.0f} ms"
    report(f"training step, {words['integers']} / SGD in bf16-mixed", ratio, "<= 1.15", ratio <= 1.15, detail)


class Evaluated(Images):
    """The same with logits, for the ensemble."""

    def forward(self, x):
        """Logits."""
        return self.net(x)

    def test_step(self, batch, batch_idx):
        """Nothing: the time is the ensemble's."""


def evaluation_seconds(module: Evaluated, bank: SampleBank, loader: DataLoader, arithmetic: str) -> float:
    """Seconds that ``trainer.test`` takes with an ensemble of the samples in a bank, all metrics on."""
    trainer = L.Trainer(
        plugins=[LowPrecisionSGLD(seed=0)], callbacks=[EnsembleEvaluation(bank, arithmetic=arithmetic)], logger=False,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.test(module, loader, verbose=False)
    return time.perf_counter() - began


def ensemble_bars(rounds: int = 3, samples: int = 3, batches: int = 2) -> None:
    """What one more sample of an ensemble costs in ``EnsembleEvaluation``, against a plain fp32 forward pass."""
    torch.manual_seed(0)
    module, banks = Evaluated(), {1: SampleBank(), 1 + samples: SampleBank()}
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(quantize(p, "bfp8", rounding="nearest"))
    formats = {name: "bfp8" for name, _ in module.named_parameters()}
    for bank, step in ((bank, step) for size, bank in banks.items() for step in range(size)):
        bank.add(module, step=step, formats=formats)
    data = TensorDataset(torch.randn(64 * batches, 3, 32, 32), torch.randint(0, 10, (64 * batches,)))
    loader, plain = DataLoader(data, 64), resnet18(3, 10).eval()
    times: dict[str, list[float]] = {name: [] for name in ("fp32", "bf16", "simulated", "auto")}

    def forward() -> None:
        with torch.no_grad():
            for batch in loader:
                plain(batch[0])

    def half() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            forward()

    for _ in range(rounds + 1):
        began = time.perf_counter()
        forward()
        times["fp32"].append(time.perf_counter() - began)
        began = time.perf_counter()
        half()
        times["bf16"].append(time.perf_counter() - began)
        for name in ("simulated", "auto"):
            few, many = (evaluation_seconds(module, bank, loader, name) for bank in banks.values())
            times[name].append((many - few) / samples)
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round fills caches
    for name, bar in (("simulated", None), ("auto", ensemble_bar())):
        ratio = middle[name] / middle["fp32"]
        detail = f"{1e3 * middle[name] / batches:.0f} ms / {1e3 * middle['fp32'] / batches:.0f} ms a batch"
        what = f"ensemble pass per sample, ResNet-18, batch 64, arithmetic='{name}' / plain fp32 forward"
        report(what, ratio, "none" if bar is None else f"<= {bar}", bar is None or ratio <= bar, detail)
    ratio = middle["auto"] / middle["bf16"]
    detail = f"{1e3 * middle['auto'] / batches:.0f} ms / {1e3 * middle['bf16'] / batches:.0f} ms a batch"
    report("the same, arithmetic='auto' / a forward pass under bf16 autocast", ratio, "< 1", ratio < 1, detail)


def ensemble_bar() -> float:
    """The bar of this kind of machine."""
    if torch.cpu._is_amx_tile_supported():
        return 0.30
    return 0.50 if torch.cpu._is_vnni_supported() else 1.0


def training_bar() -> float:
    """The same for a training step in ``arithmetic="auto"``."""
    if torch.cpu._is_amx_tile_supported():
        return 0.60
    return 0.85 if torch.cpu._is_vnni_supported() or torch.cpu._is_avx512_bf16_supported() else 1.05


def kept_bytes(net: nn.Module, x: torch.Tensor, y: torch.Tensor, context) -> tuple[int, list[torch.Tensor]]:
    """Bytes alive after a forward that were not before, by the allocator's own account; and the gradients."""
    with context:
        nn.functional.cross_entropy(net(x), y)  # finds the last layer, fills caches
    with torch.profiler.profile(profile_memory=True) as profile, context:
        loss = nn.functional.cross_entropy(net(x), y)
    kept = sum(event.self_cpu_memory_usage for event in profile.events())
    loss.backward()
    return kept, [p.grad.clone() for p in net.parameters()]


def memory_bars() -> None:
    """What autograd keeps for backward, and the size of a sample."""
    from lightning_lpsgld.casting import ActivationCasting

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (64,), generator=generator)
    results = {}
    for mode in ("fp32", "full", "codes"):
        torch.manual_seed(0)
        net = resnet18(3, 10)
        context = nullcontext()
        if mode != "fp32":
            casting = ActivationCasting(net, seed=0, saved_activations=mode).attach()
            context = Reusable(casting.forward_context)
        results[mode] = kept_bytes(net, x, y, context)
    kept, plain = results["codes"][0], results["fp32"][0]
    same = all(torch.equal(a, b) for a, b in zip(results["full"][1], results["codes"][1]))
    detail = f"{kept / 1e6:.0f} MB / {plain / 1e6:.0f} MB, gradients {'bit-identical' if same else 'DIFFER'}"
    what = "kept for backward, ResNet-18, batch 64, codes / fp32"
    report(what, kept / plain, "<= 0.5", kept <= plain / 2 and same, detail)

    net = resnet18(3, 10)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(quantize(p, "bfp8", rounding="nearest"))
    bank = SampleBank()
    bank.add(net, step=1, formats={name: "bfp8" for name, _ in net.named_parameters()})
    fp32 = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    ratio = bank.nbytes / fp32
    report(
        "sample of ResNet-18, bank / fp32 state_dict", ratio, "<= 0.27", ratio <= 0.27, f"{bank.nbytes / 1e6:.2f} MB"
    )


class Reusable:
    """A context manager that opens a new context each time it is entered."""

    def __init__(self, make: Callable) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.open = self.make()
        self.open.__enter__()

    def __exit__(self, *error) -> None:
        self.open.__exit__(*error)


def import_bars() -> None:
    """Seconds that importing every public name takes after lightning, in fresh processes, byte code at hand.

    An installation has its byte code; with ``PYTHONDONTWRITEBYTECODE`` set a working tree would be compiled every time.
    """
    code = (
        "import time; import lightning; began = time.perf_counter(); import lightning_lpsgld as m; "
        "[getattr(m, name) for name in m.__all__]; print(time.perf_counter() - began)"
    )
    with tempfile.TemporaryDirectory() as cache:
        keep = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        keep["PYTHONPYCACHEPREFIX"] = cache
        runs = [float(subprocess.check_output([sys.executable, "-c", code], env=keep)) for _ in range(4)]
    extra = min(runs[1:])
    report("import of every public name, seconds beyond lightning's", extra, "<= 0.3", extra <= 0.3, "best of 3")


GROUPS = {
    "step": step_bars,
    "quantize": quantize_bars,
    "beyond": beyond_bars,
    "family": family_bars,
    "training": training_bars,
    "ensemble": ensemble_bars,
    "memory": memory_bars,
    "import": import_bars,
}


def main() -> None:
    """Run the groups and print hardware and versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], help="groups to run (default: all)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    machine = {
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "lightning": L.__version__, "python": platform.python_version(), "backends": backend_report(),
    }  # fmt: skip
    print(json.dumps(machine))
    for name in args.groups or GROUPS:
        GROUPS[name]()
    print(markdown(machine))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": ROWS}, indent=1))


def markdown(machine: dict[str, object]) -> str:
    """The table of README and docs."""
    where = "{processor}, {threads} threads, torch {torch}, lightning {lightning}, Python {python}".format(**machine)
    lines = [f"\nMedians, one run, {where}:\n", "| what | ratio | bar | measured |", "|---|---|---|---|"]
    for row in ROWS:
        missed = "" if row["met"] else " (missed)"
        lines.append(f"| {row['what']} | {row['value']:.2f}{missed} | {row['bar']} | {row['detail']} |")
    return "\n".join(lines)


def processor() -> str:
    """Name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
