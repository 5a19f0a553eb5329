"""How the work of the Triton kernels is cut, and what the compiler makes of it for devices that need not be here."""

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_scale.losses import triton_kernels, triton_tiles
from simclr_scale.losses.triton_tiles import Tiles
from tests.gloo_pool import GlooPool

TYPES = [torch.float32, torch.bfloat16]

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("rows", "columns", "width", "chunks"),
    [(2, 2, 128, 1), (1024, 1024, 128, 1), (1024, 65536, 128, 1), (8192, 65536, 128, 1), (65536, 65536, 128, 1),
     (65536, 65536, 2048, 8), (100_000, 1_000_000, 256, 1), (2, 1_000_001, 1, 1), (1_000_000, 1_000_000, 1, 1)],
)  # fmt: skip
def test_the_work_is_cut_so_that_it_is_whole_and_fills_the_device(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, width: int, chunks: int
) -> None:
    monkeypatch.setattr(triton_tiles, "_multiprocessors", lambda device: 132)
    tiles = Tiles(rows=128, columns=128, depth=128, width=128, warps=8, stages=2)
    blocks, splits, steps = triton_tiles.grid(rows, columns, width, chunks, tiles, torch.device("cpu"))
    assert (blocks - 1) * 128 < rows <= blocks * 128
    assert (splits - 1) * steps * 128 < columns <= splits * steps * 128  # all columns, and no split without any
    assert splits == 1 or splits * rows * width * 4 <= 64 << 20
    if columns == 65536:
        rounds = math.ceil(blocks * splits * chunks / 132)
        assert rows * columns * chunks / 128**2 / 132 > 0.85 * rounds * steps  # of the time, no multiprocessor is idle
    if rows == 65536:
        assert splits == 1  # what would be added up here is as large as what memory the engine may take


def _nothing(rank: int, world_size: int) -> None:
    pass


def _compiled(
    rank: int, world_size: int, kernel: str, dtype: torch.dtype, width: int, temperature: float, capability: int
) -> dict[str, int]:
    """What the compiler makes of a kernel for a CUDA device of that capability, none of which need be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    padded = max(16, triton.next_power_of_2(width)) if width <= 256 else triton.cdiv(width, 256) * 256
    if kernel == "log_negatives":
        function = triton_kernels._log_negatives_kernel
        tiles = triton_tiles.log_negatives_tiles(dtype, width, capability >= 90)
        constants: dict[str, Any] = {"ONLINE": not triton_kernels._spread_fits(temperature)}
    else:
        function = triton_kernels._repulsion_kernel
        tiles = triton_tiles.repulsion_tiles(dtype, width, capability >= 90)
        constants = {
            "ONE_EXPONENTIAL": triton_kernels._spread_fits(temperature),
            "CHUNK": min(tiles.width, padded),
        }
    constants |= {"WIDTH": padded, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": min(tiles.depth, padded)}
    options = triton_kernels._compiled_as(tiles)
    constants |= {name: options.pop(name) for name in ("PRODUCTS", "WIDEN")}

    pointers = {"z", "z_all", "total", "peak", "row_terms", "column_terms", "out"}
    rows_of = "*fp32" if dtype == torch.float32 else "*bf16"
    signature, aligned = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = rows_of if name in ("z", "z_all") else "*fp32"
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": compiled.metadata.shared,
        "threads": 32 * tiles.warps,
        "warpgroup products": compiled.asm["ptx"].count("wgmma.mma_async"),
        "products": len(re.findall(r"\bmma\.sync", compiled.asm["ptx"])),
        "asynchronous copies": len(re.findall(r"cp\.async\.c[ag]", compiled.asm["ptx"])),
    }


@pytest.fixture(scope="module")
def compile_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """``compile_kernel(kernel, dtype, width, temperature, capability)``, in a process that does not interpret."""
    pool = GlooPool()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        pool(1, _nothing)  # the process starts here, and keeps this environment
        yield lambda *args: pool(1, _compiled, *args)[0]
    pool.close()


@pytest.mark.parametrize("kernel", ["log_negatives", "repulsion"])
def test_kernels_compile_for_an_h100_without_spilling(compile_kernel: Run, kernel: str) -> None:
    report = compile_kernel(kernel, torch.bfloat16, 128, 0.1, 90)
    assert report["spilled"] == 0
    assert report["warpgroup products"] > 0  # the tensor cores' own instruction, fed by copies that run beside it
    assert report["asynchronous copies"] > 0
    programs = min((64 << 10) // (report["registers"] * report["threads"]), (227 << 10) // report["shared"])
    assert programs >= {"log_negatives": 2, "repulsion": 1}[kernel]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("capability", "width", "temperature"),
    [
        *((90, width, temperature) for width in (128, 256, 2048) for temperature in (0.1, 0.01)),
        *((capability, width, 0.1) for capability in (89, 90) for width in (16, 64)),
        *((89, width, 0.1) for width in (128, 256, 2048)),
        (89, 128, 0.01),
        (80, 128, 0.1),
    ],
)
@pytest.mark.parametrize("kernel", ["log_negatives", "repulsion"])
def test_every_variant_compiles_for_every_device(
    compile_kernel: Run, kernel: str, dtype: torch.dtype, width: int, temperature: float, capability: int
) -> None:
    report = compile_kernel(kernel, dtype, width, temperature, capability)
    print(kernel, dtype, width, temperature, capability, report)  # the table by which the tiles are chosen: pytest -s
    assert report["spilled"] <= 128  # what a step's start keeps; a tile of sums would be thousands of bytes
    assert report["shared"] <= {80: 163, 89: 99, 90: 227}[capability] << 10
    if dtype == torch.bfloat16:
        assert report["warpgroup products" if capability == 90 else "products"] > 0
