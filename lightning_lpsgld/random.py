"""Counter-based draws: every number is a pure function of (seed, step, stream, element index).

No global generator is read or advanced. The generator is Philox4x32-10 with key = seed and
counter = (index lo, index hi, stream, step); one evaluation gives the words of elements ``4*index .. 4*index + 3``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from enum import IntEnum
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["DrawKey", "Role", "derive_seed", "normals", "philox4x32", "stream_id", "uniforms", "words"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: Streams below 2**31 are the caller's; an op that needs normals *and* uniforms takes its normals from
#: ``stream | NORMAL_BIT``.
NORMAL_BIT = 1 << 31


class Role(IntEnum):
    """What a stream of draws is for; with the index of a tensor it makes a stream (:func:`stream_id`)."""

    WEIGHT = 0
    GRADIENT = 1
    ACTIVATION = 2
    ERROR = 3
    VELOCITY = 4
    OFFSET = 5
    COMMUNICATION = 6
    SAMPLE = 7
    PROBE = 8
    VIEW = 9


def stream_id(role: Role, index: int) -> int:
    """Stream of tensor number ``index`` (0 to 2**24 - 1) in ``role``; different pairs never share draws.

    Args:
        role: What the draws are for.
        index: Number of the tensor, 0 to 2**24 - 1.

    Returns:
        An int below 2**32.

    Raises:
        ValueError: If ``index`` is out of range.
    """
    if not 0 <= index < 2**24:
        raise ValueError(f"`index` of a stream must be in [0, 2**24), got {index}.")
    return (int(role) << 24) | index


@dataclass(frozen=True)
class DrawKey:
    """Name of a family of draws, one per element of a tensor.

    Args:
        seed: Any int; taken modulo 2**64.
        step: Counter of the optimizer step (or of the forward call), 0 to 2**32 - 1.
        stream: 0 to 2**31 - 1; see :func:`stream_id`.
        offset: Index of the tensor's first element in the whole tensor; not 0 only for shards. 0 to 2**62.

    Raises:
        TypeError: If the seed is not an int.
        ValueError: If another field is out of range.

    Example:
        >>> DrawKey(seed=7, step=3).at(step=4)
        DrawKey(seed=7, step=4, stream=0, offset=0)
    """

    seed: int
    step: int = 0
    stream: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is type(self.step) is type(self.stream) is type(self.offset) is int and (
            0 <= self.seed < 2**64 and 0 <= self.step < 2**32 and 0 <= self.stream < 2**31 and 0 <= self.offset < 2**62
        ):
            return  # nearly always; keys are made at every cast
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise TypeError(f"DrawKey: `seed` must be an int, got {self.seed!r}.")
        object.__setattr__(self, "seed", int(self.seed) % 2**64)
        for name, limit in (("step", 2**32), ("stream", 2**31), ("offset", 2**62)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
                raise ValueError(f"DrawKey: `{name}` must be an int in [0, {limit}), got {value!r}.")

    def at(self, *, step: int | None = None, stream: int | None = None, offset: int | None = None) -> DrawKey:
        """Copy with some fields changed."""
        changes = {"step": step, "stream": stream, "offset": offset}
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


def derive_seed(seed: int, *labels: int | str) -> int:
    """Independent 64-bit seed for a chain, a rank or any other labelled use of ``seed``.

    Args:
        seed: The parent seed.
        labels: Ints or strings that name the use, such as ``"chain", 3``.

    Returns:
        An int in [0, 2**64), the same on every machine.
    """
    text = "/".join([str(int(seed) % 2**64), *map(str, labels)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: ten rounds over four 32-bit words held in int64 tensors.

    Args:
        counter: Four int64 tensors of one shape with values in [0, 2**32).
        key: Two ints in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32).

    Reference:
        Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2**64; the mask after the arithmetic shift leaves its upper word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(shape: torch.Size | tuple[int, ...], key: DrawKey, stream: int, device: torch.device | str) -> Tensor:
    count = math.prod(shape)
    first = key.offset // 4
    blocks = (key.offset + count + 3) // 4 - first
    index = torch.arange(first, first + blocks, dtype=torch.int64, device=device)
    counter = (index & _MASK, index >> 32, torch.full_like(index, stream), torch.full_like(index, key.step))
    out = torch.stack(philox4x32(counter, (key.seed & _MASK, key.seed >> 32)), dim=1).flatten()
    start = key.offset - 4 * first
    return out[start : start + count].reshape(shape)


def words(shape: torch.Size | tuple[int, ...], key: DrawKey, *, device: torch.device | str = "cpu") -> Tensor:
    """One 32-bit word per element, in row-major order of the *logical* shape, as int64 in [0, 2**32).

    Args:
        shape: Shape of the result.
        key: Names the draws.
        device: Where the result is; the values are the same everywhere.

    Returns:
        int64 tensor of ``shape``.
    """
    return _words(shape, key, key.stream, device)


def uniforms(shape: torch.Size | tuple[int, ...], key: DrawKey, *, device: torch.device | str = "cpu") -> Tensor:
    r"""Uniform draws :math:`(\lfloor w/2^9\rfloor + \tfrac12)\,2^{-23}` in the open interval (0, 1).

    The set is symmetric about one half and exact in float32, so that ``u < p`` has probability within 2**-24 of p for
    every p, is certain for p >= 1 and impossible for p <= 0.

    Args:
        shape: Shape of the result.
        key: Names the draws.
        device: Where the result is; the values are the same everywhere.

    Returns:
        float64 tensor of ``shape``; every value is exact in float32.

    Example:
        >>> uniforms((2,), DrawKey(seed=0)).dtype
        torch.float64
    """
    return ((words(shape, key, device=device) >> 9).double() + 0.5) * 2.0**-23


def normals(shape: torch.Size | tuple[int, ...], key: DrawKey, *, device: torch.device | str = "cpu") -> Tensor:
    r"""Standard normal draws by Box-Muller on the words of elements :math:`(2j, 2j+1)`.

    .. math::
        z_{2j} = \sqrt{-2\ln u_1}\cos 2\pi u_2,\quad z_{2j+1} = \sqrt{-2\ln u_1}\sin 2\pi u_2,
        \qquad u = (w + \tfrac12)\,2^{-32}

    so that :math:`|z| < 6.77`. They use the sub-stream ``stream | NORMAL_BIT`` and are independent of
    :func:`uniforms` under the same key.

    Args:
        shape: Shape of the result.
        key: Names the draws.
        device: Where the result is; the values are the same everywhere.

    Returns:
        float64 tensor of ``shape``.
    """
    count = math.prod(shape)
    first = key.offset - key.offset % 2
    length = (key.offset + count - first + 1) // 2 * 2
    raw = _words((length,), key.at(offset=first), key.stream | NORMAL_BIT, device)
    u = (raw.double() + 0.5) * 2.0**-32
    radius, angle = (-2.0 * u[0::2].log()).sqrt(), (2.0 * math.pi) * u[1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten()
    start = key.offset - first
    return z[start : start + count].reshape(shape)
