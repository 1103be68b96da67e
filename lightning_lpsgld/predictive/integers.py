"""Arithmetic of a module's forward passes: integers where casts give codes and their products are exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lpsgld.arithmetic import Arithmetic, ArithmeticRefusal, LayerArithmetic, check_choice
from lightning_lpsgld.casting import carried_codes

__all__ = ["layer_arithmetic"]


@contextmanager
def layer_arithmetic(module: nn.Module, arithmetic: Arithmetic) -> Iterator[LayerArithmetic | None]:
    """Run forwards of a module in the arithmetic asked for.

    Args:
        module: The module; its casts (:class:`~lightning_lpsgld.casting.ActivationCasting`) make the codes.
        arithmetic: ``"simulated"``; ``"auto"``: integers layer by layer, where exact and faster on this machine;
            ``"integer"``: integers in every linear and convolution layer but the first, whose input is not rounded.

    Yields:
        Who decides, and can report; ``None`` where nothing runs in integers.

    Raises:
        ValueError: If ``arithmetic`` is another.
        ArithmeticRefusal: With ``"integer"``, if nothing is cast in the module, or, from a forward, with the name of a
            layer that cannot run in integers.

    Example:
        >>> with layer_arithmetic(nn.Linear(1, 1), "auto") as running:
        ...     print(running)
        None
    """
    check_choice("layer_arithmetic", arithmetic)
    if arithmetic == "simulated":
        yield None
        return
    with carried_codes(module) as codes_of:
        if codes_of is None:
            if arithmetic == "integer":
                raise ArithmeticRefusal(
                    f"arithmetic='integer': activations of {type(module).__name__} are not rounded, so no layer has "
                    "codes to multiply. Attach an ActivationCasting (the plugin does), or use arithmetic='auto'."
                )
            yield None
            return
        layers = LayerArithmetic(module, codes_of, arithmetic)
        with layers.running():
            yield layers
