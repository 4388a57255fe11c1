"""Refusals: diagnoses of an answer that is no stream, or no more than an ``sse_busy``.

Pure. Each of them stands alone, because nothing else can be examined then.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from .facts import Answer, Facts
from .findings import Finding, fault, warning
from .words import MORE_THREADS, page, proxy_of, redis_away, server_of, status_text


def diagnose_refusal(facts: Facts) -> list[Finding]:
    """Return why there is no stream to examine; nothing if there is one."""
    if facts.stage is not None and facts.stage != "silent":
        return [_unreachable(facts)]
    answer, first = facts.answer, facts.first
    if answer is None:
        return []
    if not answer.is_stream:
        return [_no_stream(facts, answer)]
    if first is not None and first.type == "sse_busy":
        return [_busy(facts, first.reason)]
    if first is not None and not first.type.startswith("sse_"):
        return [
            warning(
                "not_a_stream",
                f"The stream begins with an event of the type `{first.type}`, and one of sse_batcher begins with "
                "`sse_open`: it is another library's, or something has removed the first block.",
                "Check the URL. Streams of other programs cannot be examined further.",
            )
        ]
    return []


def _unreachable(facts: Facts) -> Finding:
    do = {
        "name": "Check the name in the URL, and the DNS entry of the host.",
        "connect": "Start the server; check host and port, the firewall, and that the server listens on this address "
        "(`--bind 0.0.0.0:8000`, not `127.0.0.1`, for clients of other hosts).",
        "tls": "Check the certificate of the server, and whether this port speaks https at all. `--insecure` examines "
        "a site whose certificate is not valid.",
        "answer": "Check that this port speaks HTTP, and not https; look in the log of the server for a worker that "
        "ended in this moment.",
    }[facts.stage or "answer"]
    return fault("unreachable", f"There is no answer: {facts.failure}.", do)


def _no_stream(facts: Facts, answer: Answer) -> Finding:
    if 300 <= answer.status < 400:
        return _redirected(facts, answer)
    return _BY_STATUS.get(answer.status, _another_status)(facts, answer)


def _forbidden(facts: Facts, answer: Answer) -> Finding:
    return fault(
        "forbidden",
        "The app answers 403 Forbidden: its `authorize` grants none of the channels that the URL asks for. Without "
        "an `authorize`, each channel except `default` is refused; and a signed token opens only its own channels.",
        "Register `@sse.authorize`, and return the names that this request may have; give the doctor what a browser "
        "sends (`--header 'Cookie: ...'`, or `--token`); and check `?channel=` in the URL. If the log of the app "
        f"has no line about it, it is a proxy or a firewall. {page('Channels and users: which streams get an event')}",
    )


def _no_app(facts: Facts, answer: Answer) -> Finding:
    proxy = proxy_of(facts)
    return fault(
        "unreachable",
        f"{proxy.name if proxy else 'A proxy'} answers {status_text(answer)}: it does not reach the app behind it, "
        "or the app refuses.",
        "Start the app; compare its address with that in the proxy (`proxy_pass` and `upstream` in nginx, "
        f"ProxyPass in Apache), and look into the log of both. {page('Behind a proxy')}",
    )


def _another_page(facts: Facts, answer: Answer) -> Finding:
    kind = answer.header("content-type") or "no Content-Type"
    if facts.found_at == (urlsplit(facts.url).path or "/"):
        return fault(
            "not_a_stream",
            f"The answer is 200 with `{kind}`, and a stream is `text/event-stream`. A browser refuses it for good. The "
            "stream is at this path, so something changes its `Content-Type`.",
            "Let the stream keep its `Content-Type`: look for `proxy_hide_header Content-Type` and `add_header` in "
            "nginx, `Header set Content-Type` and `ForceType` in Apache, and for code of the app that sets "
            f"`response.content_type`. {page('Behind a proxy')}",
        )
    return fault(
        "not_a_stream",
        f"The answer is 200 with `{kind}`, and a stream is `text/event-stream`. A browser refuses it for good. Most "
        "likely another page answers at this path: a login page, or the page of a single-page app that answers all "
        "paths.",
        f"{_other_path(facts)}Let the app or the proxy pass the path of the stream (`SSE_URL_PREFIX`) to "
        f"sse_batcher, and answer 401 instead of a login page. {page('URLs')}",
    )


def _error(facts: Facts, answer: Answer) -> Finding:
    return fault(
        "not_a_stream",
        "The app answers 500 Internal Server Error: a function of it has raised an error, before the stream or "
        "after it (`authorize`, `identify`, an `after_request` function that reads the response).",
        "Look at the traceback in the log of the app. If it says `this response streams events and has no end`, "
        "let the function that is named leave out responses with `direct_passthrough`. `flask sse doctor` shows "
        f"the error. {page('Compression, and functions that read responses')}",
    )


def _another_status(facts: Facts, answer: Answer) -> Finding:
    return fault(
        "not_a_stream",
        f"The answer is {status_text(answer)}, and no stream.",
        "Look into the log of the app and of the proxy. If the status is that of a firewall or a limit (429), let it "
        f"leave out the path of the stream. {page('URLs')}",
    )


def _unauthorized(facts: Facts, answer: Answer) -> Finding:
    if facts.has_token:
        return fault(
            "unauthorized",
            "The app answers 401 Unauthorized to the token: it is over, or from another app, salt or `SECRET_KEY`, or "
            "its user was kicked. The answer does not say which.",
            "Make a new one, and check that all processes have the same `SECRET_KEY`, and that their clocks are right. "
            + page("Signed URLs"),
        )
    return fault(
        "unauthorized",
        "The app, or a proxy, answers 401 Unauthorized: it does not know who asks.",
        "Give the doctor what a browser sends: `--header 'Cookie: session=...'`, or a signed token by `--token`. If "
        "browsers get it, too: an `EventSource` sends no headers of its own, and to another origin it sends cookies "
        f"only with `withCredentials`. {page('Authentication: decide which requests get a stream')}",
    )


def _redirected(facts: Facts, answer: Answer) -> Finding:
    where = answer.headers.get("location", "nowhere")
    if facts.leads_to is not None and facts.leads_to.is_stream:
        return warning(
            "redirected",
            f"The answer is {status_text(answer)} to {where}, and the stream is there. Each client that comes back "
            "asks twice, and some clients send no cookie or header to the new place.",
            f"Use {where} as the URL of the stream, and run the doctor with it.",
        )
    return fault(
        "redirected",
        f"The answer is {status_text(answer)} to {where}, and no stream was found there (the doctor asks no other "
        "origin): most likely a login page, to which a function of the app (`before_request`, `login_required`) sends "
        "requests that are not logged in. A browser refuses the page that it gets then for good.",
        "Let the function answer 401 for the path of the stream instead, or leave it out and decide in "
        "`@sse.authorize`. To examine the stream behind it, give `--header 'Cookie: session=...'`, or a signed token "
        f"by `--token`. {page('Authentication: decide which requests get a stream')}",
    )


def _not_found(facts: Facts, answer: Answer) -> Finding:
    return fault(
        "not_found",
        f"The answer is {status_text(answer)}: there is no stream at `{urlsplit(facts.url).path or '/'}`.",
        f"{_other_path(facts)}Compare the path with `SSE_URL_PREFIX` of the app (default `/events`), and with the path "
        "that a proxy, `APPLICATION_ROOT` or a prefix of a blueprint puts before it; `SSE_URL_PREFIX = None` adds no "
        f"route. {page('URLs')}",
    )


def _other_path(facts: Facts) -> str:
    return f"There is a stream at `{facts.found_at}`: use that. " if facts.found_at else ""


def _busy(facts: Facts, reason: str) -> Finding:
    if reason == "backend":
        return redis_away()
    if reason == "http2":
        return fault(
            "http2",
            "gunicorn itself speaks HTTP/2 with this client, and serves the requests of a connection one after the "
            "other, so the app refuses streams: `sse_busy`, `http2`.",
            "Leave `h2` out of gunicorn's `--http-protocols`, and let a proxy such as nginx speak HTTP/2 with "
            f"browsers. {page('Choose and set up a server')}",
        )
    if reason == "threads":
        return _busy_threads(facts)
    what, do = {
        "limit": (
            "as many streams are open as `SSE_MAX_CLIENTS`, `SSE_MAX_CLIENTS_PER_USER`, or the file descriptors of the "
            "process, allow",
            f"Raise these options, or the limit of file descriptors (`ulimit -n`), or run more processes. "
            f"{page('Scaling')}",
        ),
        "draining": (
            "this process is about to end",
            "Wait for the new process. If there is none, start it; if the old one does not end, look what holds it. "
            + page("Monitoring"),
        ),
        "snapshot": (
            "a function of the app, registered with `@sse.snapshot` or `@sse.user_snapshot`, has raised an error",
            f"Look at the traceback in the log of the app: `a snapshot for the channels ... failed`. "
            f"{page('The state, then the stream')}",
        ),
        "error": (
            "an error of the library, or of a function that it calls",
            "Look at the traceback in the log of the app: `a stream of the channels ... could not be opened`. "
            "Please report it.",
        ),
    }.get(reason, ("it does not say why in words that this version knows", "Look into the log of the app."))
    return fault("busy", f"The app refuses the stream (`sse_busy`, `{reason}`): {what}. Its clients try again.", do)


def _busy_threads(facts: Facts) -> Finding:
    if facts.ready is not None and facts.ready.word == "threads":
        return fault(
            "threads",
            "The app refuses the stream (`sse_busy`, `threads`): open streams hold the threads of the server, and the "
            "last ones are kept for other requests.",
            f"{MORE_THREADS} {page('Choose and set up a server')}",
        )
    server = server_of(facts)
    name = server.name if server else "the server of the app"
    return fault(
        "one_thread",
        f"The app refuses the stream (`sse_busy`, `threads`), to keep threads for other requests. Either {name} serves "
        "one request at a time, as gunicorn does with its default worker class `sync`, and `SSE_TRANSPORT` is "
        '"attached". Or streams cannot be detached: the log of the app says why.',
        f"{MORE_THREADS} {page('Choose and set up a server')}",
    )


_BY_STATUS: dict[int, Callable[[Facts, Answer], Finding]] = {
    200: _another_page,
    401: _unauthorized,
    403: _forbidden,
    404: _not_found,
    405: _not_found,
    500: _error,
    **dict.fromkeys((502, 503, 504), _no_app),
}
