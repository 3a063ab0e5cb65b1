"""Quire, through quire.LLM in this process."""

from protocol import Generate, serve

import quire


def load(settings: dict) -> tuple[Generate, str]:
    llm = quire.LLM(
        settings["model"],
        skip_tokenizer_init=True,
        dtype=settings["dtype"],
        quantization=settings.get("quantization"),
        threads=settings["threads"],
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_num_seqs"],
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], output_len: int) -> int:
        params = quire.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate, quire.__version__


if __name__ == "__main__":
    serve(load)
