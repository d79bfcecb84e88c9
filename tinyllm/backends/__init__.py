"""Backends: one implementation of the ops per device."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from tinyllm.backends.base import Backend
from tinyllm.config import EngineConfig
from tinyllm.errors import ConfigError, DeviceError

__all__ = ["DEVICES", "backend_for", "create_backend"]

DEVICES = ("auto", "cuda", "cpu", "cuda-emulated", "reference")


def backend_for(engine: EngineConfig, *, on_event: Callable[[str], None] | None = None) -> Backend:
    """The backend that an engine's options ask for. Raises DeviceError, ConfigError; see create_backend."""
    return create_backend(
        engine.device,
        engine.num_threads,
        compute_dtype=engine.compute_dtype,
        activations=engine.activations,
        cuda_graphs=engine.cuda_graphs,
        fast_matmul=engine.fast_matmul,
        on_event=on_event,
    )


def create_backend(
    device: str = "auto",
    num_threads: int | None = None,
    *,
    compute_dtype: str = "auto",
    activations: str = "f32",
    cuda_graphs: bool = True,
    fast_matmul: bool = False,
    on_event: Callable[[str], None] | None = None,
) -> Backend:
    """The backend for a device name, importing none of the others.

    Args:
        device: "auto" is a GPU where there is one that can be used, else the CPU.
        num_threads: CPU threads to use; None means all that this process may.
        activations: of the CPU; compute_dtype, cuda_graphs, fast_matmul: of the GPU; see tinyllm.config.EngineConfig.
        on_event: receives one-line notices, e.g. that kernels are being compiled.

    Raises:
        DeviceError: there is no such device, here or at all.
        ConfigError: an option that the device does not have.
    """
    if device == "auto":
        device = "cuda" if _gpu_is_usable() else "cpu"
    if activations != "f32" and device != "cpu":
        raise ConfigError(f"activations {activations} is for the CPU; the device is {device}")
    if device in ("cuda", "cuda-emulated"):
        return _cuda_backend(device, compute_dtype, cuda_graphs, fast_matmul, on_event)
    if compute_dtype not in ("auto", "f32") or fast_matmul:
        option = "fast_matmul" if fast_matmul else f"compute_dtype {compute_dtype}"
        raise ConfigError(f"{option} is for GPUs; the device is {device}")
    if device == "cpu":
        from tinyllm.backends.cpu import CpuBackend

        return CpuBackend(num_threads=num_threads, on_compile=on_event, activations=activations)
    if device == "reference":
        from tinyllm.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise DeviceError(f"unknown device {device!r}; the devices are {', '.join(DEVICES)}")


def _gpu_is_usable() -> bool:
    """Whether `cuda` would work: asks the driver, so that machines without one import neither CuPy nor numba.cuda."""
    if find_spec("cupy") is None or find_spec("numba_cuda") is None:
        return False
    from cuda_kernels.gpu import driver_device_count

    return driver_device_count() > 0


def _cuda_backend(
    device: str, compute_dtype: str, cuda_graphs: bool, fast_matmul: bool, on_event: Callable[[str], None] | None
) -> Backend:
    extra = "cuda" if device == "cuda" else "emulator"
    if find_spec("numba_cuda") is None:
        raise DeviceError(f"device {device} needs numba-cuda, which is not installed: pip install 'tinyllm[{extra}]'")
    from cuda_kernels.errors import CudaKernelError
    from tinyllm.backends.cuda import CudaBackend
    from tinyllm.backends.cuda_runtime import open_runtime

    try:
        runtime = open_runtime(device, on_event)
    except CudaKernelError as error:
        raise DeviceError(f"device {device} cannot be used: {error}") from error
    return CudaBackend(
        runtime, name=device, compute_dtype=compute_dtype, cuda_graphs=cuda_graphs, fast_matmul=fast_matmul
    )
