"""What scripts/gpu_check.py runs: checks of each kernel family against numpy, and timings against rooflines."""
