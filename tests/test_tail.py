"""`tail` over HTTP: what it shows, how it comes back, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask

from sse_batcher import SSE, Text
from sse_batcher.cli import main
from sse_batcher.commands.tail import Printer, Shown, unpack
from sse_batcher.commands.terminal import Terminal
from sse_batcher.parser import Block
from sse_batcher.remote import follow
from sse_batcher.remote.follow import FinalError, Follower
from sse_batcher.remote.message import RemoteError, Request, make_request
from sse_batcher.testing import live_server

from .kit.commands import environment, interrupt, started
from .kit.scripted_server import HEAD, holding, scripted_server, sending
from .kit.waiting import TIMEOUT, wait_until

STREAM = HEAD + b"\r\n"
OPEN = b'event: sse_open\nretry: 1\ndata: {"heartbeat":15.0,"channels":["a"]}\nid: e-0\n\n'
GONE = sending(b"HTTP/1.1 204 No Content\r\n\r\n")  # so that the command ends
NO_CONTENT = "Error: the server answers with 204 No Content\n"


def said(text: str) -> str:
    """What was printed, without what differs each time."""
    return re.sub(r"\d\d:\d\d:\d\d\.\d{3}", "TIME", re.sub(r"in \d+\.\d s", "in N s", text))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, in seconds. They take no time."""
    waits: list[float] = []
    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=waits.append)
    monkeypatch.setattr(follow, "time", clock)
    return waits


# -- what is shown -----------------------------------------------------------------------------------------------------


def shown(block_type: str, data: str) -> list[tuple[str, str, bool]]:
    return [(event.type, event.body, event.is_text) for event in unpack(0.0, Block(block_type, data, "e-1", True))]


def test_batches_are_unpacked() -> None:
    assert shown("order_batch", '{"events":[{"id": 1},"x"]}') == [("order", '{"id":1}', False), ("order", '"x"', False)]
    mixed = '{"events":[{"type":"a","data":1},{"type":"b","text":"x\\ny"}]}'
    assert shown("mixed_batch", mixed) == [("a", "1", False), ("b", "x\ny", True)]


@pytest.mark.parametrize(
    ("block_type", "data", "events"),
    [
        ("a_batch", "{", [("a_batch", "{", True)]),
        ("a_batch", "[]", [("a_batch", "[]", False)]),
        ("a_batch", '{"events":1}', [("a_batch", '{"events":1}', False)]),
        ("mixed_batch", '{"events":[1,{"type":2,"text":3}]}', [("2", "null", False)]),
        ("a", "[" * 100_000, [("a", "[" * 100_000, True)]),
        ("a", "7", [("a", "7", False)]),
    ],
)
def test_blocks_of_another_form_are_shown_as_they_are(
    block_type: str, data: str, events: list[tuple[str, str, bool]]
) -> None:
    assert shown(block_type, data) == events


HOSTILE = Shown(0.0, "t\x1b]0;x\x07", "a\x1b[2J\u202eb\n\x9b1m", True, "e-1", "c\x1b[0m", ("u\x1b[0m", 7))


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_names_and_contents_do_not_reach_the_terminal(as_json: bool) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Screen()
    Printer(Terminal(out, io.StringIO()), as_json=as_json, full=True, types=()).print(HOSTILE)
    line = re.sub("\x1b\\[\\d+m", "", out.getvalue())  # our own colours
    assert line.endswith("\n")
    assert [each for each in line[:-1] if not each.isprintable()] == []
    if as_json:
        assert (json.loads(line)["text"], json.loads(line)["users"]) == (HOSTILE.body, ["u\x1b[0m", 7])
    else:
        assert "a\\x1b[2J\\u202eb\\n\\x9b1m" in line
        assert 'user "u' in line


