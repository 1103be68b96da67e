"""Fused cpu kernels (placeholder until the kernels land)."""


def unavailable() -> str:
    """Reason why this backend cannot run."""
    return "the fused cpu kernels are not built."
