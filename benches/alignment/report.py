"""The lines of `cargo bench --bench alignment` as a table, and the reward–divergence curve as docs/alignment.svg.

cargo bench --bench alignment > lines; python3 benches/alignment/report.py lines
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

SVG = Path(__file__).resolve().parents[2] / "docs/alignment.svg"
COLOURS = {"dpo": "#2f6fa7", "ppo": "#c4602a"}
WIDTH, HEIGHT, LEFT, TOP = 460, 280, 60, 20


def main():
    lines = [line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    found = defaultdict(lambda: defaultdict(list))
    seen, seconds = defaultdict(list), defaultdict(list)
    for row in rows:
        name = row["effect"]
        seen[name].append(row["seen"])
        seconds[name].append(row["seconds"])
        for key, value in flat(row["figures"]):
            found[name][key].append(value)
    print("| effect | figure | mean | least | most | seeds that show it | seconds a seed |\n|---|---|---|---|---|---|---|")
    for name, figures in found.items():
        for i, (key, values) in enumerate(figures.items()):
            shown = f"{sum(seen[name])} of {len(seen[name])} | {statistics.mean(seconds[name]):.0f}" if i == 0 else " |"
            print(f"| {name if i == 0 else ''} | {key} | {statistics.mean(values):.3f} | {min(values):.3f} "
                  f"| {max(values):.3f} | {shown} |")
    curves = [row["figures"] for row in rows if row["effect"] == "curve"]
    if curves:
        SVG.write_text(picture(curves))


def flat(figures, path=""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key} ")
        elif isinstance(value, list):
            for point in value:
                yield f"{path}{key} {point['weight']} reward", point["reward"]
                yield f"{path}{key} {point['weight']} kl", point["kl"]
        else:
            yield path + key, value


def picture(curves):
    """Each seed's points, small; means over seeds, joined."""
    far = 1.05 * max(point["kl"] for curve in curves for name in COLOURS for point in curve[name])
    x = lambda kl: LEFT + WIDTH * max(kl, 0) / far  # noqa: E731
    y = lambda reward: TOP + HEIGHT * (1 - reward)  # noqa: E731
    parts = [f'<path d="M{LEFT} {TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#222"/>']
    for reward in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{LEFT - 8}" y="{y(reward) + 4:.1f}" text-anchor="end">{reward}</text>')
    step = max(1, round(far / 6))
    for kl in range(0, int(far) + 1, step):
        parts.append(f'<text x="{x(kl):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{kl}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">divergence from the base, '
                 'nats a completion</text>')
    parts.append(f'<text x="16" y="{TOP + HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {TOP + HEIGHT / 2})">'
                 'share of vowels</text>')
    start = statistics.mean(curve["base"] for curve in curves)
    for n, (name, colour) in enumerate(COLOURS.items()):
        middle = [(0, start)]
        for at in range(len(curves[0][name])):
            points = [curve[name][at] for curve in curves]
            parts += [f'<circle cx="{x(p["kl"]):.1f}" cy="{y(p["reward"]):.1f}" r="2.5" fill="{colour}" opacity="0.5"/>'
                      for p in points]
            middle.append((statistics.mean(p["kl"] for p in points), statistics.mean(p["reward"] for p in points)))
        middle.sort()
        line = "L".join(f"{x(kl):.1f} {y(reward):.1f}" for kl, reward in middle)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + WIDTH - 60}" y="{TOP + HEIGHT - 40 + 18 * n}" fill="{colour}" '
                     f'font-weight="bold">{name.upper()}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{TOP + HEIGHT + 44}" '
            f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n')


main()
