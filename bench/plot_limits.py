"""The share of what the machine allows, for each engine, from results of peers.py: plot_limits.py OUT.svg FILE.json...

One panel a file. A bar is tokens/s over the roofline of the same run ("both together allow"); the number above is
tokens/s. ``--steps`` draws decode steps as lines instead: against the number of requests, and against the context of
one; files of the same model and weights are one row (results of cpu_table.py's sweep, 8k and 32k pieces). Light and dark
pages both show it: the background is white. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

COLORS = {
    "quire": "#1f6f8b",
    "openvino": "#e07a5f",
    "llamacpp": "#81b29a",
    "vllm": "#f2cc8f",
    "transformers": "#9a8c98",
}


def frame(axes: plt.Axes) -> None:
    """A line at the limit, and room above it: a limit that moves can be passed."""
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(0, max(1.12, axes.dataLim.ymax * 1.05))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)


def panel(axes: plt.Axes, content: dict) -> None:
    """Grouped bars of one file."""
    rows = {row["name"]: row["speeds"] for row in content["rows"]}
    bound = rows["limit: both"]
    engines = [name for name in rows if not name.startswith("limit")]
    workloads = list(bound)
    width = 0.8 / len(engines)
    for i, name in enumerate(engines):
        shares = [rows[name].get(work, 0.0) / bound[work] for work in workloads]
        places = [j + (i - (len(engines) - 1) / 2) * width for j in range(len(workloads))]
        bars = axes.bar(places, shares, width * 0.92, label=name, color=COLORS.get(name.partition("-")[0]))
        labels = [f"{rows[name][work]:,.0f}" if work in rows[name] else "failed" for work in workloads]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.set_xticks(range(len(workloads)), [work.replace("->", "→") for work in workloads])
    frame(axes)
    settings = content["settings"]
    axes.set_title(f"{settings['model']}, {settings.get('quantization') or settings['dtype']}", fontsize=10)


STEP = re.compile(r"(\d+) x decode at ([\d,]+)$")


def steps_of(contents: list[dict]) -> dict[str, dict[tuple[int, int], float]]:
    """By engine: share of the limit by (requests, context). Quire is in several files: the last one's value counts."""
    found: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for content in contents:
        rows = {row["name"]: row["speeds"] for row in content["rows"]}
        bound = rows["limit: both"]
        for name, speeds in rows.items():
            for work, speed in speeds.items():
                if (match := STEP.match(work)) and not name.startswith("limit"):
                    found[name][int(match[1]), int(match[2].replace(",", ""))] = speed / bound[work]
    return found


def line_panels(axes: tuple[plt.Axes, plt.Axes], title: str, contents: list[dict]) -> None:
    """Shares against requests (at the shortest context) and against context (of one request)."""
    shares = steps_of(contents)
    shortest = min(context for points in shares.values() for _, context in points)
    for name, points in shares.items():
        style = {"color": COLORS.get(name.partition("-")[0]), "marker": "o", "markersize": 3, "label": name}
        style["linestyle"] = "--" if "-" in name else "-"
        batches = sorted((r, share) for (r, context), share in points.items() if context == shortest)
        contexts = sorted((context, share) for (r, context), share in points.items() if r == 1)
        for each, line in zip(axes, (batches, contexts), strict=True):
            if line:
                each.plot(*zip(*line, strict=True), **style)
    for each, label in zip(
        axes, (f"requests, at {shortest} tokens of context", "tokens of context, 1 request"), strict=True
    ):
        each.set_xscale("log", base=2)
        each.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
        each.set_xlabel(label, fontsize=9)
        frame(each)
    axes[0].set_title(title, fontsize=10, loc="left")
    axes[0].set_ylabel("share of the limit")


def draw_steps(contents: list[dict]) -> plt.Figure:
    by_kind = defaultdict(list)
    for content in contents:
        settings = content["settings"]
        by_kind[f"{settings['model']}, {settings.get('quantization') or settings['dtype']}"].append(content)
    figure, panels = plt.subplots(len(by_kind), 2, figsize=(9, 2.9 * len(by_kind)), squeeze=False)
    for row, (title, each) in zip(panels, by_kind.items(), strict=True):
        line_panels(tuple(row), title, each)
    lines = {name: line for axes in panels.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0, 1].legend(lines.values(), lines.keys(), ncols=2, fontsize=8, frameon=False, loc="lower left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--steps", action="store_true", help="decode steps, against requests and context")
    args = parser.parse_args()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    matplotlib.rcParams["svg.hashsalt"] = "quire"  # the same file from the same figures
    figure = draw_steps(contents) if args.steps else draw_bars(contents)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


def draw_bars(contents: list[dict]) -> plt.Figure:
    figure, panels = plt.subplots(len(contents), 1, figsize=(9, 3.1 * len(contents)), squeeze=False)
    for axes, content in zip(panels[:, 0], contents, strict=True):
        panel(axes, content)
        axes.set_ylabel("share of the limit")
    bars = {name: bar for axes in panels[:, 0] for bar, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0, 0].legend(
        bars.values(), bars.keys(), ncols=5, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.28)
    )
    return figure


if __name__ == "__main__":
    main()
