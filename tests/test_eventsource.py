"""`BatchedEventSource` beside the browser's own `EventSource`: both read the same bytes, and see the same events.

One server answers both. The streams are those of the standard, and whatever a parser can get wrong.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page

from sse_batcher.browser import SCRIPT

from .kit.browser import chromium
from .kit.servers import HOST
from .kit.waiting import TIMEOUT

pytestmark = pytest.mark.external

# The examples of https://html.spec.whatwg.org/multipage/server-sent-events.html, and more, with what they are about.
STREAMS = {
    "standard, two lines of data": b"data: This is the first message.\n\n"
    b"data: This is the second message, it\ndata: has two lines.\n\ndata: This is the third message.\n\n",
    "standard, types": b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
    "standard, three lines of data": b"data: YHOO\ndata: +2\ndata: 10\n\n",
    "standard, ids": b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
    "standard, empty data": b"data\n\ndata\ndata\n\ndata:",
    "standard, a space": b"data:test\n\ndata: test\n\n",
    "nothing": b"",
    "only comments": b":\n\n: a\n\n",
    "line ends: CR": b"data:a\rdata:b\r\rdata:c\r\r",
    "line ends: CRLF": b"data:a\r\ndata:b\r\n\r\ndata:c\r\n\r\n",
    "line ends: mixed": b"data:a\n\rdata:b\r\r\ndata:c\r\n\rdata:d\r\n\ndata:e\n\r\n",
    "line ends: empty lines": b"\r\n\n\r\r\ndata:a\n\n\n\r\r\r\n\ndata:b\r\n\r\n\r\n",
    "no other line ends": "data:a\u2028b\u2029c\x85d\x0be\x0cf\x1eg\n\ndata:\u2028\n\u2028\ndata:h\n\n".encode(),
    "no blank line at the end": b"data:a\n\nid: 7\nevent: add\ndata:b\n",
    "no line end at the end": b"data:a\n\nid: 7\nevent: add\ndata:b",
    "BOM": b"\xef\xbb\xbfdata:a\n\n\xef\xbb\xbfdata:b\n\ndata:\xef\xbb\xbfc\n\n",
    "BOM twice": b"\xef\xbb\xbf\xef\xbb\xbfdata:a\n\ndata:b\n\n",
    "BOM before a comment": b"\xef\xbb\xbf:\ndata:a\n\n",
    "BOM, a part": b"\xef\xbbdata:a\n\ndata:b\n\n",
    "BOM of UTF-16": b"\xfe\xffdata:a\n\ndata:b\n\n",
    "comments": b":a\ndata:b\n:c\ndata:d\n: data:e\n\n:data:f\n\n::\ndata:g\n\n",
    "fields without colon": b"data\ndata\nevent\nid\nretry\n\nevent:add\ndata\n\nid:7\ndata\n\nid\ndata\n\n",
    "unknown fields": b"Data:a\nDATA:b\n data:c\ndata :d\ndatax:e\ndat:f\nfoo\ndata:g\n\n",
    "colons": b"data::\ndata: :\ndata:a:b: c\n\nevent:a:b\ndata:c\n\nid::\ndata:d\n\n",
    "spaces": b"data:\ndata: \ndata:  \ndata:a \ndata:\tb\n\nevent: add \ndata:c\n\nid: 7 \ndata:d\n\n",
    "id without data": b"id:7\n\ndata:a\n\n",
    "id at the end without data": b"id:7\ndata:a\n\nid:8\n\n",
    "id twice": b"id:7\nid:8\ndata:a\n\n",
    "id emptied": b"id:7\ndata:a\n\nid:\ndata:b\n\ndata:c\n\n",
    "id with NUL": b"id:7\ndata:a\n\nid:8\x009\ndata:b\n\nid:\x00\ndata:c\n\n",
    "id with more than ASCII": "id: é☃💛\ndata:a\n\n".encode(),
    "type empty": b"event:\ndata:a\n\nevent:add\nevent:\ndata:b\n\nevent: message\ndata:c\n\n",
    "type twice": b"event:remove\nevent:add\ndata:a\n\ndata:b\n\n",
    "type without data": b"event:add\n\ndata:a\n\nevent:add\n:\n\ndata:b\n\n",
    "types that objects have": b"event:__proto__\ndata:a\n\nevent:constructor\ndata:b\n\nevent:toString\ndata:c\n\n",
    "NUL": b"data:a\x00b\n\nda\x00ta:c\n\nevent:a\x00dd\ndata:d\n\n",
    "retry": b"retry:20\ndata:a\n\nretry:x\nretry:1.5\nretry:-1\nretry:+1\nretry: 0x1\ndata:b\n\nretry\xd9\xa1\n\n",
    "not UTF-8": b"data:\xff\xfe\xc3\n\ndata:\xe2\x82\ndata:\xed\xa0\x80\xc0\x8a\xf5\n\ndata:\xf0\x9f\x92\xc3\n\n",
    "not UTF-8 in the names": b"da\xffta:a\n\nevent:\xc3\ndata:b\n\nid:\xff\ndata:c\n\n",
    "the end is in a character": b"data:a\n\ndata:\xf0\x9f",
    "characters of two to four bytes": "data:é☃💛\n\nevent:é\ndata:\ufffd\n\n".encode(),
    "no batch": b'event:a_batch\ndata:{"events":3}\n\nevent:_batch\ndata:x\n\nevent:b_batch\ndata:null\n\n',
    "the stream's own": b"event:sse_open\ndata:{}\nid:7\n\nevent:sse_gap\ndata:\nid:8\n\nevent:sse_bye\ndata:x\n\n",
    "a line of 2 MB": b"id:7\ndata:" + b"x" * 2_000_000 + b"\n\ndata:a\n\n",
    "20,000 lines of data": b"data:line\r\n" * 20_000 + b"\r\ndata:a\n\n",
    "3,000 events": b"".join(b"id:%d\rdata:%d\r\r" % (number, number) for number in range(3_000)),
    "2 MB without an end": b"data:a\n\nid:7\ndata:" + "é☃💛".encode() * 220_000,
}
BATCH = b'event:a_batch\nid:7\ndata:{"type":"a","batchSize":2,"events":[{"n":1}, {"n": 2}]}\n\n'
OTHER_STREAMS = {
    "types of the connection": b"event:open\ndata:1\n\nevent:error\ndata:2\n\nevent:statechange\ndata:3\n\n",
    "a batch": BATCH,
}
"""Those in which the module differs."""
SHORT = [name for name, stream in STREAMS.items() if len(stream) <= 100]
TYPES = sorted(
    {"message"}
    | {
        re.sub("^ ", "", name)
        for stream in STREAMS.values()
        for name in re.findall("event:(.+)", stream.decode("utf-8", "replace"))
    }
)

Events = dict[str, list[list[str]]]
"""By the name of the stream: type, data, lastEventId and origin of each event."""

PAGE = """<!doctype html><meta charset="utf-8"><title>EventSource</title><link rel="icon" href="data:,">
<base href="/folder/">
<script type="module">
import { BatchedEventSource } from "/sse-batcher.js";

