"""What the server writes to its log."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from mambakit.serving.logs import LogOptions, configure, fields


@pytest.fixture
def log(capsys):
    """Configures this process's log and gives what was written; all is as before afterwards."""
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level

    def write(options: LogOptions, *records):
        configure(options)
        logger = logging.getLogger("mambakit.test")
        for how, message, extra in records:
            how(logger, message, extra=extra)
        return capsys.readouterr().err.splitlines()

    yield write
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_is_one_object_on_each_line(log):
    evil = 'two\nlines "quoted" \u2028 \ud800 {"level": "error"}'
    (line,) = log(LogOptions("json"), (logging.Logger.info, "request", fields(path=evil, status=200, key=None)))
    found = json.loads(line)
    assert found["path"] == evil
    assert (found["level"], found["message"], found["status"], found["logger"]) == (
        "info",
        "request",
        200,
        "mambakit.test",
    )
    assert "key" not in found
    assert found["time"].endswith("Z")


def test_text_quotes_what_requests_hold(log):
    evil = "a b\nERROR forged"
    (line,) = log(LogOptions(), (logging.Logger.warning, "request", fields(path=evil, status=503, seconds=0.123456)))
    assert line.endswith(r'WARNING request path="a b\nERROR forged" status=503 seconds=0.1235')


@pytest.mark.parametrize("form", ["text", "json"])
def test_levels(form, log):
    all_of_them = [
        (logging.Logger.debug, "d", None),
        (logging.Logger.info, "i", None),
        (logging.Logger.error, "e", None),
    ]
    assert len(log(LogOptions(form, "debug"), *all_of_them)) == 3
    assert len(log(LogOptions(form), *all_of_them)) == 2
    assert len(log(LogOptions(form, "error"), *all_of_them)) == 1


def test_a_traceback_is_a_field(log):
    try:
        raise ValueError("no\nluck")
    except ValueError:
        (line,) = log(
            LogOptions("json"), (lambda logger, m, extra: logger.error(m, exc_info=sys.exc_info()), "bad", {})
        )
    assert "ValueError: no" in json.loads(line)["traceback"]


@pytest.mark.parametrize("stream", ["none", "closed", "closing", "no reader"])
def test_a_closed_standard_error_is_not_written_to(log, stream, monkeypatch, capsys):
    """Not even by `logging` itself, which prints a traceback where a handler fails."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            if stream == "closing":
                self.close()
                raise ValueError("I/O operation on closed file")
            raise BrokenPipeError

    given = {"none": None, "closed": io.StringIO()}.get(stream, Broken())
    if stream == "closed":
        given.close()
    log(LogOptions())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", given)
        patch.setattr(logging.Handler, "handleError", lambda *_: pytest.fail("a traceback was printed"))
        logging.getLogger("mambakit.test").info("request", extra=fields(path="/"))
    logging.getLogger("mambakit.test").info("later")
    assert capsys.readouterr().err.endswith("INFO later\n"), "what standard error is then"
