"""Inside: what can be seen of an app in its own process, and its diagnoses.

Pure. `flask.doctor` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .answers import diagnose_clock
from .facts import Answer, FirstBlock
from .findings import Finding, fault, warning
from .flow import diagnose_heartbeat
from .words import LEAVE_OUT_OF_COMPRESSION, MORE_THREADS, page, status_text

FEW_THREADS = 100
"""With fewer threads, a site whose streams hold one each is stopped by a few dozen visitors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GunicornFacts:
    """What the settings of gunicorn say that this process can see. None: they do not say it."""

    where: str
    """The file or variable that they stand in."""
    workers: int | None = None
    threads: int | None = None
    worker_class: str | None = None
    max_requests: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisFacts:
    """What Redis answers."""

    error: str | None = None
    """Why it does not answer, or refuses a command."""
    clock_offset: float | None = None
    """How many seconds its clock is ahead of that of this host."""
    is_replica: bool = False
    policy: str | None = None
    """``maxmemory-policy``, if it has a limit of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What the whole app answers in this process to a request for the stream."""

    path: str
    has_token: bool = False
    answer: Answer | None = None
    first: FirstBlock | None = None
    """None: no block came out of the app."""
    coded_by_library: bool = False
    """Whether the stream is compressed because the app has set `SSE_COMPRESS`."""
    error: str | None = None
    """The error that a function of the app has raised."""
    reads_whole: bool = False
    """Whether that error says that a function wants to read the whole response."""


