"""Inside serving, imports point one way, and dispatch and supervision start without torch and without HTTP."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVING = ROOT / "mambakit" / "serving"
# From the bottom up: files and folders, and the files of each folder. Each may import those before it.
FOLDERS = [
    "errors", "logs", "messages", "metrics", "states", "api", "dispatch", "replicas", "playground", "http",
    "tokenizing", "server", "ray_app",
]  # fmt: skip
FILES = {
    "playground": ["files", "about"],
    "api": [
        "declarations", "values", "checks", "shapes", "formats", "states", "fields", "asked", "templates", "prompts",
        "completions", "reply", "chat_messages", "chat", "log_probs", "answers", "chat_answers", "tokens", "score",
        "operations", "state_bodies", "state_operations", "openapi", "intake",
    ],
    "states": ["tensors", "blobs", "records", "remote", "places", "store", "options"],
    "dispatch": ["shares", "jobs", "fair_queue", "queue", "affinity", "rates", "promises", "suspects", "dispatcher"],
    "replicas": [
        "heartbeat", "memory", "states", "outbox", "receiving", "constraints", "scoring", "loading", "worker",
        "transport", "process", "ray_actor", "scaling", "supervisor",
    ],
    "http": [
        "keys", "quotas", "tls", "request_log", "access", "refusals", "connection_limits", "connection", "request_ids",
        "routing", "services", "kept", "texts", "generation", "states", "scores", "tokens", "models", "probes",
        "playground", "app",
    ],
}  # fmt: skip
ORDER = [f"{folder}.{file}" if file else folder for folder in FOLDERS for file in FILES.get(folder, [""])]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SERVING).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(SERVING.rglob("*.py")) if path.stem != "__init__"}


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    before = ORDER[: ORDER.index(name)]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mambakit.serving"):
            package = (node.module or "").removeprefix("mambakit.serving").lstrip(".")
            for alias in node.names:
                imported = package if package in MODULES else f"{package}.{alias.name}".lstrip(".")
                assert imported in before, f"{name}:{node.lineno} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_files_have_one_subject(name):
    lines = MODULES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("dispatch.dispatcher", {"torch", "starlette", "uvicorn", "multiprocessing"}),
        ("replicas.supervisor", {"torch", "starlette", "uvicorn"}),
        ("api.chat", {"starlette", "uvicorn", "multiprocessing"}),
    ],
)
def test_what_each_part_does_not_know(module, never):
    code = f"import sys, mambakit.serving.{module}\nprint(','.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not never & set(done.stdout.strip().splitlines()[-1].split(","))
