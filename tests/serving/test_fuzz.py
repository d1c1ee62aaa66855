"""Requests of the OpenAPI document and raw bytes: no 5xx, no hang, no slot that stays taken, answers as documented.

`benchmarks/fuzz_serving.py` sends 10,000 of them, and here a few hundred.
"""

from __future__ import annotations

import pytest

from benchmarks.fuzz_serving import SERVER, fuzz
from tests.serving.conftest import serving

REQUESTS = 500


@pytest.mark.filterwarnings("ignore")
def test_requests_of_any_kind(chat_model, tmp_path):
    named = ("--model", chat_model, "--served-model-name", "tiny", "--states", str(tmp_path / "states"))
    with serving(tmp_path / "log", *named, *SERVER) as server:
        findings = fuzz(server.ready().url, REQUESTS)
    assert not findings.wrong, "\n".join(findings.wrong[:10])
    assert sum(findings.statuses.values()) > REQUESTS // 2
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize"):
        assert findings.statuses[f"POST {path} (positive) 200"], findings.statuses
        assert findings.statuses[f"POST {path} (negative) 400"], findings.statuses
    for path in ("", "/{state}/fork", "/{state}/branch"):
        assert findings.statuses[f"POST /v1/states{path} (positive) 200"], findings.statuses
