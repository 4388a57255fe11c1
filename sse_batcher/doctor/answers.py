"""Diagnoses of single answers: their headers, their version of HTTP, and their date.

Pure. Each function returns None if the facts do not show its fault.
"""

from __future__ import annotations

from .facts import Answer, Facts
from .findings import Finding, fault, warning
from .software import UNKNOWN
from .words import LEAVE_OUT_OF_COMPRESSION, between, duration, page, proxy_of, server_of, setting, status_text

CLOCK_SECONDS = 10
"""How far two clocks may be apart: a signed token that seems to be made later than this is refused."""


def compressed(facts: Facts) -> Finding | None:
    """The stream comes compressed to a client that accepts it, and not by the library itself."""
    if facts.coding in {"", "identity"} or (facts.coded_by_library and facts.coded_block):
        return None
    server, proxy = server_of(facts), proxy_of(facts)
    # Apache lets the name of the app's server pass, and compresses what says that it is not to be compressed.
    ignores_header = facts.plain is not None and facts.plain.header("content-encoding") == "identity"
    if server is not None and not ignores_header:
        by = f"the app compresses it, since its server, {server.name}, does not"
        do = f"{LEAVE_OUT_OF_COMPRESSION} {page('Compression, and functions that read responses')}"
    elif proxy is None and ignores_header:
        by = (
            "a proxy compresses it although the app says `Content-Encoding: identity`, most likely Apache with "
            "mod_deflate"
        )
        do = (
            f"{setting(facts, 'compression')}. If there is no proxy, it is the app: {LEAVE_OUT_OF_COMPRESSION} "
            f"{page('Behind a proxy')}"
        )
    else:
        by = f"{proxy.name if proxy else 'a proxy that does not name itself'}, or the app behind it, compresses it"
        do = f"{setting(facts, 'compression')}. If it is the app: {LEAVE_OUT_OF_COMPRESSION} {page('Behind a proxy')}"
    what = (
        f"The stream arrives with `Content-Encoding: {facts.coding}` at a client that accepts it, as browsers do: {by}."
    )
    if facts.coded_block is False:
        late = (
            "The compressor waits for more before it passes anything on: no block came, or the app has noticed that "
            "and has ended the stream. Browsers get no event, or get it late."
        )
        return fault("compressed", f"{what} {late}", do)
    if facts.coded_block is None:
        more = "This program cannot read it, so it is not known whether blocks come at once."
    else:
        more = "The first block came at once, so events arrive. But each costs time, and small ones hardly get smaller."
    return warning("compressed", f"{what} {more}", do)


def http_1_0(facts: Facts) -> Finding | None:
    """The answer has an old version of HTTP."""
    if facts.answer is None or facts.answer.version != "HTTP/1.0":
        return None
    return warning(
        "http_1_0",
        "The answer to a request of HTTP/1.1 is HTTP/1.0. There, only the end of the connection ends a response: a "
        "client cannot tell the end of a stream from a broken one, no connection is used again, and some proxies hold "
        "such a response back.",
        f"{setting(facts, 'http11')}. A server of the app should speak HTTP/1.1, too: gunicorn, waitress, cheroot and "
        f"`flask run` do. {page('Behind a proxy')}",
    )


def headers_missing(facts: Facts) -> Finding | None:
    """Headers that each stream has did not arrive."""
    answer = facts.plain or facts.answer
    if answer is None or not answer.is_stream:
        return None
    missing = [
        f"`Cache-Control: {word}`"
        for word in ("no-cache", "no-transform")
        if word not in answer.header("cache-control")
    ]
    if facts.coding in {"", "identity"} and answer.header("content-encoding") != "identity":
        missing.append("`Content-Encoding: identity`")
    if answer.header("x-content-type-options") != "nosniff":
        missing.append("`X-Content-Type-Options: nosniff`")
    server = server_of(facts)
    # nginx reads this one and does not pass it on, so it is missing behind each nginx.
    if server is not None and answer.header("x-accel-buffering") != "no":
        missing.append("`X-Accel-Buffering: no`")
    if not missing:
        return None
    if server is not None:
        where = "an `after_request` function or a middleware of the app, or a proxy that does not name itself,"
        do = (
            "Look for code that sets or deletes these headers, and let it leave out `text/event-stream`. A view of "
            f"your own must return all headers of `stream()`. If there is a proxy, {UNKNOWN.settings['headers']}"
        )
    else:
        where, do = between(facts), setting(facts, "headers")
    return warning(
        "headers",
        f"The library sends {', '.join(missing)} with each stream, and it did not arrive: {where} removes or replaces "
        "it. Caches, compressors and buffers on the way go by these headers.",
        f"{do}. {page('Wire format')}",
    )


def clock_off(facts: Facts) -> Finding | None:
    """The date of the answer is not that of this host."""
    return diagnose_clock(facts.clock_offset, "that answers")


def diagnose_clock(offset: float | None, host: str) -> Finding | None:
    """Return a fault if the clock of a host is `offset` seconds ahead of ours, or behind. `host`: which one it is."""
    if offset is None or abs(offset) <= CLOCK_SECONDS:
        return None
    ahead = "ahead of" if offset > 0 else "behind"
    return fault(
        "clock",
        f"The clock of the host {host} is {duration(abs(offset))} {ahead} that of this host. Signed tokens are refused "
        "if their time is over or in the future, and the logs of the two cannot be compared.",
        "Let NTP set both clocks (`timedatectl set-ntp true`; `chronyc tracking` shows which one is wrong), and look "
        f"at the host of Redis, too. {page('Signed URLs')}",
    )


def cors_missing(facts: Facts) -> Finding | None:
    """A browser would not let a page of this origin read the stream, or not with headers of its own."""
    origin = facts.origin
    answer = facts.plain or facts.answer
    if origin is None or answer is None:
        return None
    allowed = answer.header("access-control-allow-origin")
    if allowed not in {"*", origin.lower()}:
        got = f"`Access-Control-Allow-Origin: {allowed}`" if allowed else "no header `Access-Control-Allow-Origin`"
        more = " Two of them come if the app and a proxy each add one." if "," in allowed else ""
        return fault(
            "cors",
            f'A page of {origin} may not read the stream: the answer has {got}.{more} The browser says "blocked by '
            'CORS policy", and the page gets no event.',
            f'Set `SSE_CORS_ORIGINS = ["{origin}"]`; if a proxy adds such headers, remove them there. '
            + page("Authentication: decide which requests get a stream"),
        )
    if facts.preflight is not None and not _allows(facts.preflight, origin):
        status = status_text(facts.preflight)
        return warning(
            "cors",
            f"A page of {origin} may read the stream, but not with headers such as `Authorization`: the browser asks "
            f"first (a preflight, OPTIONS), and the answer is {status}, without leave for them. The module for "
            "browsers sends its cursor in the query, and needs no preflight.",
            "Let OPTIONS requests to the path of the stream pass: they come without cookies, so a login check must "
            "leave them out, and a proxy must not answer them itself. "
            + page("Authentication: decide which requests get a stream"),
        )
    return None


def _allows(preflight: Answer, origin: str) -> bool:
    headers = preflight.header("access-control-allow-headers")
    is_allowed = preflight.header("access-control-allow-origin") in {"*", origin.lower()}
    return 200 <= preflight.status < 300 and is_allowed and ("authorization" in headers)
