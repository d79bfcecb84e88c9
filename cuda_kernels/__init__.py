"""GPU kernels for transformer decoders, written with numba.cuda: usable from CuPy, and from a CPU by emulation.

Each file holds one family: device functions, kernels, and a launcher that checks shapes. `compile` turns kernels into
PTX and machine code with no GPU at hand, `launch` runs them on a GPU, `emulator` interprets their PTX on numpy.
This package imports neither tinyllm nor weights.
"""
