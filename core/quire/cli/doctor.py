"""``quire doctor``: look at every device, compute something on it, and say what is native and what is not usable."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from quire.hardware import Backend, DeviceOptions, UserError
from quire.plugins import Registry, describe, load, native

HELP = "check every device: memory, dtypes, a computation, native operations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="only this one (default: all that are registered)")
    parser.add_argument("--threads", type=int, metavar="N", help="host threads, where the device uses them")
    parser.add_argument(
        "--isa", metavar="NAME", help="instruction set, where the device has several (default: the best)"
    )
    parser.add_argument("--attention-backend", metavar="NAME", help="open the device with this one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """0 if a device is usable (the one that was named, if one was)."""
    registry = load(args.plugins)
    names = [args.device] if args.device else sorted(registry.backends)
    options = DeviceOptions(threads=args.threads, isa=args.isa, attention_backend=args.attention_backend)
    devices = [examine(registry, name, options) for name in names]
    refused = {plugin.name: plugin.error for plugin in registry.plugins if plugin.error}
    if args.json:
        json.dump({"devices": devices, "refused": refused}, sys.stdout, indent=1)
        print()
    else:
        show(devices, refused)
    return 0 if any(device["usable"] for device in devices) else 1


def examine(registry: Registry, name: str, options: DeviceOptions = DeviceOptions()) -> dict[str, Any]:
    """All that is known of a registered device. ``problem`` says why it is not usable; a bad result is a problem."""
    backend, found, why = registry.find(name)
    report: dict[str, Any] = {"device": name, "usable": False, "problem": why, "found": [], "computation": {}}
    if backend is None or not found:
        return report
    report["operations"] = native(backend)
    try:
        backend.open(found[0].index, options)
        for info in backend.devices():  # again: opening may have said what they compute with
            memory = backend.memory(info.index)
            row = {"index": info.index, "name": info.name, "details": info.details}
            report["found"].append({**row, "free": memory.free, "total": memory.total})
        capabilities = backend.capabilities  # opening may have made them more exact
        report["graphs"], report["batch_invariant"] = capabilities.graphs, capabilities.batch_invariant
        report["collectives"] = sorted(capabilities.collectives)
        report["computation"] = {dtype: check(backend, dtype) for dtype in sorted(capabilities.dtypes)}
        report["notes"] = backend.notes()  # after computing: what was chosen may depend on what was asked
    except Exception as error:  # a doctor does not fall ill of what it finds
        text = str(error) if isinstance(error, UserError) else describe(error)
        report["problem"] = text.partition("\n")[0]
    wrong = [f"{dtype}: {result}" for dtype, result in report["computation"].items() if result != "right"]
    report["problem"] = report["problem"] or "; ".join(wrong)
    report["usable"] = not report["problem"]
    return report


def check(backend: Backend, dtype: str) -> str:
    """A product and a paged attention, compared with float64: "right", or what is wrong."""
    from quire.conformance.ops import Weight, both, random
    from quire.conformance.world import Row, Shape, compare, usual_head, usual_kv

    try:
        both(backend, dtype, lambda b, x, w: b.linear(x, w), random(3, 64), Weight(random(24, 64, seed=1, scale=0.1)))
        shape = Shape(
            head_dim=usual_head(backend),
            page_size=min(backend.capabilities.page_sizes),
            dtype=dtype,
            kv_dtype=usual_kv(backend, dtype),
        )
        compare(backend, [Row(9, 9), Row(40, 1)], shape)
    except Exception as error:
        return str(error) if isinstance(error, AssertionError) else describe(error)
    return "right"


def show(devices: list[dict[str, Any]], refused: dict[str, str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    for device in devices:
        mark = "[green]usable[/green]" if device["usable"] else "[red]not usable[/red]"
        console.print(f"[bold]{escape(device['device'])}[/bold]  {mark}")
        for info in device["found"]:
            free, total = (f"{info[key] / 2**30:.1f} GiB" for key in ("free", "total"))
            details = f" ({info['details']})" if info["details"] else ""
            console.print(escape(f"  {info['index']}: {info['name']}{details}, {free} free of {total}"))
        for dtype, result in device["computation"].items():
            console.print(escape(f"  {dtype}: a product and an attention computed, {result}"))
        if "operations" in device:
            for title, wanted in (("native", True), ("reference", False)):
                names = [name for name, is_native in device["operations"].items() if is_native == wanted]
                console.print(f"  {title}: {', '.join(names) or 'none'}")
        if "graphs" in device:
            answers = {key: "yes" if device[key] else "no" for key in ("graphs", "batch_invariant")}
            console.print(f"  captured steps: {answers['graphs']}; batch-invariant: {answers['batch_invariant']}")
            console.print(f"  collectives: {', '.join(device['collectives']) or 'none'}")
        for note in device.get("notes", ()):
            console.print(escape(f"  {note}"))
        if device["problem"]:
            console.print(f"  [red]{escape(device['problem'])}[/red]")
    for name, error in refused.items():
        console.print(f"[red]plugin {escape(name)} was refused:[/red] {escape(error)}")
    if not devices:
        console.print("No plugin registers a device. `pip install quire-plugin-cpu` runs anywhere.")
