"""The scheduler process: admission, placement, handoff, recovery and metrics of the whole cluster."""
