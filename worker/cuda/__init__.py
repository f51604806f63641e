"""The device side of a worker on an NVIDIA GPU."""
