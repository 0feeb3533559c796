"""C11 and C12: a job that trains on the base while it serves."""

import asyncio
import json
import random
import statistics
import time

import client
from bench import ROWS, Row, prompt
from servers import PATH, Attune

SHARE = 0.25


def run(bench, wanted):
    server = Attune(bench, bench.folder("training"), "--training-share", str(bench.args.training_share), "--max-batch", "16")
    rows = beside_load(bench, server) if "C11" in wanted else []
    rows += [to_the_first_token(bench, server)] if "C12" in wanted else []
    server.stop()
    return rows


def start(server):
    """A job that does not end by itself, once it has made steps."""
    training = {"n_epochs": 1000, "batch_size": 4, "checkpoint_every": 100_000}
    job = server.job(ROWS, {"type": "lora", "r": 8, "alpha": 12}, **training)
    while steps(server, job) < 2:
        time.sleep(0.2)
    return job


def steps(server, job):
    """How many it has made."""
    found = server.json(f"/v1/fine_tuning/jobs/{job}/events?limit=5")["data"]
    return max((event["data"]["step"] for event in found if event["type"] == "metrics"), default=0)


def change(server, job, what, status):
    server.json(f"/v1/fine_tuning/jobs/{job}/{what}", {})
    while server.json(f"/v1/fine_tuning/jobs/{job}")["status"] != status:
        time.sleep(0.1)


def beside_load(bench, server):
    seconds = 4 if bench.args.quick else 30
    full = saturated(server, bench.tokens, 32 if bench.args.quick else 96)
    rate = SHARE * full
    job = start(server)

    def on(seed):
        before, begun = steps(server, job), time.perf_counter()
        p99 = asyncio.run(open_load(server, rate, bench.tokens, seconds, seed))
        return p99, round((steps(server, job) - before) / (time.perf_counter() - begun), 3)

    def alone(_):
        before, begun = steps(server, job), time.perf_counter()
        time.sleep(seconds / 2)
        speed = round((steps(server, job) - before) / (time.perf_counter() - begun), 3)
        change(server, job, "pause", "paused")
        return 0, speed

    def off(seed):
        p99 = asyncio.run(open_load(server, rate, bench.tokens, seconds, seed))
        change(server, job, "resume", "running")
        before = steps(server, job)
        while steps(server, job) < before + 1:
            time.sleep(0.1)
        return p99, 0

    found = bench.interleaved({"on": on, "alone": alone, "off": off})
    change(server, job, "cancel", "cancelled")
    with_training, speed = (statistics.median(column) for column in zip(*found["on"]))
    without, full_speed = statistics.median(p for p, _ in found["off"]), statistics.median(s for _, s in found["alone"])
    what = f"at 25 % of saturated load ({rate:.2f} of {full:.2f} requests/s)"
    shares = f"training share {bench.args.training_share}"
    return [
        Row("C11a", f"{what}: p99 between tokens, training on / off",
            f"{with_training:.1f} and {without:.1f} ms; {shares}", with_training / without),
        Row("C11b", f"{what}: training speed kept", f"{speed:.2f} and {full_speed:.2f} steps/s; {shares}",
            100 * speed / full_speed, "%"),
    ]


def saturated(server, tokens, requests):
    """Requests per second of 16 clients that never wait."""
    left = list(range(requests))

    async def one_after_another():
        while left:
            await client.ask(server, PATH, server.body(prompt(left.pop(), "full"), tokens))

    async def clients():
        await asyncio.gather(*(one_after_another() for _ in range(16)))

    begun = time.perf_counter()
    asyncio.run(clients())
    return requests / (time.perf_counter() - begun)


async def open_load(server, rate, tokens, seconds, seed):
    """Streams that come at random times, whether others have ended or not; the 99th percentile of gaps, milliseconds."""
    rng, tasks, end = random.Random(seed), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        body = server.body(prompt(len(tasks), seed), tokens)
        tasks.append(asyncio.create_task(client.stream(server, PATH, body)))
        await asyncio.sleep(rng.expovariate(rate))
    answers = await asyncio.gather(*tasks)
    return round(1000 * client.percentile([gap for answer in answers for gap in answer.gaps()], 0.99), 2)


def to_the_first_token(bench, server):
    """From the event of a step to the first token of what it made; and, which no event can flatter, the longest that it
    can have been: from the last request that still found the step before to the token of the first that did not."""
    job = start(server)
    events, bound = asyncio.run(followed(server, job, 4 if bench.args.quick else 30))
    change(server, job, "cancel", "cancelled")
    raw = f"median of {len(events)} steps, p90 {1000 * client.percentile(events, 0.9):.0f} ms"
    raw += f"; upper bound by polling {1000 * statistics.median(bound):.0f} ms (median)" if bound else ""
    return Row("C12", "optimiser step to the first token served from it", raw, 1000 * statistics.median(events), "ms")


async def followed(server, job, count):
    body = {**server.body("It is", 1), "model": f"{job}:live"}
    found, past = [], steps(server, job)
    async for _, event in client.events(server, f"/v1/fine_tuning/jobs/{job}/events"):
        if event.get("type") == "metrics" and event["data"]["step"] > past:
            begun = time.perf_counter()
            answer = await client.stream(server, PATH, body)
            found.append(answer.times[0] - begun)
            if len(found) == count:
                break
    bound, last = [], None
    while len(bound) < count:
        begun = time.perf_counter()
        answer = await client.stream(server, PATH, body)
        made = json.loads(answer.lines[0])["system_fingerprint"]
        if last and last[1] != made:
            bound.append(answer.times[0] - last[0])
        last = (begun, made)
    return found, bound
