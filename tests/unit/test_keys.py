"""API keys from the command line and from a file."""

import os
from pathlib import Path

import pytest

from baton.proto.errors import UserError
from baton.proto.keys import LOOK_INTERVAL_S, Keyring, bearer_key


def key_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_keys_have_names(tmp_path: Path) -> None:
    file = key_file(tmp_path / "keys", "# a comment\n\n  search\tsecret-of-search \nkey-3 from-the-file\n")
    keys = Keyring(("first", "second"), file)
    sent = (b"first", b"second", b"secret-of-search", b"from-the-file", b"search", b"", b"\xff")
    assert [keys.name_of(key) for key in sent] == ["key-1", "key-2", "search", "key-3", None, None, None]


def test_no_key_of_a_file_has_the_name_of_one_from_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="key-2"):
        Keyring(("first", "second"), key_file(tmp_path / "keys", "key-2 from-the-file\n"))


def test_without_keys_nobody_is_asked_and_with_an_empty_file_nobody_gets_in(tmp_path: Path) -> None:
    assert not Keyring()
    assert Keyring(("k",))
    empty = Keyring((), key_file(tmp_path / "keys", "# none yet\n"))
    assert empty
    assert empty.name_of(b"") is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UserError, match="chmod 600"):
        Keyring((), key_file(tmp_path / "keys", "a  long-enough\n", mode))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("name", "line 2: expected 'NAME KEY'"),
        ("name too many-words", "line 2"),
        ("na/me long-enough", "line 2"),
        ("name short", "8 to 512"),
        ("name blüten-reich", "line 2"),
        ("good another-key", "second key has the name good"),
    ],
)
def test_a_wrong_line_is_named_but_not_told(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Keyring((), key_file(tmp_path / "keys", f"good long-enough\n{line}\n"))
    assert not any(word in str(caught.value) for word in line.split()[1:])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Keyring((), str(tmp_path / "none"))


def test_a_changed_file_is_read_again_unless_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("baton.proto.keys.time.monotonic", lambda: now)
    path = tmp_path / "keys"
    keys = Keyring((), key_file(path, "a long-enough\n"))
    assert keys.name_of(b"long-enough") == "a"
    key_file(path, "a another-secret\n")
    assert keys.name_of(b"another-secret") is None
    now += LOOK_INTERVAL_S
    assert keys.name_of(b"another-secret") == "a"
    assert keys.name_of(b"long-enough") is None
    key_file(path, "nonsense\n")
    now += LOOK_INTERVAL_S
    assert keys.name_of(b"another-secret") == "a"
    os.unlink(path)
    now += 100 * LOOK_INTERVAL_S
    assert keys.name_of(b"another-secret") == "a"


def test_bearer_tokens() -> None:
    sent = (b"Bearer k", b"bearer  k ", b"Basic k", b"k", b"")
    assert [bearer_key(header) for header in sent] == [b"k", b"k", b"", b"", b""]
