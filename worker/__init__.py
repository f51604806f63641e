"""The worker process: continuous batching over paged KV blocks, and the model that fills them."""
