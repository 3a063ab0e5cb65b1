"""Decode steps recorded as graphs of torch.cuda (CUDA, and HIP under the same name).

All recordings share one memory pool: they are replayed one after another, so what one needed while it ran the next
may use. What stays taken is each recording's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from quire.hardware import CapturedStep

log = logging.getLogger("quire.triton")


class GraphStep(CapturedStep):
    """A recorded step. Its output is the same memory at every replay: copy what must outlive the next."""

    def __init__(self, graph: Any, output: Any) -> None:
        self.graph, self.output = graph, output

    def replay(self) -> Any:
        self.graph.replay()
        return self.output


class Recorder:
    """Records functions, each once run beforehand: kernels are then compiled, and libraries have their workspaces.

    ``module`` is torch.cuda. One stream beside the default one serves every recording.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.pool: Any = None
        self.beside: Any = None
        self.count = 0

    def record(self, fn: Callable[[], Any]) -> CapturedStep | None:
        """``fn`` recorded, or None, with one line in the log, when it does something that cannot be (an operation that
        waits for the device, as the reference of a mixture of experts does)."""
        if self.pool is None:
            self.pool, self.beside = self.module.graph_pool_handle(), self.module.Stream()
        self.beside.wait_stream(self.module.current_stream())
        with self.module.stream(self.beside):
            fn()
        self.module.current_stream().wait_stream(self.beside)
        graph = self.module.CUDAGraph()
        try:
            # Only this thread's calls are held to what a recording allows: others may copy meanwhile.
            with self.module.graph(graph, pool=self.pool, stream=self.beside, capture_error_mode="thread_local"):
                output = fn()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("decode steps are not recorded as graphs: %s", reason)
            return None
        self.count += 1
        return GraphStep(graph, output)
