"""``lpsgld bank ls|info|verify|recover|merge|thin|export``: look into a bank of samples and change it."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any, cast

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.bank.beside import made_beside
from lightning_lpsgld.cli.built import BuiltCLI, built
from lightning_lpsgld.cli.errors import CommandError, in_one_line, one_line
from lightning_lpsgld.cli.opened import opened_bank
from lightning_lpsgld.cli.outputs import checked_folder
from lightning_lpsgld.cli.parsing import OneLineParser, as_json
from lightning_lpsgld.cli.plan import optimizer_of, training_loss
from lightning_lpsgld.precision.num_data import count_examples
from lightning_lpsgld.precision.weights import read_tensors
from lightning_lpsgld.predictive import PosteriorEnsemble
from lightning_lpsgld.predictive.selection import (
    Selection,
    evenly,
    greedy_selection,
    member_probabilities,
    posterior_scores,
    stein_thinning,
)

__all__ = ["ACTIONS", "EXAMPLE", "SUMMARY", "copy_samples", "parser", "run"]

#: The command in the list of ``lpsgld --help``.
SUMMARY = "look into a bank of samples: ls, info, verify, recover, merge, thin, export"
#: A call, for its help.
EXAMPLE = "lpsgld bank info bank"

_EXAMPLES = {
    "ls": ("list the samples", "lpsgld bank ls bank"),
    "info": ("what the samples are samples of, and how large", "lpsgld bank info bank --json"),
    "verify": (
        "read every file and compare checksums; exit 1 if one is damaged or not listed",
        "lpsgld bank verify bank",
    ),
    "recover": ("list the samples anew from their files, if what names them is lost", "lpsgld bank recover bank"),
    "merge": ("new bank with the samples of several", "lpsgld bank merge all run1/bank run2/bank"),
    "thin": ("new bank with fewer samples", "lpsgld bank thin bank small --keep 5"),
    "export": ("write samples as float32 state dicts in safetensors", "lpsgld bank export bank folder"),
}
#: What can be done to a bank.
ACTIONS = tuple(_EXAMPLES)


def parser(action: str) -> OneLineParser:
    """Argument parser of one action."""
    made = OneLineParser(f"lpsgld bank {action}", *_EXAMPLES[action])
    if action == "merge":
        made.add_argument("into", help="path of the new bank")
        made.add_argument("sources", nargs="+", help="banks to read")
        made.add_argument("--chains", choices=("renumber", "keep"), default="renumber", help="labels of chains")
        return made
    made.add_argument("path", help="path of the bank")
    if action in ("ls", "info"):
        made.add_argument("--json", action="store_true", help="print JSON")
    if action == "thin":
        made.add_argument("into", help="path of the new bank")
        made.add_argument("--keep", type=int, required=True, help="how many samples to keep")
        made.add_argument("--method", choices=("even", "last", "nll", "stein"), default="even", help="which ones")
        made.add_argument("--config", help="the run's YAML file; nll scores on its validation, stein on its train data")
    if action == "export":
        made.add_argument("into", help="folder to write to")
        made.add_argument("--index", type=int, nargs="+", help="only these samples")
        made.add_argument("--base", help="checkpoint with the frozen weights, if the bank has only their checksums")
    return made


def run(args: list[str]) -> int:
    """Run an action.

    Args:
        args: Arguments after ``lpsgld bank``.

    Returns:
        Exit code.
    """
    action = args[0] if args else "--help"
    if action in ("-h", "--help"):
        rows = [f"  {name:<8} {text}\n           {example}" for name, (text, example) in _EXAMPLES.items()]
        print("\n".join(["usage: lpsgld bank ACTION ...", "", SUMMARY, "", *rows]))
        return 0
    if action not in _EXAMPLES:
        raise CommandError(f"there is no action {action!r}; use {', '.join(_EXAMPLES)}.")
    options = parser(action).parse_args(args[1:])
    try:
        code: int = _ACTIONS[action](options)
    except (BankError, OSError, ValueError) as error:
        raise CommandError(one_line(error)) from error
    return code


def _row(index: int, info: Any) -> dict[str, Any]:
    return {
        "index": index,
        "chain": info.chain,
        "step": info.step,
        "cycle": info.cycle,
        "temperature": info.temperature,
        "lr": info.lr,
        "metrics": dict(info.metrics),
    }


def _ls(options: Namespace) -> int:
    bank = SampleBank.open(options.path, verify=False)
    rows = [_row(index, info) for index, info in enumerate(bank.infos)]
    if options.json:
        print(as_json(rows))
        return 0
    names = sorted({name for row in rows for name in row["metrics"]})
    print("  ".join(["index", "chain", "    step", "cycle", "temperature", "        lr", *names]))
    for row in rows:
        numbers = ["-" if row[name] is None else f"{row[name]:.4g}" for name in ("temperature", "lr")]
        cycle = "-" if row["cycle"] is None else row["cycle"]
        metrics = [f"{row['metrics'].get(name, math.nan):{len(name)}.4g}" for name in names]
        cells = [f"{row['index']:5}", f"{row['chain']:5}", f"{row['step']:8}", f"{cycle!s:>5}"]
        print("  ".join([*cells, f"{numbers[0]:>11}", f"{numbers[1]:>10}", *metrics]))
    _say_damage(bank)
    return 0


def _say_damage(bank: SampleBank) -> None:
    for damage in bank.damaged:
        print(f"damaged: chain {damage.info.chain}, step {damage.info.step}: {damage.reason}")


def _info(options: Namespace) -> int:
    bank = SampleBank.open(options.path, verify=False)
    spec = bank.spec
    entries = [] if spec is None else spec.entries
    data = {
        "path": bank.path,
        "samples": len(bank),
        "chains": bank.chains,
        "steps": [min(bank.steps), max(bank.steps)] if len(bank) else None,
        "damaged": len(bank.damaged),
        "fingerprint": bank.fingerprint,
        "bytes": bank.nbytes,
        "bytes_fp32": bank.nbytes_fp32,
        "base": None if bank.base is None else {"kind": bank.base.kind, "tensors": sorted(bank.base.digests)},
        "tensors": [
            {"name": e.name, "shape": list(e.shape), "dtype": str(e.dtype).removeprefix("torch."),
             "format": None if e.format is None else str(e.format), "bytes": e.nbytes}
            for e in entries
        ],
    }  # fmt: skip
    if options.json:
        print(as_json(data))
        return 0
    share = f"{bank.nbytes / bank.nbytes_fp32:.3f} of float32" if bank.nbytes_fp32 else "empty"
    print(f"{bank.path}: {len(bank)} samples of chains {bank.chains}, steps {data['steps']}")
    print(f"{bank.nbytes} bytes, {share}; {len(bank.damaged)} damaged; module {bank.fingerprint}")
    shared = () if bank.base is None else bank.base.digests
    note = "" if bank.base is None else {"stored": ", once", "reference": ", as a checksum"}[bank.base.kind]
    for entry in entries:
        print(f"  {entry}, {entry.nbytes} bytes{note if entry.name in shared else ''}")
    return 0


def _verify(options: Namespace) -> int:
    bank = SampleBank.open(options.path, verify=True)
    _say_damage(bank)
    for name in bank.unlisted:
        print(f"not listed: {name}; lpsgld bank recover {options.path} takes it in if it is whole")
    print(f"{len(bank)} samples are whole, {len(bank.damaged)} damaged, {len(bank.unlisted)} not listed.")
    return 1 if bank.damaged or bank.unlisted else 0


def _recover(options: Namespace) -> int:
    bank = SampleBank.recover(options.path)
    left = len(bank.unlisted)
    note = f"; {left} more files are not whole" if left else ""
    print(f"{bank.path}: {len(bank)} samples of chains {bank.chains} are listed{note}.")
    return 0


def _merge(options: Namespace) -> int:
    checked_folder(options.into, "into", of_bank=True)
    sources = [SampleBank.open(path) for path in options.sources]
    for source in sources:
        _say_damage(source)
    if not any(map(len, sources)):
        raise CommandError(f"sources: {', '.join(options.sources)} have no usable sample; nothing is made.")
    bank = SampleBank.merged(sources, options.into, chains=options.chains)
    print(f"{bank.path}: {len(bank)} samples of chains {bank.chains}.")
    return 0


def copy_samples(bank: SampleBank, indices: list[int], into: str) -> SampleBank:
    """New bank at ``into`` with some samples of another, bit for bit; whole, or not there at all.

    Raises:
        BankError: If there is a bank already.
    """
    kind = "stored" if bank.base is None else bank.base.kind
    with made_beside(into) as place, SampleBank(place, base=kind) as made:
        made.merge(bank, indices=indices)
    return SampleBank.open(into, verify=False)


def _thin(options: Namespace) -> int:
    checked_folder(options.into, "into", of_bank=True)
    bank = opened_bank(options.path, "path")
    if not 1 <= options.keep <= len(bank):
        raise CommandError(f"--keep: must be between 1 and the {len(bank)} samples of {options.path}.")
    n, k = len(bank), options.keep
    if options.method in ("nll", "stein"):
        selection = _selected(bank, options)
        chosen = sorted(selection.indices)
        print(selection)
    else:
        chosen = evenly(n, k) if options.method == "even" else list(range(n - k, n))
    made = copy_samples(bank, chosen, options.into)
    print(f"{made.path}: {len(made)} of {n} samples, steps {made.steps}; {made.nbytes} of {bank.nbytes} bytes.")
    return 0


def _selected(bank: SampleBank, options: Namespace) -> Selection:
    """The samples that lose least, by the configured run's data."""
    if options.config is None:
        raise CommandError(f"--config: --method {options.method} needs the run's YAML file.")
    cli = built(BuiltCLI, ["--config", options.config])
    with in_one_line(cli.config):
        return _chosen(cli, bank, options)


