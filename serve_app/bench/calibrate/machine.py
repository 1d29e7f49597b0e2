"""The peaks of this machine, as one worker's threads reach them: products, memory, the mesh.

On CUDA the same code times the GPU, between two `synchronize`; it has only been run on CPUs.
"""

import os
import time
from collections.abc import Callable
from threading import Thread

import msgspec
import torch

from serve_app.model.cpu import cpu_has_bf16
from serve_app.runtime.frames import tensor_frame, tensor_header
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.wire import Hidden

SIDE = 2048  # of the matrices that are multiplied; 4 times that on a GPU
MOVED_BYTES = 256 * 2**20  # more than any cache holds
FRAME_BYTES, NUM_FRAMES = 2**20, 64
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
PEER = "peer"
LOOK_S = 0.5  # at what else runs


class Machine(msgspec.Struct, frozen=True):
    """Of one worker of so many threads, alone on the machine."""

    name: str
    kind: str  # cpu, gpu
    num_threads: int
    num_workers: int  # such workers, that the machine has cores for
    peak_tflops: dict[str, float]
    memory_gb: float  # of one worker's share
    memory_gb_s: float
    mesh_gb_s: float  # from process to process on this machine


def measure(device: torch.device, num_threads: int, seconds: float) -> Machine:
    """Takes about `seconds`, and sets torch's threads."""
    torch.set_num_threads(num_threads)
    is_cpu = device.type == "cpu"
    dtypes = [torch.bfloat16, torch.float32] if not is_cpu or cpu_has_bf16() else [torch.float32]
    share_s = seconds / (len(dtypes) + 2)
    num_workers = max(1, num_cpus() // num_threads) if is_cpu else torch.cuda.device_count()
    return Machine(
        name=cpu_name() if is_cpu else torch.cuda.get_device_name(device),
        kind="cpu" if is_cpu else "gpu",
        num_threads=num_threads,
        num_workers=num_workers,
        peak_tflops={NAMES[dtype]: _product_flops(device, dtype, share_s) / 1e12 for dtype in dtypes},
        memory_gb=memory_bytes(device) / (num_workers if is_cpu else 1) / 1e9,
        memory_gb_s=_memory_bytes_s(device, share_s) / 1e9,
        mesh_gb_s=_mesh_bytes_s(share_s) / 1e9,
    )


def num_cpus() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: torch.device) -> float:
    if device.type != "cpu":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def others_at_work(seconds: float = LOOK_S) -> float:
    """Cores that are busy while this process sleeps. 0 where the system does not tell.

    What else runs here is measured too, and not only by its share of the cores: low priorities do not help where the
    kernel shares them by session (`sched_autogroup_enabled`), and caches and memory are shared by all.
    """
    before = _busy_s()
    time.sleep(seconds)
    return max(0.0, _busy_s() - before) / seconds


def _busy_s() -> float:
    """Seconds that all cores were at work since the start of the machine."""
    try:
        with open("/proc/stat") as lines:  # noqa: PTH123
            ticks = [int(part) for part in next(lines).split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def timed_s(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, to its end on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun_s


def _best_s(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of as many as go into `seconds`, and of three at least. A peak is what was reached once."""
    until_s, best_s, num = time.perf_counter() + seconds, float("inf"), 0
    while num < 3 or time.perf_counter() < until_s:
        best_s, num = min(best_s, timed_s(run, device)), num + 1
    return best_s


def _product_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    side = SIDE * (1 if device.type == "cpu" else 4)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * side**3 / _best_s(lambda: torch.mm(a, b, out=out), device, seconds)


def _memory_bytes_s(device: torch.device, seconds: float) -> float:
    """Reading is what a step does of weights and KV: a sum, or a copy where that moves more."""
    source = torch.ones(MOVED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    read_s = _best_s(source.sum, device, seconds / 2)
    copied_s = _best_s(lambda: target.copy_(source), device, seconds / 2)
    return MOVED_BYTES / min(read_s, copied_s / 2)


def _mesh_bytes_s(seconds: float) -> float:
    """Tensors from one mesh to another over the loopback, read there as a worker reads them."""
    sent = torch.zeros(FRAME_BYTES // 4)
    header, frame = Hidden(1, 0, *tensor_header(sent)), tensor_frame(sent)
    begun_s, num_bytes = time.perf_counter(), 0
    with Mesh() as source, Mesh() as target:
        source.connect(PEER, target.address)
        while time.perf_counter() - begun_s < seconds:
            sender = Thread(target=lambda: [source.send(PEER, header, frame) for _ in range(NUM_FRAMES)])
            sender.start()
            for _ in range(NUM_FRAMES):
                received = target.receive(5.0)
                assert received is not None, "the loopback has lost a message"
                num_bytes += 0 if received.frame is None else received.frame.nbytes
            sender.join()
    return num_bytes / (time.perf_counter() - begun_s)
