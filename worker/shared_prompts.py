"""Who has a prompt: the samples of one request, and others that begin alike, compute or pull it once.

The first leg to run with some tokens owns them here until its blocks are given back. A leg that comes with the same
tokens waits until they have settled in the owner's blocks, then takes references on the full ones. The block that the
owner goes on filling is its own: a prefill leg copies it, a decode leg pulls its own copy. The prefix cache knows full
blocks only, and only settled ones; this is for what is on its way there.

Where blocks are swapped (swaps.py) each leg has its own: what others refer to can't be given away.
"""

from baton.worker.request import Request


class SharedPrompts:
    """Legs by what their blocks hold, or will. Unless `enabled` nobody shares anything."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._owners: dict[tuple[str, bytes, tuple[int, ...]], Request] = {}

    def owner(self, request: Request, length: int) -> Request | None:
        """Whose blocks hold the request's first `length` tokens, or will once it has settled so many."""
        found = self._owners.get(self._key(request, length)) if self._owners else None
        return None if found is request else found

    def claim(self, request: Request, length: int) -> None:
        """The request is about to fill its blocks with its first `length` tokens."""
        key = self._key(request, length)
        if self._enabled and key not in self._owners:
            self._owners[key] = request
            request.shared_key = key

    def release(self, request: Request) -> None:
        """Its blocks are no longer its own."""
        if request.shared_key is not None:
            del self._owners[request.shared_key]
            request.shared_key = None

    @staticmethod
    def _key(request: Request, length: int) -> tuple[str, bytes, tuple[int, ...]]:
        return request.leg, *request.prefix_name(length)
