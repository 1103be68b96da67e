"""A kernel that is wrong, raises, or is said to fail is not used: the reference takes over, one warning says so.

Triton interprets or compiles as it is told when it is imported, so each case is a process of its own: this file, run as
a script with the name of a case.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import (
    StepSpec,
    backend_report,
    decode,
    dispatch,
    encode,
    quantize,
    quantize_variance_corrected,
    self_check,
)
from lightning_lpsgld.random import DrawKey

ROOT = Path(__file__).parents[2]
KEY = DrawKey(3, step=1)
FORMATS = ["bfp8", "bfp8-tensor", "bfp8-clamp", "fixed8.6", "e4m3", "mxfp8e4m3"]


def everywhere() -> None:
    """Let ``"auto"`` ask Triton first on a CPU, where its interpreter runs."""
    dispatch._AUTO["cpu"] = ("triton", "reference")


def values(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outcomes(text: str) -> list[Tensor]:
    """What every op gives, in whatever backend ``"auto"`` takes."""
    x = values((3, 32))
    encoded = encode(x, text, rounding="stochastic", key=KEY)
    found = [quantize(x, text, key=KEY), quantize(x, text, rounding="nearest"), encoded.codes, decode(encoded)]
    return [*found, quantize_variance_corrected(x, 1e-4, text, key=KEY)]


def expected(text: str) -> list[Tensor]:
    x, key = values((3, 32)), {"key": KEY, "backend": "reference"}
    encoded = encode(x, text, rounding="stochastic", **key)
    found = [quantize(x, text, **key), quantize(x, text, rounding="nearest", backend="reference"), encoded.codes]
    return [*found, decode(encoded, backend="reference"), quantize_variance_corrected(x, 1e-4, text, **key)]


def stepped(backend: Any, mode: Any = "vc") -> Tensor:
    from lightning_lpsgld.samplers.updates import langevin_steps_

    param = quantize(values((4, 16)), "bfp8", rounding="nearest", backend="reference")
    fmt = parse_format("bfp8")
    spec = StepSpec(0.1, 0.0, 1e-5, fmt, fmt, mode)
    langevin_steps_([param], [values((4, 16))], None, spec, [KEY], [0], backend=backend)
    return param


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def case_good_kernels_are_used_and_compared_once() -> None:
    from lightning_lpsgld.ops import triton as backend

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in FORMATS:
            assert same(outcomes(text)[:4], expected(text)[:4]), text
        stepped("auto")
    assert dispatch.choose("auto", "quantize", values((3, 32)), parse_format("bfp8")) is backend
    assert not self_check.failures()
    known = dict(self_check._results)
    assert {name[0] for name in known} == set(self_check.OPS)
    for text in FORMATS:
        outcomes(text)
    assert self_check._results == known
    assert backend_report()["triton"] == "available"


def case_a_block_of_one_element_can_be_checked() -> None:
    """Of a scalar, whatever the format's blocks are: no shape has such blocks but a scalar's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("bfp8b4", "bfp8e4", "bfp8-tensor"):
            x = torch.tensor(0.3)
            encoded = encode(x, text, rounding="nearest")
            assert torch.equal(decode(encoded), decode(encoded, backend="reference"))
            assert torch.equal(quantize(x, text, key=KEY), quantize(x, text, key=KEY, backend="reference"))
            quantize_variance_corrected(x, 1e-4, text, key=KEY)
    assert not self_check.failures()


