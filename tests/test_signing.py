"""Signed URLs: what a token grants, and that no other text grants anything."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping
from time import time as now
from typing import Any
from unittest.mock import patch

import pytest
from flask import Flask, Response, abort, render_template_string, request
from itsdangerous import Signer
from werkzeug.test import TestResponse

from sse_batcher import SSE, BackendError, InvalidEventError, UsageError
from sse_batcher.backends.kicks import MAX_TOKEN_SECONDS, KickedUsers, Stamps
from sse_batcher.flask.signing import TOKEN_PREFIX, Grant, Tokens
from sse_batcher.manager_state import process_of
from sse_batcher.testing import StreamRefusedError, open_stream

from .kit.flask_sites import making

MakeSite = Callable[..., "Site"]
RANDOM_TOKENS = 100_000
ALPHABET = string.ascii_letters + string.digits + "-_"


class Site:
    """An app with a `SECRET_KEY`, and with a function for each decision that fails the test if it is called."""

    def __init__(self, name: str = "site", **config: Any) -> None:
        self.app = Flask(name, static_folder=None)
        self.app.config.update({"SECRET_KEY": "the key", **config})
        self.sse = SSE(self.app)
        self.manager = self.sse.manager

    def refuse_cookies(self) -> None:
        def asked(*_: object) -> Any:
            raise AssertionError("a token stands for authorize and identify")

        self.sse.authorize(asked)
        self.sse.identify(asked)

    def tokens(self, salt: str = "site") -> Tokens:
        return Tokens(self.app, self.manager, salt)

    def get(self, token: str | None = None, **options: Any) -> TestResponse:
        query = {} if token is None else {"token": token}
        return self.app.test_client().get("/events", query_string=query | options.pop("query", {}), **options)

    def answer(self, token: str | None = None, **options: Any) -> tuple[int, Mapping[str, str], bytes]:
        """The whole answer to a request with this token; of a stream, its status."""
        with self.get(token, **options) as response:
            if response.status_code == 200:
                return 200, {}, b""
            return response.status_code, dict(response.headers), response.data

    def status(self, token: str | None = None, **options: Any) -> int:
        return self.answer(token, **options)[0]


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    with making(Site) as make:
        yield make


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site()


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {token}"}


def at(offset: float) -> Any:
    """A block whose clock is ahead by so many seconds."""
    return patch("sse_batcher.backends.memory.time.time", lambda: now() + offset)


# -- what a token grants -----------------------------------------------------------------------------------------------


def test_a_token_stands_for_authorize_and_identify(site: Site) -> None:
    site.refuse_cookies()
    with site.app.test_request_context():
        url = site.sse.url(["team-7", "default"], user=7)
    assert url.startswith("/events?token=sse1.")
    with open_stream(site.app, url) as stream:
        assert stream.channels == ["team-7", "default"]
        site.sse.enqueue("note", 1, user=7)
        site.sse.enqueue("note", 2, user="7")
        site.sse.enqueue("note", 3, channel="team-7")
        stream.clock.advance(1)
        assert stream.events() == [("note", 1), ("note", 3)]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer ", "Bearer\t"])
def test_a_token_may_come_in_the_header(site: Site, scheme: str) -> None:
    site.refuse_cookies()
    with open_stream(site.app, "/events", headers=bearer(site.sse.sign(["a"]), scheme)) as stream:
        assert stream.channels == ["a"]


@pytest.mark.parametrize(
    ("asked", "channels"),
    [
        ([], ["a", "b"]),
        (["b"], ["b"]),
        (["b", "a"], ["b", "a"]),
        (["c"], None),
        (["a", "c"], None),
        (["default"], None),
    ],
)
def test_the_channels_asked_for_are_some_of_the_tokens(
    site: Site, asked: list[str], channels: list[str] | None
) -> None:
    site.refuse_cookies()
    token = site.sse.sign(["a", "b"])
    url = "&".join([f"/events?token={token}", *(f"channel={name}" for name in asked)])
    if channels is None:
        assert site.status(token, query={"channel": asked}) == 403
        return
    with open_stream(site.app, url) as stream:
        assert stream.channels == channels


def test_a_token_may_be_for_a_user_and_no_channel(site: Site) -> None:
    with open_stream(site.app, f"/events?token={site.sse.sign((), user='ada')}") as stream:
        assert stream.channels == []
        site.sse.enqueue("note", 1, user="ada")
        site.sse.enqueue("note", 2)
        stream.clock.advance(1)
        assert stream.events() == [("note", 1)]
    assert site.status(site.sse.sign((), user="ada"), query={"channel": "default"}) == 403


def test_a_token_without_a_user_has_none(site: Site) -> None:
    site.sse.identify(lambda: 7)
    with open_stream(site.app, f"/events?token={site.sse.sign()}") as stream:
        site.sse.enqueue("note", 1, user=7)
        site.sse.kick(user=7)
        stream.clock.advance(1)
        assert (stream.events(), stream.is_open) == ([], True)


@pytest.mark.parametrize("user", [7, "7", -1, 10**255, "ä \ud800 ☃", "since"])
def test_each_user_comes_back_as_it_was(site: Site, user: Any) -> None:
    assert site.tokens().check(site.sse.sign(["ä", "*a"], user=user)) == Grant(("ä", "*a"), user)


def test_a_poll_may_have_a_token(site: Site) -> None:
    with site.get(site.sse.sign(["a"]), query={"poll": 1}) as response:
        assert b'"channels":["a"]' in response.data


def test_the_url_is_also_there_in_templates(site: Site) -> None:
    with site.app.test_request_context():
        html = render_template_string("{{ sse_url(['a'], user=7, ttl=60) }} {{ sse_url(external=true) }}")
    found = re.fullmatch(r"/events\?token=([\w.-]+) http://localhost/events\?token=([\w.-]+)", html)
    assert found
    assert [site.tokens().check(token) for token in found.groups()] == [Grant(("a",), 7), Grant(("default",), None)]


def test_without_routes_there_is_no_url_but_a_token(make_site: MakeSite) -> None:
    site = make_site(SSE_URL_PREFIX=None)
    with site.app.test_request_context(), pytest.raises(UsageError, match="SSE_URL_PREFIX = None adds no routes"):
        site.sse.url()
    assert site.sse.sign().startswith(TOKEN_PREFIX)


def test_a_view_of_the_apps_own_decides_for_itself(site: Site) -> None:
    site.app.add_url_rule("/mine", view_func=lambda: site.sse.response(["a"]))
    with open_stream(site.app, "/mine?token=sse1.forged") as stream:
        assert stream.channels == ["a"]


@pytest.mark.parametrize(
    ("channels", "options", "error"),
    [
        ((), {}, InvalidEventError),
        (["*"], {}, InvalidEventError),
        ("a", {}, InvalidEventError),
        (["a"], {"user": None}, InvalidEventError),
        (["a"], {"user": True}, InvalidEventError),
        *((["a"], {"ttl": ttl}, UsageError) for ttl in (0, -1, float("nan"), float("inf"), 604_801, "60", True, None)),
    ],
)
def test_what_cannot_be_signed_is_refused(
    site: Site, channels: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        site.sse.sign(channels, **options)


@pytest.mark.parametrize("key", [None, "", b""])
def test_nothing_is_signed_or_accepted_without_a_key(make_site: MakeSite, key: Any) -> None:
    site = make_site(SECRET_KEY=key, SECRET_KEY_FALLBACKS=["", None])
    with pytest.raises(UsageError, match="set SECRET_KEY"):
        site.sse.sign()
    empty = Signer("", salt="sse_batcher.token.site", key_derivation="hmac").sign("sse1.W10").decode()
    assert site.status(empty) == 401


# -- what no token grants ----------------------------------------------------------------------------------------------


def forged(site: Site, make_site: MakeSite) -> dict[str, str]:
    """Tokens that are not valid, each with what is wrong with it."""
    token = site.sse.sign(user=7)
    _, payload, signature = token.split(".")
    other = site.sse.sign(["admin"])
    more = json.dumps([0, 10**18, 8, ["default"]]).encode()
    kicked = site.sse.sign(user="kicked")
    site.sse.kick(user="kicked")
    with at(-100):
        old = make_site().sse.sign(ttl=99)
    return {
        "empty": "sse1.",
        "cut": token[:-1],
        "cut in the middle": token[: len(token) // 2],
        "without its signature": f"sse1.{payload}",
        "with another signature": f"sse1.{payload}.{other.split('.')[2]}",
        "with another payload": f"sse1.{base64.urlsafe_b64encode(more).decode().rstrip('=')}.{signature}",
        "longer": token + "A",
        "padded": token + "=",
        "with a line end": token + "\n",
        "with a foreign character": f"{token[:-3]}!{token[-3:]}",
        "not ASCII": f"sse1.ä.{signature}",
        "very long": "sse1." + "A" * 5_000,
        "many dots": "sse1." + "." * 1_000,
        "NUL": "sse1.\0",
        "expired": old,
        "of another key": make_site(SECRET_KEY="another").sse.sign(user=7),
        "of another app": make_site(name="another").sse.sign(user=7),
        "of another salt": make_site(SSE_TOKEN_SALT="another").sse.sign(user=7),
        "of a session": "sse1." + Signer("the key", salt="cookie-session").sign("W10").decode(),
        "of a kicked user": kicked,
    }


def test_every_invalid_token_gets_the_same_answer(site: Site, make_site: MakeSite) -> None:
    site.refuse_cookies()
    answers = {name: site.answer(token) for name, token in forged(site, make_site).items()}
    status, headers, body = answers["empty"]
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert body
    assert {name: answer for name, answer in answers.items() if answer != answers["empty"]} == {}


def test_an_invalid_token_is_no_reason_to_look_at_the_cookie(site: Site) -> None:
    site.sse.authorize(lambda channels: channels)
    assert site.status() == 200
    for token in ("sse1.", site.sse.sign()[:-1]):
        assert site.status(token) == site.status(headers=bearer(token)) == 401
        assert site.status(headers={"Authorization": f"Bearer\t{token}"}) == 401
    valid = site.sse.sign()
    assert site.status("sse1.", headers=bearer(valid)) == site.status(valid, headers=bearer("sse1.")) == 401
    assert site.status(query={"token": ["mine", "sse1."]}) == 401
    assert site.status(valid, headers=bearer(valid)) == 200
    for query in ("%74oken=sse1.", "token=%73se1.", "channel=default&token=sse1%2E"):
        with site.app.test_client().get(f"/events?{query}") as response:
            assert response.status_code == 401


def test_tokens_of_the_apps_own_are_left_to_authorize(site: Site) -> None:
    @site.sse.authorize
    def allowed(channels: tuple[str, ...]) -> tuple[str, ...]:
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if (request.args.get("token") or header) != "mine":
            abort(401)
        return channels

    assert site.status("mine") == site.status(headers=bearer("mine")) == 200
    for token in ("", "yours", "SSE1.a.b", "sse2.a.b", " sse1.a.b", "xsse1.a.b"):
        assert site.status(token) == 401
    assert site.status(headers=bearer("yours")) == site.status(headers={"Authorization": "Basic sse1.a.b"}) == 401
    assert site.status(headers=bearer(site.sse.sign())) == 200


def test_no_single_character_of_a_token_may_differ(site: Site) -> None:
    token, tokens = site.sse.sign(user=7), site.tokens()
    assert tokens.check(token)
    for place in range(len(TOKEN_PREFIX), len(token)):
        for character in ALPHABET + ".=":
            if character != token[place]:
                assert tokens.check(token[:place] + character + token[place + 1 :]) is None


@pytest.mark.parametrize(
    "content",
    [
        "x",
        "[]",
        "{}",
        "1",
        "[" * 100_000,
        "[0, 9e99, null, ['a']]",
        "[0, 9999999999999999, null, []]",
        '[0, 9999999999999999, null, "a"]',
        '[0, 9999999999999999, null, ["*"]]',
        "[0, 9999999999999999, null, [1]]",
        '[0, 9999999999999999, true, ["a"]]',
        '[0, 9999999999999999, [1], ["a"]]',
        '[0, "9999999999999999", null, ["a"]]',
        '[0, 9e99, null, ["a"]]',
        '[false, 9999999999999999, null, ["a"]]',
        '[0, 9999999999999999, null, ["a"], "more"]',
    ],
)
def test_what_another_version_has_signed_is_refused(site: Site, content: str) -> None:
    def signed(content: str) -> str:
        signer = Signer("the key", salt="sse_batcher.token.site", key_derivation="hmac", digest_method=hashlib.sha256)
        payload = base64.urlsafe_b64encode(content.encode()).rstrip(b"=")
        return signer.sign(TOKEN_PREFIX.encode() + payload).decode()

    assert site.status(signed('[0, 9999999999999999, null, ["a"]]')) == 200
    assert site.status(signed(content)) == 401


def random_token(chance: random.Random, token: str) -> str:
    """A random text, a random text with the form of a token, or one that differs from a token in a few places."""
    kind = chance.randrange(3)
    if kind == 0:
        return TOKEN_PREFIX + "".join(map(chr, chance.choices(range(1, 0x500), k=chance.randrange(200))))
    if kind == 1:
        parts = ("".join(chance.choices(ALPHABET, k=length)) for length in (chance.randrange(1, 150), 43))
        return TOKEN_PREFIX + ".".join(parts)
    characters = list(token)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(TOKEN_PREFIX), len(characters))
        characters[place] = chance.choice([each for each in ALPHABET if each != token[place]])
    return "".join(characters)


def test_of_a_hundred_thousand_random_tokens_none_is_valid(site: Site) -> None:
    chance, token, tokens = random.Random(18), site.sse.sign(user=7), site.tokens()
    assert [each for each in (random_token(chance, token) for _ in range(RANDOM_TOKENS)) if tokens.check(each)] == []


def test_random_tokens_in_requests_all_get_the_same_answer(site: Site) -> None:
    site.sse.authorize(lambda channels: channels)
    chance, token = random.Random(81), site.sse.sign(user=7)
    constant = site.answer("sse1.")
    assert constant[0] == 401
    for _ in range(300):
        assert site.answer(random_token(chance, token)) == constant


# -- keys and clocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallbacks", [["older", "the key"], ["the key"], ("the key",), "the key"])
def test_tokens_outlive_a_change_of_the_key(site: Site, fallbacks: Any) -> None:
    token = site.sse.sign()
    site.app.config.update(SECRET_KEY="the new key")
    assert site.status(token) == 401
    site.app.config["SECRET_KEY_FALLBACKS"] = fallbacks
    assert site.status(token) == site.status(site.sse.sign()) == 200
    site.app.config["SECRET_KEY_FALLBACKS"] = None
    assert site.status(token) == 401


def test_the_characters_of_a_fallback_are_no_keys(make_site: MakeSite) -> None:
    forger = make_site(SECRET_KEY="k")
    assert make_site(SECRET_KEY_FALLBACKS="key").status(forger.sse.sign()) == 401


def test_an_empty_fallback_is_no_key(make_site: MakeSite) -> None:
    site = make_site(SECRET_KEY_FALLBACKS=["", None, b""])
    _, payload, _ = site.sse.sign().split(".")
    empty = Signer("", salt="sse_batcher.token.site", key_derivation="hmac", digest_method=hashlib.sha256)
    assert site.status(empty.sign(f"sse1.{payload}").decode()) == 401
    assert site.status(site.sse.sign()) == 200


def test_the_new_key_signs(make_site: MakeSite, site: Site) -> None:
    rotated = make_site(SECRET_KEY="the new key", SECRET_KEY_FALLBACKS=["the key"])
    assert site.status(rotated.sse.sign()) == 401


def test_a_token_is_valid_until_its_time_is_over(site: Site) -> None:
    url = f"/events?token={site.sse.sign(ttl=60)}"
    with open_stream(site.app, url) as stream:
        stream.clock.advance(58)
        stream.reconnect()
        assert stream.is_open
        stream.clock.advance(3)
        assert stream.is_open  # the time is that for opening
        with pytest.raises(StreamRefusedError) as refused:
            stream.reconnect()
        assert refused.value.status == 401


@pytest.mark.parametrize(("ahead", "expected"), [(-50, 200), (-70, 401), (0, 200), (9, 200), (30, 401)])
def test_the_clock_of_the_signing_host_may_differ_a_little(make_site: MakeSite, ahead: float, expected: int) -> None:
    signing, serving = make_site(), make_site()
    with at(ahead):
        token = signing.sse.sign(ttl=60)
    assert serving.status(token) == expected


def test_stamps_rise_even_if_the_clock_is_set_back() -> None:
    stamps = Stamps()
    assert [stamps.next(5.0), stamps.next(5.0), stamps.next(4.0), stamps.next(6.0)] == [5_000, 5_001, 5_002, 6_000]
    stamps.raise_to(9_000)
    stamps.raise_to(8_000)
    assert stamps.next(6.0) == 9_001


# -- kicks -------------------------------------------------------------------------------------------------------------


def test_a_kick_refuses_the_tokens_that_were_made_before(site: Site) -> None:
    with patch("sse_batcher.backends.memory.time.time", lambda: 2_000_000_000.0):  # all in the same instant
        old, other, same_text = site.sse.sign(user=7), site.sse.sign(user=8), site.sse.sign(user="7")
        site.sse.kick(user=7)
        new = site.sse.sign(user=7)
        assert [site.status(token) for token in (old, new, other, same_text)] == [401, 200, 200, 200]
        site.sse.kick(user=7, channel="elsewhere")
        assert [site.status(token) for token in (old, new, other, same_text)] == [401, 401, 200, 200]
        site.sse.kick(channel="default")
        assert [site.status(token) for token in (old, new, other, same_text)] == [401, 401, 200, 200]


def test_a_kick_in_the_same_microsecond_counts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    token = site.sse.sign(user=7)
    issued = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))[0]
    for until, expected in [(issued, 401), (issued - 1, 200)]:
        monkeypatch.setattr(process_of(site.manager).backend, "kicked_until", lambda user, until=until: until)
        assert site.status(token) == expected


def test_a_kicked_stream_does_not_come_back_with_its_token(site: Site) -> None:
    with open_stream(site.app, f"/events?token={site.sse.sign(user=7)}") as stream:
        site.sse.kick(user=7)
        assert stream.bye == "kicked"
        with pytest.raises(StreamRefusedError) as refused:
            stream.reconnect()
        assert refused.value.status == 401


def test_a_kick_after_the_token_was_looked_at_ends_the_stream(site: Site) -> None:
    site.sse.snapshot("default")(lambda: [site.sse.kick(user=7), ("state", 1)][1])  # type: ignore[arg-type, return-value]
    with site.get(site.sse.sign(user=7)) as response:
        assert b"kicked" in b"".join(response.response)  # type: ignore[arg-type]


def test_after_a_restart_with_the_memory_backend_tokens_with_a_user_are_refused(make_site: MakeSite) -> None:
    with at(-100_000), patch("sse_batcher.backends.memory.process_began", lambda: now() - 200_000):
        before = make_site()
        with_user, without = before.sse.sign(["a"], user=7, ttl=200_000), before.sse.sign(["a"], ttl=200_000)
    after = make_site()
    assert (after.status(with_user), after.status(without)) == (401, 200)
    assert after.status(after.sse.sign(["a"], user=7)) == 200


def test_new_tokens_are_valid_although_the_clock_was_set_back(make_site: MakeSite) -> None:
    site = make_site()
    with at(-3_600):  # before this process has begun
        old = site.sse.sign(user=7)
        assert site.status(old) == 200
        site.sse.kick(user=7)
        assert (site.status(old), site.status(site.sse.sign(user=7))) == (401, 200)


def test_kicks_that_are_forgotten_count_for_all_users() -> None:
    week = MAX_TOKEN_SECONDS * 1_000_000
    kicks = KickedUsers(since=10, most=2)
    assert kicks.until("ada") == 10
    for user, stamp in [("ada", 20), ("bob", 30), ("ada", 40)]:
        kicks.add(user, stamp)
    assert [kicks.until(user) for user in ("ada", "bob", 7)] == [40, 30, 10]
    kicks.add(7, 50)
    assert [kicks.until(user) for user in ("ada", "bob", 7, "7")] == [40, 30, 50, 30]
    kicks.add(7, 48)  # another thread had this stamp before
    assert kicks.until(7) == 50
    kicks.add(8, 45 + week)
    assert [kicks.until(user) for user in ("ada", "bob", 7, 8)] == [40, 40, 50, 45 + week]


# -- revalidate, Redis and the log -------------------------------------------------------------------------------------


def test_revalidate_is_asked_at_each_opening(site: Site) -> None:
    asked: list[int] = []
    answers = [True, False, None]
    site.refuse_cookies()

    @site.sse.revalidate
    def may_stay(user: int) -> bool:
        asked.append(user)
        return answers.pop(0)  # type: ignore[return-value]

    token, without_user = site.sse.sign(user=7), site.sse.sign()
    assert site.status(without_user) == 200
    assert site.status(token) == 200
    assert site.answer(token) == site.answer("sse1.")
    site.app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(UsageError, match="revalidate"):
        site.get(token)
    assert asked == [7, 7, 7]


def test_a_limit_of_streams_counts_the_user_of_a_token(make_site: MakeSite) -> None:
    site = make_site(SSE_MAX_CLIENTS_PER_USER=1)
    url = f"/events?token={site.sse.sign(user=7)}"
    with open_stream(site.app, url) as opened, open_stream(site.app, url) as refused:
        assert (opened.opened_with, refused.busy) == ("sse_open", "limit")


def test_while_the_kicks_are_not_known_a_client_is_asked_to_come_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(user: object) -> int:
        raise BackendError("Redis does not answer")

    monkeypatch.setattr(process_of(site.manager).backend, "kicked_until", away)
    with site.get(site.sse.sign(user=7)) as response:
        assert (response.status_code, response.mimetype) == (200, "text/event-stream")
        assert b'"reason":"backend"' in response.data
    assert site.status(site.sse.sign()) == 200
    assert site.status(site.sse.sign(user=7)[:-1]) == 401


def test_other_origins_can_read_that_a_token_is_refused(make_site: MakeSite) -> None:
    site = make_site(SSE_CORS_ORIGINS=["https://example.com"])
    _, headers, _ = site.answer("sse1.", headers={"Origin": "https://example.com"})
    assert headers["Access-Control-Allow-Origin"] == "https://example.com"


def test_no_token_is_logged(site: Site, make_site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = [*forged(site, make_site).values(), site.sse.sign(["a"], user=7), site.sse.sign(["a"])]
    for token in tokens:
        for query in ({}, {"channel": "foreign"}, {"poll": 1}, {"channel": "\n"}):
            site.status(token, query=query)
            site.status(headers=bearer(token.strip().encode("ascii", "ignore").decode().replace("\0", "")), query=query)
    site.sse.snapshot("default")(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    site.status(site.sse.sign(user=7))
    site.sse.kick(user=7)
    site.manager.shutdown()
    assert "a snapshot for the channels" in caplog.text
    assert TOKEN_PREFIX not in caplog.text
    assert TOKEN_PREFIX not in repr((site.sse, site.tokens(), site.tokens().check(site.sse.sign())))


def test_the_token_of_a_path_of_the_apps_own_is_its_own(site: Site) -> None:
    site.app.add_url_rule("/page", view_func=lambda: Response(request.args["token"]))
    assert site.app.test_client().get("/page?token=sse1.x").text == "sse1.x"
