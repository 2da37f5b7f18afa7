"""What the compiler makes of the CUDA kernels: registers, spills, the instructions that matter.

    python benchmarks/kernel_report.py --arch sm_90 --output benchmarks/results
    python benchmarks/kernel_report.py --check

Compiles every csrc/cuda/*.cu as the build does, reads what ptxas reports of each kernel and counts
the instructions in its disassembly. Needs no GPU, but nvcc on PATH and nvdisasm (on PATH, or from
the dev extra). Counts are of instructions in the code, not of instructions executed.

With --check, exits with 1 if a kernel spills registers, uses local memory, or lacks instructions
that RULES ask for. Without nvcc nothing is checked: it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--fmad=false")  # as in CMakeLists.txt
JOBS = 2

# Columns and what they count. An opcode counts for the first pattern that matches it.
INSTRUCTIONS = {
    "HMMA": r"H(G)?MMA",  # float16 on the tensor cores
    "LDSM": r"LDSM",  # matrices from shared memory to registers
    "LDGSTS": r"LDGSTS",  # asynchronous copies from global to shared memory
    "FFMA": r"FFMA2?",
    "FADD": r"FADD2?",
    "MNMX": r"(FMNMX|VIMNMX)3?",  # minima and maxima
    "LDG.128": r"LDG\.(\w+\.)*128",
    "LDG": r"LDG",
    "STG.128": r"STG\.(\w+\.)*128",
    "STG": r"STG",
    "LDS": r"LDS",
    "local": r"LDL|STL",
    "BAR": r"BAR",
}


@dataclass(frozen=True)
class Rule:
    """Instructions that every kernel of a source file must have, if its name matches."""

    source: str
    kernels: str  # a regular expression, matched at the start of the name
    instructions: tuple[str, ...]


RULES = (
    Rule("extract_patches.cu", r"extract_tiles<16,", ("STG.128",)),
    Rule("screen.cu", r"screen_", ("HMMA", "LDSM", "LDGSTS")),
)


@dataclass(frozen=True)
class Resources:
    """What ptxas reports about a kernel; sizes in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int  # static


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled."""

    source: str
    name: str
    resources: Resources
    instructions: dict[str, int]
    total: int  # instructions, without the padding behind them


# --- parsing --------------------------------------------------------------------------------------


def parse_resources(log: str) -> dict[str, Resources]:
    """The resources of each kernel, by mangled name, from the output of `nvcc -Xptxas -v`."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        if not re.search(r"Used \d+ registers", part):
            raise ValueError(f"ptxas says nothing of the registers of {name}")
        found[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            stack=number(r"(\d+) bytes stack frame"),
            spill_stores=number(r"(\d+) bytes spill stores"),
            spill_loads=number(r"(\d+) bytes spill loads"),
            shared=number(r"(\d+) bytes smem"),
        )
    return found


def parse_disassembly(text: str) -> dict[str, list[str]]:
    """The opcodes of each function, by mangled name, from the output of `nvdisasm -c`."""
    found: dict[str, list[str]] = {}
    opcodes: list[str] = []
    for line in text.splitlines():
        if section := re.match(r"\.text\.([\w$.]+):", line):
            opcodes = found.setdefault(section[1], [])
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            opcodes.append(code[1])
    for opcodes in found.values():
        while opcodes and opcodes[-1] == "NOP":
            opcodes.pop()
    return found


def count_instructions(opcodes: Iterable[str]) -> dict[str, int]:
    """How many of the opcodes each entry of INSTRUCTIONS matches."""
    counts = dict.fromkeys(INSTRUCTIONS, 0)
    for opcode in opcodes:
        for name, pattern in INSTRUCTIONS.items():
            if re.match(rf"(?:{pattern})(?![A-Z0-9])", opcode):
                counts[name] += 1
                break
    return counts


def short_name(demangled: str) -> str:
    """A kernel's name and template arguments, without namespaces, parameters and return type."""
    name = re.sub(r"psvdd::|cuda::|\(anonymous namespace\)::|^void ", "", demangled)
    return name.split("(", 1)[0].replace("> >", ">>").replace("unsigned char", "uint8")


# --- compiling ------------------------------------------------------------------------------------


