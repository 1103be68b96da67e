"""The one exception of the bank."""

from __future__ import annotations

__all__ = ["BankError"]


class BankError(ValueError):
    """A sample bank, or what was to be put into it, is not what it should be; the message names the part and a remedy.

    Whatever a manifest or a sample file contains, reading it raises this and nothing else. Failures of the file system
    itself (no space, no permission) stay ``OSError``.
    """
