"""Quire, through quire.LLM in this process."""

from collections.abc import Iterator

from protocol import Engine, Prompts, serve

import quire


class Quire(Engine):
    version = quire.__version__

    def __init__(self, settings: dict) -> None:
        self.llm = quire.LLM(
            settings["model"],
            device="cpu",
            skip_tokenizer_init=True,
            dtype=settings["dtype"],
            quantization=settings.get("quantization"),
            threads=settings["threads"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            num_pages=(settings["kv_tokens"] // 16 + 1,),
            swap_space=0,
            enable_prefix_caching=False,
            **settings.get("options", {}),
        )
        self.facts = {"weights": self.llm._engine.memory.weights}

    def generate(self, prompts: Prompts, output_len: int) -> int:
        params = quire.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def stream(self, prompts: Prompts, output_len: int) -> Iterator[int]:
        params = quire.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        core = self.llm._engine.core
        ids = [f"stream-{i}" for i in range(len(prompts))]
        for name, prompt in zip(ids, prompts, strict=True):
            core.add(self.llm._inputs.request({"prompt_token_ids": prompt}, params, name)[1])
        try:
            while core.has_work():
                yield sum(len(output.token_ids) for output in core.step())
        finally:
            core.abort(ids)
            while core.has_work() or core.in_flight:
                core.step()


if __name__ == "__main__":
    serve(Quire)
