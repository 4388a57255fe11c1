"""`load`: what it opens, what it counts, and what it says of it."""

from __future__ import annotations

import gzip
import json
import math
import re
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort, request
from hypothesis import given
from hypothesis import strategies as st

from sse_batcher import SSE, parser
from sse_batcher.cli import main
from sse_batcher.commands import load as commands_load
from sse_batcher.commands.load import OTHER_FILES, Load, raise_limit
from sse_batcher.commands.load_client import BlockReader, Memo
from sse_batcher.commands.load_tally import Frames, Seen, losses, order, percentiles
from sse_batcher.parser import Parser
from sse_batcher.remote.message import RemoteError, make_request
from sse_batcher.testing import live_server

from .kit.commands import interrupt, started
from .kit.scripted_server import HEAD, holding, scripted_server, sending
from .kit.servers import SERVERS, serving
from .kit.waiting import wait_until

OPEN = HEAD + b'\r\nevent: sse_open\nretry: 1\ndata: {"heartbeat":15.0}\nid: e-0\n\n'


def frame(number: int) -> bytes:
    return b"event: a\ndata: %d\nid: e-%d\n\n" % (number, number)


# -- what is counted ---------------------------------------------------------------------------------------------------


def lost_of(frames: list[str], *clients: Seen) -> dict[int, int]:
    found = Frames()
    for at, id in enumerate(frames):
        found.add(id, float(at), None)
    return dict(losses(found, clients))


def test_a_client_has_lost_what_others_got_while_it_was_open() -> None:
    frames = ["e-2", "e-1", "e-10", "e-9"]
    assert lost_of(frames, Seen("e-0", "e-10", 4, True), Seen("e-2", "e-10", 2, True), Seen("e-10", "", 0, True)) == {}
    assert lost_of(frames, Seen("e-0", "e-10", 3, True), Seen("e-0", "e-2", 2, True), Seen("e-1", "", 0, True)) == {
        1: 1,
        2: 1,
        3: 1,
    }
    # One that has ended may have lost only what came before its newest frame.
    assert lost_of(frames, Seen("e-0", "e-9", 3, False), Seen("e-0", "", 0, False)) == {}
    assert lost_of(frames, Seen("e-0", "e-9", 2, False)) == {1: 1}


def test_each_process_without_redis_has_a_history_of_its_own() -> None:
    frames = ["e-1", "e-2", "f-1"]
    assert lost_of(frames, Seen("e-0", "e-2", 2, True), Seen("f-0", "f-1", 1, True), Seen("g-0", "", 0, True)) == {}


def test_cursors_are_sorted_by_their_numbers() -> None:
    assert sorted(["e-10", "e-9"], key=order) == ["e-9", "e-10"]
    assert sorted(["e-10", "e-10.2", "e-10.1"], key=order) == ["e-10.1", "e-10.2", "e-10"]
    assert sorted(["e-5-10-1", "e-5-9", "e-5-10"], key=order) == ["e-5-9", "e-5-10", "e-5-10-1"]
    assert order("x-\u00b2-" + "9" * 5_000) == ("x", ((0, 0), math.inf))


