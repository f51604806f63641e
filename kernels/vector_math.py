"""torch's vector functions on a CPU, made safe to call from many threads.

oneMKL, which computes them, chooses a kernel for each at its first call. Where several threads are in that first call
one of them may run a kernel of the lowest accuracy over its whole share (2024.2, in today's wheels; pytorch/pytorch
#188792): cosines off by 1.5e-4, once, in a process that computes them right from then on. A rotary table made so gave a
worker other tokens than its peers from the middle of the table on.
"""

import torch

FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh)
"""Those that the worker calls on tensors of more than 2,048 elements, which torch shares out among threads."""


def settle() -> None:
    """Have the kernels chosen by this thread alone. To be called before any tensor is computed."""
    for dtype in (torch.float32, torch.float64):
        for function in FUNCTIONS:
            function(torch.ones(1, dtype=dtype))
