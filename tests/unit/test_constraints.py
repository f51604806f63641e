"""Masks of constrained rows, against a matcher that knows every word of a small language."""

import itertools
import json
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from baton.proto.config import ModelConfig
from baton.proto.messages import SamplingParams
from baton.worker.constraints import Constraints, Masks
from baton.worker.grammar_compiler import MAX_KEPT, GrammarCompiler
from baton.worker.plan import Row, SlotInit

LETTERS = "abc"
PIECES = [*(chr(byte) for byte in range(33, 127)), "ab", "ba", "aa", "abc", "cab", "bb"]
EOS = len(PIECES)
STOP = PIECES.index("z")
VOCAB = EOS + 40
"""More rows than tokens, and no multiple of a word's bits."""
LONGEST = 7


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarCompiler]:
    merges = [("a", "b"), ("b", "a"), ("a", "a"), ("ab", "c"), ("c", "ab"), ("b", "b")]
    backend = tokenizers.Tokenizer(models.BPE({piece: id for id, piece in enumerate(PIECES)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    compiler = GrammarCompiler(ModelConfig(path=str(path), served_names=("m",)), VOCAB)
    yield compiler
    compiler.close()


@pytest.fixture
def constraints(compiler: GrammarCompiler) -> Iterator[Constraints]:
    constraints = Constraints(compiler, VOCAB)
    yield constraints
    constraints.close()


def grammar_of(pattern: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]})


def params(pattern: str, **changes: object) -> SamplingParams:
    given = {"max_tokens": 99, "stop_token_ids": (EOS,), "grammar": grammar_of(pattern), **changes}
    return SamplingParams(**given)  # type: ignore[arg-type]


def decode_row(slot: int, output: list[int]) -> Row:
    """The row that samples the token behind `output`."""
    return Row(slot, 4 + len(output), 1, output[-1:] or [0], False, [], True, len(output))


def take(constraints: Constraints, slot: int, given: SamplingParams, output: list[int]) -> None:
    constraints.take_slot(SlotInit(slot, (1, slot), 1, given, 4, [0, 0, 0, 0, *output], []))


def masks_of(constraints: Constraints, rows: list[Row]) -> Masks:
    building = constraints.begin(rows)
    assert building is not None
    return building.result()


def allowed(constraints: Constraints, slot: int, output: list[int]) -> set[int]:
    masks = masks_of(constraints, [decode_row(slot, output)])
    assert masks.failed == {}
    return set(np.flatnonzero(masks.allowed(VOCAB)[0]).tolist())


def words_of(pattern: str) -> list[str]:
    """Every word of the language, which must have none longer than LONGEST."""
    texts = ("".join(letters) for size in range(LONGEST + 1) for letters in itertools.product(LETTERS, repeat=size))
    return [text for text in texts if re.fullmatch(pattern, text)]


def brute_force(words: list[str], text: str) -> set[int]:
    found = {id for id, piece in enumerate(PIECES) if any(word.startswith(text + piece) for word in words)}
    return found | {EOS} if text in words else found


def next_letters(words: list[str], text: str) -> set[str]:
    """The empty one is the end."""
    return {word[len(text) : len(text) + 1] for word in words if word.startswith(text)}


def random_pattern(depth: int = 2) -> str:
    if depth == 0:
        return random.choice(["a", "b", "c", "[ab]", "[bc]"])
    first, second = random_pattern(depth - 1), random_pattern(depth - 1)
    return random.choice([f"{first}{second}", f"({first}|{second})", f"({first})?{second}", first])


@pytest.mark.parametrize("seed", range(25))
def test_a_mask_allows_what_some_word_of_the_language_goes_on_with(constraints: Constraints, seed: int) -> None:
    random.seed(seed)
    pattern = f"{random_pattern()}({random_pattern(1)}){{0,2}}"
    words = words_of(pattern)
    take(constraints, 0, params(pattern), [])
    output: list[int] = []
    while True:
        text = "".join(PIECES[id] for id in output)
        found = allowed(constraints, 0, output)
        expected = brute_force(words, text)
        if len(next_letters(words, text)) > 1:
            assert found == expected, (pattern, text)
        else:  # what must come next comes as the tokenizer would write it
            assert found
            assert found <= expected, (pattern, text)
        token = random.choice(sorted(found))
        if token == EOS:
            break
        output.append(token)


def test_replayed_output_gives_the_mask_of_the_undisturbed_stream(constraints: Constraints) -> None:
    given = params("(ab|c){4}")
    take(constraints, 0, given, [])
    output: list[int] = []
    for token in (PIECES.index(piece) for piece in ("a", "b", "cab", "c")):
        before = allowed(constraints, 0, output)
        take(constraints, 1, given, output)
        assert allowed(constraints, 1, output) == before
        output.append(token)


def test_stop_tokens_are_allowed_only_where_the_output_may_end(constraints: Constraints) -> None:
    take(constraints, 0, params("abc?z?", stop_token_ids=(STOP, EOS)), [])
    a, ab = PIECES.index("a"), PIECES.index("ab")
    assert allowed(constraints, 0, []) == {a, ab, PIECES.index("abc")}
    assert allowed(constraints, 0, [ab]) == {PIECES.index("c"), STOP, EOS}


def test_min_tokens_holds_the_end_back_unless_the_grammar_is_complete(constraints: Constraints) -> None:
    a = PIECES.index("a")
    take(constraints, 0, params("a{1,3}", min_tokens=5), [])
    assert EOS not in allowed(constraints, 0, [a])
    assert EOS not in allowed(constraints, 0, [a, a])
    assert allowed(constraints, 0, [a, a, a]) == {EOS}


def test_a_stop_token_that_the_grammar_needs_is_left(constraints: Constraints) -> None:
    take(constraints, 0, params("za", stop_token_ids=(STOP,)), [])
    assert allowed(constraints, 0, []) == {STOP}


def test_rows_without_a_grammar_and_chunks_have_no_mask(constraints: Constraints) -> None:
    take(constraints, 0, params("a"), [])
    take(constraints, 1, SamplingParams(max_tokens=9), [])
    chunk = Row(0, 0, 2, [0, 0], False, [], False, 0)
    free = decode_row(1, [])
    assert constraints.begin([free, chunk]) is None
    take(constraints, 2, params("b"), [])
    masks = masks_of(constraints, [chunk, free, decode_row(2, [])])
    assert masks.rows.tolist() == [1]
    assert np.flatnonzero(masks.allowed(VOCAB)[0]).tolist() == [PIECES.index("b")]


def test_a_slot_forgets_the_stream_that_had_it(constraints: Constraints) -> None:
    take(constraints, 0, params("a"), [])
    take(constraints, 0, SamplingParams(max_tokens=9), [])
    assert constraints.begin([decode_row(0, [])]) is None


def test_output_outside_of_the_grammar_fails_its_own_row_only(constraints: Constraints) -> None:
    a, b = PIECES.index("a"), PIECES.index("b")
    take(constraints, 0, params("ab"), [])
    take(constraints, 1, params("ab"), [])
    chunk = Row(2, 0, 2, [0, 0], False, [], False, 0)
    rows = [chunk, decode_row(0, [b]), decode_row(1, [a])]
    masks = masks_of(constraints, rows)
    assert masks.failed_rows(rows).keys() == {1}
    assert masks.allowed(VOCAB)[0].all()
    assert np.flatnonzero(masks.allowed(VOCAB)[1]).tolist() == [b]


def test_a_grammar_that_does_not_compile_is_told_to_the_loop(compiler: GrammarCompiler) -> None:
    compiler.request(grammar_of("("))
    compiler.matcher(grammar_of("(")).exception()
    compiler.request(grammar_of("a"))
    compiler.matcher(grammar_of("a")).exception()
    answers = {}
    while len(answers) < 2:
        answers |= {answer.grammar: answer.error for answer in compiler.completed()}
    assert "regex" in answers[grammar_of("(")]
    assert answers[grammar_of("a")] == ""


def test_a_grammar_is_kept_as_long_as_a_request_needs_it(compiler: GrammarCompiler) -> None:
    needed = grammar_of("abc")
    compiler.request(needed)
    first = compiler.matcher(needed)

    def ask_for_others(pattern: str) -> None:
        for i in range(MAX_KEPT + 2):
            compiler.matcher(grammar_of(f"{pattern}{{{i + 1}}}")).result()

    ask_for_others("a")
    assert compiler.matcher(needed) is first
    compiler.release(needed)
    ask_for_others("b")
    assert compiler.matcher(needed) is not first


def test_min_tokens_that_leave_no_token_end_the_stream_with_the_reason(constraints: Constraints) -> None:
    a = PIECES.index("a")
    given = SamplingParams(
        max_tokens=9, min_tokens=3, allowed_token_ids=(a, EOS), bad_words=((a, a),), stop_token_ids=(EOS,)
    )
    take(constraints, 0, given, [a])
    rows = [decode_row(0, [a])]
    assert "leave no token" in masks_of(constraints, rows).failed_rows(rows)[0]


def test_allowed_token_ids_are_the_only_ones_and_bad_words_are_taken_out(constraints: Constraints) -> None:
    a, b, c = (PIECES.index(letter) for letter in "abc")
    take(constraints, 0, SamplingParams(max_tokens=9, allowed_token_ids=(a, b, c), bad_words=((b,),)), [])
    assert allowed(constraints, 0, []) == {a, c}
    take(constraints, 0, SamplingParams(max_tokens=9, bad_words=((b,),)), [])
    assert allowed(constraints, 0, []) == set(range(VOCAB)) - {b}


def test_the_last_token_of_a_bad_word_is_banned_behind_the_others_only(constraints: Constraints) -> None:
    a, b, c = (PIECES.index(letter) for letter in "abc")
    given = SamplingParams(max_tokens=9, bad_words=((a, b, c), (b, a)))
    take(constraints, 0, given, [])
    output: list[int] = []
    for token, banned in ((a, set()), (b, {c, a}), (b, {a}), (c, set())):
        output.append(token)
        expected = set(range(VOCAB)) - banned
        assert allowed(constraints, 0, output) == expected
        take(constraints, 1, given, output)
        assert allowed(constraints, 1, output) == expected, "replayed"


def test_a_mask_without_a_memory_needs_no_tokens(constraints: Constraints) -> None:
    """Steps issued ahead bring no tokens: the device has them."""
    take(constraints, 0, SamplingParams(max_tokens=9, allowed_token_ids=(1,)), [])
    masks = masks_of(constraints, [Row(0, 9, 1, [], True, [], True, 5)])
    assert np.flatnonzero(masks.allowed(VOCAB)[0]).tolist() == [1]


def test_within_a_grammar_too_only_allowed_tokens_are_drawn(constraints: Constraints) -> None:
    a, b = PIECES.index("a"), PIECES.index("b")
    take(constraints, 0, params("[ab]c", allowed_token_ids=(a, b, EOS), bad_words=((b,),)), [])
    assert allowed(constraints, 0, []) == {a}
    masks = masks_of(constraints, [decode_row(0, [a])])
    assert "no token to go on with" in masks.failed[0]
