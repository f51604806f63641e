"""Flags of tool calls and reasoning."""

import argparse

from baton.frontend.tools.registry import REASONING_PARSERS, TOOL_PARSERS, find_reasoning_parser, find_tool_parser
from baton.proto.errors import UserError


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """As vLLM's."""
    group.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="the model may decide to call tools; needs --tool-call-parser. A required or named tool needs no flag",
    )
    group.add_argument(
        "--tool-call-parser", default="", metavar="NAME", help=f"{', '.join(TOOL_PARSERS)}, or of the plug-in"
    )
    group.add_argument(
        "--reasoning-parser", default="", metavar="NAME", help=f"{', '.join(REASONING_PARSERS)}, or of the plug-in"
    )
    group.add_argument(
        "--tool-parser-plugin", default="", metavar="FILE", help="Python file with parsers; it runs as it is"
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for parsers that are not there."""
    if args.enable_auto_tool_choice and not args.tool_call_parser:
        raise UserError("--enable-auto-tool-choice needs --tool-call-parser NAME")
    if args.tool_parser_plugin and not (args.tool_call_parser or args.reasoning_parser):
        raise UserError("--tool-parser-plugin needs --tool-call-parser or --reasoning-parser with a name of its own")
    if args.tool_call_parser:
        find_tool_parser(args.tool_call_parser, args.tool_parser_plugin)
    if args.reasoning_parser:
        find_reasoning_parser(args.reasoning_parser, args.tool_parser_plugin)
