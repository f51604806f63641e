"""Answers as blocks: the same, however the output was cut into deltas."""

import random
from collections.abc import Sequence

import pytest

from baton.frontend.api.blocks import Begins, Block, Blocks, Ends, Grows, Kind
from baton.frontend.api.choice import Delta, Tokens
from baton.frontend.tools.events import Content, Reasoning
from baton.frontend.tools.output import CallPart, Piece
from baton.proto.messages import TokenLogprobs


def blocks_of(deltas: Sequence[Delta]) -> list[Block]:
    """What the changes add up to; they must come in order."""
    blocks, following = [], Blocks()
    open_block: Block | None = None
    grown = ""
    for change in [change for delta in deltas for change in following.take(delta)] + [*following.end()]:
        match change:
            case Begins(block):
                assert open_block is None
                assert block.index == len(blocks)
                open_block, grown = block, ""
            case Grows(block, text, _):
                assert block is open_block
                grown += text
            case Ends(block):
                assert block is open_block
                assert block.text == grown
                open_block = None
                blocks.append(block)
    assert open_block is None
    return blocks


def told(blocks: list[Block]) -> list[tuple[Kind, str, str]]:
    return [(block.kind, block.name, block.text) for block in blocks]


def pieces(*deltas: list[Piece]) -> list[Delta]:
    return [Delta(pieces=[*delta]) for delta in deltas]


def cut(rng: random.Random, whole: Sequence[Piece]) -> list[Delta]:
    """The pieces cut further, and spread over deltas."""
    parts: list[Piece] = []
    for piece in whole:
        text = piece.arguments if isinstance(piece, CallPart) else piece.text
        at = rng.randint(0, len(text))
        if isinstance(piece, CallPart):
            parts += [CallPart(piece.index, text[:at], piece.name, piece.id), CallPart(piece.index, text[at:])]
        else:
            parts += [type(piece)(text[:at]), type(piece)(text[at:])]
    deltas = [Delta()]
    for part in parts:
        deltas[-1].pieces.append(part)
        if rng.random() < 0.5:
            deltas.append(Delta())
    return deltas


WHOLE: list[Piece] = [
    Reasoning("I must look."),
    Content("\n\nLet me see. "),
    CallPart(0, '{"city": "Bonn"}', "weather", "call_0"),
    Content("\n"),
    CallPart(1, "{}", "time", "call_1"),
    Content(" Done."),
]


def test_pieces_become_blocks_in_their_order() -> None:
    assert told(blocks_of(pieces([*WHOLE]))) == [
        (Kind.REASONING, "", "I must look."),
        (Kind.TEXT, "", "\n\nLet me see. "),
        (Kind.CALL, "weather", '{"city": "Bonn"}'),
        (Kind.CALL, "time", "{}"),
        (Kind.TEXT, "", " Done."),
    ]


def test_how_the_output_was_cut_makes_no_difference() -> None:
    rng = random.Random(7)
    expected = told(blocks_of(pieces([*WHOLE])))
    for _ in range(300):
        assert told(blocks_of(cut(rng, WHOLE))) == expected


def test_an_answer_without_parser_is_one_text() -> None:
    assert told(blocks_of([Delta("a"), Delta(""), Delta(" b")])) == [(Kind.TEXT, "", "a b")]


@pytest.mark.parametrize(("text", "count"), [("", 0), (" \n", 1)])
def test_white_space_is_a_block_only_where_it_is_all(text: str, count: int) -> None:
    assert len(blocks_of([Delta(text)])) == count
    assert len(blocks_of(pieces([Content(text), CallPart(0, "{}", "time", "c")]))) == 1


def test_two_calls_of_one_tool_are_two_blocks() -> None:
    calls: list[Piece] = [CallPart(0, "{}", "time", "a"), CallPart(1, "{}", "time", "b")]
    assert [block.call_id for block in blocks_of(pieces(calls))] == ["a", "b"]


def test_logprobs_go_with_the_text_that_their_tokens_bring() -> None:
    def token(id: int) -> Tokens:
        return Tokens([id], [TokenLogprobs(-1.0, 1, ())])

    deltas = [
        Delta(pieces=[token(1), Reasoning("hm")]),
        Delta(pieces=[token(2)]),
        Delta(pieces=[token(3), Content("ab")]),
        Delta(pieces=[token(4), CallPart(0, "{", "time", "c")]),
        Delta(pieces=[token(5), CallPart(0, "}")]),
        Delta(pieces=[token(6), Content("c")]),
    ]
    following = Blocks()
    grown = [change for delta in deltas for change in following.take(delta) if isinstance(change, Grows)]
    texts = [change for change in grown if change.block.kind is Kind.TEXT]
    assert [[id for id, _ in change.logprobs] for change in texts] == [[2, 3], [6]]
