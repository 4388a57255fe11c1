"""`doctor`: diagnoses of made-up facts, and the report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from sse_batcher.doctor.diagnoses import diagnose
from sse_batcher.doctor.facts import Answer, Check, Facts, FirstBlock, Listening
from sse_batcher.doctor.findings import CODES, fault, warning
from sse_batcher.doctor.inside import (
    AppFacts,
    GunicornFacts,
    RedisFacts,
    RequestFacts,
    diagnose_app,
    fine_inside,
    no_token,
    token_refused,
)
from sse_batcher.doctor.rendering import as_text, fine_of, json_text, subject_of
from sse_batcher.doctor.software import PROXIES, SERVERS, recognise
from sse_batcher.doctor.words import duration
from sse_batcher.wire import HEADERS

from .kit.repository import ROOT

HEAD = {name.lower(): value for name, value in HEADERS}
ANSWER = Answer(status=200, headers={**HEAD, "server": "gunicorn"}, after=0.01)
CODED = replace(ANSWER, headers={name: value for name, value in ANSWER.headers.items() if name != "content-encoding"})
"""The answer of an app that has taken the header away, so that compressors find the stream."""
OPEN = FirstBlock(type="sse_open", data={"heartbeat": 15.0}, cursor="aaaaaaaa-1", after=0.001)
LISTENED = Listening(seconds=24.0, heartbeats=1, together=1, silence=15.0, silence_at_end=9.0)
OK = Check(status=200, word="ok")


def healthy(**changed: Any) -> Facts:
    """The facts of a stream without a fault, with changes."""
    facts: dict[str, Any] = {
        "url": "http://example.com/events",
        "answer": ANSWER,
        "first": OPEN,
        "coding": "identity",
        "listened": LISTENED,
        "health": OK,
        "ready": OK,
        "live": OK,
        "streams_beside": 3,
        "answers_beside": True,
        "histories": ["aaaaaaaa"] * 15,
        "by_header": "sse_gap",
        "by_query": "sse_gap",
        "resumed": OPEN,
        "clock_offset": 0.4,
    }
    return Facts(**{**facts, **changed})


def answered(status: int, **headers: str) -> Facts:
    return Facts(url="http://example.com/events", answer=Answer(status=status, headers=headers))


def behind(server: str, **more: str) -> Answer:
    return replace(ANSWER, headers={**HEAD, "server": server, **more})


def busy(reason: str, **changed: Any) -> Facts:
    return healthy(first=FirstBlock(type="sse_busy", data={"reason": reason}), listened=None, **changed)


def gap(reason: str) -> FirstBlock:
    return FirstBlock(type="sse_gap", data={"reason": reason})


def silent(**changed: Any) -> Facts:
    return Facts(url="http://example.com/events", stage="silent", failure="did not answer", **changed)


QUIET_END = Listening(seconds=60.0, silence=60.0, silence_at_end=60.0, end="closed")
BYE = Listening(seconds=3.0, silence=3.0, end="complete")

CASES: dict[str, tuple[Facts, str, str, str]] = {
    # What is seen, the code, the level, and words that have to be there.
    "no name": (Facts(url="", stage="name", failure="no address"), "unreachable", "fault", "DNS"),
    "no server": (Facts(url="", stage="connect", failure="refused"), "unreachable", "fault", "--bind"),
    "bad certificate": (Facts(url="", stage="tls", failure="self-signed"), "unreachable", "fault", "--insecure"),
    "no HTTP": (Facts(url="", stage="answer", failure="not HTTP"), "unreachable", "fault", "https"),
    "a proxy alone": (answered(502, server="nginx"), "unreachable", "fault", "proxy_pass"),
    "404": (answered(404), "not_found", "fault", "SSE_URL_PREFIX"),
    "401": (answered(401), "unauthorized", "fault", "--header"),
    "401 to a token": (replace(answered(401), has_token=True), "unauthorized", "fault", "SECRET_KEY"),
    "403": (answered(403), "forbidden", "fault", "@sse.authorize"),
    "redirect": (answered(302, location="/login"), "redirected", "fault", "before_request"),
    "redirect to the stream": (
        replace(answered(301, location="/events/"), leads_to=ANSWER), "redirected", "warning", "/events/"
    ),
    "a page": (answered(200, **{"content-type": "text/html"}), "not_a_stream", "fault", "text/html"),
    "a changed type": (
        replace(answered(200, **{"content-type": "text/plain"}), found_at="/events"),
        "not_a_stream", "fault", "ForceType",
    ),
    "an error": (answered(500), "not_a_stream", "fault", "direct_passthrough"),
    "an unknown status": (answered(429), "not_a_stream", "fault", "429 Too Many Requests"),
    "another library's stream": (healthy(first=FirstBlock(type="greeting")), "not_a_stream", "warning", "greeting"),
    "nothing but polls": (silent(poll=OK, health=OK), "buffered", "fault", "proxy_buffering off"),
    "nothing but polls of nginx": (
        silent(poll=replace(OK, headers={"server": "nginx"})), "buffered", "fault", "In the configuration of nginx"
    ),
    "nothing but health": (silent(health=OK), "buffered", "fault", "proxy_buffering off"),
    "nothing behind nginx": (
        healthy(answer=behind("nginx/1.22"), first=None, poll=OK), "buffered", "fault", "X-Accel-Buffering"
    ),
    "nothing at all": (silent(), "threads", "fault", "--worker-class gthread"),
    "late": (healthy(first=replace(OPEN, after=4.0)), "buffered", "fault", "4.0 s"),
    "heartbeats together": (
        healthy(listened=replace(LISTENED, seconds=50.0, heartbeats=3, together=3, silence=45.0)),
        "buffered", "fault", "3 heartbeats",
    ),
    "read whole": (healthy(listened=replace(BYE, bye="buffered")), "read_whole", "fault", "app.wsgi_app"),
    "gzip that waits": (
        healthy(coding="gzip", coded_block=False, plain=CODED), "compressed", "fault", "COMPRESS_MIMETYPES"
    ),
    "gzip that passes": (healthy(coding="gzip", coded_block=True, plain=CODED), "compressed", "warning", "gunicorn"),
    "gzip of what says identity": (
        healthy(coding="gzip", coded_block=True, plain=ANSWER), "compressed", "warning", "no-gzip"
    ),
    "zstd behind nginx": (
        healthy(answer=behind("nginx"), coding="zstd", plain=behind("nginx")), "compressed", "warning", "gzip off"
    ),
    "HTTP/1.0": (healthy(answer=replace(ANSWER, version="HTTP/1.0")), "http_1_0", "warning", "force-response-1.0"),
    "idle": (
        healthy(answer=behind("nginx"), first=replace(OPEN, data={"heartbeat": 75.0}), listened=QUIET_END),
        "idle_timeout", "fault", "proxy_read_timeout",
    ),
    "idle after the heartbeat of all": (
        healthy(listened=replace(QUIET_END, heartbeats=1, silence=10.0, silence_at_end=10.0)),
        "idle_timeout", "fault", "10.0 s",
    ),
    "cut soon after a heartbeat": (
        healthy(listened=replace(QUIET_END, heartbeats=1, silence=15.0, silence_at_end=10.0)),
        "ends_early", "fault", "whole response",
    ),
    "idle behind Apache": (
        healthy(answer=behind("Apache/2.4"), listened=replace(QUIET_END, silence_at_end=10.0, silence=10.0)),
        "idle_timeout", "fault", "ProxyTimeout",
    ),
    "a long heartbeat": (
        healthy(first=replace(OPEN, data={"heartbeat": 120.0})), "idle_timeout", "warning", "SSE_HEARTBEAT"
    ),
    "no heartbeat": (
        healthy(listened=replace(LISTENED, heartbeats=0, silence=24.0)),
        "heartbeats_missing", "fault", "proxy_buffering",
    ),
    "no thread left": (healthy(answers_beside=False), "threads", "fault", "SSE_TRANSPORT"),
    "says that none is left": (healthy(ready=Check(status=503, word="threads")), "threads", "fault", "--threads"),
    "none left for the second": (healthy(busy_beside="threads"), "threads", "fault", "--threads"),
    "one at a time": (healthy(answers_beside=False, streams_beside=1), "one_thread", "fault", "gthread"),
    "gunicorn sync": (busy("threads"), "one_thread", "fault", "sync"),
    "held threads": (busy("threads", ready=Check(status=503, word="threads")), "threads", "fault", "SSE_TRANSPORT"),
    "two histories": (healthy(histories=["a", "b", "a"]), "separate_processes", "fault", "SSE_BACKEND"),
    "a second one comes back later": (
        healthy(histories_after=[*"babbab"], resumed=gap("epoch")), "separate_processes", "fault", "--workers 1",
    ),
    "a restart between two connections": (
        healthy(histories_after=["b", "b", "b"], resumed=gap("epoch")), "no_resume", "fault", "restarted",
    ),
    "Redis away": (busy("backend"), "backend", "fault", "Redis fails:"),
    "Redis away since": (healthy(health=Check(status=503, word="backend")), "backend", "fault", "SSE_BACKEND"),
    "HTTP/2 refused": (healthy(http2="busy"), "http2", "fault", "--http-protocols"),
    "HTTP/2 blocks": (healthy(http2="blocked"), "http2", "fault", "--http-protocols"),
    "only HTTP/2": (busy("http2"), "http2", "fault", "--http-protocols"),
    "stopped": (
        healthy(listened=replace(BYE, bye="shutdown"), histories=["a", "a", "b"], resumed=gap("epoch")),
        "ends_early", "fault", "--max-requests",
    ),
    "cut": (
        healthy(listened=replace(BYE, heartbeats=9, silence_at_end=0.1, end="reset")),
        "ends_early", "fault", "WORKER TIMEOUT",
    ),
    "lease": (healthy(listened=replace(BYE, bye="lease")), "ends_early", "warning", "SSE_MAX_STREAM_AGE"),
    "kicked": (healthy(listened=replace(BYE, bye="kicked")), "ends_early", "warning", "revalidate"),
    "bye for threads": (healthy(listened=replace(BYE, bye="threads")), "threads", "fault", "--threads"),
    "clock ahead": (healthy(clock_offset=7_300.0), "clock", "fault", "2 hours ahead"),
    "clock behind": (healthy(clock_offset=-11.0), "clock", "fault", "11 s behind"),
    "header removed": (healthy(by_header="sse_open"), "no_resume", "fault", "proxy_set_header Last-Event-ID"),
    "query removed": (healthy(by_query="sse_open"), "no_resume", "fault", "The module"),
    "short history": (
        healthy(resumed=gap("too_old")), "no_resume", "fault", "SSE_HISTORY_FRAMES"
    ),
    "lost history": (
        healthy(resumed=gap("epoch")), "no_resume", "fault", "maxmemory-policy"
    ),
    "lost batch": (
        healthy(resumed=gap("publish_failed")), "no_resume", "fault", "batch"
    ),
    "no CORS": (healthy(origin="https://example.com"), "cors", "fault", "SSE_CORS_ORIGINS"),
    "no preflight": (
        healthy(
            origin="https://example.com",
            answer=behind("gunicorn", **{"access-control-allow-origin": "*"}),
            preflight=Answer(status=302),
        ),
        "cors", "warning", "OPTIONS",
    ),
    "two origins": (
        healthy(origin="https://a.org", answer=behind("x", **{"access-control-allow-origin": "https://a.org, *"})),
        "cors", "fault", "Two of them",
    ),
    "headers": (
        healthy(answer=replace(ANSWER, headers={**HEAD, "server": "waitress", "cache-control": "no-cache"})),
        "headers", "warning", "no-transform",
    ),
    "limit": (busy("limit"), "busy", "fault", "SSE_MAX_CLIENTS"),
    "limit beside": (healthy(busy_beside="limit", streams_beside=2), "busy", "warning", "SSE_MAX_CLIENTS"),
    "draining": (busy("draining"), "busy", "fault", "new process"),
    "snapshot": (busy("snapshot"), "busy", "fault", "@sse.snapshot"),
    "error": (busy("error"), "busy", "fault", "could not be opened"),
    "a reason of a later version": (busy("lunch"), "busy", "fault", "lunch"),
    "a dead thread": (healthy(live=Check(status=503, word="thread")), "unhealthy", "fault", "Restart"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_facts_are_diagnosed_as_one_fault_and_its_words_say_what_to_change(name: str) -> None:
    facts, code, level, words = CASES[name]
    [finding] = diagnose(facts)
    assert (finding.code, finding.level) == (code, level)
    assert words in f"{finding.what} {finding.do}"


@pytest.mark.parametrize("server", ["gunicorn", "nginx"])
@pytest.mark.parametrize("name", ["cache-control", "content-encoding", "x-content-type-options", "x-accel-buffering"])
def test_each_header_that_is_missing_is_named(server: str, name: str) -> None:
    answer = Answer(status=200, headers={key: value for key, value in behind(server).headers.items() if key != name})
    found = diagnose(healthy(answer=answer, coding=""))
    if (server, name) == ("nginx", "x-accel-buffering"):
        assert found == []  # nginx takes it for itself
        return
    [finding] = found
    assert (finding.code, finding.level) == ("headers", "warning")
    missing = {key for key in HEAD if f"`{key}:" in finding.what.lower()}
    assert missing == {name}
    assert ("`after_request`" in finding.what) is (server == "gunicorn")
    assert ("In the configuration of nginx" in finding.do) is (server == "nginx")


def test_what_the_library_has_compressed_is_no_fault_unless_it_is_held_back() -> None:
    facts = healthy(coding="gzip", coded_block=True, coded_by_library=True, plain=ANSWER)
    assert diagnose(facts) == []
    facts.coded_block = False
    assert [(finding.code, finding.level) for finding in diagnose(facts)] == [("compressed", "fault")]


def test_a_coding_that_cannot_be_read_is_no_fault_and_the_words_say_so() -> None:
    found = diagnose(healthy(coding="br", plain=CODED))
    assert [(finding.code, finding.level) for finding in found] == [("compressed", "warning")]
    assert "cannot read it" in found[0].what


def test_a_preflight_that_is_allowed_is_no_finding() -> None:
    allowed = {"access-control-allow-origin": "https://example.com"}
    preflight = Answer(status=200, headers={**allowed, "access-control-allow-headers": "Authorization, Last-Event-ID"})
    facts = healthy(origin="https://example.com", answer=behind("gunicorn", **allowed), preflight=preflight)
    assert diagnose(facts) == []
    assert "pages of https://example.com may read it" in fine_of(facts, [])


def test_what_compresses_is_named_by_what_is_left_of_the_header() -> None:
    by_app, by_proxy, by_nginx = (
        diagnose(healthy(answer=answer, coding="gzip", coded_block=True, plain=plain))[0].what
        for answer, plain in [(ANSWER, CODED), (behind("x"), behind("x")), (behind("nginx"), behind("nginx"))]
    )
    assert "the app compresses it, since its server, gunicorn, does not" in by_app
    assert "a proxy compresses it although the app says `Content-Encoding: identity`" in by_proxy
    assert "nginx, or the app behind it, compresses it" in by_nginx


def test_a_healthy_stream_has_no_finding() -> None:
    facts = healthy()
    assert diagnose(facts) == []
    assert (
        diagnose(healthy(answer=replace(behind("nginx"), headers={**HEAD, "server": "nginx", "x-accel-buffering": ""})))
        == []
    )
    fine = fine_of(facts, [])
    assert len(fine) == 4
    report = as_text(subject_of(facts), [], fine)
    assert report.startswith(
        "http://example.com/events, answered by gunicorn, HTTP/1.1\n\nFine: the first block comes 11 ms"
    )
    assert report.endswith("\n\nNothing is wrong.")


def test_a_stream_of_an_app_without_routes_of_the_library_has_no_finding() -> None:
    """There, health checks are 404, and their words are missing."""
    nothing = Check(status=404)
    assert diagnose(healthy(health=nothing, ready=nothing, live=nothing)) == []


def test_a_silence_that_is_shorter_than_the_heartbeat_is_no_fault() -> None:
    assert diagnose(healthy(listened=Listening(seconds=5.0, silence=5.0, silence_at_end=5.0))) == []


def test_a_busy_stream_sends_no_heartbeat_and_that_is_no_fault() -> None:
    assert diagnose(healthy(listened=Listening(seconds=30.0, events=300, silence=0.5, silence_at_end=0.1))) == []


def test_a_wrong_clock_is_reported_beside_a_refused_token() -> None:
    facts = replace(answered(401), has_token=True, clock_offset=600.0)
    assert [finding.code for finding in diagnose(facts)] == ["unauthorized", "clock"]


def test_two_processes_that_also_restart_are_still_separate() -> None:
    facts = healthy(histories=[*"abbaabacbccb"], listened=replace(BYE, bye="shutdown"))
    assert {finding.code for finding in diagnose(facts)} == {"ends_early", "separate_processes"}


def test_connections_at_the_same_time_may_meet_a_restart_in_another_order() -> None:
    facts = healthy(histories=[*"aaaababbbbcbcc"], listened=replace(BYE, bye="shutdown"))
    assert [finding.code for finding in diagnose(facts)] == ["ends_early"]


def test_a_process_that_is_met_only_afterwards_is_a_second_one_if_the_first_is_there_again() -> None:
    again = healthy(resumed=gap("epoch"), histories_after=[*"babbab"])
    gone = healthy(resumed=gap("epoch"), histories_after=["b", "b", "b"])
    assert [finding.code for finding in diagnose(replace(again, histories=["a"] * 15))] == ["separate_processes"]
    assert [finding.code for finding in diagnose(replace(gone, histories=["a"] * 15))] == ["no_resume"]


def test_faults_come_before_warnings() -> None:
    facts = healthy(answer=replace(ANSWER, version="HTTP/1.0"), histories=["a", "b", "a"])
    assert [finding.level for finding in diagnose(facts)] == ["fault", "warning"]


def test_each_code_is_documented_and_has_a_case() -> None:
    inside = {code for code, text in CODES.items() if "Inside only" in text}
    of_tokens = {token_refused().code, no_token().code}
    assert {code for _, code, _, _ in CASES.values()} == set(CODES) - inside - of_tokens
    assert inside <= {code for _, code, _, _ in INSIDE.values()}


@pytest.mark.parametrize(("headers", "name"), [
    ({"server": "nginx/1.22.1"}, "nginx"),
    ({"server": "openresty"}, "nginx"),
    ({"server": "Apache/2.4.57 (Debian)"}, "Apache"),
    ({"server": "gunicorn", "via": "1.1 Caddy"}, "Caddy"),
    ({"via": "1.1 vegur"}, "the router of Heroku"),
    ({"server": "cloudflare"}, "Cloudflare"),
    ({"cf-ray": "1"}, "Cloudflare"),
    ({"server": "Werkzeug/3.1 Python/3.11"}, "the development server of Flask"),
    ({"server": "waitress"}, "waitress"),
    ({"server": "something"}, None),
    ({}, None),
])  # fmt: skip
def test_software_is_recognised_by_its_headers(headers: dict[str, str], name: str | None) -> None:
    found = recognise(headers)
    assert (found and found.name) == name


def test_each_proxy_has_words_for_each_setting() -> None:
    kinds = {"buffering", "timeout", "compression", "http11", "headers"}
    assert all(set(proxy.settings) == kinds for proxy in PROXIES)
    assert not any(server.is_proxy for server in SERVERS)


@pytest.mark.parametrize(
    ("seconds", "text"), [(11.4, "11 s"), (600, "10 minutes"), (7200, "2 hours"), (200_000, "2 days")]
)
def test_times_are_written_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_has_a_paragraph_for_each_finding() -> None:
    findings = [fault("clock", "A " * 80, "B"), warning("headers", "C", "D " * 80)]
    text = as_text("the subject", findings, ["one thing"])
    first, *paragraphs, fine = text.split("\n\n")
    assert (first, fine) == ("the subject", "Fine: one thing.")
    assert [paragraph.split(":")[0] for paragraph in paragraphs] == ["FAULT clock", "WARNING headers"]
    assert all("\n  What to do: " in paragraph for paragraph in paragraphs)
    assert max(map(len, text.splitlines())) <= 100


def test_each_page_that_the_words_name_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "sse_batcher" / "doctor").glob("*.py"))
    named = set(re.findall(r"""\bpage\(['"](.*?)['"]\)""", sources))
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert len(named) > 10
    assert named <= set(re.findall(r"^#+ (.*)$", pages, flags=re.M))


