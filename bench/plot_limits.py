"""The share of what the machine allows, for each engine, from results of peers.py: plot_limits.py OUT.svg FILE.json...

One panel a file. A bar is tokens/s over the roofline of the same run ("both together allow"); the number above is
tokens/s. Light and dark pages both show it: the background is white. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
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
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(workloads)), [work.replace("->", "→") for work in workloads])
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    settings = content["settings"]
    axes.set_title(f"{settings['model']}, {settings.get('quantization') or settings['dtype']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    matplotlib.rcParams["svg.hashsalt"] = "quire"  # the same file from the same figures
    figure, panels = plt.subplots(len(contents), 1, figsize=(9, 3.1 * len(contents)), squeeze=False)
    for axes, content in zip(panels[:, 0], contents, strict=True):
        panel(axes, content)
        axes.set_ylabel("share of the limit")
    bars = {name: bar for axes in panels[:, 0] for bar, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0, 0].legend(
        bars.values(), bars.keys(), ncols=5, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.28)
    )
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
