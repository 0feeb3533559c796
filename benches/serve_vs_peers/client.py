"""HTTP for measuring: many requests at once on one thread, each piece of a stream with the time at which it came."""

import asyncio
import json
import time
from dataclasses import dataclass, field


@dataclass
class Stream:
    """An answer in pieces."""

    begun: float
    times: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    def first(self):
        """Seconds to the first token."""
        return self.times[0] - self.begun

    def gaps(self):
        """Seconds between tokens; the last piece says only that the answer has ended."""
        return [b - a for a, b in zip(self.times, self.times[1:-1])]

    def pieces(self):
        return [json.loads(line) for line in self.lines]


async def ask(server, path, body):
    """The whole answer to a request."""
    reader, writer = await _send(server, path, body)
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b"transfer-encoding: chunked" in head.lower():
        content = _joined(content)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise SystemExit(f"{server.name}, {path}: {content.decode(errors='replace')[:2000]}")
    return json.loads(content)


async def stream(server, path, body):
    """The events of an answer, until it ends."""
    found = Stream(time.perf_counter())
    reader, writer = await _send(server, path, {**body, "stream": True})
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{server.name}, {path}: {(await reader.read()).decode(errors='replace')[:2000]}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            found.times.append(time.perf_counter())
            found.lines.append(line[6:])
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return found


async def events(server, path):
    """Each event of a job's stream with its time, as they come."""
    reader, writer = await _send(server, path, None, "Accept: text/event-stream\r\n")
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                yield time.perf_counter(), json.loads(line[6:])
    finally:
        writer.close()


def percentile(values, share):
    """The smallest value that so large a share of them does not pass."""
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))]


async def _send(server, path, body, more=""):
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
    content = b"" if body is None else json.dumps(body).encode()
    head = (f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n{more}"
            f"Authorization: Bearer {server.key}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n")
    writer.write(head.encode() + b"\r\n" + content)
    return reader, writer


def _joined(content):
    """What chunks hold."""
    whole = b""
    while content:
        size, _, rest = content.partition(b"\r\n")
        size = int(size.split(b";")[0], 16)
        whole += rest[:size]
        content = rest[size + 2:] if size else b""
    return whole
