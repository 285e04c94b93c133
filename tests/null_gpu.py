"""Runs a Python program as if one H100 were here, on a machine without a GPU: CUDA's libraries give way to stand-ins
whose kernels do nothing. Needs a CUDA build of PyTorch 2 for Linux with its Triton, gcc and nm; no driver, no toolkit.

    python tests/null_gpu.py train_gpt.py [ARGUMENTS]             # knobs are environment variables, as usual
    python tests/null_gpu.py tests/bench_gpu.py training          # peak memory
    python tests/null_gpu.py -m pytest -n0 tests/test_counts.py -k cuda

Real: PyTorch's host code and caching allocator (what goes beyond 79 GiB fails, as on the card), choice of kernels,
shapes, dtypes, devices, streams, waits that PyTorch's watch reports, graphs of Dynamo, compilation by Inductor, Triton
and ptxas for sm_90, peak memory, the time that the host needs to queue work.
Not real: whatever a kernel computes. A tensor on the device holds zeros, what was copied there, or leftovers.
NOTHING THAT IS PRINTED ABOUT TIME ON THE DEVICE, SPEED, LOSSES, SCORES OR SIZES OF ARTIFACTS MEANS ANYTHING.

Known limits: one process and one GPU; no cuDNN, cuFFT, CUDA graphs or expandable segments; copies between host and
device happen at once, in host time; operators whose shapes follow values (`nonzero`) may return anything. Processes
that the program starts see the GPU too, unless CUDA_VISIBLE_DEVICES is empty, but not the patches below.
"""
from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
TRITON = Path(getattr(importlib.util.find_spec("triton"), "origin", None) or "none").parent / "backends" / "nvidia"
MARK = "NULL_GPU"    # in the environment of the process in which the stand-ins are loaded
# Functions of the runtime, of the driver, and of the libraries of products and factors; cuFile is left alone.
WANTED = re.compile(r"(?:__)?cuda[A-Z_]\w*|cu(?!File)[A-Z]\w*|cu(?:blas|solver|sparse)\w+")
# What those with these names do before they return 0, that is success; their arguments are a, b, c, d, e, f.
ANSWERS = {
    r"cu(da|blas|solver|sparse)\w*[Cc]reate\w*|cuModule(Load\w*|GetFunction)|cuDevicePrimaryCtxRetain|cuCtxGetCurrent":
        "static long last = 1024; *(long *)a = last += 64;",    # a handle, which nobody follows
    r"cudaGetDevice|cuDeviceGet": "*(int *)a = 0;",
    r"cu(da)?DeviceGetAttribute": "*(int *)a = attribute[(long)b & 255];",
    r"cuda(Driver|Runtime)GetVersion": "*(int *)a = VERSION;",
    r"cudaDeviceGetStreamPriorityRange": "*(int *)a = 0; *(int *)b = -5;",
    r"cuDevicePrimaryCtxGetState": "*(int *)b = 0; *(int *)c = 1;",
    r"cudaStream(IsCapturing|GetCaptureInfo\w*)": "*(int *)b = 0;",    # no graph is being captured
    r"cudaEventElapsedTime\w*": "*(float *)a = 1;",    # ms
    r"cu\w*OccupancyMaxActive\w+": "*(int *)a = 4;",
    r"cublasGet(Pointer|Math)Mode\w*": "*(int *)b = 0;",
    r"cusolverDn[SD]potrf_bufferSize": "*(int *)f = 64;",
    r"cudaGetDriverEntryPoint": "*(void **)b = nothing; if (d) *(int *)d = 0;",
    r"cudaGetDriverEntryPointByVersion|cuGetProcAddress_v2": "*(void **)b = nothing; if (e) *(int *)e = 0;",
    r"cuGetError(String|Name)": '*(char **)b = "null GPU";',
    r"cudaGetError(String|Name)|cu\w+GetStatusString": 'return (long)"null GPU";',
}
# The rest that must answer. Without CUDA's headers: structures are filled by offset, save cudaDeviceProp, whose
# definition takes the place of PROPERTIES, because CUDA 12 and 13 differ in it.
SOURCE = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
typedef struct { char bytes[16]; } cudaUUID_t;
PROPERTIES
#define ROOM (79ul << 30)      /* what PyTorch sees of an H100 with 80 GB */
#define WINDOW (32ul << 40)    /* addresses, none used twice; only pages that are touched take memory */
#define BLOCK (2ul << 20)
static char *window;
static size_t next, used;      /* no lock: PyTorch's allocator holds one */
__attribute__((constructor)) static void reserve(void) {
    window = mmap(0, WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (window == MAP_FAILED) next = WINDOW;
}
static int here(const void *p) { return (char *)p >= window && (char *)p < window + WINDOW; }
static int nothing(void) { return 0; }
int cudaGetDeviceCount(int *n) {    /* an empty list hides this GPU as it would a real one; 100: no device */
    const char *shown = getenv("CUDA_VISIBLE_DEVICES");
    return (*n = !shown || *shown) ? 0 : 100;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *p) {
    *p = (struct cudaDeviceProp){
        .name = "NVIDIA H100 null", .major = 9, .warpSize = 32, .totalGlobalMem = ROOM, .multiProcessorCount = 132,
        .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32,
        .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448, .sharedMemPerMultiprocessor = 233472,
        .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536, .l2CacheSize = 50 << 20, .memoryBusWidth = 5120, .cooperativeLaunch = 1};
    return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p) { return cudaGetDeviceProperties(p); }
static const int attribute[256] = {    /* the driver and the runtime number them alike; clocks (13, 36) in kHz */
    [75] = 9, [10] = 32, [16] = 132, [1] = 1024, [39] = 2048, [106] = 32, [8] = 49152, [97] = 232448, [81] = 233472,
    [2] = 1024, [3] = 1024, [4] = 64, [5] = 2147483647, [6] = 65535, [7] = 65535, [12] = 65536, [82] = 65536,
    [38] = 50 << 20, [37] = 5120, [13] = 1980000, [36] = 2619000, [95] = 1};
int cudaMemGetInfo(size_t *available, size_t *all) { *available = ROOM - used; *all = ROOM; return 0; }
int cudaMalloc(char **p, size_t n) {    /* 2: out of memory. The page before a block holds its size */
    n = (n + BLOCK - 1) / BLOCK * BLOCK;
    if (used + n > ROOM || next + n + BLOCK > WINDOW) return 2;
    *p = window + next + BLOCK;
    used += ((size_t *)*p)[-1] = n;
    next += n + BLOCK;
    return 0;
}
int cudaFree(char *p) {
    if (!here(p)) return 0;
    used -= ((size_t *)p)[-1];
    return madvise(p, ((size_t *)p)[-1], MADV_DONTNEED);
}
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return posix_memalign(p, 4096, n) ? 2 : 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *to, const void *from, size_t n) {    /* much within the device: a kernel's work */
    if (n < BLOCK || !here(to) || !here(from)) memcpy(to, from, n);
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t n) { return cudaMemcpy(to, from, n); }
int cudaMemset(void *p, int v, size_t n) { if (n < BLOCK) memset(p, v, n); return 0; }    /* so too */
int cudaMemsetAsync(void *p, int v, size_t n) { return cudaMemset(p, v, n); }
int cudaPointerGetAttributes(int *a, void *p) { memset(a, 0, 24); *a = here(p) ? 2 : 0; return 0; }    /* a device's */
int cuPointerGetAttribute(void **found, int which, void *p) { *found = p; return !here(p); }    /* 1: no device's */
int cuFuncGetAttribute(int *v, int which) { *v = which == 0 ? 1024 : which == 4 ? 32 : 0; return 0; }
int cudaFuncGetAttributes(void *p) {    /* three sizes, then threads and registers, as above, and versions */
    memcpy(p, (int[10]){0, 0, 0, 0, 0, 0, 1024, 32, 90, 90}, 40);
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *l, void *d, void *a, void *b, void *c, void *e, void *w, int n, char *found,
                                   int *count) { memset(found, 0, 96); *count = 1; return 0; }    /* takes no room */
