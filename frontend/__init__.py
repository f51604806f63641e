"""Everything clients meet: the HTTP server, tokenising, streams, the offline LLM class and the command line."""
