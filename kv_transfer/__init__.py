"""Moving KV blocks between workers: the leases that keep them, the contract of a transport, and the transports."""
