"""The draws: the generator's known answers, the draws as a function of their index, and their distributions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.stats import (
    assert_frequencies,
    assert_moments,
    assert_normal,
    assert_uncorrelated,
    assert_uniform,
)

from lightning_lpsgld.random import (
    NORMAL_BIT,
    DrawKey,
    Role,
    derive_seed,
    normals,
    philox4x32,
    stream_id,
    uniforms,
    words,
)

#: counter, key, result: the known answers of Random123 for philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEY = DrawKey(seed=0x1234_5678_9ABC_DEF0, step=77, stream=stream_id(Role.WEIGHT, 3))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    result = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in result) == expected


def plain_philox(counter, key):
    """Ten rounds in Python ints: a second writing of the same definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_random_counters_agree_with_python_ints():
    source = random.Random(5)
    counters = [[source.getrandbits(32) for _ in range(4)] for _ in range(200)]
    key = (source.getrandbits(32), source.getrandbits(32))
    columns = tuple(torch.tensor(column) for column in zip(*counters))
    result = torch.stack(philox4x32(columns, key), dim=1)
    assert result.tolist() == [plain_philox(c, key) for c in counters]


@pytest.mark.parametrize("offset", [0, 1, 6, 2**32 * 4 - 3, 2**61 + 5])
def test_words_are_the_documented_counters(offset):
    """Element i is word i % 4 of counter (i // 4 lo, i // 4 hi, stream, step), also beyond 2**32 counters."""
    key = KEY.at(offset=offset)
    expected = []
    for i in range(offset, offset + 9):
        index = i // 4
        counter = (index % 2**32, index >> 32, key.stream, key.step)
        expected.append(plain_philox(counter, (key.seed % 2**32, key.seed >> 32))[i % 4])
    assert words((9,), key).tolist() == expected
    assert uniforms((9,), key).tolist() == [((w >> 9) + 0.5) / 2**23 for w in expected]


@pytest.mark.parametrize("draw", [words, uniforms, normals])
def test_draws_are_a_function_of_their_index(draw):
    """Slices at an offset are slices of the whole, for all residues; a shape only arranges them row by row."""
    whole = draw((1000,), KEY)
    for start in (*range(9), 500, 997):
        for length in (0, 1, 2, 3, 5, 1000 - start):
            part = draw((min(length, 1000 - start),), KEY.at(offset=start))
            assert torch.equal(part, whole[start : start + len(part)])
    assert torch.equal(draw((10, 4, 25), KEY), whole.view(10, 4, 25))
    assert torch.equal(draw((), KEY), whole[0])
    assert draw((3, 0), KEY).shape == (3, 0)