window.BatchedEventSource = BatchedEventSource;

// With ?cut=7, the module reads the body in two pieces, the first of 7 bytes. With ?cut=0, each byte is a piece. The
// server sends it once.
const fetchWhole = window.fetch;
const bodies = new Map();
window.fetch = async (url, options) => {
  const cut = url.searchParams.get("cut");
  if (cut === null) return fetchWhole(url, options);
  const name = url.searchParams.get("name");
  if (!bodies.has(name)) bodies.set(name, fetchWhole(url).then((response) => response.arrayBuffer()));
  const bytes = new Uint8Array(await bodies.get(name));
  const pieces = cut > 0 ? [bytes.slice(0, cut), bytes.slice(cut)] : Array.from(bytes, (byte) => Uint8Array.of(byte));
  const body = new ReadableStream({
    pull: (controller) => pieces.length ? controller.enqueue(pieces.shift()) : controller.close(),
  });
  return new Response(body, {headers: {"Content-Type": "text/event-stream"}});
};

window.streamURL = (name, by, more) => `/stream?${new URLSearchParams({name, by, ...more})}`;

/** The events of a stream that ends. The source comes back so many times. */
window.read = (Source, url, types, options, returns = 0) => new Promise((resolve) => {
  const seen = [];
  const source = new Source(url, options);
  const note = ({type, data, lastEventId, origin}) => seen.push([type, data, lastEventId, origin]);
  for (const type of types) source.addEventListener(type, note);
  source.addEventListener("error", () => {
    if (returns-- > 0) return;
    source.close();
    resolve(seen);
  });
});

