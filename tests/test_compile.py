"""Compile the kernels ahead of time, which needs no GPU: registers, spills, shared memory,
tensor-core instructions.

`python tests/test_compile.py > kernels/compiled.csv` writes the table anew.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (75, 80, 86, 89, 90, 100, 120)  # T4; A100; A10, RTX 30; L4, RTX 40; H100; B200; RTX 50
SPILL_FREE = (80, 90, 100)  # what the tiles are chosen for
AMD = ("gfx90a", "gfx942")  # MI200, MI300: they have to compile, for want of a tool nothing is read
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MATRIX = {75: "HMMA", 80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA",
          120: "HMMA"}  # the tensor-core instruction of each generation
LIMITS = ("issue_us", "sfu_us", "memory_us")
FIELDS = ("kernel", "dtype", "C", "arch", "registers", "spills", "stack", "shared", "tensor_core",
          *LIMITS)
# An H200: warp instructions and bytes a microsecond. 132 multiprocessors of four schedulers at 1.98
# GHz; a warp's special function takes a scheduler's unit 8 cycles; a copy's bandwidth as measured.
ISSUE, BANDWIDTH = 132 * 4 * 1980, 4.27e6
# At the paper's size (B 128, C 80, N 196, D 512), bf16: programs, turns of the loop, bytes moved.
# Of topk the 37 programs that find a known positive.
WORK = {"pool": (128 * 2 * 2, 7, 40.2e6),
        "pool, gradient of f": (128 * 4 * 2, 3, 40.2e6),
        "pool, gradient of energy": (128 * 2 * 4, 8, 44.2e6),
        "match": (4 * 80, 4, 10.6e6),
        "match, gradient": (4 * 80, 4, 21.2e6),
        "topk": (37, 5, 0.6e6)}


def cases():
    """(name, kernel, pointer types, compile-time values, C) as the launchers call them at the
    paper's and VOC's size."""
    from kernels.match import SMALLEST, TILE, match_grad_kernel, match_kernel
    from kernels.region_pool import GRAD_TILE, grad_kernel, pool_kernel, pool_tile
    from kernels.topk_prototypes import TICKET, topk_kernel

    for t, C in (("bf16", 80), ("bf16", 20), ("bf16", 3), ("fp16", 80), ("fp32", 80)):
        half = t != "fp32"  # pooling in float32 is cuBLAS's
        pointers = dict(energy=t, f=t, out=t)
        # CARL hands its energies over transposed
        sizes = dict(C=C, N=196, D=512, stride_c=1, stride_n=C)
        if half:
            yield "pool", t, pool_kernel, pointers, pool_tile(C) | sizes, C
        if t == "fp16" or C < 80:  # the rest differs from bf16 at 80 by nothing new
            continue
        if half:
            turned = dict(C=196, N=C, D=512, stride_c=C, stride_n=1)
            yield "pool, gradient of f", t, pool_kernel, pointers, pool_tile(196) | turned, C
            yield ("pool, gradient of energy", t, grad_kernel, dict(pointers, grad=t),
                   GRAD_TILE | sizes, C)
        wide = dict.fromkeys(("difference", "out", "inverse", "grad", "matched", "d_difference"),
                             "fp32")
        yield "match", t, match_kernel, dict(wide, x=t), dict(TILE, SMALLEST=SMALLEST), C
        yield "match, gradient", t, match_grad_kernel, dict(wide, x=t, d_x=t), TILE, C
        yield ("topk", t, topk_kernel,
               dict(energy=t, f=t, labels="i8", bank="fp32", cursor="i64"),
               dict(stride_c=1, TICKET=TICKET, BLOCK_B=128, BLOCK_N=256, BLOCK_D=512, num_warps=4),
               C)


def resources(cubin, arch):
    """(registers, spill instructions, stack bytes, the matrix instruction or "", the disassembly)
    out of a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        use = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True,
                              text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", use)[1]) for word in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))  # loads from and stores to local memory
    matrix = re.findall(r"\b(UTC\w*MMA|[HQ]GMMA|[HQ]MMA)\b", sass)
    return registers, spills, stack, matrix[0] if matrix else "", sass


def limits(name, sass, warps):
    """Three times in us that an H200 cannot beat: to issue the instructions, to compute the special
    functions, to move the bytes. sass: the disassembly, whose loop is a branch back to a label."""
    programs, turns, moved = WORK[name]
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in sass.splitlines()]
    place = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    times = [int(line.endswith(";")) for line in lines]  # how often a line is executed
    for i, line in enumerate(lines):
        back = re.search(r"^@.*BRA.*`\((\.L_x_\d+)\)|^BRA `\((\.L_x_\d+)\)", line)
        start = back and place[back[1] or back[2]]
        if back and start < i - 1:  # the last instruction branches to itself
            times[start:i + 1] = [turns * time for time in times[start:i + 1]]
    special = sum(time for line, time in zip(lines, times) if "MUFU" in line)
    return [f"{t:.1f}" for t in (programs * warps * sum(times) / ISSUE,
                                 programs * warps * 8 * special / ISSUE, moved / BANDWIDTH)]


