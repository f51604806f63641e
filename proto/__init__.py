"""What every process shares: messages, the codec, typed channels, the config tree and block hashing.

Imports nothing of ours and no torch, so that any process starts quickly.
"""

PROTOCOL_VERSION = 2
"""Raised when a message changes in a way that an older peer would misread; appended fields do not count."""

__version__ = "0.1.0"
