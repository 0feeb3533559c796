"""C6 and C7: adapters that are nowhere but in the store, which is moto's S3 server on this machine."""

import asyncio
import functools
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from xml.etree import ElementTree

import client
from bench import Row, prompt
from servers import PATH, Attune

BUCKET = "adapters"
ACCESS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


def run(bench, wanted):
    port = 5600
    # In life the store is another machine: here it must not take the cores that are measured.
    command = ["nice", "-n", "19", bench.python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until_it_answers(url)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).read()
        server = Attune(bench, bench.folder("cold"), "--blob-store", f"s3://{BUCKET}/bench", "--s3-endpoint", url,
                        "--adapter-budget", str(8 << 30), **ACCESS)
        rows = [first_token(bench, server, url)] if "C6" in wanted else []
        rows += [others(bench, server)] if "C7" in wanted else []
        server.stop()
        return rows
    finally:
        store.terminate()
        store.wait()


def until_it_answers(url):
    for _ in range(300):
        try:
            return urllib.request.urlopen(url).read()
        except urllib.error.URLError:
            time.sleep(0.1)
    raise SystemExit("moto's server did not start: is moto[server] in the peers' environment?")


def get(url):
    """moto wants to see a signature, whatever it says."""
    signed = "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    return urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": signed})).read()


def fetch(url, generation):
    """Seconds that a plain client takes for an adapter's objects."""
    listed = get(f"{url}/{BUCKET}?list-type=2&prefix=bench/adapters/{generation}/")
    keys = [entry.text for entry in ElementTree.fromstring(listed).iter() if entry.tag.endswith("Key")]
    begun = time.perf_counter()
    for key in keys:
        get(f"{url}/{BUCKET}/{key}")
    return time.perf_counter() - begun


def first_token(bench, server, url):
    """A new adapter each time: its first request, then two more."""
    found = []
    for i in range(2 if bench.args.quick else 12):
        adapter = server.register(bench.adapter(1000 + i).packed())
        plain = fetch(url, adapter["generation"])
        bodies = [server.body(prompt(n, i), 4, len(server.adapters) - 1) for n in range(3)]
        cold, *warm = (asyncio.run(client.stream(server, PATH, body)).first() for body in bodies)
        found.append((cold, statistics.median(warm), plain))
    # The first one opens connections.
    cold, warm, plain = (statistics.median(column) for column in zip(*found[1:]))
    raw = f"cold {cold * 1000:.0f} ms; warm {warm * 1000:.0f} ms, GET {plain * 1000:.0f} ms (moto, {len(found) - 1} adapters)"
    return Row("C6", "first token cold from S3 / (warm + raw GET)", raw, cold / (warm + plain))


def others(bench, server):
    """Eight streams, alone, beside requests for cold adapters, and beside the same requests for a warm one."""
    tokens, count = (40, 3) if bench.args.quick else (256, 24)
    first = len(server.adapters)
    for i in range(9):
        server.register(bench.adapter(2000 + i).packed())
    streams, warm = range(first, first + 8), first + 8

    def phase(kind, number):
        coming = [] if kind == "quiet" else [warm] * count
        if kind == "cold":
            # Before the clock runs: an import is no load.
            for i in range(count):
                server.register(bench.adapter(3000 + count * number + i).packed())
            coming = range(len(server.adapters) - count, len(server.adapters))
        return asyncio.run(gaps(server, streams, tokens, coming))

    found = bench.medians({kind: functools.partial(phase, kind) for kind in ("quiet", "cold", "warm")})
    raw = ", ".join(f"{name} {value:.1f} ms" for name, value in found.items()) + "; warm: the same arrivals in memory"
    return Row("C7", "others' p99 between tokens, cold loads / quiet", raw, found["cold"] / found["quiet"])


async def gaps(server, streams, tokens, coming):
    """The 99th percentile of the streams' gaps in milliseconds, once all of them write; every half second one comes."""
    async def arrive():
        for i, adapter in enumerate(coming):
            await asyncio.sleep(0.5)
            tasks.append(asyncio.create_task(client.ask(server, PATH, server.body(prompt(i, seed), 1, adapter))))

    tasks, seed = [], time.perf_counter()
    arriving = asyncio.create_task(arrive())
    bodies = [server.body(prompt(i, seed), tokens, adapter) for i, adapter in enumerate(streams)]
    answers = await asyncio.gather(*(client.stream(server, PATH, body) for body in bodies))
    arriving.cancel()
    await asyncio.gather(*tasks)
    since = max(answer.times[0] for answer in answers)
    late = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:-1]) if a > since]
    return round(1000 * client.percentile(late, 0.99), 2)
