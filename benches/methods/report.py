"""What was found, as a table and as a picture."""

import html
import os
import statistics
import subprocess
import time
from pathlib import Path

from effects import EFFECTS


def values(about):
    return {variant: one["values"] for variant, one in about["variants"].items()}


def table(args, results):
    effects = results["effects"]
    seconds = results["seconds"] + sum(about.get("seconds", 0) for about in effects.values())
    lines = ["# Published effects, in small", "",
             f"Made by `python3 benches/methods/run.py{' --small' if args.small else ''}` on {time.strftime('%Y-%m-%d')} with "
             f"{version(args.binary)} in {seconds / 60:.0f} minutes of processor time: {machine()}.", "",
             f"A Llama of 5 million weights made from a seed learns words first (loss {results['loss']:.3f} on new texts); on it "
             f"the methods learn small tasks, each for as many steps as the others of its effect, with the best of three learning "
             f"rates by a validation part. Values are of a held-out part: means over {args.seeds} seeds, with the least and the "
             "largest. Orderings are what counts; the sizes say nothing about large models. `numbers` are those in the "
             "adapter's file.", "",
             "| effect | variant | rate | numbers | measure | mean | range | shown |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    hidden = []
    for name, about in effects.items():
        effect = EFFECTS[name]
        title = f"{name}: {effect.claim} ({effect.source})"
        if "lacking" in about:
            lines.append(f"| {title} | | | | | | | not run: this server has no method {', '.join(about['lacking'])} |")
            continue
        is_shown = effect.judge(values(about))
        if not is_shown:
            hidden.append(f"- {name}: {effect.guess or 'no guess yet'}")
        for i, (variant, one) in enumerate(about["variants"].items()):
            found, rate = one["values"], one["rate"]
            trained = rate and effect.steps > 1
            lines.append(f"| {title if i == 0 else ''} | {variant} | {f'{rate:g}' if trained else ''} | {one.get('size', '')} "
                         f"| {effect.unit} | {statistics.mean(found):.4f} | {min(found):.4f} to {max(found):.4f} "
                         f"| {('yes' if is_shown else 'no') if i == 0 else ''} |")
    if hidden:
        lines += ["", "What did not show, and a guess why:", "", *hidden]
    if not args.small:
        lines += ["", "![Means and ranges by effect](methods.svg)"]
    return "\n".join(lines) + "\n"


def version(binary):
    return subprocess.run([binary, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def machine():
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown CPU")
    return f"{cpu}, {os.environ.get('RAYON_NUM_THREADS') or os.cpu_count()} threads"


def picture(effects):
    """A bar for each variant, with the range over seeds."""
    parts, y, left, width = [], 10, 250, 380
    for name, about in effects.items():
        if "lacking" in about:
            continue
        found = values(about)
        shown = "shown" if EFFECTS[name].judge(found) else "not shown"
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{name} ({EFFECTS[name].unit}): {shown}</text>')
        most = max(max(results) for results in found.values()) or 1.0
        y += 20
        for variant, results in found.items():
            low, mid, high = (width * value / most for value in (min(results), statistics.mean(results), max(results)))
            parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{html.escape(variant)}</text>'
                         f'<rect x="{left}" y="{y}" width="{mid:.1f}" height="12" fill="#4a7fb5"/>'
                         f'<path d="M{left + low:.1f} {y + 6}H{left + high:.1f}" stroke="#222"/>'
                         f'<text x="{left + high + 6:.1f}" y="{y + 11}">{statistics.mean(results):.3f}</text>')
            y += 16
        y += 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{y}" '
            f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n')
