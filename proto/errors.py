"""Errors that are the user's to mend."""


class UserError(Exception):
    """Wrong flags, a missing model, too little memory, a busy port: one clear line, exit code 2, no traceback."""
