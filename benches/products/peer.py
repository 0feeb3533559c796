"""The products of `main.rs` in torch, over dense weights of the same shapes: the same names, the same figures."""

import argparse
import json
import statistics
import time

import torch

SHAPES = {"q_proj": (576, 576), "k_proj": (576, 192), "gate_proj": (576, 1536), "down_proj": (1536, 576)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--ranks", type=lambda text: [int(rank) for rank in text.split(",")], default=[8, 16, 64])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    random = lambda *shape, grad=True: torch.randn(*shape, dtype=dtype, requires_grad=grad)  # noqa: E731
    found = {}
    for name, (width, out) in SHAPES.items():
        x, w = random(args.rows, width), random(out, width, grad=False)
        measure(found, f"{name} {width} to {out}", args.repetitions, [x], lambda: torch.nn.functional.linear(x, w))
    for rank in args.ranks:
        x, a, b = random(args.rows, 576), random(rank, 576), random(576, rank)
        measure(found, f"rank {rank} of 576", args.repetitions, [x, a, b], lambda: 2.0 * ((x @ a.T) @ b.T))
    print(json.dumps(found))


def measure(found, name, repetitions, leaves, product):
    forward, backward = [], []
    for _ in range(repetitions + 2):
        begun = time.perf_counter()
        y = product()
        forward.append((time.perf_counter() - begun) * 1000)
        g = torch.ones_like(y)
        begun = time.perf_counter()
        y.backward(g)
        backward.append((time.perf_counter() - begun) * 1000)
        for leaf in leaves:
            leaf.grad = None
    found[f"{name}, forward"] = statistics.median(forward[2:])
    found[f"{name}, backward"] = statistics.median(backward[2:])


if __name__ == "__main__":
    main()