def _chosen(cli: BuiltCLI, bank: SampleBank, options: Namespace) -> Selection:
    if options.method == "nll":
        ensemble = PosteriorEnsemble(cli.model, bank, task="multiclass", members="streamed")
        return greedy_selection(member_probabilities(ensemble, cli.loader("val")), options.keep)
    loader, plugin = cli.loader("train"), cast(Any, cli.trainer.precision_plugin)
    optimizer, _ = optimizer_of(cli.model, cli.trainer)
    points, scores = posterior_scores(
        bank,
        cli.model,
        loader,
        training_loss,
        num_data=count_examples(loader) if plugin.num_data == "auto" else plugin.num_data,
        temperature=plugin.temperature,
        weight_decay=float(optimizer.param_groups[0].get("weight_decay", 0.0)),
    )
    return stein_thinning(points, scores, options.keep)


def _export(options: Namespace) -> int:
    from safetensors.torch import save_file

    folder = checked_folder(options.into, "into", of_bank=False)
    bank = opened_bank(options.path, "path")
    if options.base is not None:
        bank.give_base(read_tensors(options.base, "--base"))
    elif bank.needs_base:
        raise CommandError(f"--base: {options.path} has only checksums of its frozen weights; give their checkpoint.")
    indices = list(range(len(bank))) if options.index is None else options.index
    if any(not 0 <= index < len(bank) for index in indices):
        raise CommandError(f"--index: must be between 0 and {len(bank) - 1}, got {indices}.")
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        sample = bank.sample(index)
        tensors = {name: tensor.clone().contiguous() for name, tensor in sample.state_dict().items()}
        target = folder / f"chain{sample.chain}-step{sample.step:08d}.safetensors"
        save_file(tensors, target, metadata={"chain": str(sample.chain), "step": str(sample.step)})
        print(target)
    return 0


_ACTIONS = {
    "ls": _ls, "info": _info, "verify": _verify, "recover": _recover, "merge": _merge, "thin": _thin, "export": _export,
}  # fmt: skip
