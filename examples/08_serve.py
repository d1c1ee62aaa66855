"""A server of two replicas behind one address, and a client of it: any client of OpenAI's completions API would do."""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="hub id or folder (default: the model that ships with mambakit)")
parser.add_argument("--replicas", type=int, default=2)
arguments = parser.parse_args()

command = [sys.executable, "-m", "mambakit", "serve", "--port", "0", "--replicas", str(arguments.replicas)]
command += ["--model", arguments.model] if arguments.model else []
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ask(path: str, **body):
    """The answer; a stream's, line by line, where the body asks for one."""
    data = json.dumps(body).encode() if body else None
    return urllib.request.urlopen(urllib.request.Request(url + path, data, {"Content-Type": "application/json"}))


def ready() -> bool:
    try:
        return json.load(ask("/health"))["status"] == "ok"
    except urllib.error.HTTPError:  # 503 until a replica is ready
        return False


def complete(seed: int) -> str:
    answer = json.load(ask("/v1/completions", prompt="It was a dark", seed=seed, max_tokens=12, stop="\n"))
    return answer["choices"][0]["text"]


try:
    url = server.stdout.readline().split(" at ")[1].split(",")[0]  # "books at http://127.0.0.1:12345, replicas: ..."
    while not ready():
        time.sleep(0.1)

    print("streamed: It was a dark", end="")
    for line in ask("/v1/completions", prompt="It was a dark", max_tokens=24, temperature=0, stream=True):
        if line.startswith(b"data: {"):
            print(json.loads(line[6:])["choices"][0]["text"].replace("\n", " "), end="", flush=True)
    print()

    with ThreadPoolExecutor(8) as pool:  # at once: each goes to the replica with the least to do
        for text in pool.map(complete, range(8)):
            print(f"It was a dark{text}")
    wrote = [line for line in ask("/metrics").read().decode().splitlines() if "generated_tokens_total{" in line]
    print("both replicas wrote" if len(wrote) == 2 else "replicas that wrote:", *(line.split()[-1] for line in wrote))
finally:
    server.terminate()
    server.wait()
