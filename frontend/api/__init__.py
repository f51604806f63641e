"""The OpenAI-compatible API: requests in, responses out, nothing about sockets."""