@dataclass(slots=True, kw_only=True)
class AppFacts:
    """All that was seen of an app."""

    name: str
    url_prefix: str | None
    heartbeat: float
    transport: str
    has_redis: bool
    middleware: list[str] = field(default_factory=list)
    """The classes of the WSGI middleware around the app, from outside in, and names of extensions that compress."""
    gunicorn: GunicornFacts | None = None
    redis: RedisFacts | None = None
    request: RequestFacts | None = None

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary, which `json.dumps` accepts."""
        return asdict(self)


def diagnose_app(facts: AppFacts) -> list[Finding]:
    """Return what is wrong inside, faults first."""
    found = [*_of_settings(facts), *_of_gunicorn(facts), *_of_redis(facts), *_of_request(facts)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def token_refused() -> Finding:
    """Return the finding for a server that refuses a token of this process."""
    return warning(
        "secret_key",
        "The server answers 401 to a token that the app in this process has signed. So its `SECRET_KEY`, its "
        "`SSE_TOKEN_SALT` or the name of the app is another one there, as with a key that is random at each start. The "
        "stream was examined without a token.",
        "Give this command the same environment as the server. If the key is made at each start, set `SECRET_KEY` to a "
        "fixed random text: otherwise each restart, and each further process, refuses the signed URLs of the others. "
        + page("Signed URLs"),
    )


def no_token() -> Finding:
    """Return the finding for a server that refuses a request without a token, which the app has no key to sign."""
    return warning(
        "secret_key",
        "The server refuses the stream, and the doctor has sent no token, since the app in this process has no "
        "`SECRET_KEY` to sign one.",
        "Give this command the same environment as the server, or give the doctor what a browser sends: `--header "
        "'Cookie: session=...'`, or `--token`. If the app needs signed URLs or sessions, set `SECRET_KEY` to the same "
        f"random text in all processes. {page('Signed URLs')}",
    )


def fine_inside(facts: AppFacts, findings: list[Finding]) -> list[str]:
    """Return what works, in a few words each."""
    codes = {finding.code for finding in findings}
    request, redis = facts.request, facts.redis
    fine = []
    if request is not None and request.first is not None and request.first.type == "sse_open" and not request.error:
        fine.append(f"the app, with all its middleware, streams at {request.path}")
    if redis is not None and "backend" not in codes:
        fine.append("Redis answers")
    if "idle_timeout" not in codes:
        fine.append(f"a heartbeat every {facts.heartbeat:g} s keeps streams open behind the usual proxies")
    return fine


def _of_settings(facts: AppFacts) -> Iterator[Finding]:
    late = diagnose_heartbeat(facts.heartbeat)
    if late is not None:
        yield late


def _of_gunicorn(facts: AppFacts) -> Iterator[Finding]:
    gunicorn = facts.gunicorn
    if gunicorn is None:
        return
    if gunicorn.workers is not None and gunicorn.workers > 1 and not facts.has_redis:
        yield fault(
            "separate_processes",
            f"{gunicorn.where} asks for {gunicorn.workers} processes, and the backend is `memory://`: each process has "
            "its own clients, and an event reaches only those of the process that enqueues it.",
            'Set `SSE_BACKEND = "redis://..."`, or run one process with threads (`--workers 1 --threads 16`). '
            + page("Several processes and hosts: Redis"),
        )
    if gunicorn.max_requests:
        yield fault(
            "ends_early",
            f"{gunicorn.where} has `max_requests` = {gunicorn.max_requests}: each time a worker has served so "
            "many requests, it restarts, and all of its streams end.",
            f"Leave `max_requests` out. {page('Choose and set up a server')}",
        )
    has_one_thread = gunicorn.worker_class in {None, "sync"} and gunicorn.threads in {None, 1}
    says_kind = gunicorn.worker_class is not None or gunicorn.threads is not None
    if has_one_thread and says_kind and facts.transport == "attached":
        yield fault(
            "one_thread",
            f"{gunicorn.where} chooses the worker class `sync`, which serves one request at a time, and "
            '`SSE_TRANSPORT` is "attached": each stream is refused with `sse_busy`, `threads`.',
            f"{MORE_THREADS} {page('Choose and set up a server')}",
        )
    threads = (gunicorn.threads or 1) * (gunicorn.workers or 1)
    if 1 < threads < FEW_THREADS and not has_one_thread and facts.transport == "attached":
        yield warning(
            "threads",
            f'{gunicorn.where} gives the site {threads} threads, and `SSE_TRANSPORT` is "attached": each open tab '
            f"holds a thread, so {threads} open tabs stop the site.",
            f"{MORE_THREADS} {page('Choose and set up a server')}",
        )


def _of_redis(facts: AppFacts) -> Iterator[Finding]:
    redis = facts.redis
    if redis is None:
        return
    if redis.error is not None:
        yield fault(
            "backend",
            f"Between this host and Redis: {redis.error.rstrip('.')}. New streams are refused with `sse_busy`, "
            "`backend`, and events wait.",
            "Start Redis, and check the address, password and rights in `SSE_BACKEND`. "
            + page("Several processes and hosts: Redis"),
        )
        return
    if redis.is_replica:
        yield fault(
            "backend",
            "The Redis of `SSE_BACKEND` is a replica, which takes no events.",
            f"Name the master, or use `redis+sentinel://`. {page('Several processes and hosts: Redis')}",
        )
    clock = diagnose_clock(redis.clock_offset, "of Redis")
    if clock is not None:
        yield clock
    if redis.policy is not None and redis.policy.startswith("allkeys"):
        yield fault(
            "eviction",
            f"Redis has `maxmemory-policy {redis.policy}`: once its memory is full, it may remove the history of "
            "events and the list of kicked users. Then clients get `sse_gap`, and tokens with a user are refused.",
            "Set `maxmemory-policy` to `noeviction`, or to one that begins with `volatile`. "
            + page("Several processes and hosts: Redis"),
        )


def _of_request(facts: AppFacts) -> Iterator[Finding]:
    request = facts.request
    if request is None:
        return
    answer = request.answer
    if request.reads_whole:
        yield _read_whole(
            "a function of the app reads the whole response, and is stopped with an error, so the answer is 500: "
            f"{request.error}"
        )
    elif request.error is not None:
        yield fault(
            "not_a_stream",
            f"In this process, a request for {request.path} raises {request.error}.",
            "The traceback is above, or in the log of the app. "
            + page("Compression, and functions that read responses"),
        )
    elif answer is not None and not answer.is_stream:
        yield _refused(request, answer)
    elif (
        answer is not None
        and answer.header("content-encoding") not in {"", "identity"}
        and not request.coded_by_library
    ):
        coding = answer.header("content-encoding")
        late = "" if request.first else " No block comes out of it, since the compressor waits for more."
        make = warning if request.first else fault
        yield make(
            "compressed",
            f"The app itself compresses the stream, before the server gets it: `Content-Encoding: {coding}`"
            f"{_among(facts)}.{late}",
            f"{LEAVE_OUT_OF_COMPRESSION} {page('Compression, and functions that read responses')}",
        )
    elif request.first is None:
        yield _read_whole("something reads the whole response before it passes anything on, and no block comes out")


def _read_whole(what: str) -> Finding:
    return fault(
        "read_whole",
        f"Between the app and its server, {what}. A stream has no end, so browsers get nothing.",
        "Let the middleware around `app.wsgi_app` pass `text/event-stream` on block by block, and let an "
        "`after_request` function leave out responses with `direct_passthrough`, as it must for files. "
        + page("Compression, and functions that read responses"),
    )


def _among(facts: AppFacts) -> str:
    return f" (around the app: {', '.join(facts.middleware)})" if facts.middleware else ""


def _refused(request: RequestFacts, answer: Answer) -> Finding:
    where = f" to {answer.headers.get('location', 'nowhere')}" if 300 <= answer.status < 400 else ""
    code = {401: "unauthorized", 403: "forbidden", 404: "not_found"}.get(answer.status, "not_a_stream")
    if where:
        code = "redirected"
    seen = f"In this process, the app answers a request for {request.path} with {status_text(answer)}{where}"
    if code == "not_a_stream":
        return fault(code, f"{seen}, and no stream.", f"Look which function of the app answers there. {page('URLs')}")
    if request.has_token:
        why = (
            "The request has a token, which stands for `authorize`. It is not valid here, or a login check came first."
        )
    else:
        why = "The request has no token, so this may be as you want it: `authorize`, or a login check, refuses it."
    return warning(
        code,
        f"{seen}. {why} What comes after it was not examined.",
        "Give the doctor what a browser sends: `--header 'Cookie: session=...'`. A login check that should admit "
        "signed tokens has to leave out the path of the stream. "
        + page("Authentication: decide which requests get a stream"),
    )
