"""Source text of kernels, made from kernel plans: Triton, Gluon and blocked PyTorch."""

if not __name__.startswith("attndsl."):
    # Under another name every module would exist twice, and its classes would differ from themselves.
    raise ImportError(f"import attndsl.codegen, not {__name__}")
