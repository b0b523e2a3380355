"""Time, memory and error of attention forward, forward with tangent, and backward, against what else there is.

    python scripts/benchmark_attention.py [--shapes cpu-2048 ...] [--dtypes bfloat16 ...] [--device cuda]
        [--passes forward jvp backward] [--contenders ours math ...] [--repeats 10] [--output_dir DIR]

First our back end is checked against float64; if it is wrong, nothing is timed and the exit status is 1. Then each
row runs in a process of its own: median, 20 % and 80 % quantile of the time, TFLOP/s (products only: 4, 12 and 10
times B H Lq Lk D, and 8 for central differences, which are two forwards), time over the floor (the larger of products
at the rate of a large GEMM and bytes at the rate of a copy, both measured in the same run), peak memory beyond the
inputs, and the error of the result on 64 queries.
Rows that do not fit or fail say so. DIR gets results.json, results.csv and, with matplotlib, time.png and memory.png.
"""

import argparse
import csv
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fewstep.distill.training.measure import environment, peak_mib, quantiles, seconds
from fewstep.kernels import attention_jvp, chunked, naive, use_backend
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "cpu-2048": (1, 8, 2048, 2048, 64), "cpu-16384": (1, 8, 16384, 16384, 64),
    "dit-256": (32, 16, 256, 256, 72), "dit-512": (32, 16, 1024, 1024, 72),
    "sd15": (8, 8, 4096, 4096, 40), "sd15-cross": (8, 8, 4096, 77, 40),
    "flux-1024": (1, 24, 4608, 4608, 128), "square-4096-64": (4, 16, 4096, 4096, 64),
    "square-4096-128": (4, 16, 4096, 4096, 128), "wan-480p": (1, 12, 31200, 31200, 128),
}  # fmt: skip
PRODUCTS = {"forward": 4, "jvp": 12, "backward": 10}
CONTENDERS = ("ours", "math", "jvp-flash-attention", "differences")
TOLERANCES = {"float64": 1e-13, "float32": 5e-6, "float16": 1e-3, "bfloat16": 6e-3}
MATH_MATRICES = 5  # score matrices that forward mode over explicit attention holds at once, measured


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and their tangents."""
    b, h, lq, lk, d = shape
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(b, h, n, d) for n in (lq, lk, lk)] * 2
    return [torch.randn(s, dtype=dtype, device=device, generator=generator) for s in sizes]


def our_backend(device: str) -> str:
    return "triton" if device == "cuda" else "chunked"


def check(dtype: str, device: str, d: int) -> list[str]:
    """Complaints about O, tO and the gradients at ragged lengths; none if all are right."""
    x = draw((2, 2, 130, 77, d), getattr(torch, dtype), device)
    wide, scale = [t.double() for t in x], d**-0.5
    expected = list(naive.forward(*wide, None, None, False, scale))
    primals = [t.requires_grad_() for t in x[:3]]
    with use_backend(our_backend(device)):
        got: list[Any] = list(attention_jvp(*primals, *x[3:]))
        grad_out = torch.randn_like(got[0])
        got += torch.autograd.grad(got[0], primals, grad_out)
    expected += naive.backward(
        grad_out.double(), *wide[:3], None, expected[0], expected[2], False, scale, False
    )[:3]
    complaints = []
    for name, a, b in zip(("O", "tO", "LSE", "dQ", "dK", "dV"), got, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= TOLERANCES[dtype] * (3 if name.startswith("d") else 1):
            complaints.append(f"{name} of {dtype}, D = {d}: relative error {error:.1e}")
    return complaints


def work(contender: str, which: str, x: list[Tensor]) -> tuple[Callable[[], Any], str]:
    """The call to be timed, whose result starts with O or with O and tO, and what runs it."""
    device = x[0].device.type
    if which == "backward":
        primals = [t.requires_grad_() for t in x[:3]]
        if contender == "ours":
            with use_backend(our_backend(device)):
                out = attention_jvp(*primals, *x[3:])[0]
            ran = our_backend(device)
        else:
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(*primals)
            ran = "MATH"
        grad_out = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, primals, grad_out, retain_graph=True), ran
    if contender == "ours":
        tangents = x[3:] if which == "jvp" else [None] * 3

        def ours() -> Any:
            with use_backend(our_backend(device)):
                return attention_jvp(*x[:3], *tangents)

        return ours, our_backend(device)
    if contender == "math":

        def explicit() -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                if which == "jvp":
                    return torch.func.jvp(F.scaled_dot_product_attention, tuple(x[:3]), tuple(x[3:]))
                return (F.scaled_dot_product_attention(*x[:3]),)

        return explicit, "MATH"
    if contender == "differences":
        h = 1e-3 if x[0].dtype.itemsize == 4 else 1e-2
        ran = SDPBackend(torch._fused_sdp_choice(*x[:3])).name

        def differences() -> Any:
            ahead, behind = (
                F.scaled_dot_product_attention(*(p + s * h * t for p, t in zip(x[:3], x[3:], strict=True)))
                for s in (1, -1)
            )
            return (ahead + behind) / 2, (ahead - behind) / (2 * h)

        return differences, f"{ran}, h = {h:g}"
    from jvp_flash_attention.jvp_attention import JVPAttn

    def rival() -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(x[:3], x[3:], strict=True)]
            return tuple(forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals)))

    return rival, importlib.metadata.version("jvp-flash-attention")


def error_on_some_queries(which: str, x: list[Tensor], result: Any) -> float | None:
    """Relative error of tO, or of O without a tangent, on 64 queries of the first head; None for a backward."""
    if which == "backward":
        return None
    q, k, v, tq, tk, tv = (t[:1, :1].detach().double() for t in x)
    tangents = (tq[:, :, :64], tk, tv) if which == "jvp" else (None, None, None)
    expected = chunked.forward(q[:, :, :64], k, v, *tangents, None, None, False, q.shape[-1] ** -0.5)
    index = 1 if which == "jvp" else 0
    reference = expected[index]
    assert reference is not None
    return float((result[index][:1, :1, :64].double() - reference).norm() / reference.norm())


def measure_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """One row, in this process: memory of the first call, then times."""
    device, which, contender = cell["device"], cell["pass"], cell["contender"]
    x = draw(SHAPES[cell["shape"]], getattr(torch, cell["dtype"]), device)
    with torch.set_grad_enabled(which == "backward"):
        try:
            small = draw((1, 1, 64, 64, x[0].shape[-1]), x[0].dtype, device)
            work(contender, which, small)[0]()
            call, ran = work(contender, which, x)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident_mib()
            result = call()
            extra = peak_mib() - before
        except (RuntimeError, ImportError, AttributeError, AssertionError, ValueError) as failure:
            return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"}
        error = error_on_some_queries(which, x, result)
        del result
        times = [seconds(call)]
        repeats = max(3, min(cell["repeats"], int(60 / times[0])))
        times += [seconds(call) for _ in range(repeats - 1)]
    return {"ran": ran, "seconds": quantiles(times), "extra_mib": extra, "error": error, "repeats": repeats}


def resident_mib() -> float:
    """Resident size now; the kernel's mark of the peak is set back to it where that is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_mib()
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) / 2**10


