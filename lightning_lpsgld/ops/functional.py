"""The four public ops: arguments are checked here once, backends compute."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats import (
    FormatLike,
    NumberFormat,
    check_dtype,
    code_dtype,
    parse_format,
)
from lightning_lpsgld.ops.dispatch import BackendName, choose
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.random import DrawKey

__all__ = ["decode", "encode", "quantize", "quantize_variance_corrected"]


def _checked(x: Tensor, fmt: FormatLike) -> NumberFormat:
    if x.layout != torch.strided:
        raise TypeError(f"Quantization takes dense tensors, got layout {x.layout}. Call `.to_dense()` first.")
    if torch.compiler.is_compiling() or not isinstance(fmt, (str, NumberFormat)):  # Dynamo warns of caches
        return _number(fmt, x.dtype)
    return _known_number(fmt, x.dtype)


def _number(fmt: FormatLike, dtype: torch.dtype) -> NumberFormat:
    number = parse_format(fmt)
    check_dtype(number, dtype)
    return number


#: Once for each pair; what is refused is looked at again.
_known_number = lru_cache(1024)(_number)


def _check_rounding(rounding: str, key: DrawKey | None) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {rounding!r}.")
    if rounding == "stochastic" and not isinstance(key, DrawKey):
        raise TypeError(f"rounding='stochastic' needs `key=DrawKey(seed, step, stream)`, got {key!r}.")


def quantize(
    x: Tensor,
    fmt: FormatLike,
    *,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    key: DrawKey | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Round every element of ``x`` to the grid of ``fmt``.

    With gap :math:`\Delta` and :math:`p = x/\Delta - \lfloor x/\Delta\rfloor`, stochastic rounding is

    .. math::
        Q^s(x) = \Delta\,(\lfloor x/\Delta\rfloor + [u < p]), \qquad u \sim U(0, 1)

    so that :math:`E\,Q^s(x) = x` and :math:`\mathrm{Var}\,Q^s(x) = p(1-p)\Delta^2 \le \Delta^2/4` **inside the range**.
    Outside, values saturate and the result is biased. A value on the grid stays there with certainty.

    Args:
        x: Values to round, any shape and memory format; float32, float16, bfloat16 or float64. Not modified.
            NaN stays NaN; infinities saturate (to the largest code of their block).
        fmt: Target grid: a format object, a string such as ``"bfp8"``, or a qtorch number.
        rounding: ``"nearest"`` (ties to the even code) or ``"stochastic"``.
        key: Names the draws; required for ``"stochastic"``. The same key gives the same result on every backend but
            ``"qtorch"``.
        backend: ``"auto"`` takes the fastest that can run the call; any other name is binding.

    Returns:
        Tensor of the shape and dtype of ``x``, every value on the grid; zeros are positive.

    Raises:
        TypeError: If the dtype is not floating, the layout is sparse, or the key is missing.
        ValueError: If ``fmt`` is wider than the dtype, or ``rounding`` or ``backend`` is unknown.
        RuntimeError: If the backend that was asked for cannot run the call.

    Example:
        >>> import torch
        >>> x = torch.tensor([-9.0, -0.3, 0.0, 0.375, 9.0])
        >>> quantize(x, "fixed4.2", rounding="nearest")
        tensor([-2.0000, -0.2500,  0.0000,  0.5000,  1.7500])
        >>> quantize(x, "bfp8", key=DrawKey(seed=0)).shape
        torch.Size([5])

    Reference:
        Gupta et al., 2015, arXiv:1502.02551 (stochastic rounding);
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 2 (use in SGLD).
    """
    number = _checked(x, fmt)
    _check_rounding(rounding, key)
    if torch.compiler.is_compiling():
        from lightning_lpsgld.ops import library

        node: Tensor = library.quantize(x.detach(), str(number), rounding, *library.key_fields(key), backend)
        return node
    out: Tensor = choose(backend, "quantize", x, number).quantize(x.detach(), number, rounding, key)
    return out


