"""Decode steps as CUDA graphs: recorded the second time that one of their size runs, replayed from then on.

The first time a step runs op by op, since kernels may have to be loaded, which no recording may hold.
"""

from __future__ import annotations

from collections.abc import Callable

from cuda_kernels.launch import Graph, Runtime
from tinyllm.backends.base import Batch
from tinyllm.backends.cuda_staging import GraphKey, graph_key

__all__ = ["GraphSteps"]

MAX_GRAPHS = 64


class GraphSteps:
    """A StepRunner that replays graphs.

    Args:
        generation: what changes when memory moves that the launches point at.
    """

    def __init__(self, runtime: Runtime, generation: Callable[[], object]) -> None:
        self.graphs: dict[GraphKey, Graph] = {}
        self._runtime = runtime
        self._generation = generation
        self._recorded_at = generation()
        self._seen: set[GraphKey] = set()

    def run(self, batch: Batch, step: Callable[[], None]) -> None:
        key = graph_key(batch)
        if key is None:
            step()
            return
        if self._generation() != self._recorded_at:
            self.graphs.clear()
            self._recorded_at = self._generation()
        graph = self.graphs.get(key)
        if graph is None:
            if key not in self._seen:
                self._seen.add(key)
                step()
                return
            if len(self.graphs) >= MAX_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            graph = self.graphs[key] = self._runtime.capture(step)
        graph.launch()
