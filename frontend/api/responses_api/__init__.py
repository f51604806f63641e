"""/v1/responses: OpenAI's stateful API, in front of the same requests and streams as chat completions."""
