"""Errors that are the user's to mend, and those of reading what a peer has sent."""

import msgspec

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no message: not only its own error, but text that is no UTF-8, and arrays
nested beyond what it follows."""


class UserError(Exception):
    """Wrong flags, a missing model, too little memory, a busy port: one clear line, exit code 2, no traceback."""
