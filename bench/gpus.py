"""What the performance model (`bench/model.py`) knows of GPUs, with sources.

An H200's bandwidths and shares by runs are read off times of kernels that only move memory
(bench/history/nvidia-h200/2026-11-27-3-streams.jsonl), and its latency, sharpness and l1 were fitted to these
(`bench.validate --fit`). Of the others they are published, or estimates, as each line says; copy and triad of an A100
are eight and five percent below its read, and clocks are those of boost, a little below it on an H200 and a B200.

Sources: [guide] NVIDIA's CUDA C++ programming guide, throughput of native arithmetic instructions, and technical
specifications by compute capability. [streams] te42kyfo/gpu-benches, read, scale and triad, to which
BW(f) = R/(1 + (f0/f)^p)^(1/p) was fitted, f being bytes in flight on a multiprocessor: R, p, and f0, which is latency·R
over the multiprocessors. [ampere] arXiv 2208.11174. [hopper] arXiv 2402.13499. [quack] notes of Dao-AILab/quack on runs
of contiguous bytes. [here] measured by this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Gpu:
    """Describe a GPU.

    name: in words. target: what kernels are compiled for (`aot.TARGETS`). multiprocessors. clock: GHz under load.
    read, copy, triad: GB/s that kernels move at most which read only, read as much as they write, and read twice that.
    latency: nanoseconds from a load to its value, from memory that is idle. sharpness: the exponent by which times add
    up (`model.add_times`). l2: bytes that it keeps for a second read. l2_read: GB/s. l2_latency: nanoseconds. l1: bytes
    a scheduler moves to or from memory in a clock. fp32: operations that a multiprocessor starts in a clock. launch,
    next: microseconds of a launch, and of one behind another: as much as one of a graph; both are published.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    read: float
    copy: float
    triad: float
    latency: float
    sharpness: float
    l2: int
    l2_read: float
    l2_latency: float
    l1: float = 16
    fp32: int = 128
    launch: float = 2.5
    next: float = 1.3


# By bytes that stand side by side in a strided access of a warp: the share of the bandwidth that is left. H100 [quack]
# has 0.93 of 128, 0.51 of 32 for loads, and 0.94 and 0.32 for stores; these are an H200's [here]. Shorter ones count as
# 32 bytes.
READ_RUNS: Mapping[int, float] = MappingProxyType({32: 0.80, 64: 0.94, 128: 1.0})
WRITE_RUNS: Mapping[int, float] = MappingProxyType({32: 0.56, 64: 0.78, 128: 1.0})

GPUS = {
    # [streams], 80 GB: f0 of 13.3 KB is 757 ns, of which seven tenths are taken, as of the H200's; L2: 7.2 TB/s and 200
    # clocks (PMC10448217, table 3); half the fp32 operations of later ones [guide]
    "a100": Gpu("A100 80 GB", "sm_80", 108, 1.41, 1897, 1740, 1800, 537, 2.75, 30_000_000, 7200, 142, fp32=64),
    # bandwidths [quack]; f0 of the PCIe part, 12.3 KB, is 695 ns, of which seven tenths, and its p; L2 as the H200's
    "h100": Gpu("H100 SXM", "sm_90", 132, 1.75, 2900, 2900, 2900, 493, 2.35, 40_000_000, 9700, 150),
    # [here]; published f0 of 18.3 KB would be 620 ns, and p 1.75; L2 [streams]: 9.6 to 9.9 TB/s up to 40 MB
    "h200": Gpu("H200", "sm_90", 132, 1.9, 4280, 4000, 4200, 440, 2.5, 40_000_000, 9700, 150),
    # nine tenths of the 8 TB/s of the data sheet; latency and sharpness as the H200's, none being published: a third
    # more bytes in flight, which CCCL asks of it (64 KB for 48), are as many nanoseconds; L2: an estimate, of its size
    "b200": Gpu("B200", "sm_100", 148, 1.9, 7200, 6900, 7000, 440, 2.5, 100_000_000, 16000, 150),
}
