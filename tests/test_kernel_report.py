"""The report on compiled kernels: its parsers, and that its check finds faulty kernels."""

import json
import shutil
from dataclasses import replace

import pytest

import kernel_report
from kernel_report import Kernel, Resources, Rule

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fastPf' for 'sm_90'
ptxas info    : Function properties for _Z4fastPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 53.797 ms
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z4slowPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
"""

DISASSEMBLY = """\
\t.section\t.text._Z4fastPf,"ax",@progbits
.text._Z4fastPf:
        .type           _Z4fastPf,@function
_Z4fastPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U8.CONSTANT R8, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   LDSM.16.M88.4 R4, [R9] ;
        /*0050*/                   LDS R5, [R9] ;
        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0070*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;
        /*0080*/                   FMNMX3 R1, R2, R3, R4, PT ;
        /*0090*/                   VIADDMNMX.U32 R0, R9, -UR8, R0, PT ;
        /*00a0*/               @P1 BRA `(.L_x_0) ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/              @P0  STG.E.128 desc[UR24][R2.64], R4 ;
        /*00d0*/                   NOP;
        /*00e0*/                   NOP;
.text._Z4slowPf:
_Z4slowPf:
        /*0000*/                   STL [R1], R5 ;
        /*0010*/                   LDL.64 R4, [R1] ;
"""

# Keeps more values alive than it may have registers.
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* data) {
  float values[128];
  for (int i = 0; i < 128; ++i) values[i] = data[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 128; ++i) data[i * 1024 + threadIdx.x] = values[127 - i] * values[i];
}
"""
# Indexes an array by what is known only as it runs.
INDEXES = """
__global__ void indexes(const int* from, int* to) {
  int values[64] = {};
  for (int i = 0; i < 64; ++i) values[from[i] & 63] += i;
  for (int i = 0; i < 64; ++i) to[i] = values[i];
}
"""
FINE = "__global__ void fine(float4* data) { data[threadIdx.x].x += 1.0f; }"

KERNEL = Kernel(
    "a.cu", "fast<16>", Resources(32, 0, 0, 0, 0), dict.fromkeys(kernel_report.INSTRUCTIONS, 1), 99
)
KERNEL.instructions["local"] = 0


@pytest.fixture
def compiler():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    try:
        kernel_report.find_nvdisasm()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_resources_are_read_from_the_log():
    assert kernel_report.parse_resources(LOG) == {
        "_Z4fastPf": Resources(32, 0, 0, 0, 1024),
        "_Z4slowPf": Resources(255, 16, 12, 8, 0),
    }


def test_a_log_without_registers_is_an_error():
    with pytest.raises(ValueError, match="nothing of the registers of _Z4slowPf"):
        kernel_report.parse_resources(LOG.replace("Used 255 registers", "Used many registers"))


def test_instructions_are_counted():
    code = kernel_report.parse_disassembly(DISASSEMBLY)
    assert list(code) == ["_Z4fastPf", "_Z4slowPf"]
    assert len(code["_Z4fastPf"]) == 13
    counts = kernel_report.count_instructions(code["_Z4fastPf"])
    ones = {"HMMA", "LDSM", "LDGSTS", "MNMX", "LDG.128", "LDG", "STG.128", "LDS", "BAR"}
    assert {name for name, count in counts.items() if count == 1} == ones
    assert sum(counts.values()) == len(ones)
    assert kernel_report.count_instructions(code["_Z4slowPf"])["local"] == 2


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("psvdd::cuda::(anonymous namespace)::sum_rows(psvdd::ScoreMapParams, long)", "sum_rows"),
        (
            "void psvdd::cuda::(anonymous namespace)::extract_tiles<16, psvdd::cuda::(anonymous "
            "namespace)::Normalize<unsigned char> >(psvdd::ExtractPatchesParams)",
            "extract_tiles<16, Normalize<uint8>>",
        ),
        ("_Z4fastPf", "_Z4fastPf"),
    ],
)
def test_names_are_shortened(demangled, name):
    assert kernel_report.short_name(demangled) == name


def test_complaints():
    rule = Rule("a.cu", "fast", ("HMMA", "LDSM"))
    assert kernel_report.complaints([KERNEL], [rule]) == []
    spilling = replace(KERNEL, resources=Resources(255, 16, 12, 8, 0))
    assert kernel_report.complaints([spilling], []) == [
        "a.cu: fast<16> spills registers (12 bytes stored, 8 loaded)"
    ]
    local = replace(KERNEL, instructions={**KERNEL.instructions, "local": 3})
    assert kernel_report.complaints([local], []) == [
        "a.cu: fast<16> uses local memory (0 bytes of stack, 3 instructions)"
    ]
    plain = replace(KERNEL, instructions={**KERNEL.instructions, "HMMA": 0})
    assert kernel_report.complaints([plain], [rule]) == ["a.cu: fast<16> has no HMMA"]
    for other in (replace(rule, source="b.cu"), replace(rule, kernels="slow")):
        (line,) = kernel_report.complaints([KERNEL], [other])
        assert f"{other.source}: no kernel is named {other.kernels}" in line


def test_without_nvcc_the_check_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert kernel_report.main(["--check"]) == 0
    assert "NOT checked" in capsys.readouterr().out
    assert kernel_report.main([]) == 1


@pytest.mark.parametrize(
    ("source", "complaint"),
    [(SPILLS, "spills spills registers"), (INDEXES, "indexes uses local memory"), (FINE, "")],
)
def test_the_check_notices_local_memory(compiler, monkeypatch, capsys, tmp_path, source, complaint):
    (tmp_path / "kernel.cu").write_text(source)
    monkeypatch.setattr(kernel_report, "RULES", ())
    code = kernel_report.main(["--check", "--sources", str(tmp_path)])
    shown = capsys.readouterr()
    assert "1 kernels for sm_90 by nvcc" in shown.out
    assert code == (1 if complaint else 0)
    assert complaint in shown.err
    assert bool(shown.err) == bool(complaint)


def test_a_source_that_does_not_compile_is_an_error(compiler, tmp_path):
    (tmp_path / "kernel.cu").write_text("__global__ void broken() { no_such_thing(); }")
    with pytest.raises(RuntimeError, match="no_such_thing"):
        kernel_report.main(["--sources", str(tmp_path)])


def test_a_report_is_written(compiler, tmp_path):
    (tmp_path / "kernel.cu").write_text(FINE)
    assert kernel_report.main(["--sources", str(tmp_path), "--output", str(tmp_path / "new")]) == 0
    content = json.loads((tmp_path / "new" / "kernels_sm_90.json").read_text())
    (kernel,) = content["kernels"]
    assert kernel["name"] == "fine"
    assert kernel["instructions"]["LDG"] == 1
    assert "| kernel.cu | `fine` |" in (tmp_path / "new" / "kernels_sm_90.md").read_text()
