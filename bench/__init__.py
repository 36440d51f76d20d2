"""Benchmarks of jpaged and pallas_kernels: ``python -m bench`` lists them."""


class UsageError(ValueError):
    """Options that do not fit together, or that this machine cannot serve."""
