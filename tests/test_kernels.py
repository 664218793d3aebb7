# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The Triton kernels are the mixture, forward and backward, in a process of its own: on a GPU where there is one, else in
Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version


triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from modernalbert import mol_triton  # noqa: E402


ON_GPU = torch.cuda.is_available()
CASES = [  # tokens, experts, experts per token, rank, width, dtype
    [40, 4, 2, 4, 136, "float32"],
    [33, 8, 1, 16, 64, "float32"],
    [40, 3, 3, 20, 100, "float32"],
    [20, 32, 1, 4, 80, "float32"],  # experts that no token chose
    [1, 4, 4, 1, 80, "float32"],
    [0, 4, 2, 4, 80, "float32"],
    [33, 4, 2, 8, 72, "float16"],
]
if ON_GPU:  # the interpreter multiplies no bfloat16
    CASES += [[4097, 8, 2, 16, 2624, "bfloat16"], [1000, 64, 2, 8, 1152, "bfloat16"]]
TOLERANCES = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 3e-2}


@pytest.fixture(scope="module")
def errors() -> list[dict[str, float] | str]:
    """Relative errors of outputs and gradients against `reference` in float64, or what went wrong, for each case."""
    # Before 3.7 the interpreter reads the bounds of loops in a way that numpy forbids since 2.4.
    if not ON_GPU and Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("triton < 3.7 interprets no loop with numpy >= 2.4")
    # The interpreter is chosen when triton is first imported.
    environment = os.environ | {"TRITON_INTERPRET": "0" if ON_GPU else "1"}
    worker = Path(__file__).with_name("kernels_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(CASES)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_kernels_are_the_mixture(errors, case):
    assert isinstance(errors[case], dict), errors[case]
    assert set(errors[case]) == {"output", "x", "router", "Wi", "Wo", "A_in", "B_in", "A_out", "B_out"}
    assert {name: error for name, error in errors[case].items() if not error < TOLERANCES[CASES[case][-1]]} == {}


# Arguments that are no pointers to the states' dtype.
OTHERS = dict.fromkeys(("gates", "parts", "part_gates"), "*fp32") | {"ends": "*i32", "experts": "*i32"}
OTHERS |= {"order": "*i64", "slots": "*i64", "scaling": "fp32", "num_tokens": "i32", "num_parts": "i32"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["_forward", "_backward_states", "_sum_parts", "_backward_experts"])
def test_kernels_compile_for_a_gpu(kernel, dtype):
    """To Hopper's machine code, by the assembler that triton brings along: no GPU is needed for that."""
    function = getattr(mol_triton, kernel)
    gates, A_out = torch.empty(4096, 2), torch.empty(8, 16, 2624)
    sizes = mol_triton.tiling(gates, A_out)[1] | {"IS_WEIGHTED": True}
    options = {"num_stages": sizes.pop("num_stages")}
    if kernel == "_backward_states":
        options["num_warps"] = mol_triton.BACKWARD_WARPS
    constants = {name: value for name, value in sizes.items() if name in function.arg_names}
    kinds = {name: OTHERS.get(name, f"*{dtype}") for name in function.arg_names}
    if kernel == "_backward_experts":  # whose results are sums over programs
        kinds |= dict.fromkeys(("d_B_in", "d_A_out"), "*fp32")
    source = ASTSource(function, kinds | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= 48 * 1024  # what every GPU has for a program
