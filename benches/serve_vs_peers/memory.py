"""C8 and C9, and the base alone: bytes in memory, as the system counts them."""

import asyncio
import time
from pathlib import Path

import client
from bench import Row
from servers import PATH, Attune

ONE_TOKEN = {"num_virtual_tokens": 1}


def run(bench, wanted):
    rows = []
    if "base" in wanted:
        rows.append(base(bench))
    if "C8" in wanted:
        rows.append(hot(bench))
    if "C9" in wanted:
        rows.append(registered(bench))
    return rows


def settled(server):
    """Once nothing is given back any more."""
    time.sleep(2)
    return server.resident()


def use(server, adapters):
    async def one_by_one():
        for adapter in adapters:
            await client.ask(server, PATH, server.body("Hi", 1, adapter))

    asyncio.run(one_by_one())


def base(bench):
    server = Attune(bench, bench.folder("base"))
    use(server, [None] * 4)
    resident, own, file = settled(server), server.resident("RssAnon"), Path(bench.model).stat().st_size
    server.stop()
    raw = f"{resident / 1e6:.1f} MB for the whole process ({own / 1e6:.1f} besides the mapped model and program) and "
    return Row("base", "memory of a server with the base alone / the model's file", raw + f"{file / 1e6:.1f} MB", resident / file)


def hot(bench):
    count = 4 if bench.args.quick else 32
    server = Attune(bench, bench.folder("hot"), "--adapter-budget", str(8 << 30))
    adapters = [bench.adapter(i) for i in range(count + 4)]
    for adapter in adapters:
        server.register(adapter.packed())
    # Some before it counts: what is taken once is no adapter's.
    use(server, [None] * 4 + list(range(4)))
    before = settled(server)
    use(server, range(4, count + 4))
    added = (settled(server) - before) / count
    server.stop()
    size = adapters[0].bytes()
    raw = f"{added / 1e6:.2f} and {size / 1e6:.2f} MB, r 16 LoRAs stored in bfloat16, {count} of them"
    return Row("C8", "memory of a hot adapter / its tensors", raw, added / size)


def registered(bench):
    count = 200 if bench.args.quick else 10_000
    server = Attune(bench, bench.folder("registered"))
    template = bench.template("prompt")
    # One virtual token each: what is measured is the registration, not the files.
    template = type(template)({**template.config, **ONE_TOKEN}, {
        name: (dtype, [1, shape[1]], data[:len(data) // shape[0]]) for name, (dtype, shape, data) in template.tensors.items()})
    for i in range(100):
        server.register(template.another(-1 - i).packed())
    use(server, [None] * 4 + list(range(4)))
    before, begun = settled(server), time.perf_counter()
    for i in range(count):
        server.register(template.another(i).packed())
    seconds = time.perf_counter() - begun
    added = settled(server) - before
    server.stop()
    raw = f"{before / 1e6:.1f} MB before, {count} imports in {seconds:.0f} s"
    return Row("C9", f"memory added by {count:,} registered adapters", raw, added / 1e6, "MB")
