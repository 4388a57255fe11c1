"""The monitor's page in Chromium, Firefox and WebKit."""

from __future__ import annotations

from contextlib import closing, suppress

import pytest

from .kit.engines import ENGINES, Engine, engines
from .kit.monitor import Site, site
from .kit.waiting import wait_until

__all__ = ["engines", "site"]

pytestmark = pytest.mark.external


@pytest.mark.parametrize("name", ENGINES)
def test_it_works_in_each_engine(name: str, engines: dict[str, Engine], site: Site) -> None:
    site.open("<b>ada</b>", "team-7")
    site.manager.enqueue("order", {"id": 7}, channel="team-7")
    site.manager.flush_all()
    with closing(engines[name].open(site.url())) as tab:
        wait_until(lambda: tab.evaluate("document.getElementById('state').textContent") == "live", "it is live")
        assert tab.evaluate("document.querySelector('td.user').textContent") == "<b>ada</b>"
        assert tab.evaluate("document.querySelector('#event-rows .name').textContent") == "order"
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        tab.evaluate("document.querySelector('td.kick button').focus()")
        tab.evaluate("document.activeElement.click()")
        assert tab.evaluate("document.getElementById('kick').open")
        assert tab.evaluate("document.activeElement.id") == "kick-cancel"
        tab.evaluate("document.getElementById('kick-cancel').click()")
        wait_until(
            lambda: tab.evaluate("document.activeElement.parentElement.className") == "kick", "the focus returns"
        )
        tab.evaluate("document.activeElement.click()")
        tab.evaluate("document.getElementById('kick-do').click()")
        said = "<b>ada</b> was kicked: 1 stream ended."
        wait_until(lambda: tab.evaluate("document.getElementById('said').textContent") == said, "it is said")
        inline = "(() => { const it = document.createElement('script'); it.append('window.inline = 1');"
        with suppress(AssertionError, Exception):  # where trusted types are known
            tab.evaluate(f"{inline} document.head.append(it); }})()")
        assert tab.evaluate("window.inline ?? 'none'") == "none"
    assert site.kicks == [200]
