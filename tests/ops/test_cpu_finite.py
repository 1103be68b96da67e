"""The look for NaN and infinities: every type, every place, any beginning and order in memory."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lpsgld.ops import cpu
from lightning_lpsgld.ops.cpu_finite import finite_flags, readable
from lightning_lpsgld.ops.cpu_library import LEVELS, load
from lightning_lpsgld.samplers import finite

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BEST = cpu.instruction_set()


@pytest.mark.parametrize("level", [name for name in LEVELS if LEVELS[name] <= LEVELS.get(BEST, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_is_found_wherever_it_stands(dtype, level):
    load()[0].lpsgld_level(LEVELS[level])
    try:
        for length in (1, 7, 16, 33, 100):
            for begin in (0, 1, 3):
                x = torch.full((length + begin,), torch.finfo(dtype).max, dtype=dtype)[begin:]
                x[::2] = -torch.finfo(dtype).smallest_normal / 4  # subnormal
                assert finite_flags([x]).tolist() == [True]
                for place in range(length):
                    bad = [x.clone() for _ in range(3)]
                    for y, value in zip(bad, (math.nan, math.inf, -math.inf)):
                        y[place] = value
                    assert finite_flags([x, *bad, x]).tolist() == [True, False, False, False, True]
    finally:
        load()[0].lpsgld_level(-1)


def test_nan_of_every_kind_counts():
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000 | 1 << 5], dtype=torch.int32)
    for pattern in (bits, bits | -(2**31)):
        assert finite_flags(list(pattern.view(torch.float32).split(1))).tolist() == [False] * 3


@pytest.mark.parametrize("threads", [1, 3])
def test_large_tensors_are_looked_through_to_their_ends(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.zeros(3, 40_001)
        tensors = [x] * 6
        for i, place in ((1, (0, 0)), (2, (2, 40_000)), (4, (1, 5))):
            tensors[i] = x.clone()
            tensors[i][place] = math.nan
        assert finite_flags(tensors).tolist() == [True, False, False, True, False, True]
    finally:
        torch.set_num_threads(before)


def test_gaps_between_elements_are_not_read():
    """Beyond a view lies what is not a gradient; such views are looked at by torch."""
    storage = torch.full((6, 8), math.nan)
    strided, last = storage[::2, 1:7], torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    strided.fill_(1.0)
    assert not readable(strided)
    assert readable(last)
    assert not readable(torch.zeros(3).int())
    assert finite._finite_flags([strided, last, torch.zeros(0)]).tolist() == [True, True, True]
    strided[1, 1] = last[1, 2, 3, 4] = math.inf
    assert finite._finite_flags([strided, torch.ones(2), last]).tolist() == [False, True, False]


def test_without_the_kernel_the_answers_are_the_same(monkeypatch):
    huge, bad = torch.full((5,), 3e38), torch.tensor([1.0, math.nan])
    grads = [huge, bad, torch.zeros(0), torch.ones(4)]
    expected = finite._finite_flags(grads).tolist()
    monkeypatch.setattr(finite.cpu_finite, "readable", lambda x: False)
    assert finite._finite_flags(grads).tolist() == expected == [True, False, True, True]
