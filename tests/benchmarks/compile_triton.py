"""Compile the Triton kernels ahead of time and read the machine code: no GPU is needed.

    python tests/benchmarks/compile_triton.py            # the table of docs/performance.md, as Markdown
    python tests/benchmarks/compile_triton.py --json     # the representative set that the tests check

Registers, spills and shared memory are what ``ptxas -v`` reports for sm_80 and sm_90. Bytes per element are counted in
the PTX: the width of every global access of a thread over the elements of the thread. The last columns are the least
time that these bytes take for 11.2 million elements at the memory bandwidth of the data sheets; they are bounds, not
measurements.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import StepSpec, triton_kernels, triton_step
from lightning_lpsgld.ops import triton as backend
from lightning_lpsgld.ops.triton_step_kernel import step_kernel

ELEMENTS = 11.2e6
BANDWIDTH = {"A100 40 GB": 1555e9, "A100 80 GB": 2039e9, "H100": 3350e9}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
FLOATS = ("lr", "decay")


@dataclass(frozen=True)
class Case:
    """One kernel with its compile-time arguments."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What the compiled kernel says."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    bytes_per_element: float


def ptxas() -> str:
    """The assembler that comes with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")


def step_case(weights: str | None, gradients: str | None, mode: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, phase: int = 0) -> Case:  # fmt: skip # noqa: E501
    """The sampler's step over tensors of one shape."""
    spec = StepSpec(
        0.1, 0.0, 1e-5, weights and parse_format(weights), gradients and parse_format(gradients), mode  # type: ignore[arg-type]
    )  # fmt: skip
    param = torch.empty(shape, dtype=dtype)
    item = triton_step._item(param, param, param.float() if mode == "full" else None, 0, spec)
    pointers = {
        "table": "*i64",
        "program_map": "*i32",
        "counts": "*i64",
        "gradient_keys": "*i64",
        "weight_keys": "*i64",
    }
    name = f"step {mode}, W {weights}, G {gradients}, {'x'.join(map(str, shape))} {str(dtype)[6:]}"
    name += ("", ", pass over gradients", ", pass over weights")[phase]
    return Case(name, step_kernel, pointers, {**triton_step.step_meta(spec, item), "PHASE": phase})


