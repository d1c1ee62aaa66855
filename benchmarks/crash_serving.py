"""A server that is killed at random moments under load: whatever it acknowledged is there after the next start.

    python benchmarks/crash_serving.py --kills 30          # starts servers of the embedded model, two replicas each

Clients keep states at the end of completions and chats, go on from them, fork, branch, export, import and delete them,
and send chats whose prefixes are snapshots. After a random time all processes, the API server alone, or one replica get
SIGKILL; some servers are killed while they start. Checked after every start, of each state that was acknowledged: what
it stands after, its file, and the greedy text that goes on from it, which is the one of its first time; that deleted
states are gone; that a chat's known beginning is read from its snapshot. Ends with status 1 where one of that fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 900.0
MODES = ("all", "all", "all", "front", "replica", "loading")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ("the", "old", "man", "saw", "a", "small", "boat", "near", "its", "harbour", "and", "told", "his", "friend")


@dataclass
class State:
    """One that was acknowledged.

    Attributes:
        record: what was told of it.
        tokens: what it stands after, once that was read.
        text: the greedy text after it, once that was written.
    """

    record: dict[str, Any]
    tokens: list[int] | None = None
    text: str | None = None


@dataclass
class Known:
    """What clients were told, over all servers."""

    states: dict[str, State] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    chats: list[list[dict[str, str]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, answer: dict[str, Any]) -> State:
        self.counts[what] += 1
        self.states[answer["id"]] = state = State(answer)
        return state


class Server:
    """`mambakit serve` in a process group of its own."""

    def __init__(self, folder: Path, options: list[str]):
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
        command = [
            sys.executable, "-m", "mambakit", "serve", "--device", "cpu", "--port", "0", "--replicas", "2", "--slots",
            "4", "--states", str(folder / "states"), "--prefix-cache", "--chat-template", str(template),
            "--log-level", "error", "--heartbeat-seconds", "300", *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" at ")[1].split(",")[0]

    async def ready(self, client: httpx.AsyncClient) -> None:
        end = time.monotonic() + PATIENCE
        while (await client.get("/health")).json()["status"] != "ok":
            if self.process.poll() is not None or time.monotonic() > end:
                raise TimeoutError("the server did not become ready")
            await asyncio.sleep(0.1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


async def work(client: httpx.AsyncClient, known: Known, chance: random.Random) -> None:
    """Ask for one thing after another, until the server is gone."""
    while True:
        try:
            await one(client, known, chance)
        except httpx.TransportError:
            return
        except RefusedError as refused:  # a replica was killed
            known.counts[f"{refused.args[0]}"] += 1
            await asyncio.sleep(0.2)


class RefusedError(Exception):
    """A status that is no answer: 503 while a replica is away, 404 of a state that another client has deleted."""


async def ask(client: httpx.AsyncClient, known: Known, method: str, path: str, **options: Any) -> httpx.Response:
    response = await client.request(method, path, **options)
    if response.status_code == 503 and "retry-after" in response.headers:
        raise RefusedError(503)
    named = set(re.findall("state_[0-9a-f]{24}", path + str(options.get("json"))))
    if response.status_code == 404 and not named <= set(known.states):
        raise RefusedError(404)
    if response.status_code != 200:
        known.wrong.append(f"{method} {path} {str(options)[:300]}: {response.status_code} {response.text[:300]}")
        raise RefusedError(response.status_code)
    return response


def words(chance: random.Random, most: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(chance.randrange(1, most)))


async def one(client: httpx.AsyncClient, known: Known, chance: random.Random) -> None:
    ids = list(known.states)
    kind = chance.choice(("completion", "on", "chat", "prompt", "fork", "branch", "file", "delete", "talk", "n"))
    id = chance.choice(ids) if ids else ""
    body: dict[str, Any] = {"max_tokens": chance.randrange(1, 24), "temperature": 0, "keep_state": True}
    if kind in ("completion", "n") or not id:
        body |= {"prompt": words(chance, 60), "n": 3 if kind == "n" else 1}
        answer = (await ask(client, known, "POST", "/v1/completions", json=body)).json()
        for choice in answer["choices"]:
            await look(client, known, known.note("completion", choice["state"]))
    elif kind == "on":
        body |= {"prompt": " and", "state": id}
        answer = (await ask(client, known, "POST", "/v1/completions", json=body)).json()
        await look(client, known, known.note("on", answer["choices"][0]["state"]))
    elif kind == "chat":
        body["messages"] = [{"role": "user", "content": words(chance, 30)}]
        answer = (await ask(client, known, "POST", "/v1/chat/completions", json=body)).json()
        await look(client, known, known.note("chat", answer["choices"][0]["state"]))
    elif kind == "prompt":
        answer = (await ask(client, known, "POST", "/v1/states", json={"prompt": words(chance, 200)})).json()
        await look(client, known, known.note("prompt", answer))
    elif kind == "fork":
        known.note("fork", (await ask(client, known, "POST", f"/v1/states/{id}/fork", json={})).json())
    elif kind == "branch":
        at = chance.randrange(1, known.states[id].record["tokens"] + 1)
        answer = (await ask(client, known, "POST", f"/v1/states/{id}/branch", json={"at": at})).json()
        await look(client, known, known.note("branch", answer))
    elif kind == "file":
        data = (await ask(client, known, "GET", f"/v1/states/{id}/export")).content
        headers = {"Content-Type": "application/octet-stream"}
        answer = (await ask(client, known, "POST", "/v1/states/import", content=data, headers=headers)).json()
        state, source = known.note("import", answer), known.states.get(id)
        if source is not None:
            state.tokens, state.text = source.tokens, source.text
    elif kind == "delete" and len(ids) > 30:
        if (state := known.states.pop(id, None)) is None:
            return
        # Until the answer it may be there or not: it is asked for no more.
        await ask(client, known, "DELETE", f"/v1/states/{id}")
        known.deleted.add(state.record["id"])
        known.counts["delete"] += 1
    elif kind == "talk":
        await talk(client, known, chance)


async def talk(client: httpx.AsyncClient, known: Known, chance: random.Random) -> None:
    """A turn of a chat that sends all of its messages."""
    messages = list(chance.choice(known.chats)) if known.chats and chance.random() < 0.7 else []
    messages.append({"role": "user", "content": words(chance, 20)})
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    answer = (await ask(client, known, "POST", "/v1/chat/completions", json=body)).json()
    reply = answer["choices"][0]["message"]["content"]
    if reply and len(messages) < 12:
        known.chats.append([*messages, {"role": "assistant", "content": reply}])
    known.counts["talk"] += 1


async def look(client: httpx.AsyncClient, known: Known, state: State) -> None:
    """Read what a state stands after and what follows, or compare them with the first time."""
    id = state.record["id"]
    tokens = (await ask(client, known, "GET", f"/v1/states/{id}/text")).json()["tokens"]
    if len(tokens) != state.record["tokens"] or (state.tokens is not None and state.tokens != tokens):
        known.wrong.append(f"{id} stands after {tokens}, not {state.tokens} ({state.record['tokens']} tokens)")
    state.tokens = tokens
    body = {"prompt": "", "state": id, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    text = (await ask(client, known, "POST", "/v1/completions", json=body)).json()["choices"][0]["text"]
    if state.text is not None and text != state.text:
        known.wrong.append(f"{id} goes on with {text!r}, not {state.text!r}")
    state.text = text


async def verify(client: httpx.AsyncClient, known: Known, chance: random.Random, most: int) -> None:
    """Compare what the server has with what clients were told."""
    listed: dict[str, dict[str, Any]] = {}
    after, more = "", True
    while more:
        params = {"limit": 1000} | ({"after": after} if after else {})
        page = (await ask(client, known, "GET", "/v1/states", params=params)).json()
        listed |= {one["id"]: one for one in page["data"]}
        after, more = (page["data"][-1]["id"] if page["data"] else ""), page["has_more"]
    for id, state in known.states.items():
        told = {name: value for name, value in state.record.items() if name not in ("usage",)}
        if listed.get(id) != told:
            known.wrong.append(f"{id} is {listed.get(id)}, and was {told}")
    if back := known.deleted & set(listed):
        known.wrong.append(f"deleted states are there again: {back}")
    chosen = chance.sample(list(known.states.values()), min(most, len(known.states)))
    gate = asyncio.Semaphore(8)

    async def check(state: State) -> None:
        async with gate:
            await look(client, known, state)
            data = (await ask(client, known, "GET", f"/v1/states/{state.record['id']}/export")).content
            if hashlib.sha256(data).hexdigest() != state.record["sha256"]:
                known.wrong.append(f"{state.record['id']} has another file")

    await asyncio.gather(*map(check, chosen))
    known.counts["states compared"] += len(chosen)


async def snapshots(client: httpx.AsyncClient, known: Known, chance: random.Random) -> None:
    """Chats that were answered before: what they had read comes from a snapshot."""
    for chat in chance.sample(known.chats, min(3, len(known.chats))):
        body = {"messages": [*chat, {"role": "user", "content": "and"}], "max_tokens": 1, "temperature": 0}
        usage = (await ask(client, known, "POST", "/v1/chat/completions", json=body)).json()["usage"]
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        known.counts["chats read from a snapshot" if cached else "chats read again"] += 1


async def serve_once(folder: Path, known: Known, chance: random.Random, mode: str, options: argparse.Namespace) -> None:
    """One server's life."""
    server, limits = Server(folder, options.server), httpx.Limits(max_keepalive_connections=0)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as client:
            if mode == "loading":
                await asyncio.sleep(chance.uniform(0, 2))
                return
            await server.ready(client)
            await verify(client, known, chance, options.compare)
            await snapshots(client, known, chance)
            if mode == "end":
                return
            workers = [asyncio.create_task(work(client, known, chance)) for _ in range(options.clients)]
            await asyncio.sleep(chance.uniform(0.1, options.seconds))
            replicas = [one["pid"] for one in (await client.get("/health")).json()["replicas"]]
            if mode == "replica":
                os.kill(chance.choice(replicas), signal.SIGKILL)
                await asyncio.sleep(chance.uniform(0.1, options.seconds))
                await server.ready(client)
                replicas = [one["pid"] for one in (await client.get("/health")).json()["replicas"]]
            if mode == "front":
                server.process.kill()
                end = time.monotonic() + 30
                while any(Path(f"/proc/{pid}").exists() for pid in replicas) and time.monotonic() < end:
                    await asyncio.sleep(0.1)
                if time.monotonic() >= end:
                    known.wrong.append("replicas outlive their server by 30 seconds")
            server.kill()
            await asyncio.gather(*workers)
    finally:
        server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load, at most, before a kill")
    parser.add_argument("--compare", type=int, default=60, help="states whose texts are compared after each start")
    parser.add_argument("--seed", type=int, default=0)
    options, options.server = parser.parse_known_args()
    chance, known, began = random.Random(options.seed), Known(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.kills):
            mode = chance.choice(MODES)
            asyncio.run(serve_once(Path(folder), known, chance, mode, options))
            print(f"{number + 1}: {mode}; {len(known.states)} states, {len(known.wrong)} failures", flush=True)
        options.compare = len(known.states)
        asyncio.run(serve_once(Path(folder), known, chance, "end", options))
    print(f"{json.dumps(known.counts)} in {time.monotonic() - began:.0f} s")
    for wrong in known.wrong[:20]:
        print(f"\n{wrong}")
    print(f"\n{len(known.wrong)} failures")
    return 1 if known.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
