"""The bits of the loss on a wide matrix of calls: recorded before a rewrite, compared after it.

    PYTHONPATH=tests python -m soak.bits --record FILE     # on the tree as it was
    PYTHONPATH=tests python -m soak.bits --compare FILE    # on the tree as it is; status 1 if they
                                                           # differ

Every call goes through the public function, on both backends (triton in its interpreter), compiled,
and in process groups of one to three ranks. A line holds a hash of the loss and of its gradients
and, for one eager process, the peak of what torch allocates. Bits belong to one machine and one
torch: they are no reference for correctness, which tests hold against float64.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler prints a line a call otherwise

import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fused_siglip import Easiest, Hardest, Random, siglip_loss
from support.memory import peak_allocated

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
NEGATIVES = {
    "all": None,
    "random": Random(0.3, seed=7),
    "hardest": Hardest(0.1),
    "easiest": Easiest(0.25),
}
PAIRS = ("diagonal", "ids", "none")
GRADS = {"all": (1, 1, 1, 1), "image": (1, 0, 0, 0), "text": (0, 1, 0, 0), "scalars": (0, 0, 1, 1)}


def inputs(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Features, t and b; and ids with padding."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, 40, generator=generator, dtype=torch.float64) for rows in (m, n))
    x, y = (torch.nn.functional.normalize(f, dim=1).to(dtype) for f in (x, y))
    wide = torch.promote_types(dtype, torch.float32)
    scalars = [torch.tensor(12.5, dtype=wide), torch.tensor(-3.0, dtype=wide)]
    ids = [torch.randint(-1, 20, (rows,), generator=generator) for rows in (m, n)]
    return [x, y, *scalars], ids


def run(function: Callable, tensors: Sequence[Tensor], needs: Sequence[int], **options) -> str:
    """A hash of the loss and of the gradients that are needed."""
    leaves = [
        t.detach().clone().requires_grad_(bool(need))
        for t, need in zip(tensors, needs, strict=True)
    ]
    loss = function(*leaves, **options)
    out = [loss.detach()]
    if loss.requires_grad:
        (loss * 1.5).backward()
        out += [leaf.grad for leaf in leaves if leaf.grad is not None]
    digest = hashlib.sha1()
    for tensor in out:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def calls(sizes: Sequence[tuple[int, int]], dtypes: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Names of calls, and what they take."""
    for (m, n), dtype, pairs, negatives in itertools.product(sizes, dtypes, PAIRS, NEGATIVES):
        if pairs == "diagonal" and m != n:
            continue
        for grads in GRADS if negatives in ("all", "random") and pairs != "none" else ("all",):
            for reduction in ("mean", "sum") if grads == "all" else ("mean",):
                name = f"{m}x{n} {dtype} {pairs} {negatives} {grads} {reduction}"
                tensors, (image_ids, text_ids) = inputs(m, n, DTYPES[dtype])
                options = {"negatives": NEGATIVES[negatives], "reduction": reduction}
                if pairs == "ids":
                    options |= {"image_ids": image_ids, "text_ids": text_ids}
                options["negative_only"] = pairs == "none"
                yield name, {"tensors": tensors, "needs": GRADS[grads], **options}


def one_process(backend: str, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    dtypes = [d for d in DTYPES if not (backend == "triton" and d == "float64")]
    for name, call in calls(sizes, dtypes):
        for workspace in (None, 1 << 19):
            options = {"backend": backend, "workspace_bytes": workspace}
            found = run(siglip_loss, **call, **options)
            if backend == "torch":
                found += f" {peak_allocated(lambda: run(siglip_loss, **call, **options))}"  # noqa: B023
            yield f"{backend} {name} workspace={workspace}", found
    x = inputs(130, 130, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        yield f"{backend} autocast", run(siglip_loss, x, (1,) * 4, backend=backend)
    turned = [x[0].T.contiguous().T, x[1][:, torch.arange(39, -1, -1)], *x[2:]]
    yield f"{backend} strides", run(siglip_loss, turned, (1,) * 4, backend=backend)


def compiled() -> Iterator[tuple[str, str]]:
    torch._dynamo.config.recompile_limit = 1000
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(siglip_loss, fullgraph=True, backend=counter)
    for name, call in calls([(130, 130), (70, 70), (90, 90)], ["float32", "bfloat16"]):
        if "all mean" in name:
            yield f"compiled {name}", run(function, **call)
    for seed in range(5):
        x = inputs(130, 130, torch.float32)[0]
        yield f"compiled seed {seed}", run(function, x, (1,) * 4, negatives=Random(0.5, seed=seed))
    yield "compilations", str(counter.frame_count)


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    lines = {}
    for dist_impl, uneven in itertools.product(("ring", "gather"), (0, 1)):
        m = 60 + 20 * rank * uneven
        n = 60 + 20 * rank * uneven
        for name, call in calls([(m, n)], ["float32", "bfloat16"]):
            call["tensors"] = inputs(m, n, call["tensors"][0].dtype, seed=rank)[0]
            name = name.split(" ", 1)[1]
            key = f"group {world_size}.{rank} {dist_impl} uneven={uneven} {name}"
            lines[key] = run(siglip_loss, **call, group="world", dist_impl=dist_impl)
    Path(folder, f"{rank}.json").write_text(json.dumps(lines))
    dist.destroy_process_group()


def groups() -> Iterator[tuple[str, str]]:
    for world_size in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (world_size, folder), world_size)
            for rank in range(world_size):
                yield from json.loads(Path(folder, f"{rank}.json").read_text()).items()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bits", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="write the lines to this file")
    parser.add_argument("--compare", type=Path, help="compare with the lines of this file")
    parser.add_argument("--triton", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.triton:  # in a process of its own: the interpreter is chosen at import
        print(json.dumps(dict(one_process("triton", [(70, 70), (130, 60)]))))
        return 0
    command = [sys.executable, "-m", "soak.bits", "--triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    interpreter = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = dict(one_process("torch", [(130, 130), (64, 200), (700, 700)]))
    print(f"one process: {len(lines)} calls", file=sys.stderr)
    lines |= dict(compiled())
    lines |= dict(groups())
    print(f"compiled and groups: {len(lines)} calls", file=sys.stderr)
    lines |= json.loads(interpreter.communicate()[0])
    if args.record:
        args.record.write_text(json.dumps(lines, indent=0))
        print(f"{len(lines)} calls recorded")
    return compare(json.loads(args.compare.read_text()), lines) if args.compare else 0


def compare(before: dict[str, str], after: dict[str, str]) -> int:
    """Print what has changed; 1 where bits differ or a peak has grown."""
    names = sorted(before.keys() | after.keys())
    other_bits = [n for n in names if _bits(before.get(n)) != _bits(after.get(n))]
    grown = [n for n in names if _peak(after.get(n)) > _peak(before.get(n))]
    for name in (other_bits + grown)[:40]:
        print(f"{name}: {before.get(name)} -> {after.get(name)}")
    print(f"{len(names) - len(other_bits)} of {len(names)} calls give the bits of before")
    print(f"{len(grown)} of {len(names)} take more memory at their peak")
    return 1 if other_bits or grown else 0


def _bits(line: str | None) -> str | None:
    return line and line.split()[0]


def _peak(line: str | None) -> int:
    return int(line.split()[1]) if line and " " in line else 0


if __name__ == "__main__":
    sys.exit(main())