/** Run functions that return promises, a few at a time: a browser has six connections to a server. */
window.runAll = async (functions) => {
  const results = [];
  const waiting = [...functions.entries()];
  const work = async () => {
    for (let next; (next = waiting.shift()); ) results[next[0]] = await next[1]();
  };
  await Promise.all([1, 2, 3, 4, 5].map(work));
  return results;
};
</script>"""


class Request(NamedTuple):
    last_event_id: str | None
    at: float
    """When it came, in seconds, by the monotonic clock."""


class ScriptedServer(ThreadingHTTPServer):
    """Serves the page, the module, and ``/stream?name=...&by=...``: the bytes of that stream, to each reader once.

    A reader that comes back gets the status 204, which ends an `EventSource` for good.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.url = f"http://{HOST}:{self.server_port}"
        self.requests: defaultdict[tuple[str, str], list[Request]] = defaultdict(list)
        """By the names of stream and reader. A request is appended by the thread that answers it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if url.path == "/":
            self._respond(200, "text/html", PAGE.encode())
        elif url.path == "/sse-batcher.js":
            self._respond(200, "text/javascript", SCRIPT)
        elif url.path == "/status":
            self._respond(int(query["status"]), query["type"], b"")
        else:
            header = self.headers["Last-Event-ID"]
            as_text = None if header is None else header.encode("latin-1").decode()
            requests = self.server.requests[query["name"], query["by"]]
            requests.append(Request(query.get("last_event_id", as_text), time.monotonic()))
            if len(requests) == 1:
                self._respond(200, "text/event-stream", (STREAMS | OTHER_STREAMS)[query["name"]])
            else:
                self._respond(204, "text/event-stream", b"")

    def _respond(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        thread = threading.Thread(target=server.serve_forever, name="scripted server")
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture(scope="module")
def page(server: ScriptedServer) -> Iterator[Page]:
    with chromium() as browser, browser.new_page() as page:
        page.set_default_timeout(1000 * TIMEOUT)
        page.goto(server.url, wait_until="load")
        yield page


@pytest.fixture(scope="module")
def native(page: Page) -> Events:
    """What the browser's own `EventSource` sees of each stream. It comes back once, most often after three seconds."""
    events = page.evaluate(
        """([names, types]) => Promise.all(names.map((name) => {
          return read(EventSource, streamURL(name, "native"), types, {}, 1);
        }))""",
        [list(STREAMS), TYPES],
    )
    return dict(zip(STREAMS, events, strict=True))


# -- the parser --------------------------------------------------------------------------------------------------------


def test_the_module_sees_the_events_that_the_browser_sees(page: Page, native: Events) -> None:
    events = page.evaluate(
        """([names, types]) => runAll(names.map((name) => () => {
          return read(BatchedEventSource, streamURL(name, "module"), types, {backoff: [1, 1]}, 1);
        }))""",
        [list(STREAMS), TYPES],
    )
    assert dict(zip(STREAMS, events, strict=True)) == native
    assert sum(map(len, events)) > 3_050


def test_the_module_comes_back_with_the_id_of_the_browser(server: ScriptedServer, page: Page, native: Events) -> None:
    page.evaluate(
        """([names]) => runAll(names.map((name) => () => {
          return read(BatchedEventSource, streamURL(name, "returning"), [], {backoff: [1, 1]}, 1);
        }))""",
        [list(STREAMS)],
    )
    ids = {by: [server.requests[name, by][1].last_event_id for name in STREAMS] for by in ("native", "returning")}
    # The browser's one comes in a header, which has no spaces at its end.
    assert [value and value.rstrip() for value in ids["returning"]] == ids["native"]
    assert len(set(ids["native"])) > 5


