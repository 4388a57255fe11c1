"""What commands write: nothing that a terminal would obey, colours only on a terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher.commands.arguments import described_user, user_of
from sse_batcher.commands.terminal import Terminal
from sse_batcher.commands.text import duration, printable, shortened, size


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text(st.characters()) | st.text(st.sampled_from("\x00\x07\x1b\x7f\x9b\n\r\t\u2028\u202e\u2066\ud800a\u00e9")))
def test_nothing_that_is_printed_is_obeyed(text: str) -> None:
    shown = printable(text)
    assert not [each for each in shown if unicodedata.category(each) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}]
    shown.encode()


def test_what_is_escaped_can_still_be_read() -> None:
    assert printable("a\x1b[31m\u00e9\u4e2d\n\u202e\x9b") == "a\\x1b[31m\u00e9\u4e2d\\n\\u202e\\x9b"
    assert printable("\u00ad\ufff9\U000e0041\ud800\t") == "\\xad\\ufff9\\U000e0041\\ud800\\t"
    assert printable("1\u00a0000\u3000\u20ac\n") == "1\u00a0000\u3000\u20ac\\n"


def test_sizes_times_and_texts_are_short() -> None:
    assert [size(count) for count in (0, 999, 1_200, 250_000, 10**13)] == [
        "0 B",
        "999 B",
        "1.2 kB",
        "250 kB",
        "10.0 TB",
    ]
    assert size(10**400) == "1000000000000000000 TB"
    times = ["0.0 s", "40 ms", "1.5 s", "61 s", "10 min", "2 h", "12 days"]
    assert [duration(each) for each in (0.0, 0.04, 1.5, 61, 600, 9_000, 10**6)] == times
    assert (shortened("abcdef", 6), shortened("abcdef", 5)) == ("abcdef", "abcd\u2026")


def test_colours_and_one_line_of_progress_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = []
    for kind in (io.StringIO, Screen):
        out, err = kind(), kind()
        terminal = Terminal(out, err)
        terminal.progress("1 of 2")
        terminal.write(terminal.styled("a", "red"))
        terminal.notice("b\x1b")
        written.append((out.getvalue(), err.getvalue()))
    plain, coloured = written
    assert plain == ("a\n", "1 of 2\n-- b\\x1b\n")
    assert coloured == ("\x1b[31ma\x1b[0m\n", "\r\x1b[K1 of 2\r\x1b[K\x1b[33m-- b\\x1b\x1b[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal(Screen(), Screen()).styled("a", "red") == "a"


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("7", 7),
        ('"7"', "7"),
        ("alice", "alice"),
        ('"alice"', "alice"),
        ("true", "true"),
        ("1.5", "1.5"),
        ("[1]", "[1]"),
        ("[" * 50_000, "[" * 50_000),
    ],
)
def test_a_user_is_a_number_or_a_text(text: str, user: object) -> None:
    found = user_of(text)
    assert (found, type(found)) == (user, type(user))


def test_a_number_and_a_text_of_digits_are_described_differently() -> None:
    assert [described_user(user) for user in (7, "7")] == ["7 (a number)", '"7" (a text)']
