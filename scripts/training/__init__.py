"""Trains the bundled model in numpy and numba; see scripts/train_bundled.py."""
