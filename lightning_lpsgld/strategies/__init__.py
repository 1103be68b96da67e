"""Lightning strategies: independent chains, one per rank or per group of ranks."""

from lightning_lpsgld.strategies.parallel_chains import ParallelChainsStrategy

__all__ = ["ParallelChainsStrategy"]
