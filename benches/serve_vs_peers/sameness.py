"""C13: the tokens of many requests of mixed methods at once, against each of them alone."""

import asyncio

import client
from bench import Row, prompt
from servers import PATH, Attune


def run(bench, wanted):
    count, tokens = (12, 8) if bench.args.quick else (64, 32)
    server = Attune(bench, bench.folder("sameness"), "--max-batch", "64", "--adapter-budget", str(8 << 30))
    for i in range(count):
        server.register(bench.mixed(i).packed())
    # Some without an adapter, and some that share one.
    adapters = [None if i % 16 == 15 else i - i % 16 if i % 16 == 14 else i for i in range(count)]
    bodies = [{**server.body(prompt(i), tokens - i % 5, adapter), "logprobs": 0} for i, adapter in enumerate(adapters)]
    differing = made = texts = 0
    for number in range(bench.rounds):
        batched = asyncio.run(all_at_once(server, bodies))
        alone = [asyncio.run(client.ask(server, PATH, body)) for body in bodies]
        for a, b in zip(batched, alone):
            a, b = (answer["choices"][0]["logprobs"]["tokens"] for answer in (a, b))
            differing += sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))
            made += len(b)
        texts = len({answer["choices"][0]["text"] for answer in alone})
    server.stop()
    raw = f"of {made}; {count} requests, {texts} different texts"
    return [Row("C13", "tokens that differ, batched mixed against alone", raw, differing)]


async def all_at_once(server, bodies):
    """A little apart, so that some read while others write."""
    async def later(i, body):
        await asyncio.sleep(0.01 * (i % 7))
        return await client.ask(server, PATH, body)

    return await asyncio.gather(*(later(i, body) for i, body in enumerate(bodies)))
