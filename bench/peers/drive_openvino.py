"""OpenVINO GenAI's continuous batching. The model is what `optimum-cli export openvino` wrote, at any weight format."""

from collections.abc import Iterator

import numpy as np
import openvino
import openvino_genai
from protocol import Engine, Prompts, serve

PRECISION = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}
BLOCK = 32  # tokens in a block of its cache on a CPU


class OpenVINO(Engine):
    version = openvino_genai.__version__

    def __init__(self, settings: dict) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = settings["kv_tokens"] // BLOCK + settings["max_num_seqs"] + 1
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = settings["max_num_seqs"]
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_PRECISION_HINT": PRECISION[settings["dtype"]],
            "INFERENCE_NUM_THREADS": settings["threads"],
            **settings.get("options", {}),
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties)
        self.asked = 0

    def _config(self, output_len: int) -> openvino_genai.GenerationConfig:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.ignore_eos = True
        config.do_sample = False
        return config

    def generate(self, prompts: Prompts, output_len: int) -> int:
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = self.pipeline.generate(tensors, [self._config(output_len)] * len(prompts))
        return sum(len(result.m_generation_ids[0]) for result in results)

    def stream(self, prompts: Prompts, output_len: int) -> Iterator[int]:
        handles = []
        for prompt in prompts:
            self.asked += 1
            tensor = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.asked, tensor, self._config(output_len)))
        try:
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
                ready = [handle.read() for handle in handles if handle.can_read()]
                yield sum(len(output.generated_ids) for each in ready for output in each.values())
        finally:
            for handle in handles:
                handle.cancel()
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()


if __name__ == "__main__":
    serve(OpenVINO)
