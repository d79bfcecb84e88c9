"""The cpu backend's kernels: numba functions over addresses, written with 16-lane vectors (`simd.py`).

`jit.py` compiles and caches them, `formats.py` draws the packed layout of every weight format. Each kernel is a loop
body over the tasks `begin` to `end`; what it computes for a row never depends on which tasks run together.
"""
