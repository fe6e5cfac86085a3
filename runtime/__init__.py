"""Kernels at work: the cache of compiled kernels, their loading and launching, and the dense reference."""

if not __name__.startswith("attndsl."):
    # Under another name every module would exist twice, and its classes would differ from themselves.
    raise ImportError(f"import attndsl.runtime, not {__name__}")