int cusolverDnXpotrf_bufferSize(void *l, void *o, int u, long n, int t, void *a, long lda, int c, long *device,
                                long *host) { *device = *host = 64; return 0; }
"""


def trouble() -> str:
    """One sentence on why this cannot work here; empty if it can."""
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__} was built without CUDA; install a build with it (it needs no GPU)."
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} is a real GPU; run the program itself."
    missing = [tool for tool in ("gcc", "nm") if not shutil.which(tool)] + ["Triton"] * (not TRITON.is_dir())
    return f"{' and '.join(missing)} must be installed." if missing else ""


def asked_for() -> set[str]:
    """Names of CUDA's functions that PyTorch's libraries leave open, and that Triton and others look up by name."""
    libraries = Path(torch.__file__).parent.glob("lib/*.so")
    table = subprocess.run(["nm", "-D", "--undefined-only", *libraries], check=True, capture_output=True, text=True)
    names = {"cuGetProcAddress_v2", *re.findall(r" U (\w+)", table.stdout)}
    for launcher in TRITON.glob("driver.*"):    # C, and C within Python
        names |= set(re.findall(r"\bcu[A-Z]\w+", launcher.read_text()))
    return {name for name in names if WANTED.fullmatch(name)}


def properties() -> str:
    """The definition of cudaDeviceProp in the headers that the wheels of PyTorch or Triton bring along."""
    site = Path(torch.__file__).parent.parent
    for header in (*site.glob("nvidia/*/include/driver_types.h"), TRITON / "include" / "driver_types.h"):
        version = re.search(r"CUDART_VERSION +(\d+)", (header.parent / "cuda_runtime_api.h").read_text())
        if version and int(version[1]) // 1000 == int(torch.version.cuda.split(".")[0]):
            found = re.search(r"struct [\w ]*cudaDeviceProp\s*{.*?};", header.read_text(), re.S)
            return re.sub(r"struct [\w ]*cudaDeviceProp", "struct cudaDeviceProp", found[0])
    sys.exit(f"null_gpu: no driver_types.h of CUDA {torch.version.cuda} lies beside PyTorch or Triton.")


def built(folder: Path) -> Path:
    """The stand-ins, compiled in `folder`. One library is enough: loaded first, it answers for the runtime and the
    others, and whoever opens libcuda.so.1 finds that a library of this name is loaded already."""
    major, minor = map(int, torch.version.cuda.split(".")[:2])
    lines = [f"#define VERSION {1000 * major + 10 * minor}", SOURCE.replace("PROPERTIES", properties())]
    for name in sorted(asked_for() - set(re.findall(r"\b(\w+)\(", SOURCE))):
        does = next((code for names, code in ANSWERS.items() if re.fullmatch(names, name)), "")
        lines.append(f"long {name}(void *a, void *b, void *c, void *d, void *e, void *f) {{ {does} return 0; }}")
    text, library = folder / "null_gpu.c", folder / "libcuda.so.1"
    text.write_text("\n".join(lines) + "\n")
    options = ["-w", "-O1", "-std=gnu11", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", library, text], check=True)
    (folder / "libcuda.so").symlink_to(library)    # Triton links its launchers against it
    return library


def start(arguments: list[str]) -> int:
    """Starts this file once more, behind the stand-ins, and returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="null_gpu_") as folder:
        env = {MARK: "1", "LD_PRELOAD": str(built(Path(folder))), "TRITON_LIBCUDA_PATH": folder}
        # Inductor chooses by timings and remembers its choice: what made-up ones say must not reach a real GPU
        cache = Path(tempfile.gettempdir(), f"null_gpu_cache_{os.getuid()}")
        env = dict(TORCHINDUCTOR_CACHE_DIR=str(cache)) | os.environ | env
        with subprocess.Popen([sys.executable, __file__, *arguments], env=env) as program:
            signal.signal(signal.SIGTERM, lambda *_: program.terminate())    # it goes first, the folder after it
            return program.wait()


