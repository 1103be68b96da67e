"""``python -m lightning_lpsgld.cli``."""

from __future__ import annotations

from lightning_lpsgld.cli.main import main

if __name__ == "__main__":
    main()
