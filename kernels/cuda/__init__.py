"""Triton kernels for NVIDIA GPUs; each has its reference in baton.kernels.reference."""
