"""Programmatic dependent launch: a kernel's programs may start while the kernel before it still runs.

They do what does not depend on it, such as loading weights, and wait with gdc_wait() until it has ended and its writes
are seen. Every program of such a kernel waits before it reads or writes anything that another kernel touches, so that
the end of one kernel implies the end of all before it. CUDA C++ Programming Guide, "Programmatic Dependent Launch".
"""

import functools

import torch
import triton


@functools.cache
def options() -> dict[str, bool]:
    """Launch options of a kernel with a parameter PDL, on the current GPU: from Hopper on it can."""
    interpreted = triton.knobs.runtime.interpret
    if interpreted or torch.cuda.get_device_capability() < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