def test_no_cut_changes_what_the_module_sees(page: Page, native: Events) -> None:
    cuts = [(name, cut) for name in SHORT for cut in range(len(STREAMS[name]))]
    events = page.evaluate(
        """([cuts, types]) => runAll(cuts.map(([name, cut]) => () => {
          return read(BatchedEventSource, streamURL(name, "cut", {cut}), types);
        }))""",
        [cuts, TYPES],
    )
    wrong = [(name, cut, seen) for (name, cut), seen in zip(cuts, events, strict=True) if seen != native[name]]
    assert wrong == []
    assert len(cuts) > 1_000


# -- the interface -----------------------------------------------------------------------------------------------------

INTERFACE = """async (Source) => {
  const facts = [];
  const add = (...values) => facts.push(values);
  const refuses = (...values) => {
    try {
      new Source(...values).close();
      return false;
    } catch {
      return true;
    }
  };

  // What programs look up without a stream.
  const states = ["CONNECTING", "OPEN", "CLOSED"];
  const idle = new Source("/status?status=204&type=text/event-stream");
  for (const owner of [Source, Source.prototype, idle]) add(states.map((name) => owner[name]));
  add(idle instanceof EventTarget, typeof Source, typeof idle.close, typeof idle.dispatchEvent);
  for (const name of ["url", "readyState", "withCredentials", "onopen", "onmessage", "onerror"]) {
    add(name in idle, idle[name]);
  }
  add(idle.close(), idle.readyState, idle.close(), idle.readyState);
  for (const values of [["http://["], ["http://host:port/"]]) add("refuses", values, refuses(...values));

  // URLs, as they are given and as they are.
  for (const given of ["status", "./status?q=a b&r=%20", "//localhost/x#f", new URL("/a?b=c+d", location), "", "?a"]) {
    const source = new Source(given);
    add(String(given), source.url);
    source.close();
  }
  for (const options of [undefined, {}, {withCredentials: true}, {withCredentials: undefined}, null]) {
    const source = new Source("x", options);
    add("withCredentials", options, source.withCredentials);
    source.close();
  }

  // What happens, one after the other.
  await new Promise((resolve) => {
    const source = new Source(streamURL("standard, types", Source.name));
    const note = (what) => (event) => add(what, event.type, event.data, source.readyState, event.target === source);
    const object = {handleEvent: note("object")};
    add("new", source.readyState);
    source.onopen = function (event) {
      add("onopen", this === source, event.constructor.name, source.readyState);
    };
    source.onmessage = note("onmessage");
    source.addEventListener("open", note("open"));
    source.addEventListener("add", note("once"), {once: true});
    source.addEventListener("add", object);
    source.addEventListener("add", object); // the second time does nothing
    source.addEventListener("remove", note("removed"));
    source.addEventListener("remove", () => source.removeEventListener("add", object));
    source.addEventListener("add", () => {
      throw new Error("of a listener");
    });
    source.addEventListener("add", note("after an error"));
    source.addEventListener("add", null);
    source.addEventListener("add", (event) => {
      const {bubbles, cancelable, source, ports, origin, lastEventId} = event;
      add(event.constructor.name, bubbles, cancelable, source, ports, origin, lastEventId);
    });
    source.onerror = function (event) {
      add("onerror", this === source, event.type, source.readyState, event instanceof Event);
      source.onerror = null;
      source.close();
      add("closed", source.readyState);
      resolve();
    };
  });

  // After close(), nothing.
  await new Promise((resolve) => {
    const source = new Source(streamURL("3,000 events", Source.name));
    source.addEventListener("error", () => add("error after close()"));
    source.onmessage = ({data}) => {
      add("message", data);
      if (data !== "1500") return;
      source.close();
      setTimeout(resolve, 300);
    };
  });

  // dispatchEvent() by the page itself, and a handler that is replaced.
  const source = new Source("/status?status=204&type=text/event-stream");
  source.onmessage = () => add("the first handler");
  source.onmessage = ({data}) => add("the second handler", data);
  source.dispatchEvent(new MessageEvent("message", {data: "of the page"}));
  source.onmessage = null;
  source.dispatchEvent(new MessageEvent("message"));
  source.close();
  return facts;
}"""