@given(st.lists(st.integers(0, 50), min_size=1))
def test_percentiles_are_those_of_the_sorted_values(steps: list[int]) -> None:
    found = percentiles(Counter(steps))
    assert found is not None
    ranked = sorted(steps)
    for name, share in [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)]:
        assert found[name] == ranked[-(-share * len(ranked) // 100) - 1] / 10
    assert percentiles({}) is None


def test_frames_that_come_after_the_end_are_left_out() -> None:
    frames = Frames()
    frames.add("e-1", 1.0, 0.5)
    assert frames.arrived("e-1", 1.2)
    frames.is_over = True
    frames.add("e-2", 2.0, None)
    assert not frames.arrived("e-2", 2.0)
    assert frames.arrived("e-1", 1.4)  # late, but it counts
    assert frames.delays() == {"p50": 200.0, "p90": 400.0, "p99": 400.0, "max": 400.0}
    assert frames.since_closed() == {"p50": 700.0, "p90": 900.0, "p99": 900.0, "max": 900.0}


PIECES = [b"data: 1\n", b"\n", b"event: a\n", b"id: e-1\n\n", b":\n", b"data: 2\nid: e-2\n\n", b"da", b"ta: 3\n\n"]


@given(st.lists(st.lists(st.sampled_from(PIECES)), min_size=2), st.lists(st.integers(1, 9), min_size=1))
def test_what_other_clients_have_got_changes_nothing(streams: list[list[bytes]], cuts: list[int]) -> None:
    memo: Memo = {}
    for pieces in streams:
        chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
        begin = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        reader = BlockReader()
        assert reader.blocks(begin, memo) == []
        # Most chunks come as they are. Some are cut.
        received = [
            part
            for place, chunk in enumerate(chunks)
            for cut in [cuts[place % len(cuts)] if place % 3 == 2 else len(chunk)]
            for part in (chunk[:cut], chunk[cut:])
            if part
        ]
        found = [block for data in received for block in reader.blocks(data, memo)]
        # The id of a block without one is that of an earlier block, which the memo does not know.
        expected = Parser().blocks(b"".join(pieces))
        assert [block[:2] for block in found] == [block[:2] for block in expected]
        assert [block.id for block in found if block.has_id] == [block.id for block in expected if block.has_id]


# -- against servers of a few bytes ------------------------------------------------------------------------------------


def load(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run it; what it says in JSON."""
    main(["load", *arguments, "--json"])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_losses_gaps_and_ends_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    gap = b'event: sse_gap\nretry: 1\ndata: {"reason":"overflow"}\nid: e-2\n\n'
    bye = b'event: sse_bye\nretry: 1\ndata: {"reason":"lease"}\nid: e-3\n\n'
    with scripted_server(
        sending(b""),  # the first connection only finds the address
        sending(OPEN + frame(1) + frame(2) + frame(3) + bye),
        sending(OPEN + frame(1) + frame(3)),
        sending(OPEN + frame(1) + gap + frame(3) + bye),
        sending(HEAD + b'\r\nevent: sse_busy\nretry: 1\ndata: {"reason":"limit"}\n\n'),
        sending(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"),
        sending(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"),
        sending(b""),
        sending(HEAD + b"\r\n"),
        sending(b"SSH-2.0\r\n"),
    ) as server:
        said = load(server.url, "--clients", "9", "--seconds", "99", capsys=capsys)
    assert said["clients"] == {
        "wanted": 9,
        "opened": 3,
        "open_at_end": 0,
        "refused": {
            "sse_busy limit": 1,
            "status 503": 1,
            "not an event stream": 1,
            "closed without an answer": 1,
            "closed at once": 1,
            "the answer is not HTTP/1.1": 1,
        },
        "ended": {"sse_bye lease": 2, "closed without sse_bye": 1},
    }
    frames = {"different": 3, "received": 7, "lost": 1, "clients_with_losses": 1, "gaps": {"overflow": 1}}
    assert said["frames"] == frames


def test_busy_after_the_beginning_is_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    busy = b'event: sse_busy\ndata: {"reason":"limit"}\n\n'
    with scripted_server(sending(b""), holding(OPEN + busy), sending(OPEN)) as server:
        said = load(server.url, "--clients", "2", "--seconds", "99", capsys=capsys)
    assert (said["clients"]["opened"], said["clients"]["open_at_end"], said["clients"]["refused"]) == (2, 0, {})
    assert said["clients"]["ended"] == {"sse_busy limit": 1, "closed without sse_bye": 1}


@pytest.mark.parametrize("begin", [b"", HEAD + b"\r\n:\n"])
def test_a_stream_that_does_not_open_is_given_up(
    begin: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_load, "OPEN_SECONDS", 0.2)
    with scripted_server(sending(b""), holding(begin)) as server:
        said = load(server.url, "--clients", "1", "--seconds", "99", capsys=capsys)
    assert said["clients"]["refused"] == {"no sse_open within 0.2 s": 1}


def test_a_compressed_stream_is_refused_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    head, body = OPEN.split(b"\r\n\r\n")
    answer = head + b"\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(body)
    for more, opened in [((), 0), (("--header", "Accept-Encoding: gzip"), 1)]:
        with scripted_server(sending(b""), sending(answer)) as server:
            said = load(server.url, "--clients", "1", "--seconds", "0", *more, capsys=capsys)
        assert said["clients"]["opened"] == opened
        assert [reason[:31] for reason in said["clients"]["refused"]] == ["the answer is compressed (gzip)"] * (
            1 - opened
        )


def test_a_time_that_is_not_credible_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    odd = b"".join(
        b'event: a_batch\ndata: {"timestamp":%b}\nid: e-%d\n\n' % (time, number)
        for number, time in enumerate([b"1e999", b"-1", b"9" * 40, b'"x"', b"null"], start=1)
    )
    with scripted_server(sending(b""), sending(OPEN + odd + b"event: b_batch\ndata: [\nid: e-9\n\n")) as server:
        said = load(server.url, "--clients", "1", "--seconds", "0", capsys=capsys)
    assert (said["frames"]["received"], said["since_batch_closed_ms"]) == (6, None)


def test_a_snapshot_is_no_frame(capsys: pytest.CaptureFixture[str]) -> None:
    opened = HEAD + b"\r\nevent: sse_open\nretry: 1\ndata: {}\n\n"
    state = b"event: state\ndata: 1\n\nevent: state\ndata: 2\nid: e-4\n\n"
    with scripted_server(
        sending(b""), sending(opened + state + frame(5)), sending(OPEN + frame(4) + frame(5))
    ) as server:
        said = load(server.url, "--clients", "2", "--seconds", "0", capsys=capsys)
    assert said["frames"] == {"different": 2, "received": 3, "lost": 0, "clients_with_losses": 0, "gaps": {}}


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_report_does_not_show_a_token(form: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(sending(b""), sending(OPEN)) as server:
        assert main(["load", f"{server.url}?token=secret", "--clients", "1", "--seconds", "0", *form]) == 0
    assert f"{server.url}?token=..." in (out := capsys.readouterr().out)
    assert "secret" not in out


# -- against a site ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site() -> Any:
    app = Flask("shop")
    app.config["SSE_MAX_CLIENTS"] = 20
    sse = SSE(app)

    @sse.authorize
    def authorize(channels: tuple[str, ...]) -> tuple[str, ...]:
        if request.headers.get("Cookie") == "bad=1":
            abort(403)
        return channels

    with live_server(app) as url:
        yield f"{url}/events", sse
    with app.app_context():
        assert sse.manager.shutdown()


def run(url: str, sse: SSE, clients: int, frames: int) -> Load:
    """Open these clients, and send so many frames once all are open."""
    sent = 0

    def progress(line: str) -> None:
        nonlocal sent
        if measuring.tally.open == clients and sent < frames:
            sent += 1
            sse.enqueue("order", sent)
            sse.enqueue("order", {"id": sent})
            sse.manager.flush_all()

    measuring = Load(make_request(url), clients, None, 2.0, progress, 0.01)
    measuring.run()
    return measuring


def test_every_client_gets_every_frame_of_a_site(site: tuple[str, SSE]) -> None:
    url, sse = site
    measuring = run(url, sse, 20, 3)
    said = measuring.result()
    measuring.close()
    assert said["clients"] == {"wanted": 20, "opened": 20, "open_at_end": 20, "refused": {}, "ended": {}}
    assert said["frames"] == {"different": 3, "received": 60, "lost": 0, "clients_with_losses": 0, "gaps": {}}
    assert 0 <= said["delay_ms"]["p50"] <= said["delay_ms"]["max"]
    assert said["delay_ms"]["p50"] < 2_000
    assert 0 <= said["since_batch_closed_ms"]["p50"] < 2_000
    assert said["opened_per_second"] > 1
    assert said["opening_ms"]["max"] > 0
    assert said["bytes"] > 60 * 100


def test_the_table_says_it_in_words(site: tuple[str, SSE], capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = site
    assert main(["load", url, "--clients", "22", "--seconds", "0.2", "--channel", "a"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"streams opened +20 of 22, [\d,.]+ a second\n", out)
    assert re.search(r"refused +2 \(sse_busy limit: 2\)\n", out)
    assert re.search(r"open at the end +20\n", out)
    assert re.search(r"delay after the first +nothing to measure\n", out)
    assert re.match(r"\d+ open of 22, \d+ opening, \d+ refused, 0 ended, 0 frames, ", err)


def test_a_site_that_opens_nothing_is_status_1(site: tuple[str, SSE], capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = site
    assert main(["load", url, "--clients", "3", "--header", "Cookie: bad=1"]) == 1
    assert re.search(r"refused +3 \(status 403: 3\)\n", capsys.readouterr().out)


def test_the_rate_is_a_limit(site: tuple[str, SSE], capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = site
    said = load(url, "--clients", "11", "--rate", "20", "--seconds", "0", capsys=capsys)
    assert said["opened_per_second"] < 23  # ten intervals of 50 ms, and the first one at once
    assert said["seconds"] >= 0.5


def test_ctrl_c_prints_what_was_measured_so_far(site: tuple[str, SSE]) -> None:
    url, sse = site
    with started("-m", "sse_batcher", "load", url, "--clients", "5", "--seconds", "60") as process:
        # For the server they are open. How many of them the command has seen by then is a matter of milliseconds.
        wait_until(lambda: sse.manager.get_stats().clients == 5, "all are open")
        status, out, err = interrupt(process)
    assert status == 130
    assert re.search(r"streams opened +\d of 5\b", out)
    assert "Traceback" not in err


@pytest.mark.external
def test_a_site_over_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SERVERS["gunicorn"]
    kind = kind._replace(command=(*kind.command, "--certfile=tls.pem", "--keyfile=tls.pem"), tls=True)
    with serving(kind, tmp_path) as server:
        url = f"https://127.0.0.1:{server.port}/events"
        refused = load(url, "--clients", "2", capsys=capsys)
        assert refused["clients"]["refused"] == {"TLS: self-signed certificate": 2}
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        said = load(url, "--clients", "5", "--seconds", "0.2", capsys=capsys)
        assert (said["clients"]["opened"], said["clients"]["open_at_end"]) == (5, 5)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_it_raises_its_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4_096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    raise_limit(100)
    raise_limit(1_000)
    raise_limit(10_000)
    assert limits == [(1_000 + OTHER_FILES, 4_096), (10_000 + OTHER_FILES, 10_000 + OTHER_FILES)]


def test_it_says_how_many_it_can_open(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: int, pair: tuple[int, int]) -> None:
        if pair[1] > 1_064:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1_064))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(RemoteError, match="1,064 open files, which is enough for 1,000 clients"):
        raise_limit(10_000)
    assert main(["load", "http://127.0.0.1:1", "--clients", "2000"]) == 1
    assert "1,000 clients" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--clients", "0"], ["--clients", "10001"], ["--rate", "0"], ["--seconds", "-1"]]
)
def test_numbers_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "http://127.0.0.1:1", *arguments]) == 2
    assert "is not in the range" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rate", "--seconds"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_what_is_no_number_is_refused(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "http://127.0.0.1:1", option, number]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_a_line_that_never_ends_ends_the_client(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "MAX_BLOCK_BYTES", 1_000)
    with scripted_server(sending(b""), sending(OPEN + b"x" * 1_001)) as server:
        said = load(server.url, "--clients", "1", "--seconds", "99", capsys=capsys)
    assert "a block of more than" in str(said["clients"]["refused"] or said["clients"]["ended"])


def test_a_site_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "http://127.0.0.1:1/events"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Error: cannot connect to 127.0.0.1, port 1: Connection refused\n")
