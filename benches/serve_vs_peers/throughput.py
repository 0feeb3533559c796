"""C1 to C5 and C10: tokens per second of requests that come together, each with the whole answer at its end.

The clock runs from the first request to the last answer, prompts included, for all servers alike.
"""

import asyncio
import random
import time

import client
from bench import Row, prompt
from servers import PATH, Attune, LlamaCpp, MistralRs, TransformersPeft


def run(bench, wanted):
    rows = []
    if wanted & {"C1", "C2", "C3", "C4", "C5"}:
        ours = Attune(bench, bench.folder("throughput"), "--max-batch", "64", "--adapter-budget", str(8 << 30))
        if "C1" in wanted:
            rows += beside(bench, "C1", ours, LlamaCpp(bench, 16, repack=bench.args.repack), base=True)
            if bench.args.torch:
                rows += beside(bench, "C1", ours, TransformersPeft(bench, 16), base=True)
        if wanted & {"C2", "C3", "C4"}:
            for i in range(64 if "C4" in wanted else 16):
                ours.register(bench.adapter(i).packed())
        if "C2" in wanted:
            rows += beside(bench, "C2", ours, LlamaCpp(bench, 16, bench.gguf(16), bench.args.repack))
            if bench.args.torch:
                rows += beside(bench, "C2", ours, TransformersPeft(bench, 16, bench.peft(16)))
        if "C3" in wanted and bench.args.torch:
            rows += beside(bench, "C3", ours, MistralRs(bench, 16, bench.peft(16)))
        if "C4" in wanted:
            rows += beside_own_base(bench, "C4", "64 distinct LoRAs / own base-only", ours, 0)
        if "C5" in wanted:
            first = len(ours.adapters)
            for i in range(64):
                ours.register(bench.mixed(i).packed())
            rows += beside_own_base(bench, "C5", "64 of mixed methods / own base-only", ours, first)
        ours.stop()
    if "C10" in wanted:
        rows += twice_the_tier(bench)
    return rows


def together(server, tokens, adapters, seed):
    """Tokens per second and per second of CPU; one request for each adapter, none for the base."""
    bodies = [server.body(prompt(i, seed), tokens, adapter) for i, adapter in enumerate(adapters)]
    cpu, begun = server.cpu(), time.perf_counter()

    async def all_at_once():
        return await asyncio.gather(*(client.ask(server, PATH, body) for body in bodies))

    answers = asyncio.run(all_at_once())
    seconds = time.perf_counter() - begun
    made = sum(answer["usage"]["completion_tokens"] for answer in answers)
    if made != tokens * len(bodies):
        raise SystemExit(f"{server.name} made {made} tokens, not {tokens * len(bodies)}")
    return round(made / seconds, 1), round(made / max(server.cpu() - cpu, 0.01), 1)


def beside(bench, figure, ours, peer, base=False):
    """16 requests of ours and of a peer's by turns."""
    adapters = [None] * 16 if base else list(range(16))
    what = ("base only" if base else "16 distinct r 16 LoRAs") + f", batch 16, against {peer.name}"
    found = bench.interleaved({server.name: lambda seed, server=server: together(server, bench.tokens, adapters, seed)
                               for server in (ours, peer)})
    peer.stop()
    (a, a_cpu), (b, b_cpu) = (middle(values) for values in found.values())
    raw = f"{a:.1f} and {b:.1f} tokens/s; {a_cpu:.1f} and {b_cpu:.1f} a CPU second"
    return [Row(figure, what, raw, a / b)]


def beside_own_base(bench, figure, what, ours, first):
    kinds = {"base": [None] * 64, "adapters": list(range(first, first + 64))}
    found = bench.interleaved({name: lambda seed, adapters=adapters: together(ours, bench.tokens, adapters, seed)
                               for name, adapters in kinds.items()})
    (base, _), (adapted, _) = (middle(values) for values in found.values())
    return [Row(figure, what + ", batch 64", f"{adapted:.1f} and {base:.1f} tokens/s", adapted / base)]


def middle(values):
    """The median of each of two numbers."""
    return [sorted(column)[len(column) // 2] for column in zip(*values)]


def twice_the_tier(bench):
    """16 clients, each asking for one adapter after another, any of 64, where 32 or all have room in memory."""
    packed = [bench.adapter(i) for i in range(64)]
    room = 32 * max(len(adapter.packed()) for adapter in packed)
    servers = {}
    for name, budget in {"half": room, "all": 4 * room}.items():
        servers[name] = Attune(bench, bench.folder(name), "--adapter-budget", str(budget), "--max-batch", "16")
        for adapter in packed:
            servers[name].register(adapter.packed())
    requests = 32 if bench.args.quick else 160
    measures = {name: lambda seed, server=server: drawn(server, requests, bench.tokens, seed)
                for name, server in servers.items()}
    found = bench.medians(measures)
    [server.stop() for server in servers.values()]
    raw = f"{found['half']:.1f} and {found['all']:.1f} tokens/s; the store is a folder"
    return [Row("C10", "twice the hot tier's adapters / all in memory, 16 clients", raw, found["half"] / found["all"])]


def drawn(server, requests, tokens, seed):
    rng = random.Random(seed)
    left = [(prompt(i, seed), rng.randrange(len(server.adapters))) for i in range(requests)]

    async def one_after_another():
        while left:
            text, adapter = left.pop()
            await client.ask(server, PATH, server.body(text, tokens, adapter))

    async def clients():
        await asyncio.gather(*(one_after_another() for _ in range(16)))

    begun = time.perf_counter()
    asyncio.run(clients())
    return round(requests * tokens / (time.perf_counter() - begun), 1)
