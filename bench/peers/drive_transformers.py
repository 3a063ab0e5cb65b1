"""Transformers' generate(), one static batch: prompts of equal length need no padding. It does not go step by step."""

import torch
import transformers
from protocol import Engine, Prompts, serve


class Transformers(Engine):
    version = transformers.__version__

    def __init__(self, settings: dict) -> None:
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()

    def generate(self, prompts: Prompts, output_len: int) -> int:
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("prompts of different lengths would need padding, which is not measured here")
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=output_len,
                min_new_tokens=output_len, pad_token_id=0,
            )  # fmt: skip
        return (output.shape[1] - ids.shape[1]) * len(prompts)


if __name__ == "__main__":
    serve(Transformers)