def available_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    b, h, lq, lk, _ = SHAPES[cell["shape"]]
    needed = MATH_MATRICES * b * h * lq * lk * getattr(torch, cell["dtype"]).itemsize / 2**30
    if cell["contender"] == "math" and needed > 0.8 * available_gib(cell["device"]):
        return {
            "failed": f"does not fit: needs about {needed:.0f} GiB, {available_gib(cell['device']):.0f} free"
        }
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        return {"failed": f"exit status {finished.returncode}: {finished.stderr.strip()[-120:]}"}
    return json.loads(finished.stdout.splitlines()[-1])


def machine_rates(dtype: str, device: str) -> tuple[float, float]:
    """FLOP/s of a large GEMM and bytes/s of a copy, read and written, medians of 5."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median(function: Callable[[], Any]) -> float:
        function()
        return statistics.median(seconds(function) for _ in range(5))

    return 2 * n**3 / median(lambda: a @ b), 2 * source.numel() / median(lambda: target.copy_(source))


def finish(row: dict[str, Any], gemm: float, copy: float) -> dict[str, Any]:
    """TFLOP/s and time over the floor."""
    if "failed" in row:
        return row
    b, h, lq, lk, d = SHAPES[row["shape"]]
    products = 2 * PRODUCTS["forward"] if row["contender"] == "differences" else PRODUCTS[row["pass"]]
    flop = products * b * h * lq * lk * d
    tensors = {"forward": 2 * lq + 2 * lk, "jvp": 4 * lq + 4 * lk, "backward": 4 * lq + 4 * lk}[row["pass"]]
    moved = b * h * tensors * d * getattr(torch, row["dtype"]).itemsize
    median = row["seconds"]["median"]
    floor = max(flop / gemm, moved / copy)
    return {**row, "tflops": flop / median / 1e12, "floor_seconds": floor, "time_over_floor": median / floor}


HEADER = (
    "shape",
    "dtype",
    "pass",
    "contender",
    "ran",
    "ms",
    "20 %",
    "80 %",
    "x floor",
    "TFLOP/s",
    "extra MiB",
    "error",
)


def as_line(row: dict[str, Any]) -> list[str]:
    start = [row[k] for k in ("shape", "dtype", "pass", "contender")]
    if "failed" in row:
        return [*start, row["failed"], *[""] * 7]
    times = [f"{row['seconds'][k] * 1e3:.4g}" for k in ("median", "q20", "q80")]
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    rates = [f"{row['time_over_floor']:.2f}", f"{row['tflops']:.3g}", f"{row['extra_mib']:.1f}", error]
    return [*start, row["ran"], *times, *rates]


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    done = [r for r in rows if "failed" not in r]
    for name, label, value in (
        ("time", "ms", lambda r: r["seconds"]["median"] * 1e3),
        ("memory", "extra MiB", lambda r: max(r["extra_mib"], 0.1)),
    ):
        figure = Figure(figsize=(8, 1 + 0.3 * len(done)), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel=label)
        names = [f"{r['shape']} {r['dtype']} {r['pass']} {r['contender']}" for r in reversed(done)]
        bars = axes.barh(names, [value(r) for r in reversed(done)])
        axes.bar_label(bars, fmt="%.3g")
        figure.savefig(folder / f"{name}.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: cpu-* on a CPU, the others on CUDA"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=TOLERANCES, help="default: float32 on a CPU, else bfloat16"
    )
    parser.add_argument("--passes", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls per row, fewer beyond a minute")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure_cell(args.cell)))
        return 0
    cpu = args.device == "cpu"
    shapes = args.shapes or [s for s in SHAPES if s.startswith("cpu") == cpu]
    dtypes = args.dtypes or ["float32" if cpu else "bfloat16"]
    complaints = [
        c for t in dtypes for d in sorted({SHAPES[s][-1] for s in shapes}) for c in check(t, args.device, d)
    ]
    if complaints:
        print("refusing to time a wrong result:", *complaints, sep="\n  ", file=sys.stderr)
        return 1
    rates = {t: machine_rates(t, args.device) for t in dtypes}
    facts = {**environment(ROOT), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    facts["triton"] = next((d.version for d in importlib.metadata.distributions(name="triton")), "absent")
    facts["rates"] = {t: {"gemm_tflops": g / 1e12, "copy_gb_per_s": c / 1e9} for t, (g, c) in rates.items()}
    rows = []
    print(json.dumps(facts), "\t".join(HEADER), sep="\n")
    for shape in shapes:
        for dtype in dtypes:
            for which in args.passes:
                for contender in args.contenders:
                    if which != "jvp" and contender not in ("ours", "math"):
                        continue
                    cell = {"shape": shape, "dtype": dtype, "pass": which, "contender": contender}
                    settings = {**cell, "device": args.device, "repeats": args.repeats}
                    rows.append(finish({**cell, **run_cell(settings)}, *rates[dtype]))
                    print("\t".join(as_line(rows[-1])), flush=True)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        result = {"environment": facts, "command": sys.argv[1:], "rows": rows}
        (args.output_dir / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        with (args.output_dir / "results.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *map(as_line, rows)])
        plot(rows, args.output_dir)
    return 0 if all(math.isfinite(r.get("error") or 0.0) for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
