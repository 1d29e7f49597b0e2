"""What a request and a streamed token cost the process that speaks HTTP, in milliseconds of CPU.

    python benchmarks/ingress_cost.py --url http://127.0.0.1:8000 --pid PID [--pid PID ...] [--requests 40]

The same calls of OpenAI's `/v1/completions` for any server: answers of 1 token, then of 65, one after the other,
streaming and not. The difference of the two, by 64, is what a token costs; what is left of the first is what a request
costs. What the processes use at rest is measured first and taken off. `--pid`: of the processes to be charged.
"""

import argparse
import json
import statistics
import time

import httpx
import psutil

SHORT, LONG = 1, 65


def cpu_s(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def idle_share(pids: list[int], seconds: float = 5.0) -> float:
    """CPU seconds a second while nobody asks for anything."""
    begun, used = time.monotonic(), cpu_s(pids)
    time.sleep(seconds)
    return (cpu_s(pids) - used) / (time.monotonic() - begun)


def run(client: httpx.Client, body: dict[str, object], num_requests: int) -> None:
    for i in range(num_requests):
        asked = body | {"seed": i}
        if not body["stream"]:
            client.post("/v1/completions", json=asked).raise_for_status()
            continue
        with client.stream("POST", "/v1/completions", json=asked) as response:
            response.raise_for_status()
            for _ in response.iter_raw():
                pass


def cost_ms(client: httpx.Client, pids: list[int], body: dict[str, object], num_requests: int, idle: float) -> float:
    """CPU milliseconds of one request."""
    begun, used = time.monotonic(), cpu_s(pids)
    run(client, body, num_requests)
    spent = cpu_s(pids) - used - idle * (time.monotonic() - begun)
    return 1e3 * spent / num_requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, action="append", required=True)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with httpx.Client(base_url=args.url, timeout=300, trust_env=False) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        prompt = "The sea is wide and the ship is small, and so we sail on into the night until "
        body = {"model": model, "prompt": prompt, "temperature": 0.0, "ignore_eos": True}
        for stream in (False, True):
            asked = body | {"stream": stream}
            run(client, asked | {"max_tokens": LONG}, 2)
            idle = idle_share(args.pid)
            per_request, per_token = [], []
            for _ in range(args.rounds):
                short = cost_ms(client, args.pid, asked | {"max_tokens": SHORT}, args.requests, idle)
                long = cost_ms(client, args.pid, asked | {"max_tokens": LONG}, max(4, args.requests // 10), idle)
                per_token.append((long - short) / (LONG - SHORT))
                per_request.append(short - per_token[-1] * SHORT)
            results["streaming" if stream else "whole"] = {
                "request_ms": round(statistics.median(per_request), 3),
                "token_ms": round(statistics.median(per_token), 4),
                "idle_ms_a_second": round(1e3 * idle, 2),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
