"""Tokens to text and back: incremental decoding, stop strings, chat templates."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from baton.frontend.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from baton.frontend.detokenizer import PROMPT_END_TOKENS, Detokenizer, StopStrings
from baton.frontend.tokenizer import Tokenizer, load_tokenizer
from baton.proto.config import ModelConfig
from baton.proto.errors import UserError

CORPUS = [
    "the baton passes from hand to hand",
    "the quick brown fox",
    "naïve café 日本語 🙂🏃‍♀️ ключ",
    "  code\n\tindent",
]


def byte_level() -> Tokenizer:
    """The kind that GPT-2, Llama 3, Qwen and SmolLM have."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<two words>", special=True)])
    backend.add_tokens(["<tool call>", "überword"])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


def byte_fallback() -> Tokenizer:
    """The kind that Llama 2 and Mistral have: pieces with ▁ for spaces, bytes as <0xAB>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "e", "x", "é"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": {"content": "<s>"}, "add_bos_token": True})


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=60), st.booleans())
@settings(max_examples=500, deadline=None)
def test_deltas_of_any_tokens_add_up_to_the_full_decoding(ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, skip_special_tokens=skip)
    text = "".join(detokenizer.feed([id]) for id in ids) + detokenizer.flush()
    assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_a_delta_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    deltas = [detokenizer.feed([id]) for id in ids]
    assert not any("\ufffd" in delta for delta in deltas)
    assert "".join(deltas) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=False)


BYTE_FALLBACK_WORDS = [[BYTE_FALLBACK.id_of(piece) or 0] for piece in ("▁", "▁the", "▁a", "e", "é")]
BYTE_FALLBACK_WORDS += [[3 + byte for byte in char.encode()] for char in "é語🙂"]


@given(st.lists(st.sampled_from(BYTE_FALLBACK_WORDS), min_size=1, max_size=12), st.data())
@settings(max_examples=500, deadline=None)
def test_an_output_goes_on_where_its_prompt_ends(words: list[list[int]], data: st.DataObject) -> None:
    ids = [id for word in words for id in word]
    cut = data.draw(st.integers(1, len(ids)))
    prompt = BYTE_FALLBACK.decode(ids[:cut])
    assume(not prompt.endswith("\ufffd"))
    detokenizer = Detokenizer(BYTE_FALLBACK, prompt_end=ids[:cut][-PROMPT_END_TOKENS:])
    text = "".join(detokenizer.feed([id]) for id in ids[cut:]) + detokenizer.flush()
    assert prompt + text == BYTE_FALLBACK.decode(ids)


def test_special_tokens_of_a_prompt_are_no_text_to_go_on_from_when_they_are_not_shown() -> None:
    bos, the = BYTE_FALLBACK.encode("")[0], BYTE_FALLBACK.id_of("▁the")
    assert the is not None
    assert Detokenizer(BYTE_FALLBACK, prompt_end=[bos]).feed([the]) == "the"
    assert Detokenizer(BYTE_FALLBACK, prompt_end=[the, bos]).feed([the]) == " the"


def test_bytes_that_make_no_character_spoil_none_of_the_prompts() -> None:
    prompt, the = [3 + byte for byte in "語言".encode()], BYTE_FALLBACK.id_of("▁the")
    assert the is not None
    for then, text in (([], ""), ([the], " the")):
        detokenizer = Detokenizer(BYTE_FALLBACK, prompt_end=prompt)
        assert detokenizer.feed([3 + 0xE8, *then]) + detokenizer.flush() == f"\ufffd{text}"


def test_a_prompt_that_ends_inside_a_character_does_not_hold_the_output_back() -> None:
    smile, the = [3 + byte for byte in "🙂".encode()], BYTE_FALLBACK.id_of("▁the")
    detokenizer = Detokenizer(BYTE_FALLBACK, prompt_end=smile[:2])
    assert detokenizer.feed([*smile[2:], the or 0]) + detokenizer.flush() == "\ufffd\ufffd the"


def test_a_character_cut_off_by_the_end_becomes_a_replacement() -> None:
    ids = BYTE_LEVEL.encode("鬱")
    assert len(ids) == 3
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert detokenizer.feed(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = BYTE_LEVEL.encode("the<|end|>")
    assert Detokenizer(BYTE_LEVEL).feed(ids) == "the"
    assert Detokenizer(BYTE_LEVEL, skip_special_tokens=False).feed(ids) == "the<|end|>"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
@settings(max_examples=500, deadline=None)
def test_stop_strings_are_found_wherever_the_text_is_cut(text: str, stop: list[str], data: st.DataObject) -> None:
    """Against a search in the whole text, which ends with the piece that completes a stop string first."""
    include = data.draw(st.booleans())
    search, out, seen, pos = StopStrings(stop, include), "", "", 0
    while pos < len(text) and search.found is None:
        step = data.draw(st.integers(1, 5))
        seen, pos = text[: pos + step], pos + step
        out += search.feed(text[pos - step : pos])
        assert text.startswith(out)
    found = [(seen.find(s), s) for s in stop if s in seen]
    if not found:
        assert search.found is None
        assert out + search.flush() == text
        return
    at, first = min(found, key=lambda match: match[0] + len(match[1]))
    assert search.found == first
    assert out == seen[: at + len(first) if include else at]


@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_a_stop_string_that_began_without_search_may_end_with_it(pieces: list[str], stop: list[str]) -> None:
    search = StopStrings(stop, include=True)
    before = "".join(search.feed(piece, search=False) for piece in pieces)
    text = "".join(pieces)
    held = text.removeprefix(before)
    assert any(one.startswith(held) and one != held for one in stop) or not held
    for one in stop:
        assert not any(text.endswith(one[:size]) for size in range(len(held) + 1, len(one)))


def test_looking_for_stop_strings_is_linear_in_the_text() -> None:
    """Work is counted, not timed: characters of the stop string that are looked at."""

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, index: Any) -> str:
            looked_at.append(index)
            return super().__getitem__(index)

    looked_at: list[Any] = []
    for text in ("a" * 2000, ("a" * 99 + "c") * 20, ("b" + "a" * 99) * 20):
        looked_at.clear()
        search = StopStrings([Counted("b" + "a" * 200 + "c"), Counted("a" * 100 + "b")], include=False)
        assert "".join(map(search.feed, text)) + search.flush() == text
        assert len(looked_at) < 10 * len(text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    search = StopStrings(["END", "\n\n"], include=False)
    pieces = ["a E", "N", "x\n", "b", "\nE", "ND more"]
    assert [search.feed(piece) for piece in pieces] == ["a ", "", "ENx", "\nb", "\n", ""]
    assert search.found == "END"


def test_tokens_after_a_stop_string_do_not_count() -> None:
    ids = BYTE_LEVEL.encode("the quick brown fox")
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["ick"])
    assert detokenizer.feed(ids) == "the qu"
    assert detokenizer.stopped == "ick"
    assert BYTE_LEVEL.decode(ids[: detokenizer.num_tokens]).startswith("the quick")
    assert detokenizer.num_tokens < len(ids)
    assert detokenizer.flush() == ""


def test_the_first_min_tokens_are_not_searched_for_stop_strings() -> None:
    ids = [BYTE_LEVEL.encode(char)[0] for char in "aXaX"]
    assert Detokenizer(BYTE_LEVEL, stop=["X"], min_tokens=2).feed(ids) == "aXa"


@pytest.mark.parametrize(("stop", "min_tokens", "text"), [("bcd", 2, "a"), ("bcd", 4, "abcdbc"), ("bc", 3, "abcd")])
def test_a_stop_string_may_begin_within_min_tokens_and_must_end_behind_them(
    stop: str, min_tokens: int, text: str
) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stop=[stop], min_tokens=min_tokens)
    out = "".join(detokenizer.feed([BYTE_LEVEL.encode(char)[0]]) for char in "abcdbc")
    assert out + detokenizer.flush() == text
    assert detokenizer.stopped == (stop if text != "abcdbc" else None)


def test_bos_is_added_when_the_configuration_asks_for_it() -> None:
    assert BYTE_FALLBACK.encode("e") == [1, BYTE_FALLBACK.encode("e", add_special_tokens=False)[0]]
    assert BYTE_LEVEL.encode("e")[0] not in BYTE_LEVEL.special_ids


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_no_token_covers_more_bytes_than_the_bound(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(text.encode()) <= len(ids) * tokenizer.max_token_bytes


CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ bos_token }}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_renders_with_special_tokens_and_generation_prompt() -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "<|im_start|>user\nhi<|im_end|>\n<s><|im_start|>assistant\n"
    assert template.render(messages, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_content_parts_become_text_for_templates_that_expect_it() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo" in ChatTemplate(CHATML, {}).render([{"role": "user", "content": parts}])


def test_text_becomes_parts_for_templates_that_loop_over_them() -> None:
    source = (
        "{% for m in messages %}{% for part in m.content %}[{{ part.type }}:{{ part.text }}]{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source, {})
    assert template.render([{"role": "user", "content": "one"}]) == "[text:one]"
    assert template.render([{"role": "user", "content": [{"type": "input_text", "text": "one"}]}]) == "[text:one]"


@pytest.mark.parametrize(
    ("source", "role"), [("{{ messages[0].role }}", "system"), ("{# developer #}{{ messages[0].role }}", "developer")]
)
def test_developer_is_system_where_the_template_does_not_know_it(source: str, role: str) -> None:
    assert ChatTemplate(source, {}).render([{"role": "developer", "content": "x"}]) == role


def test_the_conventions_of_transformers_hold() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "y"}]
    assert ChatTemplate(source, {}).render(messages) == '{"role": "user", "content": "<é>"}20'


def test_the_complaint_of_a_template_is_the_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        template.render([])


@pytest.mark.parametrize("source", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 // 0 }}"])
def test_a_template_can_do_no_harm(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([])


def test_a_broken_template_is_the_users_error() -> None:
    with pytest.raises(UserError, match="does not compile"):
        ChatTemplate("{% if %}", {})


def test_a_model_directory_gives_tokenizer_and_template(tmp_path: Path) -> None:
    BYTE_LEVEL._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}, "chat_template": "old"}')
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    config = ModelConfig(str(tmp_path), ("m",))
    tokenizer = load_tokenizer(config)
    template = load_chat_template(config, tokenizer)
    assert tokenizer.encode("the fox") == BYTE_LEVEL.encode("the fox")
    assert template is not None
    assert template.render([]) == "<|end|>"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(ModelConfig(str(tmp_path), ("m",)))


def test_decoding_is_linear_in_the_number_of_tokens() -> None:
    """Work is counted, not timed: each token's spelling is looked up once."""

    class Counted(dict[int, str | bytes]):
        def __getitem__(self, id: int) -> str | bytes:
            looked_up.append(id)
            return original[id]

    ids = [random.Random(0).randrange(256) for _ in range(1000)]
    looked_up: list[int] = []
    tokenizer = byte_level()
    original = tokenizer.spelling
    tokenizer.spelling = Counted()  # type: ignore[assignment]
    Detokenizer(tokenizer).feed(ids)
    assert looked_up == ids


def test_a_token_is_decoded_alone_once() -> None:
    for tokenizer, id in ((BYTE_LEVEL, BYTE_LEVEL.encode("überword")[0]), (BYTE_FALLBACK, BYTE_FALLBACK.id_of("▁the"))):
        assert id is not None
        assert tokenizer.token(id) == tokenizer.decode([id], skip_special_tokens=False)
        assert tokenizer.token(id) is tokenizer.token(id)


@pytest.mark.parametrize("work", [lambda t: t.encode("a quick hand " * 20_000), lambda t: t.decode([70] * 500_000)])
def test_other_threads_run_while_one_tokenises(work: Callable[[Tokenizer], object]) -> None:
    thread = threading.Thread(target=work, args=(BYTE_LEVEL,))
    turns = 0
    thread.start()
    while thread.is_alive():
        thread.join(0.001)  # gives up the GIL, and gets it back only when the library has given it up
        turns += 1
    assert turns > 5