def op_case(op: str, fmt: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    """One op on a tensor of ``shape``."""
    number, x = parse_format(fmt), torch.empty(shape, dtype=dtype)
    rows = backend.rows_of(shape, number)
    assert rows is not None
    tile = backend.tile_of(rows, True)
    meta: dict[str, Any] = {
        "SHARED": rows.shared,
        "R": tile.rows,
        "Q": tile.quads,
        "ALIGNED": True,
        "num_warps": tile.warps,
    }
    meta.update(backend.facts(number, dtype))
    pointers = {"x": POINTERS[dtype], "out": POINTERS[dtype], "keys": "*i64"}
    if op == "quantize":
        meta |= {"STOCHASTIC": True, "LEVELS": False}
    elif op == "vc":
        pointers["variance"] = POINTERS[dtype]
        meta |= {"PER_ELEMENT": False, "LEVELS": False}
    else:
        pointers |= {"out": "*i8", "exponents": "*i8", "missing": "*i32"}
        meta |= {"STOCHASTIC": True, "BITS": number.bits, "TOP": 126, "WIDTH": 8}
    name = f"{op} {fmt}, {'x'.join(map(str, x.shape))} {str(dtype)[6:]}"
    return Case(name, getattr(triton_kernels, f"{op}_kernel"), pointers, meta)


def decode_case(fmt: str, dtype: torch.dtype = torch.float32) -> Case:
    """Decoding of int8 codes in rows of 4096."""
    number = parse_format(fmt)
    facts = backend.facts(number, dtype)
    shared = backend.LONG_ROW if facts["KIND"] == 2 else backend.NOTHING
    meta = {name: facts[name] for name in ("KIND", "OFFSET", "LOW", "CMAX")}
    meta |= {"SHARED": shared, "Q": 256, "ALIGNED": True, "BITS": 8, "HAS_NAN": True, "num_warps": 4}
    meta["EXPONENT_BITS"] = getattr(number, "exponent_bits", 0)
    pointers = {"codes": "*i8", "exponents": "*i8", "out": POINTERS[dtype]}
    return Case(f"decode {fmt}, rows of 4096 {str(dtype)[6:]}", triton_kernels.decode_kernel, pointers, meta)


def representative() -> Iterator[Case]:
    """The set that the tests compile: the default step at its widest row, and the others' hardest."""
    yield step_case("bfp8", "bfp8", "vc", (512, 4608))
    yield step_case("bfp8", "bfp8", "full", (512, 4608))
    yield step_case("fixed8.6", "fixed8.6", "vc", (512, 4608))
    yield op_case("quantize", "bfp8", (512, 8192))
    yield step_case("e4m3", "bfp8", "vc", (512, 4608))


def everything() -> Iterator[Case]:
    """The set of the table in the documentation."""
    for mode in ("vc", "naive", "full"):
        for shape in ((64, 64), (256, 576), (256, 1152), (256, 2304), (512, 4608)) if mode == "vc" else ((512, 4608),):
            yield step_case("bfp8", "bfp8", mode, shape)
        yield step_case("fixed8.6", "fixed8.6", mode, (512, 4608))
    yield step_case("bfp8", "bfp8", "vc", (512,))
    yield step_case("bfp8", "bfp8", "vc", (64, 27))
    yield step_case("bfp8", "bfp8", "vc", (4096, 16384), phase=1)
    yield step_case("bfp8", "bfp8", "vc", (4096, 16384), phase=2)
    yield step_case("bfp8", "bfp8", "vc", (4096, 16384))
    yield step_case("bfp8", "bfp8", "vc", (512, 4608), torch.bfloat16)
    yield step_case("e4m3", "bfp8", "vc", (512, 4608))
    yield step_case(None, None, "float", (512, 4608))
    for fmt in ("bfp8", "fixed8.6", "e4m3"):
        for op in ("quantize", "vc", "encode"):
            yield op_case(op, fmt, (512, 4608))
        yield decode_case(fmt)
    yield op_case("quantize", "bfp8", (128, 65536))
    yield op_case("quantize", "bfp8", (512, 4608), torch.bfloat16)


def bytes_per_element(ptx: str, case: Case, threads: int) -> float:
    """Global bytes that a thread moves over its elements; table look-ups (scalar loads of the step) not counted."""
    step, aligned = case.kernel is step_kernel, case.meta["ALIGNED"]
    total = -8 if step and not aligned else 0  # the program's place in the map: two scalar loads of 32 bits
    for vector, width in re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx):
        shared = width in ("8", "64") or (step and aligned and not vector)  # exponents, keys, the table
        total += 0 if shared else int(vector or 1) * int(width) // 8
    elements = case.meta.get("R", 1) * case.meta["Q"] * 4 / threads
    return total / elements


def compiled(case: Case, capability: int) -> Row:
    """Compile one case for ``sm_<capability>`` and read what came out."""
    meta = dict(case.meta)
    options = {"num_warps": meta.pop("num_warps"), "enable_fp_fusion": meta.pop("enable_fp_fusion", True)}
    signature, attrs = {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        signature[name] = case.pointers.get(name, "constexpr" if name in meta else "fp32" if name in FLOATS else "i64")
        if name in case.pointers:
            attrs[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, meta, attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        arch = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [ptxas(), "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found[1]) if found else -1  # -1: the report has another form; a test then fails

    return Row(
        case.name, f"sm_{capability}", number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"), number(r"(\d+) bytes stack frame"),
        binary.metadata.shared, options["num_warps"],
        round(bytes_per_element(binary.asm["ptx"], case, 32 * options["num_warps"]), 2),
    )  # fmt: skip


def markdown(rows: list[Row]) -> Iterator[str]:
    """The table."""
    version = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    yield f"Triton {triton.__version__}, ptxas {release[1] if release else '?'}, torch {torch.__version__}.\n"
    heads = ["kernel", "registers sm_80, sm_90", "spilled bytes", "shared bytes", "warps", "bytes/element"]
    heads += [f"{name}, µs" for name in BANDWIDTH]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for first, second in zip(rows[0::2], rows[1::2]):
        cells = [first.kernel, f"{first.registers}, {second.registers}", f"{first.spill_bytes}, {second.spill_bytes}"]
        cells += [str(first.shared_bytes), str(first.warps), f"{first.bytes_per_element:g}"]
        cells += [f"{first.bytes_per_element * ELEMENTS / rate * 1e6:.0f}" for rate in BANDWIDTH.values()]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or the representative set as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the representative set, one JSON object a line")
    arguments = parser.parse_args()
    if arguments.json:
        for case in representative():
            for capability in (80, 90):
                print(json.dumps(asdict(compiled(case, capability))), flush=True)
        return
    cases = list(everything())
    rows = [compiled(case, capability) for case in cases for capability in (80, 90)]
    sys.stdout.write("\n".join(markdown(rows)) + "\n")


if __name__ == "__main__":
    main()