def test_the_report_in_the_documentation_is_a_real_one() -> None:
    url = "https://shop.example.com/events"
    facts = replace(silent(poll=replace(OK, headers={"server": "nginx"})), url=url)
    report = as_text(subject_of(facts), diagnose(facts), [])
    healthy_facts = healthy(url=url, answer=replace(behind("nginx"), after=0.041))
    clean = as_text(subject_of(healthy_facts), [], fine_of(healthy_facts, []))
    shown = (ROOT / "docs/guides/doctor.md").read_text()
    assert f"```text\n{report}\n```\n" in shown
    assert f"```text\n{clean}\n```\n" in shown


def test_the_json_is_ok_if_there_are_warnings_only() -> None:
    made = json.loads(json_text("u", [warning("headers", "C", "D")], healthy().as_dict()))
    assert made["ok"] is True
    assert made["findings"] == [{"code": "headers", "level": "warning", "what": "C", "do": "D"}]
    assert made["facts"]["listened"]["heartbeats"] == 1
    assert json.loads(json_text("u", [fault("clock", "C", "D")], {}))["ok"] is False


def test_what_a_server_says_cannot_change_the_terminal() -> None:
    facts = answered(302, location="/\x1b[2Jlogin\n\nNothing is wrong.")
    text = as_text(subject_of(facts), diagnose(facts), [])
    assert "\x1b" not in text
    assert "/\\x1b[2Jlogin\\n\\nNothing" in text


