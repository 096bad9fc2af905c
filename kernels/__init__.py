"""Kernels: one stem per op in `reference/` (the truth, plain PyTorch), `triton/` and `extension/` (the fast ones).

`egrpo_fast.ops` chooses an implementation and checks the arguments for all of them.
"""

if __name__ != "egrpo_fast.kernels":
    # diffusers and transformers import a package of the bare name `kernels`; this folder must never answer to it.
    raise ImportError(f"import egrpo_fast.kernels, not {__name__!r} (is the repository root on sys.path?)")
