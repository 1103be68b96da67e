"""The bank that a command is given."""

from __future__ import annotations

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.cli.errors import CommandError, one_line

__all__ = ["opened_bank"]


def opened_bank(path: str, key: str) -> SampleBank:
    """A bank with a sample in it.

    Args:
        path: Where it is.
        key: What said so, for messages.

    Raises:
        CommandError: If there is none, or it has no usable sample.
    """
    try:
        bank = SampleBank.open(path)
    except (BankError, OSError) as error:
        raise CommandError(f"{key}: {one_line(error)}") from error
    if not len(bank):
        raise CommandError(
            f"{key}: {path} has no usable sample, and {len(bank.damaged)} that are damaged; `lpsgld bank ls` lists "
            "them."
        )
    return bank