def test_programs_find_the_interface_of_an_eventsource(page: Page) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    native, module = (page.evaluate(f"({INTERFACE})({name})") for name in ("EventSource", "BatchedEventSource"))
    assert module == native
    assert len(native) > 1_500
    assert errors == ["of a listener"] * 4  # as an EventSource, the module reports the error and goes on


def test_the_module_comes_back_after_the_retry_of_the_stream(server: ScriptedServer, page: Page) -> None:
    page.evaluate(
        """() => Promise.race([
          read(BatchedEventSource, streamURL("retry", "patient"), [], {backoff: [60_000, 60_000]}, 1),
          new Promise((resolve) => setTimeout(resolve, 5_000)),
        ])"""
    )
    first, second = server.requests["retry", "patient"]
    assert second.at - first.at >= 0.02


# -- what differs on purpose -------------------------------------------------------------------------------------------


def test_types_of_the_connection_reach_on_and_no_listener(page: Page) -> None:
    seen = page.evaluate(
        """async () => {
          const types = ["open", "error", "statechange"];
          const seen = {EventSource: [], BatchedEventSource: [], on: []};
          for (const Source of [EventSource, BatchedEventSource]) {
            const source = new Source(streamURL("types of the connection", Source.name));
            const ended = new Promise((resolve) => {
              source.onerror = (event) => event instanceof MessageEvent || resolve();
            });
            for (const type of types) {
              source.addEventListener(type, (event) => {
                if (event instanceof MessageEvent) seen[Source.name].push([type, event.data]);
              });
              source.on?.(type, (data) => seen.on.push([type, data]));
            }
            await ended;
            source.close();
          }
          return seen;
        }"""
    )
    assert seen == {
        "EventSource": [["open", "1"], ["error", "2"], ["statechange", "3"]],
        "BatchedEventSource": [],
        "on": [["open", 1], ["error", 2], ["statechange", 3]],
    }


def test_a_batch_is_unpacked(server: ScriptedServer, page: Page) -> None:
    native, module = page.evaluate(
        """() => Promise.all([EventSource, BatchedEventSource].map((Source) => {
          return read(Source, streamURL("a batch", Source.name), ["a", "a_batch"]);
        }))"""
    )
    assert [event[:3] for event in native] == [["a_batch", BATCH.decode().strip().partition("data:")[2], "7"]]
    assert module == [["a", '{"n":1}', "7.1", server.url], ["a", '{"n":2}', "7", server.url]]


@pytest.mark.parametrize(
    ("status", "content_type"),
    [(204, "text/event-stream"), (404, "text/plain"), (502, "text/html"), (200, "text/html")],
)
def test_the_module_tries_again_after_an_answer_that_closes_an_eventsource(
    page: Page, status: int, content_type: str
) -> None:
    seen = page.evaluate(
        """(url) => Promise.all([EventSource, BatchedEventSource].map((Source) => new Promise((resolve) => {
          const source = new Source(url);
          source.onerror = ({status}) => {
            resolve([source.readyState, status]);
            source.close();
          };
        })))""",
        f"/status?status={status}&type={content_type}",
    )
    assert seen == [[2, None], [0, status]]


def test_open_comes_with_the_first_block(page: Page) -> None:
    # The head alone does not show that events come through. A stream of this library begins with a block.
    seen = page.evaluate(
        """() => Promise.all([EventSource, BatchedEventSource].map((Source) => new Promise((resolve) => {
          const source = new Source(streamURL("nothing", Source.name));
          const seen = [];
          source.onopen = () => seen.push("open");
          source.onerror = () => {
            source.close();
            resolve(seen);
          };
        })))"""
    )
    assert seen == [["open"], []]


def test_scripts_can_see_that_an_event_was_made_by_a_script(page: Page) -> None:
    seen = page.evaluate(
        """() => Promise.all([EventSource, BatchedEventSource].map((Source) => new Promise((resolve) => {
          const source = new Source(streamURL("BOM", Source.name));
          source.onmessage = ({isTrusted}) => {
            source.close();
            resolve(isTrusted);
          };
        })))"""
    )
    assert seen == [True, False]
