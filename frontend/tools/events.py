"""What a parser finds in a model's text."""

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text for the user."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text that the model wrote for itself."""

    text: str


class CallBegins(msgspec.Struct, frozen=True):
    """A tool is called; what follows, up to the next call, are its arguments."""

    name: str
    id: str = ""
    """Empty: the server makes one."""


class Arguments(msgspec.Struct, frozen=True):
    """A piece of the arguments of the call that began last, as JSON."""

    text: str


Event = Content | Reasoning | CallBegins | Arguments
