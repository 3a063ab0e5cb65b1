"""From a command to the first token: open a checkpoint with ``LLM``, produce one token, say so, and how long each took."""

from __future__ import annotations

import argparse
import json
import time

BEGIN = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device", required=True)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    args = parser.parse_args()
    from quire.llm import LLM
    from quire.sampling.params import SamplingParams

    imported = time.perf_counter()
    llm = LLM(
        args.folder, device=args.device, skip_tokenizer_init=True, kv_cache_memory_bytes=args.kv_cache_memory_bytes
    )
    ready = time.perf_counter()
    tokens = llm.generate(list(range(16)), SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    done = time.perf_counter()
    print(json.dumps({
        "tokens": tokens[0].outputs[0].token_ids, "import": round(imported - BEGIN, 2),
        "load": round(ready - imported, 2), "token": round(done - ready, 2),
    }), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
