"""Model files: GGUF and safetensors readers, quantised formats, tensor name maps. Never imports tinyllm."""

from weights.checkpoint import Checkpoint, open_checkpoint
from weights.errors import WeightsError
from weights.tensor import Tensor

__all__ = ["Checkpoint", "Tensor", "WeightsError", "open_checkpoint"]