def quantize_variance_corrected(
    mean: Tensor,
    variance: float | Tensor,
    fmt: FormatLike,
    *,
    key: DrawKey,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Draw a grid value with mean ``mean`` and variance ``variance``: the quantizer Q^vc.

    .. math::
        E[\theta] = \mu, \qquad \mathrm{Var}[\theta] = \max(v,\; p(1-p)\Delta^2)

    with p the fractional part of :math:`\mu/\Delta`. For :math:`v > \Delta^2/4` a Gaussian of variance
    :math:`v-\Delta^2/4` is added, rounded to nearest, and a draw from :math:`\{-\Delta, 0, \Delta\}` restores both
    moments. Below, the mean is rounded stochastically and a draw from :math:`\{-\Delta, 0, \Delta\}` adds what is left
    of v. Regimes are chosen per element. For floating point, microscaled or not, the second regime reaches to
    :math:`v = \Delta^2`, and its draw knows that beyond a power of two only every second value exists: from there it
    goes down by :math:`\Delta` with 1/3 and up by :math:`2\Delta` with 1/6 of the variance that is left, instead of
    either way with 1/2. So both moments are exact at binade edges, too; larger noise finds the gap raised for it.

    The gap of a block (of an element, for floating point; the scale of a run, for microscaling) is decided once: from
    the largest :math:`|\mu|`, raised to make room for the noise as far as every variance stays reachable on the coarser
    grid.

    **Where the promise stops.** Where :math:`p(1-p)\Delta^2 > v` no unbiased rounding has variance v, and the result
    has the larger one. Within a few standard deviations (at least two gaps) of the end of the range, values saturate.
    A run of ``"mxfp8e4m3"`` (scaling ``"floor"``) cannot keep a largest magnitude of 1.875 times a power of two: where
    it comes to that, the mean is exact and the variance larger by up to :math:`\Delta^2`; and where v is too small for
    its scale to be raised, a mean between 1.75 and 2 times a power of two saturates. ``"mxfp8e4m3-fit"`` does neither.

    Args:
        mean: μ, any shape, floating dtype. Not modified. NaN stays NaN, infinities saturate.
        variance: v >= 0, a float or a tensor that broadcasts to ``mean``; squared units of ``mean``.
        fmt: Target grid.
        key: Names the draws.
        backend: As for :func:`quantize`.

    Returns:
        Tensor of the shape and dtype of ``mean``, on the grid.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`quantize`; ValueError also for a negative or NaN variance.

    Example:
        >>> import torch
        >>> draws = quantize_variance_corrected(torch.full((100_000,), 0.3), 0.01, "fixed8.3", key=DrawKey(seed=1))
        >>> bool((draws.mean() - 0.3).abs() < 2e-3), bool((draws.var() - 0.01).abs() < 2e-4)
        (True, True)

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, algorithm 1 (fixed point). Block floating point: same moments,
        gap decided once (the published code draws no corrective noise there).
    """
    number = _checked(mean, fmt)
    _check_rounding("stochastic", key)
    if torch.compiler.is_compiling():  # a tensor of variances is then not checked: its values are not known
        from lightning_lpsgld.ops import library

        many, one = (variance.detach(), 0.0) if isinstance(variance, Tensor) else (None, float(variance))
        fields = library.key_fields(key)
        node: Tensor = library.quantize_variance_corrected(mean.detach(), many, one, str(number), *fields, backend)
        return node
    bad = (variance < 0).logical_or(variance.isnan()).any() if isinstance(variance, Tensor) else not variance >= 0
    if bad:
        raise ValueError(f"`variance` must be >= 0 everywhere, got {variance}.")
    module = choose(backend, "quantize_variance_corrected", mean, number)
    out: Tensor = module.quantize_variance_corrected(mean.detach(), variance, number, key)
    return out


def encode(
    x: Tensor,
    fmt: FormatLike,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: DrawKey | None = None,
    backend: BackendName = "auto",
) -> Encoded:
    """Round ``x`` and return integer codes and shared exponents; ``decode(encode(x)) == quantize(x)`` bit for bit.

    Args:
        x: As for :func:`quantize`.
        fmt: Target grid.
        rounding: As for :func:`quantize`; values already on the grid are kept by both.
        key: Required for ``"stochastic"``.
        backend: As for :func:`quantize`.

    Returns:
        :class:`Encoded` with ``.codes`` (int8 up to 8 bits), ``.exponents`` (int8, or ``None``) and ``.format``.

    Raises:
        TypeError, RuntimeError: As :func:`quantize`.
        ValueError: As :func:`quantize`, and if ``x`` has a NaN that the format has no code for.

    Example:
        >>> import torch
        >>> encode(torch.tensor([[0.5, -1.0], [3.0, 0.0]]), "bfp8").codes
        tensor([[ 32, -64],
                [ 96,   0]], dtype=torch.int8)
    """
    number = _checked(x, fmt)
    _check_rounding(rounding, key)
    if torch.compiler.is_compiling():
        from lightning_lpsgld.ops import library

        codes, exponents = library.encode(x.detach(), str(number), rounding, *library.key_fields(key), backend)
        return Encoded(codes, exponents if number.blocks.shared else None, number)
    out: Encoded = choose(backend, "encode", x, number).encode(x.detach(), number, rounding, key)
    return out


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32, *, backend: BackendName = "auto") -> Tensor:
    """Values of codes and exponents; exact, nothing is rounded.

    Args:
        encoded: What :func:`encode` returned.
        dtype: Floating dtype of the result.
        backend: As for :func:`quantize`.

    Returns:
        Tensor of the shape of ``encoded.codes``.

    Raises:
        ValueError: If the format is wider than ``dtype``, or the codes have another dtype than the format's.

    Example:
        >>> import torch
        >>> decode(encode(torch.tensor([0.30, -1.0]), "fixed8.6"))
        tensor([ 0.2969, -1.0000])
    """
    if torch.compiler.is_compiling():
        check_dtype(encoded.format, dtype)
    else:
        _known_number(encoded.format, dtype)
    if encoded.codes.dtype != code_dtype(encoded.format):
        raise ValueError(
            f"decode: codes of {encoded.format} are {code_dtype(encoded.format)}, got {encoded.codes.dtype}."
        )
    if torch.compiler.is_compiling():
        from lightning_lpsgld.ops import library

        node: Tensor = library.decode(encoded.codes, encoded.exponents, str(encoded.format), dtype, backend)
        return node
    out: Tensor = choose(backend, "decode", encoded.codes, encoded.format).decode(encoded, dtype)
    return out
