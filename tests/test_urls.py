"""URLs of streams: what commands add to them, find in them, and print of them."""

from __future__ import annotations

import pytest

from sse_batcher.remote.url import below, values_in, with_channels, with_query, within_site, without_token


def test_values_of_the_query_are_found() -> None:
    assert values_in("http://x/?channel=a&%63hannel=b+c&channel=&channels=d#?channel=e", "channel") == ["a", "b c", ""]
    assert values_in("http://[::1/?channel=a", "channel") == []


def test_channels_replace_those_of_the_url() -> None:
    url = "http://x/events?channel=a&batch=0"
    assert with_channels(url, ()) == url
    assert with_channels(url, ("b", "c d")) == "http://x/events?batch=0&channel=b&channel=c+d"


def test_the_rest_of_a_query_stays_as_it_was_written() -> None:
    """It may be signed."""
    for more in ("sig=%FFab&flag&x=a%2Bb;c", "a=%2f&a=b+c%20d", "channels=1&x=?channel=1"):
        assert (
            with_channels(f"http://x/events?%63hannel=a&{more}&channel", ["b"]) == f"http://x/events?{more}&channel=b"
        )
        assert with_query(f"http://x/events?{more}", {"poll": "1"}) == f"http://x/events?{more}&poll=1"


@pytest.mark.parametrize(
    ("url", "path", "result"),
    [
        ("http://a/events", "health", "http://a/events/health"),
        ("http://a/events/?channel=b", "health/live", "http://a/events/health/live"),
        ("http://a", "health", "http://a/health"),
        ("http://[::1/", "stats", "http://[::1/"),
    ],
)
def test_other_routes_of_the_site_are_below_its_stream(url: str, path: str, result: str) -> None:
    assert below(url, path) == result


def test_parameters_are_added_to_those_of_the_url() -> None:
    assert with_query("http://a/events", {"poll": "1"}) == "http://a/events?poll=1"
    assert with_query("http://a/events?channel=b#part", {"poll": "1"}) == "http://a/events?channel=b&poll=1"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://a/events?channel=b&token=secret&x=%20#part", "http://a/events?channel=b&token=...&x=%20#part"),
        ("http://a/?%74oken=secret&&Token=secret", "http://a/?token=...&&token=..."),
        ("/login?next=%2Fevents%3Fa%3Db%26token%3Dsecret", "/login?next=/events?a=b%26token=..."),
        ("http://[::1/?token=secret", "http://[::1/?token=..."),
        ("http://a/events?tokens=1", "http://a/events?tokens=1"),
        ("http://a/events", "http://a/events"),
    ],
)
def test_a_url_is_printed_without_its_token(url: str, shown: str) -> None:
    assert without_token(url) == shown


@pytest.mark.parametrize(
    ("url", "location", "place"),
    [
        ("http://a:80/events", "http://A/events/", "http://A/events/"),
        ("http://a/events", "https://a/events", "https://a/events"),
        ("http://a/events?token=secret", "/other", "http://a/other"),
        ("http://a:8000/events", "//a:8000/other", "http://a:8000/other"),
        ("http://a/events", "https://a:8443/events", None),
        ("http://a:8000/events", "https://a/events", None),
        ("https://a/events", "http://a/events", None),
        ("https://a/events", "//b/events", None),
        ("https://a/events", "//a.b/events", None),
        ("http://a/events", "http://[::1", None),
        ("http://a/events", "http://a:port/", None),
        ("http://a/events", "http://a:99999/", None),
    ],
)
def test_a_redirect_stays_in_the_site_or_goes_to_its_https(url: str, location: str, place: str | None) -> None:
    assert within_site(url, location) == place
