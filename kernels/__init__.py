"""Kernels, each beside a plain torch reference that says what it computes."""