# -- inside ------------------------------------------------------------------------------------------------------------

APP = AppFacts(name="app", url_prefix="/events", heartbeat=15.0, transport="attached", has_redis=False)
STREAMS = RequestFacts(path="/events", answer=ANSWER, first=OPEN)
REDIS = RedisFacts(clock_offset=0.001)


def seen(**changed: Any) -> AppFacts:
    return replace(APP, **{"request": STREAMS, **changed})


def gunicorn(**changed: Any) -> GunicornFacts:
    return GunicornFacts(where="`gunicorn.conf.py`", **changed)


INSIDE: dict[str, tuple[AppFacts, str, str, str]] = {
    "a long heartbeat": (seen(heartbeat=60.0), "idle_timeout", "warning", "SSE_HEARTBEAT"),
    "workers": (seen(gunicorn=gunicorn(workers=4)), "separate_processes", "fault", "SSE_BACKEND"),
    "max_requests": (seen(gunicorn=gunicorn(max_requests=1000)), "ends_early", "fault", "max_requests"),
    "sync": (seen(gunicorn=gunicorn(worker_class="sync")), "one_thread", "fault", "SSE_TRANSPORT"),
    "few threads": (seen(gunicorn=gunicorn(threads=16)), "threads", "warning", "16 open tabs"),
    "no Redis": (seen(redis=RedisFacts(error="refused"), request=None), "backend", "fault", "SSE_BACKEND"),
    "replica": (seen(redis=replace(REDIS, is_replica=True)), "backend", "fault", "redis+sentinel://"),
    "clock of Redis": (seen(redis=RedisFacts(clock_offset=-90.0)), "clock", "fault", "of Redis is 90 s behind"),
    "eviction": (seen(redis=replace(REDIS, policy="allkeys-lru")), "eviction", "fault", "noeviction"),
    "401": (seen(request=RequestFacts(path="/events", answer=Answer(status=401))), "unauthorized", "warning", "Cookie"),
    "403": (seen(request=RequestFacts(path="/events", answer=Answer(status=403))), "forbidden", "warning", "authorize"),
    "login": (
        seen(request=RequestFacts(path="/events", answer=Answer(status=302, headers={"location": "/login"}))),
        "redirected", "warning", "/login",
    ),
    "teapot": (seen(request=RequestFacts(path="/events", answer=Answer(status=418))), "not_a_stream", "fault", "418"),
    "error": (seen(request=RequestFacts(path="/events", error="KeyError: 'x'")), "not_a_stream", "fault", "KeyError"),
    "reading function": (
        seen(request=RequestFacts(path="/events", error="UsageError: has no end", reads_whole=True)),
        "read_whole", "fault", "direct_passthrough",
    ),
    "reading middleware": (
        seen(request=RequestFacts(path="/events", answer=ANSWER)), "read_whole", "fault", "app.wsgi_app"
    ),
    "compression": (
        seen(
            middleware=["Flask-Compress"],
            request=RequestFacts(path="/events", answer=behind("", **{"content-encoding": "br"})),
        ),
        "compressed", "fault", "Flask-Compress",
    ),
    "compression that passes": (
        seen(request=RequestFacts(path="/events", answer=behind("", **{"content-encoding": "br"}), first=OPEN)),
        "compressed", "warning", "COMPRESS_MIMETYPES",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_facts_of_an_app_are_diagnosed_as_one_fault(name: str) -> None:
    facts, code, level, words = INSIDE[name]
    [finding] = diagnose_app(facts)
    assert (finding.code, finding.level) == (code, level)
    assert words in f"{finding.what} {finding.do}"


def test_a_healthy_app_has_no_finding() -> None:
    facts = seen(has_redis=True, redis=REDIS, gunicorn=gunicorn(workers=4, worker_class="gthread", threads=32))
    assert diagnose_app(facts) == []
    assert len(fine_inside(facts, [])) == 3
    assert json.dumps(facts.as_dict())
