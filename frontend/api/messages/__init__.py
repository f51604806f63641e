"""/v1/messages: Anthropic's API, in front of the same requests and streams as chat completions."""
