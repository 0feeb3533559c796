"""What was found, as a table and as a picture."""

import html
import os
import statistics
import subprocess
import time

import setup
from effects import EFFECTS


def values(about):
    return {variant: one["values"] for variant, one in about["variants"].items()}


def table(args, about, effects):
    seconds = about["seconds"] + sum(one["seconds"] for one in effects.values())
    lines = ["# Published effects, in small", "",
             f"Made by `python3 benches/methods/run.py{' --small' if args.small else ''}` on {time.strftime('%Y-%m-%d')} with "
             f"{version(args.binary)} in {seconds / 60:.0f} minutes of processor time: {machine()}. A row "
             "that was not run is of a method that this version has not, or was left for later.", "",
             f"A Llama of 5 million weights made from a seed learns words first (loss {about['loss']:.3f} on new texts); on it "
             f"the methods learn small tasks, each for as many steps as the others of its effect, with the best of three learning "
             f"rates by a validation part where no rate is said. Values are of a held-out part: means over {args.seeds} seeds, with the least and the "
             "largest. Orderings are what counts; the sizes say nothing about large models. `numbers` are those in the "
             "adapter's file; a star stands at rates that were the least or the largest of those tried.", "",
             "| effect | variant | rate | numbers | measure | mean | range | shown |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    remarks = []
    for name, effect in EFFECTS.items():
        rows = f"{effect.samples} rows of {effect.task}, {effect.steps} steps"
        title = f"{name}: {effect.claim} ({effect.source}); {rows if effect.steps > 1 else effect.task}"
        if name not in effects:
            lines.append(f"| {title} | {', '.join(effect.variants)} | | | | | | not run |")
            continue
        about = effects[name]
        is_shown = effect.judge(values(about))
        if effect.remark or not is_shown:
            remarks.append(f"- {name}: {effect.remark or 'not shown; why is not known'}")
        for i, (variant, one) in enumerate(about["variants"].items()):
            found = one["values"]
            lines.append(f"| {title if i == 0 else ''} | {variant} | {chosen(one['tried'], effect.rate)} | {one.get('size', '')} "
                         f"| {effect.unit} | {statistics.mean(found):.4f} | {min(found):.4f} to {max(found):.4f} "
                         f"| {('yes' if is_shown else 'no') if i == 0 else ''} |")
    if remarks:
        lines += ["", "Remarks, and guesses where an effect did not show:", "", *remarks]
    if not args.small:
        lines += ["", "![Means and ranges by effect](methods.svg)"]
    return "\n".join(lines) + "\n"


def chosen(tried, rate):
    """The best rate, with a star if a better one may lie beyond those that were tried; or the one that is said."""
    rates = sorted(float(rate) for rate in tried)
    best = float(min(tried, key=tried.get, default=0))
    return f"{best:g}{'*' if best in (rates[0], rates[-1]) else ''}" if tried else f"{rate:g}" if rate else ""


def version(binary):
    return subprocess.run([binary, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def machine():
    return f"{setup.machine()}; {os.environ.get('RAYON_NUM_THREADS') or os.cpu_count()} threads"


def picture(effects):
    """A bar for each variant, with the range over seeds."""
    parts, y, left, width = [], 10, 250, 380
    for name in filter(effects.get, EFFECTS):
        found = values(effects[name])
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
