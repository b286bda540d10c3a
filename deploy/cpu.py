"""This CPU: its name, and those of its instructions that change speed or results. No torch.

All code that depends on the CPU (precision, runtime, messages) asks this module.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Feature -> Linux's flags: a CPU with any of the flags has the feature.
FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16"),
    "amx": ("amx_int8",),
    "arm_dot_product": ("asimddp",),
    "arm_bf16": ("bf16",),
}


@dataclass(frozen=True)
class Cpu:
    """A CPU.

    Attributes:
        name: the maker's name for it, or its architecture if the system does not tell the name.
        features: keys of FEATURES, in their order; empty if the system does not tell them.
    """

    name: str
    features: tuple[str, ...]

    @property
    def has_bf16(self) -> bool:
        """Whether an x86 CPU multiplies bf16 in hardware; Arm CPUs have not been tried."""
        return "bf16" in self.features

    @property
    def sums_exactly(self) -> bool:
        """Whether integer kernels sum products of u8 and s8 in 32 bits, as VNNI does.

        Without VNNI, kernels add two products in 16 bits, with saturation: vpmaddubsw,
        Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. An unknown CPU
        counts as one without VNNI.
        """
        return "vnni" in self.features

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.features) or 'instruction set not known'})"


def parse_cpuinfo(text: str) -> Cpu:
    """The CPU in the text of Linux's /proc/cpuinfo, by its first processor."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    features = tuple(name for name, any_of in FEATURES.items() if flags.intersection(any_of))
    return Cpu(fields.get("model name") or platform.machine(), features)


@functools.cache
def this_cpu() -> Cpu:
    """The CPU of this machine; its features are known on Linux alone."""
    if not CPUINFO.is_file():
        return Cpu(platform.processor() or platform.machine(), ())
    return parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
