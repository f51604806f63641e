"""The bytes of a KV block, as data that peers exchange before they share blocks."""

import msgspec


class Group(msgspec.Struct, frozen=True, array_like=True):
    """Layers whose KV lives in one kind of block. Today there is one group of kind 'full'."""

    kind: str
    """full | window | state | latent | aux."""
    num_layers: int
    tokens_per_block: int
    block_bytes: int
    axes: tuple[str, ...]
    """Order of the axes inside one block, outermost first."""
    shape: tuple[int, ...]
    """Extent of each axis."""
    dtype: str
    """Element type, torch's name without the prefix: float32, bfloat16, …"""


class KVLayout(msgspec.Struct, frozen=True, array_like=True):
    """Two workers may exchange blocks if and only if their layouts are equal."""

    fingerprint: str
    """Everything the values depend on (weights, revision, dtype, rope, adapters): same shape is not same model."""
    groups: tuple[Group, ...]

    def mismatch(self, other: "KVLayout") -> str | None:
        """Why blocks can't cross between self and other, or None when they can."""
        if self.fingerprint != other.fingerprint:
            return f"model fingerprint {self.fingerprint} against {other.fingerprint}"
        for mine, theirs in zip(self.groups, other.groups, strict=False):
            for field in Group.__struct_fields__:
                if getattr(mine, field) != getattr(theirs, field):
                    return f"KV {field} {getattr(mine, field)} against {getattr(theirs, field)}"
        if len(self.groups) != len(other.groups):
            return f"{len(self.groups)} KV groups against {len(other.groups)}"
        return None
