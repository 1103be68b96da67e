"""Fused triton kernels (placeholder until the kernels land)."""


def unavailable() -> str:
    """Reason why this backend cannot run."""
    return "the fused triton kernels are not built."
