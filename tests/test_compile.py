"""Compile the kernels ahead of time, which needs no GPU: registers, spills, shared memory,
tensor-core instructions.

`python tests/test_compile.py` prints the table that kernels/benchmarks.csv keeps.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90, 100)  # A100; H100 and H200; B200
TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the tensor-core instruction of each generation
FIELDS = ("kernel", "dtype", "C", "arch", "registers", "spills", "stack", "shared", "tensor_core")


def cases():
    """(name, kernel, pointer types, compile-time values, C) as the launchers call them at the
    paper's and VOC's size."""
    import torch
    from kernels.region_pool import blocks, grad_kernel, match_blocks, match_kernel, pool_kernel
    from kernels.topk_prototypes import TICKET, topk_kernel

    for t, C in (("bf16", 80), ("bf16", 20), ("fp16", 80), ("fp32", 80)):
        dtype = getattr(torch, TYPES[t])
        how, tall, low = blocks(C, dtype), blocks(196, dtype), match_blocks(C, dtype)
        yield "pool", t, pool_kernel, dict(energy=t, f=t, out=t), dict(how, stride_n=1), C
        if t == "fp16" or C == 20:  # the rest differs from bf16 at 80 by nothing new
            continue
        yield (
            "pool, gradient of f",
            t,
            pool_kernel,
            dict(energy=t, f=t, out=t),
            dict(tall, stride_c=1),
            C,
        )
        yield "pool, gradient of energy", t, grad_kernel, dict(grad=t, energy=t, f=t, out=t), how, C
        yield (
            "match",
            t,
            match_kernel,
            dict(energy=t, f=t, g_pos="fp32", g_neg="fp32", out="fp32"),
            dict(low, stride_n=1),
            C,
        )
        yield (
            "topk",
            t,
            topk_kernel,
            dict(energy=t, f=t, labels="i8", bank="fp32", cursor="i64"),
            dict(TICKET=TICKET, BLOCK_B=128, BLOCK_N=256, BLOCK_D=512, num_warps=4),
            C,
        )


def resources(cubin, arch):
    """(registers, spill instructions, stack bytes, the matrix instruction or "") out of a compiled
    kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        use = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", use)[1]) for word in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))  # loads from and stores to local memory
    matrix = re.findall(r"\b(UTC\w*MMA|[HQ]GMMA|[HQ]MMA)\b", sass)
    return registers, spills, stack, matrix[0] if matrix else ""


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, t, kernel, pointers, how, C in cases():
        options = {k: v for k, v in how.items() if k.startswith("num_")}
        fixed = {k: v for k, v in how.items() if k not in options}
        signature = {
            a: "*" + pointers[a] if a in pointers else "constexpr" if a in fixed else "i32"
            for a in kernel.arg_names
        }
        even = [
            a for a in kernel.arg_names if a in pointers or a == "D" or (a == "C" and C % 16 == 0)
        ]
        attrs = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in even}
        source = ASTSource(
            kernel, signature, {(kernel.arg_names.index(k),): v for k, v in fixed.items()}, attrs
        )
        for arch in ARCHS:
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            registers, spills, stack, matrix = resources(built.asm["cubin"], arch)
            yield dict(
                zip(
                    FIELDS,
                    (
                        name,
                        TYPES[t],
                        C,
                        f"sm_{arch}",
                        registers,
                        spills,
                        stack,
                        built.metadata.shared,
                        matrix,
                    ),
                )
            )


def table():
    """All rows, compiled in a fresh process: this one may have loaded the kernels for the
    interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, "--json"], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, f"ahead-of-time compilation failed:\n{run.stderr[-3000:]}"
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("triton", reason="triton is not installed")
    return table()


def test_nothing_spills(rows):
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in ARCHS} and len(rows) % len(
        ARCHS
    ) == 0
    spilled = [row for row in rows if row["spills"] or row["stack"]]
    assert not spilled, "registers spill to local memory:\n" + "\n".join(map(str, spilled))


def test_pooling_stays_on_the_tensor_cores(rows):
    for row in rows:
        if row["dtype"] != "float32" and row["kernel"] != "topk":
            assert row["tensor_core"], f"no matrix instruction in {row}"
            # from 64 categories on: the generation's own
            if row["kernel"] == "pool" and row["C"] == 80:
                assert row["tensor_core"] == MATRIX[int(row["arch"][3:])], (
                    f"a slower matrix instruction in {row}"
                )


TRACE = """
import sys, torch, triton
from types import SimpleNamespace
from torch._functorch.aot_autograd import aot_function
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
import kernels
from kernels.region_pool import grad_op, pool_op

target = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
def step(energy, f, g, labels, bank, cursor):
    kernels.topk_prototypes(energy, f, labels, bank, cursor, 3)
    out = pool_op(energy, f)
    matched = kernels.region_match(energy, f, g, g, 50.0)
    return out, grad_op(out, energy, f), pool_op(energy.mT, out), matched
def show(graph, inputs):
    print(graph.code)
    sys.exit()
with FakeTensorMode(), torch.no_grad():
    new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="cuda")
    aot_function(step, fw_compiler=show)(new(2, 80, 196), new(2, 196, 512), new(80, 512),
                                         new(2, 80, dtype=torch.int8), new(80, 4, 512),
                                         new(80, dtype=torch.int64))
"""


def test_torch_compile_reaches_the_triton_kernels_on_a_gpu():
    """Traced with CUDA tensors that hold no data: the graph launches the kernels, and only their
    outputs are written."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", TRACE], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.count("triton_kernel_wrapper_functional(") == 4, (
        run.stdout + run.stderr[-3000:]
    )
    assert run.stdout.count("tensors_to_clone = ['out']") == 4 and "aten.bmm" not in run.stdout
    assert run.stdout.count("trm_ml.topk_prototypes.default") == 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    found = list(compile_all())
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        print(",".join(FIELDS), *(",".join(str(row[k]) for k in FIELDS) for row in found), sep="\n")
