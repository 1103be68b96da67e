"""What a step and a prediction cost: time, peak memory and bytes, of floats and of eight bits, on this machine.

::

    python tests/benchmarks/costs.py            # minutes; adds this machine to costs.json
    python tests/benchmarks/costs.py --clock processor    # where others use the machine; one thread
    python tests/benchmarks/costs.py --docs     # only writes the tables of costs.json into the pages

ResNet-18 on 32 x 32 images, batch 16. Training, through the Trainer, and prediction of each kind run in a process
of their own. Times are medians; memory is the largest resident set above that of the process before the network
was built. Of training, bytes are those of weights and optimizer state, which stay between steps; of prediction, those
of one stored network or posterior sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from billion_weights import Peak, machine, resident
from image_classification import resnet18

from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleBank
from lightning_lpsgld.ops import CodedTensor, quantize

HERE = Path(__file__).resolve().parent
#: Pages that show the tables.
PAGES = (HERE.parents[1] / "docs" / "performance.md", HERE.parents[1] / "README.md")
PHASES = ("training", "prediction")
MARKS = ("<!-- costs -->", "<!-- end of costs -->")

FLOATS = dict.fromkeys(("weights", "gradients", "activations", "errors"))
CODES = {"arithmetic": "auto", "storage": "codes", "saved_activations": "codes"}
#: Seconds after which a pass is not repeated.
LONG = 10.0
#: The clock on the wall; ``main`` may take another.
CLOCK: Callable[[], float] = time.perf_counter
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

#: Kind -> what the table calls it, and the arguments of the plugin; ``None``: no plugin.
KINDS: dict[str, tuple[str, dict | None]] = {
    "sgd": ("SGD, float32", None),
    "sgd bf16": ("SGD, bf16-mixed", None),
    "sgld": ("SGLD, float32", FLOATS),
    "simulated": ("8 bits everywhere, simulated", {}),
    "auto": ('the same, `arithmetic="auto"`', {"arithmetic": "auto"}),
    "codes": ('the same, `storage="codes"`, `saved_activations="codes"`', CODES),
}


class Images(L.LightningModule):
    """A classifier of images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        """Logits."""
        return self.net(x)

    def training_step(self, batch, batch_idx):
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        """Nothing: the time is the ensemble's."""

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=5e-4)


class Steps(L.Callback):
    """Seconds of each training step after the first two; ends the fit when they have taken long enough."""

    def __init__(self, budget: float) -> None:
        self.budget, self.seconds, self._begin, self._spent = budget, [], 0.0, 0.0

    def on_train_batch_start(self, *args) -> None:
        """Begin."""
        self._begin = CLOCK()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Note the step."""
        took = CLOCK() - self._begin
        self._spent += took
        if batch_idx >= 2:
            self.seconds.append(took)
            trainer.should_stop = self._spent > self.budget


def trainer_of(kind: str, *callbacks: L.Callback) -> L.Trainer:
    """A quiet trainer with the plugin of a kind."""
    options = KINDS[kind][1]
    precision = {"precision": "bf16-mixed"} if kind == "sgd bf16" else {}
    return L.Trainer(
        max_epochs=1, plugins=[] if options is None else [LowPrecisionSGLD(seed=0, num_data=50_000, **options)],
        callbacks=list(callbacks), logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **precision,
    )  # fmt: skip


def images(batches: int, size: int) -> DataLoader:
    """Random images and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 10, (len(x),), generator=generator)), size)


def plain_pass(kind: str, module: Images, loader: DataLoader, repeats: int) -> float:
    """Median seconds of one batch through one network."""
    seconds, (x, _) = [], next(iter(loader))
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "sgd bf16" else nullcontext()
    module.eval()
    with torch.no_grad(), autocast:
        for _ in range(repeats + 1):
            begin = CLOCK()
            module(x)
            seconds.append(CLOCK() - begin)
            if len(seconds) > 1 and sum(seconds) > LONG:
                break
    return statistics.median(seconds[1:])


def sample_pass(kind: str, module: Images, loader: DataLoader, repeats: int) -> tuple[float, int]:
    """Seconds that one more posterior sample takes in ``EnsembleEvaluation``, a batch, and bytes of a stored one."""
    options, more = KINDS[kind][1] or {}, 2
    fmt = options.get("weights", "bfp8")
    formats = {} if fmt is None else {name: fmt for name, _ in module.named_parameters()}
    banks = (SampleBank(), SampleBank())  # their difference is what more samples take
    for bank, size in zip(banks, (1, 1 + more)):
        for step in range(size):
            bank.add(module, step=step, formats=formats)
    arithmetic, seconds = options.get("arithmetic", "simulated"), []
    for _ in range(repeats + 1):
        took = []
        for bank in banks:
            tester = trainer_of(kind, EnsembleEvaluation(bank, arithmetic=arithmetic))
            begin = CLOCK()
            tester.test(module, loader, verbose=False)
            took.append(CLOCK() - begin)
        seconds.append((took[1] - took[0]) / more)
    return statistics.median(seconds[1:]), banks[0].nbytes


def bytes_of(tensors) -> int:
    """Bytes that tensors take, codes as codes."""
    return sum(t.nbytes_stored if isinstance(t, CodedTensor) else t.nbytes for t in tensors)