def _output(*command: str | Path, text: str | None = None) -> str:
    """What the command prints. Raises RuntimeError if the command fails."""
    done = subprocess.run(
        [str(word) for word in command],
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def find_nvdisasm() -> str:
    """nvdisasm, from PATH or from the Python package; raises RuntimeError if there is none."""
    if found := shutil.which("nvdisasm"):
        return found
    packaged = Path(sysconfig.get_path("platlib")).glob("nvidia/*/bin/nvdisasm")
    if newest := max(packaged, default=None):
        return str(newest)
    raise RuntimeError("nvdisasm was not found: install the dev extra, or the CUDA toolkit's")


def demangle(names: Sequence[str]) -> list[str]:
    """The names as in the source; unchanged where no demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    return _output(tool, text="\n".join(names)).splitlines() if tool else list(names)


def compile_kernels(source: Path, arch: str, options: Sequence[str] = ()) -> list[Kernel]:
    """The kernels of a .cu file, compiled for an architecture such as sm_90, sorted by name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        log = _output(
            *("nvcc", *FLAGS, *options, "-Xptxas", "-v", "-cubin", f"-arch={arch}"),
            *("-o", cubin, source),
        )
        code = parse_disassembly(_output(find_nvdisasm(), "-c", cubin))
    resources = parse_resources(log)
    names = demangle(list(resources))
    kernels = [
        Kernel(source.name, short_name(name), used, count_instructions(code[key]), len(code[key]))
        for name, (key, used) in zip(names, resources.items(), strict=True)
    ]
    return sorted(kernels, key=lambda kernel: kernel.name)


def compile_all(arch: str, folder: Path = SOURCES) -> list[Kernel]:
    """The kernels of all .cu files in a folder."""
    sources = sorted(folder.glob("*.cu"))
    with ThreadPoolExecutor(JOBS) as pool:
        compiled = pool.map(lambda source: compile_kernels(source, arch), sources)
        return [kernel for kernels in compiled for kernel in kernels]


def compiler_version() -> str:
    """The release of nvcc, e.g. 'nvcc 13.0.88'."""
    match = re.search(r"V([\d.]+)", _output("nvcc", "--version"))
    return f"nvcc {match[1] if match else 'of unknown version'}"


# --- reporting ------------------------------------------------------------------------------------


def complaints(kernels: Sequence[Kernel], rules: Sequence[Rule]) -> list[str]:
    """What is wrong with the kernels, one line each, including rules that match no kernel."""
    found = []
    for kernel in kernels:
        used, local = kernel.resources, kernel.instructions["local"]
        if used.spill_stores or used.spill_loads:
            found.append(
                f"{kernel.source}: {kernel.name} spills registers "
                f"({used.spill_stores} bytes stored, {used.spill_loads} loaded)"
            )
        elif local or used.stack:
            found.append(
                f"{kernel.source}: {kernel.name} uses local memory "
                f"({used.stack} bytes of stack, {local} instructions)"
            )
    for rule in rules:
        subject = [
            kernel
            for kernel in kernels
            if kernel.source == rule.source and re.match(rule.kernels, kernel.name)
        ]
        if not subject:
            found.append(f"{rule.source}: no kernel is named {rule.kernels}, which a rule is about")
        for kernel in subject:
            missing = [name for name in rule.instructions if not kernel.instructions[name]]
            if missing:
                found.append(f"{kernel.source}: {kernel.name} has no {', '.join(missing)}")
    return found


def markdown(kernels: Sequence[Kernel], arch: str, compiler: str) -> str:
    """The report as a table."""
    columns = ["registers", "stack", "spilled", "shared", *INSTRUCTIONS, "total"]
    lines = [
        f"# Kernels for {arch}, compiled by {compiler}",
        "",
        "Written by `benchmarks/kernel_report.py`. Stack, spilled (stored and loaded) and static",
        "shared memory in bytes; then instructions in the code, not executed.",
        "",
        f"| source | kernel | {' | '.join(columns)} |",
        f"|---|---|{'--:|' * len(columns)}",
    ]
    for kernel in kernels:
        used = kernel.resources
        numbers = [used.registers, used.stack, used.spill_stores + used.spill_loads, used.shared]
        numbers += [*kernel.instructions.values(), kernel.total]
        cells = " | ".join(str(number) for number in numbers)
        lines.append(f"| {kernel.source} | `{kernel.name}` | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Report and, with --check, check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="architectures (sm_90)")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="folder of .cu files")
    parser.add_argument("--output", type=Path, help="folder for kernels_ARCH.md and .json")
    parser.add_argument("--check", action="store_true", help="fail on spills and broken rules")
    options = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("kernel_report: nvcc was not found, so the CUDA kernels were NOT checked")
        return 0 if options.check else 1

    wrong = []
    compiler = compiler_version()
    for arch in options.arch:
        kernels = compile_all(arch, options.sources)
        wrong += [f"{arch}: {line}" for line in complaints(kernels, RULES)]
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            stem = options.output / f"kernels_{arch}"
            stem.with_suffix(".md").write_text(markdown(kernels, arch, compiler))
            content = {
                "arch": arch,
                "compiler": compiler,
                "kernels": [asdict(kernel) for kernel in kernels],
            }
            stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        if options.check:
            print(f"kernel_report: {len(kernels)} kernels for {arch} by {compiler}")
        elif not options.output:
            print(markdown(kernels, arch, compiler))
    if options.check:
        for line in wrong:
            print(f"kernel_report: {line}", file=sys.stderr)
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
