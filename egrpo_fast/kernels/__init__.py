"""Kernels: one stem per op in `reference/` (the truth, plain PyTorch), `triton/` and `extension/` (the fast ones).

Their folders are `kernels/reference`, `kernels/triton` and `kernels/extension` at the top of the repository. `setup.py`
maps them into this package. `egrpo_fast.ops` chooses an implementation and checks the arguments for all of them.

The top folder `kernels/` has no `__init__.py`: diffusers and transformers import another project's package of that bare
name. A folder without `__init__.py` never hides an installed package, and on its own it counts as absent.
"""