def sources():
    """(name, type, C, ASTSource, options) of each case."""
    from triton.compiler import ASTSource

    for name, t, kernel, pointers, how, C in cases():
        options = {k: v for k, v in how.items() if k.startswith("num_")}
        fixed = {k: v for k, v in how.items() if k not in options}
        names = kernel.arg_names
        signature = {a: "constexpr" if a in fixed else "*" + pointers[a] if a in pointers else "i32"
                     for a in names}
        even = [a for a in names if a not in fixed and (
            a in pointers or a == "D" or a in ("C", "stride_n") and C % 16 == 0)]
        attrs = {(names.index(a),): [["tt.divisibility", 16]] for a in even}
        values = {(names.index(k),): v for k, v in fixed.items()}
        yield name, t, C, ASTSource(kernel, signature, values, attrs), options


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget

    for name, t, C, source, options in sources():
        for arch in ARCHS:
            if arch == 75 and t == "bf16":
                continue  # its tensor cores do not know bfloat16
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            registers, spills, stack, matrix, sass = resources(built.asm["cubin"], arch)
            paper = (arch, t, C) == (90, "bf16", 80)
            least = limits(name, sass, built.metadata.num_warps) if paper else [""] * 3
            yield dict(zip(FIELDS, (name, TYPES[t], C, f"sm_{arch}", registers, spills, stack,
                                    built.metadata.shared, matrix, *least)))


def compile_for_amd():
    """How many kernels compiled; a failure raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    return sum(bool(triton.compile(source, target=GPUTarget("hip", arch, 64), options=options))
               for _, _, _, source, options in sources() for arch in AMD)


def alone(*words):
    """This file run in a fresh process: this one may have loaded the kernels for the
    interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, __file__, *words], env=env, capture_output=True,
                          text=True)


def table():
    run = alone("--json")
    assert run.returncode == 0, f"ahead-of-time compilation failed:\n{run.stderr[-3000:]}"
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("triton", reason="triton is not installed")
    return table()


def test_nothing_spills_where_the_tiles_were_chosen(rows):
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in ARCHS}
    spilled = [row for row in rows if (row["spills"] or row["stack"])
               and int(row["arch"][3:]) in SPILL_FREE]
    assert not spilled, "registers spill to local memory:\n" + "\n".join(map(str, spilled))


def test_every_gpu_has_the_shared_memory(rows):
    most = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block
    assert all(row["shared"] <= most[int(row["arch"][3:])] * 1024 for row in rows)


def test_the_committed_table_is_what_the_compiler_says(rows):
    import triton
    with open(ROOT / "kernels" / "compiled.csv", newline="") as file:
        written = list(csv.DictReader(file))
    if written[0]["triton"] != triton.__version__:
        pytest.skip(f"kernels/compiled.csv is of triton {written[0]['triton']}")
    there = [{name: str(row[name]) for name in FIELDS} for row in rows]
    assert there == [{name: row[name] for name in FIELDS} for row in written], (
        "run python tests/test_compile.py > kernels/compiled.csv")


def test_the_limits_of_the_papers_size_are_below_what_was_measured(rows):
    """Instructions, special functions and bytes are lower bounds: no kernel can beat them."""
    with open(ROOT / "kernels" / "measured.csv", newline="") as file:
        took = {row["kernel"]: float(row["p50_us"]) for row in csv.DictReader(file)
                if (row["shape"], row["dtype"], row["provider"], row["pass"])
                == ("paper", "bfloat16", "triton", "forward")}
    least = {row["kernel"]: [float(row[name]) for name in LIMITS] for row in rows
             if row["issue_us"]}
    assert least.keys() == WORK.keys()
    for kernel, name in (("region_pool", "pool"), ("match", "match"), ("topk_prototypes", "topk")):
        assert 0 < min(least[name][0], least[name][2]) <= max(least[name]) < took[kernel], kernel


def test_amd_compiles():
    pytest.importorskip("triton", reason="triton is not installed")
    run = alone("--amd")
    assert run.returncode == 0 and int(run.stdout) > 20, run.stderr[-3000:]


def test_pooling_stays_on_the_tensor_cores(rows):
    for row in rows:
        half = row["dtype"] != "float32" and row["arch"] != "sm_75"
        if half and row["kernel"].startswith("pool"):
            assert row["tensor_core"], f"no matrix instruction in {row}"
            # from 64 categories on: the generation's own
            if row["kernel"] == "pool" and row["C"] == 80:
                assert row["tensor_core"] == MATRIX[int(row["arch"][3:])], (
                    f"a slower matrix instruction in {row}"
                )


TRACE = """
import sys, torch
from types import SimpleNamespace
from torch._functorch.aot_autograd import aot_function
from torch._subclasses import FakeTensorMode
import kernels

kernels.dispatch.unfit = lambda: ""  # as on a GPU; there is none here
torch.cuda.current_device = lambda: 0
def step(energy, f, difference, labels, bank, cursor):
    kernels.topk_prototypes(energy, f, labels, bank, cursor, 3)
    return kernels.match(kernels.region_pool(energy, f), difference, 50.0)
def show(graph, inputs):
    print(graph.code)
    sys.exit()
with FakeTensorMode(), torch.no_grad():
    new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="cuda")
    aot_function(step, fw_compiler=show)(new(2, 80, 196), new(2, 196, 512),
                                         new(80, 512, dtype=torch.float32),
                                         new(2, 80, dtype=torch.int8), new(80, 4, 512),
                                         new(80, dtype=torch.int64))
"""


def test_torch_compile_keeps_the_kernels_on_a_gpu():
    """Traced with CUDA tensors that hold no data: the graph calls each operator once."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", TRACE], env=env, cwd=ROOT, capture_output=True,
                         text=True)
    for name in ("region_pool", "match", "topk_prototypes"):
        assert run.stdout.count(f"trm_ml.{name}.default") == 1, run.stdout + run.stderr[-3000:]
    assert "aten.bmm" not in run.stdout


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if "--amd" in sys.argv:
        print(compile_for_amd())
        sys.exit()
    found = list(compile_all())
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        import triton
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("triton", *FIELDS))
        writer.writerows((triton.__version__, *(row[name] for name in FIELDS)) for row in found)