def predict(kind: str, make: Callable[[], nn.Module], batch: int, repeats: int) -> dict[str, float]:
    """Cost of prediction, in this process."""
    before = resident()
    module = Images(make())
    if KINDS[kind][1] is not None and KINDS[kind][1] is not FLOATS:
        with torch.no_grad():
            for param in module.parameters():
                param.copy_(quantize(param, "bfp8", rounding="nearest"))
    loader = images(1, batch)
    with Peak() as peak:
        if KINDS[kind][1] is None:
            seconds, stored = plain_pass(kind, module, loader, repeats), bytes_of(module.state_dict().values())
        else:
            seconds, stored = sample_pass(kind, module, loader, repeats)
    return {"seconds": seconds, "peak_bytes": peak.bytes - before, "bytes": stored}


def train(kind: str, make: Callable[[], nn.Module], batch: int, steps: int, budget: float) -> dict[str, float]:
    """Cost of training, in this process."""
    before, times = resident(), Steps(budget)
    trainer, loader = trainer_of(kind, times), images(steps, batch)
    torch.manual_seed(0)
    with Peak() as peak:
        with trainer.init_module():
            module = Images(make())
        trainer.fit(module, loader)
    state = (value for facts in trainer.optimizers[0].state.values() for value in facts.values())
    kept = [*module.state_dict().values(), *(value for value in state if torch.is_tensor(value))]
    return {
        "seconds": statistics.median(times.seconds), "peak_bytes": peak.bytes - before, "bytes": bytes_of(kept)
    }  # fmt: skip


def network() -> nn.Module:
    """ResNet-18 for ten classes."""
    return resnet18(3, 10)


def cost(
    kind: str, phase: str, make: Callable[[], nn.Module] = network, batch: int = 16, budget: float = 8.0
) -> dict[str, float]:
    """One cost of a kind, in this process; what another has freed would hide in its resident memory."""
    L.seed_everything(0, verbose=False)
    return predict(kind, make, batch, repeats=2) if phase == "prediction" else train(kind, make, batch, 7, budget)


# -------------------------------------------------------------------------------------------------------------- tables


def name_of(facts: dict) -> str:
    """What tells measurements apart in the file of costs: the machine, and how time was taken."""
    threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{facts['processor']}, {facts['capability']}, {threads}, {facts['clock']} time"


def table(report: dict[str, dict]) -> str:
    """The tables of all machines, in Markdown; ratios to the first row."""
    parts = []
    for name, found in sorted(report.items()):
        facts, first = found["machine"], found["costs"]["sgd"]
        head = " | ".join(
            f"{phase}, {what}" for phase in ("training", "prediction") for what in ("time", "peak", "bytes")
        )
        rows = [f"**{name}** (torch {facts['torch']}, lightning {facts['lightning']}, Python {facts['python']})", ""]
        rows += [f"| what | {head} |", "|" + "---|" * 7]
        for kind, (label, _) in KINDS.items():
            costs = found["costs"][kind]
            cells = [cell for phase in PHASES for cell in cells_of(costs[phase], first[phase])]
            rows.append(f"| {label} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def cells_of(costs: dict[str, float], first: dict[str, float]) -> list[str]:
    """Time, peak and bytes, the first two also as ratios."""
    return [
        f"{1e3 * costs['seconds']:,.0f} ms ({costs['seconds'] / first['seconds']:.2f})",
        f"{costs['peak_bytes'] / 1e6:,.0f} MB ({costs['peak_bytes'] / first['peak_bytes']:.2f})",
        f"{costs['bytes'] / 1e6:,.1f} MB",
    ]


def in_docs(text: str) -> str:
    """What stands between the marks of a page."""
    return text.split(MARKS[0])[1].split(MARKS[1])[0].strip("\n")


def with_tables(text: str, tables: str) -> str:
    """A page with other tables between its marks."""
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{after}"


def main() -> None:
    """Measure all kinds, print the table, keep the figures; or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="one kind, in this process; prints JSON")
    parser.add_argument("--phase", choices=PHASES, default="training", help="of --kind")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: time of one thread")
    parser.add_argument("--json", type=Path, default=HERE / "costs.json", help="file of all machines' costs")
    parser.add_argument("--docs", action="store_true", help="only write the tables into docs/performance.md and README")
    args = parser.parse_args()
    global CLOCK
    CLOCK = CLOCKS[args.clock]
    if args.clock == "processor":
        torch.set_num_threads(1)
    if args.kind:
        print(json.dumps(cost(args.kind, args.phase)))
        return
    report = json.loads(args.json.read_text()) if args.json.exists() else {}
    if not args.docs:
        costs = {}
        for kind in KINDS:
            costs[kind] = {}
            for phase in PHASES:
                command = [sys.executable, __file__, f"--kind={kind}", f"--phase={phase}", f"--clock={args.clock}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                costs[kind][phase] = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                f"{kind:10}", *(cell for p in PHASES for cell in cells_of(costs[kind][p], costs["sgd"][p])), flush=True
            )
        facts = {**machine(), "clock": args.clock}
        report[name_of(facts)] = {"machine": facts, "costs": costs}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), table(report)))
    print(table(report))


if __name__ == "__main__":
    main()
