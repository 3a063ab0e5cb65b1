"""vLLM's CPU build. Its fair setting: threads bound to all cores (as here), and LD_PRELOAD of its libiomp5 (env)."""

import os
from collections.abc import Iterator

from protocol import Engine, Prompts, serve


class VLLM(Engine):
    def __init__(self, settings: dict) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{settings['threads'] - 1}")
        import vllm

        self.vllm, self.version = vllm, vllm.__version__
        self.llm = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            enable_prefix_caching=False,
            **settings.get("options", {}),
        )
        self.asked = 0

    def _params(self, output_len: int):
        return self.vllm.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)

    def generate(self, prompts: Prompts, output_len: int) -> int:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, self._params(output_len), use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def stream(self, prompts: Prompts, output_len: int) -> Iterator[int]:
        engine, ids = self.llm.llm_engine, []
        for prompt in prompts:
            self.asked += 1
            ids.append(str(self.asked))
            engine.add_request(ids[-1], {"prompt_token_ids": prompt}, self._params(output_len))
        known = dict.fromkeys(ids, 0)
        try:
            while engine.has_unfinished_requests():
                before = sum(known.values())
                known |= {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
                yield sum(known.values()) - before
        finally:
            engine.abort_request(ids)
            while engine.has_unfinished_requests():
                engine.step()


if __name__ == "__main__":
    serve(VLLM)