def case_a_wrong_kernel_gives_way_to_the_reference() -> None:
    from lightning_lpsgld.ops import triton as backend

    right = backend.quantize

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        out = right(x, *rest)
        out.view(-1)[-1] += 0.25
        return out

    backend.quantize = wrong
    x = values((3, 32))
    with pytest.warns(RuntimeWarning, match=r"quantize, bfp8, float32.*1 of 64 elements differ.*reference ops take"):
        out = quantize(x, "bfp8", key=KEY)
    assert torch.equal(out, quantize(x, "bfp8", key=KEY, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once; the other ops are still Triton's
        assert torch.equal(quantize(x + 1, "bfp8", key=KEY), quantize(x + 1, "bfp8", key=KEY, backend="reference"))
        assert dispatch.choose("auto", "encode", x, parse_format("bfp8")) is backend
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run quantize here: the kernel of quantize"):
        quantize(x, "bfp8", key=KEY, backend="triton")
    assert "failed its check against the reference" in backend_report()["triton"]


def case_a_kernel_that_does_not_compile_gives_way_to_the_reference() -> None:
    from lightning_lpsgld.ops import triton_launch

    def raising(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such instruction on this device")

    triton_launch.Start._first = raising
    for text in ("bfp8", "e4m3"):
        with pytest.warns(RuntimeWarning, match=r"no such instruction on this device"):
            assert same(outcomes(text), expected(text)), text
    with pytest.warns(RuntimeWarning, match=r"the vc step.*ValueError: no such instruction"):
        out = stepped("auto")
    assert torch.equal(out, stepped("reference"))


def case_a_wrong_step_gives_way_to_the_composed_ops() -> None:
    from lightning_lpsgld.ops import triton as backend

    right = backend.langevin_steps_

    def wrong(params: Any, grads: Any, *rest: Any) -> Tensor:
        return right(params, [-grad for grad in grads], *rest)

    backend.langevin_steps_ = wrong
    with pytest.warns(RuntimeWarning, match=r"the vc step, weights bfp8, gradients bfp8.*elements differ"):
        out = stepped("auto")
    assert (out - stepped("reference")).abs().max() <= 2.0**-5  # composed of Triton's ops: a threshold apart at most
    with pytest.raises(RuntimeError, match=r"cannot run the fused step here: the kernel of the vc step"):
        stepped("triton")


def case_forced_by_the_environment() -> None:
    wish = os.environ[self_check.VARIABLE]
    if wish == "fail":
        with pytest.warns(RuntimeWarning, match="made to fail by LIGHTNING_LPSGLD_SELF_CHECK") as said:
            assert all(same(outcomes(text), expected(text)) for text in FORMATS * 2)
        assert len(said) == len(self_check._results) == len(self_check.failures())
        return
    from lightning_lpsgld.ops import triton as backend

    x, fmt = values((3, 32)), parse_format("bfp8")
    with pytest.warns(RuntimeWarning, match="made to fail"):
        assert dispatch.choose("auto", "encode", x, fmt).__name__.endswith("reference")
    assert dispatch.choose("auto", "quantize", x, fmt) is backend


CASES = {name[5:]: check for name, check in list(globals().items()) if name.startswith("case_")}
requires_triton = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("triton") is None, reason="needs the triton package"
)


@requires_triton
@pytest.mark.parametrize(
    ("name", "wish"),
    [(name, "on") for name in CASES if name != "forced_by_the_environment"]
    + [("forced_by_the_environment", "fail"), ("forced_by_the_environment", "fail-encode, fail-decode")],
)
def test_first_use(name: str, wish: str) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), self_check.VARIABLE: wish}
    done = subprocess.run([sys.executable, __file__, name], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.VARIABLE, "fail-cast")
    with pytest.raises(ValueError, match=r"LIGHTNING_LPSGLD_SELF_CHECK must be on, off, fail.*got 'fail-cast'"):
        self_check.first_use(("none",), "quantize", "nothing", torch.device("cpu"), lambda: "")


def test_off_trusts_a_kernel_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.VARIABLE, "off")
    monkeypatch.setattr(self_check, "_results", {})

    def never() -> str:
        raise AssertionError("it was called")

    assert self_check.first_use(("none",), "quantize", "nothing", torch.device("cpu"), never) is None


if __name__ == "__main__":
    torch.set_num_threads(1)
    everywhere()
    CASES[sys.argv[1]]()
