"""llama.cpp through llama-cpp-python's low-level API, since its high-level one holds a single sequence.

The model is a GGUF file (to_gguf.py writes one from a checkpoint).
"""

import ctypes
from collections.abc import Iterator

import llama_cpp as lib
import numpy as np
from protocol import Engine, Prompts, serve

BATCH = 2048  # tokens in one llama_decode


class LlamaCpp(Engine):
    """One context that holds all the sequences of a workload."""

    version = lib.__version__

    def __init__(self, settings: dict) -> None:
        lib.llama_backend_init()
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(settings["model"].encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        params = lib.llama_context_default_params()
        params.n_ctx = settings["kv_tokens"]
        params.n_batch = BATCH
        params.n_ubatch = 512
        params.n_seq_max = settings["max_num_seqs"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        if hasattr(params, "kv_unified"):
            params.kv_unified = True  # else each sequence has only n_ctx / n_seq_max
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Compute (token, position, sequence, wants output) rows; the greedy next token by sequence."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        chosen = {}
        for i, (_, _, sequence, wanted) in enumerate(tokens):
            if wanted:
                row = ctypes.cast(lib.llama_get_logits_ith(self.context, i), ctypes.POINTER(ctypes.c_float))
                chosen[sequence] = int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax())
        return chosen

    def generate(self, prompts: Prompts, output_len: int) -> int:
        return sum(self.stream(prompts, output_len))

    def stream(self, prompts: Prompts, output_len: int) -> Iterator[int]:
        self.clear()
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last: dict[int, int] = {}
        for at in range(0, len(rows), BATCH):
            last |= self.decode(rows[at : at + BATCH])
        yield len(last)
        for step in range(1, output_len):
            last = self.decode([(last[i], len(prompts[i]) + step - 1, i, True) for i in range(len(prompts))])
            yield len(last)


if __name__ == "__main__":
    serve(LlamaCpp)
