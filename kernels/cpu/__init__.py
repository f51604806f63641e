"""C kernels for float32 on CPU, compiled on first use; reference.TorchOps says what they compute."""