@pytest.mark.parametrize("draw", [words, uniforms, normals])
def test_no_global_generator_is_read_or_advanced(draw):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = draw((100,), KEY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(draw((100,), KEY), first)


def test_uniforms_are_exact_in_float32_symmetric_and_open():
    u = uniforms((10**6,), KEY)
    assert u.dtype == torch.float64
    assert torch.equal(u.float().double(), u)
    # The whole set is {(k + 1/2) 2^-23}: symmetric about one half, without 0 and 1.
    k = u * 2**23 - 0.5
    assert torch.equal(k, k.round())
    assert k.min() >= 0
    assert k.max() <= 2**23 - 1


@pytest.mark.parametrize("p", [0.0, 2**-24, 2**-23, 0.3, 0.5, 1 - 2**-24, 1.0])
def test_share_of_the_set_below_p_is_p(p):
    """``u < p`` has a probability within 2^-24 of p: counted over the whole set, not drawn."""
    k = torch.arange(2**23)
    below = int((((k.double() + 0.5) * 2.0**-23) < p).sum())
    assert abs(below / 2**23 - p) <= 2**-24
    assert (below == 0) if p == 0 else (p < 1 or below == 2**23)


def other_keys():
    return [
        KEY.at(step=78),
        KEY.at(step=76),
        KEY.at(step=0),
        KEY.at(stream=KEY.stream + 1),
        KEY.at(stream=stream_id(Role.GRADIENT, 3)),
        DrawKey(KEY.seed + 1, 77, KEY.stream),
        DrawKey(KEY.seed ^ (1 << 63), 77, KEY.stream),
        DrawKey(derive_seed(KEY.seed, "chain", 1), 77, KEY.stream),
        KEY.at(offset=4),
    ]


def test_streams_steps_and_seeds_are_uncorrelated():
    n = 2**19
    x = (uniforms((n,), KEY) - 0.5) * 12**0.5
    others = torch.stack([(uniforms((n,), key) - 0.5) * 12**0.5 for key in other_keys()], dim=1)
    assert_uncorrelated(x[:, None].expand(-1, others.shape[1]), others, reach=3**0.5, detect=0.02)


def test_normals_of_streams_steps_and_seeds_are_uncorrelated():
    n = 2**18
    z = normals((n,), KEY)
    others = torch.stack([normals((n,), key) for key in other_keys()], dim=1)
    assert_uncorrelated(z[:, None].expand(-1, others.shape[1]), others, reach=6.77, detect=0.03)
    assert_uncorrelated(z, (uniforms((n,), KEY) - 0.5) * 12**0.5, reach=6.77, detect=0.03)
    # The sine and the cosine of one pair, and the sizes of both.
    pair = z.view(-1, 2)
    assert_uncorrelated(pair[:, 0], pair[:, 1], reach=6.77, detect=0.05)
    large = (pair.abs() > 0.6744897501960817).double() * 2 - 1  # the median of |z|
    assert_uncorrelated(large[:, 0], large[:, 1], reach=1.0, detect=0.05)


def check_uniforms(n, detect):
    u = uniforms((n,), KEY)
    assert_uniform(u, detect=detect)
    assert_moments(u, 0.5, 1 / 12, reach=0.5, detect=3 * detect, fourth_moment=1 / 80)
    raw = words((min(n, 10**6),), KEY)
    for shift in (0, 8, 16, 24):  # all four bytes, the lowest one too: other ops use bits that `uniforms` drops
        counts = ((raw >> shift) & 255).bincount(minlength=256)
        assert_frequencies(counts, torch.full((256,), 1 / 256), detect=0.03)
    neighbours = ((u[: n // 2 * 2] * 16).long().view(-1, 2) * torch.tensor([16, 1])).sum(1).bincount(minlength=256)
    assert_frequencies(neighbours, torch.full((256,), 1 / 256), detect=0.05)


def check_normals(n, detect):
    z = normals((n,), KEY)
    assert_normal(z, detect=detect)
    assert float(z.abs().max()) < 6.77
    assert_moments(z, 0.0, 1.0, reach=6.77, detect=5 * detect, fourth_moment=3.0)
    tail = torch.special.ndtr(torch.tensor([-4.0, -3.0, 3.0, 4.0], dtype=torch.float64))
    law = torch.cat([tail[:1], tail.diff(), 1 - tail[-1:]])
    counts = torch.bucketize(z, torch.tensor([-4.0, -3.0, 3.0, 4.0], dtype=torch.float64)).bincount(minlength=5)
    assert_frequencies(counts, law, detect=0.02)


def test_uniforms_are_uniform():
    check_uniforms(2 * 10**6, detect=0.005)


def test_normals_are_normal():
    check_normals(2 * 10**6, detect=0.005)


def counts_of_a_hundred_million(draw, cells):
    """Counts of 1e8 consecutive draws of one stream in equiprobable cells; ``cells`` maps draws to their cell."""
    counts, chunk = torch.zeros(1024, dtype=torch.long), 5 * 10**6
    for part in range(20):
        counts += cells(draw((chunk,), KEY.at(offset=part * chunk))).bincount(minlength=1024)
    return counts


@pytest.mark.slow
def test_a_hundred_million_uniforms():
    counts = counts_of_a_hundred_million(uniforms, lambda u: (u * 1024).long())
    assert_frequencies(counts, torch.full((1024,), 1 / 1024), detect=0.003)


@pytest.mark.slow
def test_a_hundred_million_normals():
    edges = torch.special.ndtri(torch.arange(1, 1024, dtype=torch.float64) / 1024)
    counts = counts_of_a_hundred_million(normals, lambda z: torch.bucketize(z, edges))
    assert_frequencies(counts, torch.full((1024,), 1 / 1024), detect=0.003)


# --------------------------------------------------------------------------------------------------- keys and streams


def test_streams_of_roles_and_tensors_never_meet():
    ids = {stream_id(role, index) for role in Role for index in (0, 1, 2**24 - 1)}
    assert len(ids) == 3 * len(Role)
    assert max(ids) < NORMAL_BIT


@pytest.mark.parametrize("index", [-1, 2**24])
def test_stream_index_is_checked(index):
    with pytest.raises(ValueError, match=rf"\[0, 2\*\*24\), got {index}"):
        stream_id(Role.WEIGHT, index)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", 2**32),
        ("stream", 2**31),
        ("offset", -4),
        ("offset", 2**62),
        ("step", 1.0),
        ("step", True),
    ],
)
def test_key_fields_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"DrawKey: `{field}` must be an int in \[0, \d+\), got"):
        DrawKey(seed=0, **{field: value})


def test_seed_is_taken_modulo_two_to_the_64():
    assert DrawKey(-1) == DrawKey(2**64 - 1)
    assert DrawKey(2**64 + 3) == DrawKey(3)


def test_at_changes_only_what_is_named():
    assert KEY.at() == KEY
    assert KEY.at(step=0, offset=0) == DrawKey(KEY.seed, 0, KEY.stream, 0)


def test_derived_seeds_differ_and_are_fixed():
    """The value is part of the format of a run: a change would break every resumed chain."""
    seeds = {derive_seed(seed, name, i) for seed in (0, 1, 2**63) for name in ("chain", "rank") for i in range(50)}
    assert len(seeds) == 300
    assert derive_seed(1, "chain", 2) == derive_seed(2**64 + 1, "chain", 2) != derive_seed(1, "chain", "2/")
    assert derive_seed(0, "chain", 0) == 7529501025727245651
