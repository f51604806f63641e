"""Llama 3 and 4: the whole output is `{"name": …, "parameters": {…}}`, several are separated by semicolons."""

from baton.frontend.tools.events import Content
from baton.frontend.tools.json_calls import call_object, or_content
from baton.frontend.tools.parser import ToolParser, content
from baton.frontend.tools.scanner import Finds, Scanner

_TAG = "<|python_tag|>"


class LlamaJsonParser(ToolParser):
    """An output that begins otherwise is content to its end; so is an object without the tag that names none of the
    tools: it may as well be an answer in JSON."""

    names = ("llama3_json", "llama4_json")
    markers = (_TAG,)

    def parse(self, scan: Scanner) -> Finds[None]:
        names: set[str] | None = {tool["function"]["name"] for tool in self.tools}
        before = yield from scan.take_space()
        if (yield from scan.starts_with(_TAG)):
            scan.take(len(_TAG))
            names = None
            before += yield from scan.take_space()
        while (yield from scan.starts_with("{")):
            if not (yield from or_content(scan, call_object(scan, names), before)):
                before = ""
                break
            before = yield from scan.take_space()
            while (yield from scan.starts_with(";", ",")):
                before += scan.take(1) + (yield from scan.take_space())
            yield from scan.need(1)  # what separates calls is no content when nothing follows
        if before:
            yield Content(before)
        yield from content(scan)