def printed(event: Shown) -> Any:
    """What `--json` prints, read as strictly as most programs do."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    out = io.StringIO()
    Printer(Terminal(out, io.StringIO()), as_json=True, full=False, types=()).print(event)
    return json.loads(out.getvalue(), parse_constant=refuse)


@pytest.mark.parametrize("body", ["NaN", "[-Infinity]", "1e999", "9" * 5_000])
def test_a_number_that_json_does_not_have_is_written_as_text(body: str) -> None:
    [event] = unpack(0.0, Block("a", body, "e-1", True))
    assert printed(event)["text"] == body


def test_json_of_any_depth_is_written() -> None:
    nested = [(f"{'[' * depth}{']' * depth}", depth) for depth in range(100, 1_100, 7)]
    for body, depth in nested:
        for data in (body, f'{{"events":[{body}]}}', f'{{"events":[{{"type":"x","data":{body}}}]}}'):
            for block_type in ("a", "a_batch", "mixed_batch"):
                for event in unpack(0.0, Block(block_type, data, "e-1", True)):
                    said = printed(event)
                    assert ("data" in said) is not ("text" in said), depth


def test_a_cursor_can_be_copied_into_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    _, notices, _ = tail(capsys, sending(STREAM + OPEN + b"data: 1\nid: $(reboot);'\n\n"))
    assert notices.endswith("""-- to go on here: --since '$(reboot);'"'"''\n""")


# -- coming back -------------------------------------------------------------------------------------------------------


def tail(
    capsys: pytest.CaptureFixture[str], *scripts: Callable[[Any], None], arguments: tuple[str, ...] = ()
) -> tuple[list[str], str, list[bytes]]:
    """Follow a server with these scripts, after which it refuses. The lines, the notices, and the requests."""
    with scripted_server(*scripts, GONE) as server:
        assert main(["tail", server.url, *arguments]) == 1
    out, err = capsys.readouterr()
    assert err.endswith(NO_CONTENT)
    return said(out).splitlines(), said(err.removesuffix(NO_CONTENT)), server.heads


def test_it_goes_on_after_the_newest_complete_block(capsys: pytest.CaptureFixture[str]) -> None:
    events = b'event: order\ndata: {"id":7}\nid: e-1\n\nevent: order\ndata: {"id":8}\nid: e-'
    lines, notices, heads = tail(capsys, sending(STREAM + OPEN + events), sending(STREAM + OPEN))
    assert lines == ['TIME  order      8 B  {"id":7}']
    assert notices.splitlines() == [
        "-- open: a",
        "-- the server has ended the stream; next attempt in N s",
        "-- open again: a",
        "-- the server has ended the stream; next attempt in N s",
        "-- to go on here: --since e-0",
    ]
    assert b"Last-Event-ID" not in heads[0]
    assert b"\r\nLast-Event-ID: e-1\r\n" in heads[1]


def test_gaps_ends_and_refusals_are_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    gap = b'event: sse_gap\nretry: 1\ndata: {"reason":"too_old\\u001b[0m"}\nid: e-5\n\n'
    bye = b'event: sse_bye\nretry: 1\ndata: {"reason":"kicked"}\nid: e-6\n\n'
    busy = b'event: sse_busy\nretry: 2\ndata: {"reason":"limit"}\n\n'
    broken = b"event: sse_open\nretry: 1\ndata: [\nid: e-6\n\n"
    _, notices, heads = tail(capsys, sending(STREAM + busy), sending(STREAM + gap + bye), sending(STREAM + broken))
    assert notices.splitlines() == [
        "-- the server opens no stream now: limit",
        "-- the server has ended the stream; next attempt in N s",
        "-- gap: events may be missing here (too_old\\x1b[0m)",
        "-- open again: no channel",
        "-- the server ends the stream: kicked",
        "-- the server has ended the stream; next attempt in N s",
        "-- open again: no channel",
        "-- the server has ended the stream; next attempt in N s",
        "-- to go on here: --since e-6",
    ]
    assert b"\r\nLast-Event-ID: e-6\r\n" in heads[-1]


@pytest.mark.parametrize("heartbeat", [b"0.05", b"1e-9"])  # which no server can have
def test_a_silent_stream_is_opened_again(
    heartbeat: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LEAST_HEARTBEAT_SECONDS", 0.05)
    quiet = OPEN.replace(b"15.0", heartbeat)
    began = time.monotonic()
    _, notices, _ = tail(capsys, holding(STREAM + quiet))
    assert "-- the stream is silent; next attempt in N s" in notices
    assert 0.1 <= time.monotonic() - began < TIMEOUT


@pytest.mark.parametrize(("steady", "longest"), [(600.0, [0.5, 2.0, 4.0, 8.0]), (0.0, [0.5, 0.5, 0.5, 0.5])])
def test_a_server_that_ends_each_stream_at_once_is_asked_less_and_less(
    steady: float,
    longest: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    monkeypatch.setattr(follow, "STEADY_SECONDS", steady)
    tail(capsys, *[sending(STREAM + b"retry: 0\n" + OPEN.replace(b"retry: 1\n", b""))] * 4)
    assert len(waits) == 4
    for wait, most in zip(waits, longest, strict=True):
        assert most / 2 <= wait <= most
        assert wait >= 0.5


def test_after_a_thousand_attempts_it_goes_on(waits: list[float]) -> None:
    def ask(cursor: str) -> Request:
        if not waits:
            return make_request(server.url)
        raise FinalError("the end", "answer") if len(waits) == 1_100 else RemoteError("no answer", "connect")

    with scripted_server(sending(STREAM + OPEN)) as server, pytest.raises(FinalError):
        list(Follower(ask, lambda line: None).events())
    assert 15 <= waits[-1] <= 30


def test_numbers_that_are_too_large_are_cut(capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    opened = b'event: sse_open\nretry: %b\ndata: {"heartbeat":1e999}\nid: \xe2\x82\xac\n\n'
    far = b"HTTP/1.1 503 \r\nRetry-After: Mon, 01 Jan 0001 00:00:00 GMT\r\nContent-Length: %b\r\n\r\n" % (b"9" * 5_000)
    scripts = [sending(STREAM + opened % digits) for digits in (b"9" * 15, b"9" * 5_000)]
    _, _, heads = tail(capsys, *scripts, sending(far))
    assert waits[:2] == [3_600, 3_600]
    assert b"\r\nLast-Event-ID: \xe2\x82\xac\r\n" in heads[1]


def test_a_passing_failure_is_waited_out(capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    failing = sending(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\n\r\n")
    later = sending(b"HTTP/1.1 502 Bad Gateway\r\nRetry-After: Fri, 31 Dec 2100 00:00:00 GMT\r\n\r\n")
    nonsense = sending(b"HTTP/1.1 502 Bad Gateway\r\nRetry-After: soon\r\n\r\n")
    _, notices, _ = tail(capsys, sending(STREAM + OPEN), failing, sending(b""), later, nonsense)
    assert "-- the server answers with 503 Service Unavailable; next attempt in N s" in notices
    assert "closed the connection without an answer; next attempt in N s" in notices
    assert waits[0] == 0.5
    assert waits[1] == 7
    assert 2 <= waits[2] <= 4
    assert waits[3] == 3_600
    assert 8 <= waits[4] <= 16


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "the server answers with 404 Not Found"),
        (b"HTTP/1.1 503 \r\n\r\n", "the server answers with 503"),
        (b"HTTP/1.1 302 Found\r\nLocation: /log\x1bin\r\n\r\n", "302 Found, to /log\\x1bin: give that URL"),
        (b"HTTP/1.1 308 Moved\r\nLocation: /events/?token=secret\r\n\r\n", "to /events/?token=...: give that URL"),
        (HEAD + b"Content-Encoding: br\r\n\r\n", "the answer is compressed (br), although"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", "the answer is text/html, not an event stream"),
    ],
)
def test_a_refusal_at_the_beginning_ends_it(answer: bytes, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(sending(answer)) as server:
        assert main(["tail", server.url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err


def test_in_the_middle_of_a_batch_it_would_go_on_before_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(terminal: Terminal, line: str) -> None:
        written.append(line)
        if len(written) == 2:
            raise KeyboardInterrupt

    written: list[str] = []
    monkeypatch.setattr(Terminal, "write", write)
    batch = b'event: a\ndata: 1\nid: e-1\n\nevent: a_batch\ndata: {"events":[2,3]}\nid: e-2\n\n'
    with scripted_server(sending(STREAM + OPEN + batch)) as server, pytest.raises(SystemExit) as ended:
        main(["tail", server.url])
    assert ended.value.code == 130
    assert "--since e-1\n" in capsys.readouterr().err


# -- arguments ---------------------------------------------------------------------------------------------------------

EVENTS = b'event: a\ndata: "\\u00e9"\nid: e-1\n\nevent: b\ndata: x\ndata: y\nid: e-2\n\n'


def test_arguments_become_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--channel", "x", "--channel", "y z", "--since", "e-5", "--token", "sse1.t", "--header", "Cookie: a=b")
    _, _, heads = tail(capsys, sending(STREAM + OPEN), arguments=given)
    assert heads[0].startswith(b"GET /events?channel=x&channel=y+z HTTP/1.1\r\n")
    for line in (b"Last-Event-ID: e-5", b"Authorization: Bearer sse1.t", b"Cookie: a=b"):
        assert b"\r\n" + line + b"\r\n" in heads[0]


def test_a_token_can_be_in_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSE_TOKEN", "sse1.t")
    _, _, heads = tail(capsys, sending(STREAM + OPEN))
    assert b"\r\nAuthorization: Bearer sse1.t\r\n" in heads[0]
    _, _, heads = tail(capsys, sending(STREAM + OPEN), arguments=("--token", "other"))
    assert b"\r\nAuthorization: Bearer other\r\n" in heads[0]


def test_only_some_types(capsys: pytest.CaptureFixture[str]) -> None:
    lines, _, _ = tail(capsys, sending(STREAM + OPEN + EVENTS), arguments=("--type", "b", "--type", "c"))
    assert lines == ["TIME  b      3 B  x\\ny"]


def test_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    lines, _, _ = tail(capsys, sending(STREAM + OPEN + EVENTS), arguments=("--json",))
    first, second = map(json.loads, lines)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dTTIME[+-]\d\d:\d\d", first.pop("time"))
    assert first == {"type": "a", "cursor": "e-1", "size": 8, "data": "\u00e9"}
    assert (second["text"], "data" in second) == ("x\ny", False)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["ftp://x"], "is not a URL with"),
        (["http://x", "--header", "Cookie"], "Name: value"),
        ([], "Missing argument"),
        (["http://a..b/"], "is not the name of a host"),
        (["http://x", "--channel", "\udce9"], "a byte that is not UTF-8"),
        (["http://x/\udce9"], "a byte that is not UTF-8"),
        (["http://[::1/", "--channel", "a"], "is not a URL: Invalid IPv6 URL"),
    ],
)
def test_wrong_arguments_are_status_2(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_the_options_of_the_demo_are_not_for_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--host=127.0.0.1", "--port=8000"):
        assert main([option, "tail", "http://localhost:1"]) == 2
        assert "--host and --port are for the demo" in capsys.readouterr().err


# -- as a process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def site() -> Any:
    """A server, and a function that sends an event."""
    app = Flask("shop")
    sse = SSE(app)
    sse.authorize(lambda channels: channels)
    with live_server(app) as url:
        yield f"{url}/events", sse
    with app.app_context():
        assert sse.manager.shutdown(TIMEOUT)


def send_until_read(sse: SSE, process: subprocess.Popen[str]) -> str:
    """Send events until the command has printed a line, and return that."""
    assert process.stdout
    out = process.stdout.fileno()

    def has_printed() -> bool:
        sse.enqueue("order", {"id": 7})
        return bool(select.select([out], [], [], 0.1)[0])

    wait_until(has_printed, "the command prints an event")
    return process.stdout.readline()


def test_ctrl_c_ends_it_without_a_traceback(site: tuple[str, SSE]) -> None:
    url, sse = site
    with started("-m", "sse_batcher", "tail", url) as process:
        line = send_until_read(sse, process)  # through a pipe, so each line is flushed
        assert said(line) == 'TIME  order      8 B  {"id":7}\n'
        status, _, err = interrupt(process)
    assert status == 130
    assert re.fullmatch(r"-- open: default\n-- to go on here: --since \S+\n", err)


def test_a_closed_pipe_ends_it_quietly(site: tuple[str, SSE]) -> None:
    url, sse = site
    with started("-m", "sse_batcher", "tail", url) as process:
        send_until_read(sse, process)
        assert process.stdout
        process.stdout.close()

        def has_ended() -> bool:
            sse.enqueue("order", 1)
            return process.poll() is not None

        wait_until(has_ended, "the command ends")
        assert process.returncode == 141
        assert process.stderr
        assert "Error" not in process.stderr.read()


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_it_has_colours_and_fits(site: tuple[str, SSE], no_color: bool) -> None:
    url, sse = site
    ours, theirs = pty.openpty()
    more = {"COLUMNS": "60", **({"NO_COLOR": "1"} if no_color else {})}
    try:
        arguments = ("-m", "sse_batcher", "tail", url)
        with started(*arguments, environ=environment(**more), stdout=theirs, stderr=theirs) as process:
            read = b""

            def has_printed() -> bool:
                nonlocal read
                sse.enqueue("note", Text("x\x1b[2J" * 50))
                if select.select([ours], [], [], 0.1)[0]:
                    read += os.read(ours, 65_536)
                return "\u2026".encode() in read

            wait_until(has_printed, "the command prints an event")
            process.send_signal(2)
            assert process.wait(TIMEOUT) == 130
    finally:
        os.close(ours)
        os.close(theirs)
    text = read.decode()
    assert ("\x1b[36mnote\x1b[0m" in text) is not no_color
    [line] = [line for line in text.splitlines() if "\u2026" in line][:1]
    assert len(re.sub("\x1b\\[\\d+m", "", line)) == 60
    assert "\x1b[2J" not in text


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    with scripted_server(sending(STREAM + OPEN + "event: \u4e2d\ndata: \u4e2d\n\n".encode()), GONE) as server:
        environ = environment(PYTHONIOENCODING="ascii")
        with started("-m", "sse_batcher", "tail", server.url, environ=environ) as process:
            out, _ = process.communicate(timeout=TIMEOUT)
    assert said(out) == "TIME  \\u4e2d      3 B  \\u4e2d\n"


@pytest.mark.parametrize(
    ("closed", "out", "err"), [("1", "", "-- open: a\n"), ("2", 'TIME  a      4 B  "\u00e9"\n', "")]
)
def test_an_output_that_the_shell_has_closed_is_not_missed(closed: str, out: str, err: str) -> None:
    arguments = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", sys.executable, "-m", "sse_batcher", "tail"]
    event = 'event: a\ndata: "\u00e9"\n\n'.encode()
    with scripted_server(sending(STREAM + OPEN + event), GONE) as server:
        ended = subprocess.run([*arguments, server.url], env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert said(ended.stdout) == out
    assert ended.stderr.startswith(err)
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full_is_said_in_a_line() -> None:
    with scripted_server(sending(STREAM + OPEN + EVENTS)) as server, Path("/dev/full").open("w") as full:
        with started("-m", "sse_batcher", "tail", server.url, stdout=full) as process:
            _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert err.endswith("Error: the output cannot be written: No space left on device\n")
    assert "Traceback" not in err
