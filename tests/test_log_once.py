"""`LogOnce` logs each text once for each object."""

from __future__ import annotations

import logging

import pytest

from sse_batcher.runtime.log_fields import log_fields
from sse_batcher.runtime.log_once import LogOnce

FIELDS = log_fields("line")
LOGGER = logging.getLogger("sse_batcher.test_log_once")


def test_a_text_is_logged_once_whatever_its_arguments(caplog: pytest.LogCaptureFixture) -> None:
    once = LogOnce(LOGGER)
    once.log(logging.WARNING, "%d streams", 1, extra=FIELDS)
    once.log(logging.WARNING, "%d streams", 2, extra=FIELDS)
    once.log(logging.ERROR, "another text: 100 %", extra=FIELDS)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "1 streams"),
        (logging.ERROR, "another text: 100 %"),
    ]


def test_each_object_logs_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        LogOnce(LOGGER).log(logging.WARNING, "a warning", extra=FIELDS)
    assert caplog.messages == ["a warning", "a warning"]


def test_a_log_handler_may_log_the_same_text_again() -> None:
    once = LogOnce(LOGGER)
    lines = []

    class Again(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            once.log(logging.WARNING, "a warning", extra=FIELDS)

    handler = Again()
    LOGGER.addHandler(handler)
    try:
        once.log(logging.WARNING, "a warning", extra=FIELDS)
    finally:
        LOGGER.removeHandler(handler)
    assert lines == ["a warning"]
