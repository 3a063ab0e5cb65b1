"""The conformance kit on a GPU plugin of this checkout, installed or not."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "rocm", "xpu"), default="cuda")
    parser.add_argument("-k", dest="keyword", help="only cases whose names match, as pytest's -k")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="bits must not depend on the batch: the kit then asks it"
    )
    parser.add_argument("--json", type=Path, help="write the report there")
    args = parser.parse_args()

    from quire.conformance.kit import Target, run
    from quire.hardware import DeviceOptions, DeviceUnavailable

    name = f"{args.device.capitalize()}Backend"
    factory = getattr(importlib.import_module(f"quire_{args.device}.backend"), name)
    try:
        factory().devices()
    except DeviceUnavailable as error:
        print(error)
        return 2
    ranks = ["--factory", f"quire_{args.device}.backend:{name}"]
    options = DeviceOptions(batch_invariant=args.batch_invariant)
    target = Target(args.device, factory, options=options, rank_arguments=ranks)
    report = run(target, keyword=args.keyword, modules=["company"] if args.batch_invariant else [])
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    for case in report.cases:
        if case.outcome == "failed":
            print(f"fell short: {case.area} {case.name}: {case.message.splitlines()[0] if case.message else ''}")
    return report.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