def patch_torch() -> None:
    """What PyTorch must not do here."""
    torch.backends.cuda.enable_cudnn_sdp(False)    # cuDNN has no stand-in: it would want a real driver
    factor = torch.linalg.cholesky_ex

    def cholesky_ex(H: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The same call, which never fails: whether it did would be read from garbage."""
        return factor(H, **options)[0], torch.zeros(H.shape[:-2], dtype=torch.int32)

    torch.linalg.cholesky_ex = cholesky_ex


def patch_script(script: ModuleType) -> None:
    """Replaces what garbage could not pass in train_gpt.py; the work on the device is still queued."""
    nats, compared, folded = script.Ledger.targets_nats, script.kernels_trouble, script.fold

    def targets_nats(ledger: object) -> np.ndarray:
        """One nat per target: that each was scored once is compared on the device."""
        with contextlib.suppress(RuntimeError):
            nats(ledger)
        return np.ones(len(ledger), np.float32)

    def check_trellis(codes: np.ndarray, states: int) -> None:
        """Codes that no kernel has computed follow no trellis: this sets their parities to what it asks for."""
        follow, state = script.trellis_next(states), np.zeros_like(codes[:, 0])
        for row in codes.swapaxes(0, 1):
            row ^= (row ^ state) & 1
            state = follow[state, row >> 1 & 1].astype(row.dtype)

    script.Ledger.targets_nats, script.check_trellis = targets_nats, check_trellis
    # leftovers are too large for the coder's tables, and zeros too short for a reader who suspects damage: made-up ones
    script.fold = lambda codes: folded(np.random.default_rng(0).integers(-2, 3, codes.shape, codes.dtype))
    # garbage that happens to be infinite would end the run
    script.check_finite = lambda *found: None
    # kernels may fail to compile, but what they compute must not count against them
    script.kernels_trouble = lambda: "" if compared().startswith("they are off by") else compared()


def loaded(path: Path) -> ModuleType:
    """train_gpt.py under its own name, with its patches: as __main__ it would be out of their reach."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    sys.modules["train_gpt"] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    patch_script(script)
    return script


def play(arguments: list[str]) -> object:
    """Runs the program here, where the stand-ins are loaded; returns what it would exit with."""
    chip = torch.cuda.get_device_properties(0)
    assert (chip.major, chip.multi_processor_count, chip.total_memory) == (9, 132, 79 << 30), f"cudaDeviceProp: {chip}"
    patch_torch()
    module, name = arguments[0] == "-m", arguments[arguments[0] == "-m"]
    sys.argv = arguments[int(module):]
    sys.path[0] = str(Path.cwd() if module else Path(name).resolve().parent)
    if Path(name).name == "train_gpt.py":
        return loaded(Path(name)).main(sys.argv[1:], os.environ)
    loaded(REPO / "train_gpt.py")    # before the program imports it
    if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
    return 0


def main(arguments: list[str]) -> object:
    """What the process exits with: the status of the program that the arguments name, or why it was not started."""
    if not arguments or arguments in (["-h"], ["--help"], ["-m"]):
        return __doc__
    if MARK in os.environ:
        return play(arguments)
    why = trouble()
    return f"null_gpu: {why}" if why else start(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
