"""How fast the loss is: beside the floor and other losses, by panel size, batch size and panel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from fused_siglip import siglip_loss

from ...common.baselines import ABLATIONS
from ...common.memory import peak_bytes
from ...common.panels import plan_of
from ...common.timing import beside_floor, interleaved, measure, summary
from ...common.workloads import MODES, Case, make_inputs, step
from .run import Point, Run, Skipped, matmul_precision, usable


def speed(run: Run) -> Iterator[dict]:
    names = run.baselines(but=("compiled", "fused_torch") if run.on_gpu else ("compiled",))
    yield from usable(names, run)
    for point in run.sizes.speed:
        run.needs(40 if "compiled" in point.only else 8, point)
        chosen = [name for name in point.only if name in run.baselines()]
        yield from usable(chosen, run)
        cases = _cases(point, chosen if point.only else names, run)
        if not cases:
            continue
        with matmul_precision(point.precision):
            try:
                rows = measure(cases, run.sizes.repeats, **_options(run))
            except torch.OutOfMemoryError:  # each fits, but not beside the floor's matrices
                torch.cuda.empty_cache()
                ours = [case for case in cases if case.loss == run.fused]
                rows = measure(ours, run.sizes.repeats, **_options(run))
        yield from rows
        if run.on_gpu:
            torch.cuda.empty_cache()


def _options(run: Run) -> dict:
    # on a CPU every number of memory takes a process of its own
    return {"memory": run.on_gpu, "progress": False}


def _cases(point: Point, names: list[str], run: Run) -> list[Case]:
    left_out = set()
    if point.dtype != "bfloat16":
        left_out = {"siglip_kernel", "open_clip", "row_chunked"}
    shape = (point.batch_size, point.dim, point.dtype, run.device)
    t = point.logit_scale
    cases = [Case(name, *shape, logit_scale=t) for name in names if name not in left_out]
    if point.modes:
        cases += [Case(run.fused, *shape, m, logit_scale=t) for m in MODES if m != "full"]
    return cases


def alternative(run: Run) -> Iterator[dict]:
    """The shipped panels beside those of ablation_panels.py."""
    if not run.on_gpu:
        raise Skipped("needs a GPU")
    wide = torch.cuda.get_device_capability(run.device)[0] == 9
    names = [name for name in ABLATIONS if wide or name != "portable"]
    yield from usable(names, run)
    for size, dim in run.sizes.alternative:
        run.needs(8, f"B = {size}, D = {dim}")
        cases = [Case(n, size, dim, "bfloat16", run.device) for n in (run.fused, *names)]
        for row in measure(cases, run.sizes.repeats, **_options(run)):
            yield {**row, "kind": "ablation"}


def panels(run: Run) -> Iterator[dict]:
    """Time against the workspace, to choose the planner's default."""
    size, dim = run.sizes.panels
    inputs = make_inputs(size, dim, "bfloat16", run.device)
    functions = {
        workspace: step(
            functools.partial(siglip_loss, backend=run.backend, workspace_bytes=workspace), inputs
        )
        for workspace in (None, *run.sizes.workspaces)
    }
    for workspace, times in beside_floor(functions, inputs, run.sizes.repeats).items():
        plan = plan_of(inputs, run.backend, workspace)
        yield {
            "kind": "panels",
            "device": run.device,
            "batch_size": size,
            "dim": dim,
            "dtype": "bfloat16",
            "workspace_bytes": workspace,  # None: the planner's default
            "used_bytes": plan.workspace_bytes,
            "rows": plan.rows,
            "cols": plan.cols,
            **times,
        }


def latency(run: Run) -> Iterator[dict]:
    """Small batches: each loss as it is called, and replayed from a CUDA graph."""
    dim = run.sizes.panels[1]
    names = run.main_baselines()
    yield from usable(names, run)
    for size in run.sizes.latency:
        run.needs(4, f"B = {size}")
        yield from called_and_replayed(names, size, dim, 5 * run.sizes.repeats, run.device)


def called_and_replayed(
    names: Sequence[str], size: int, dim: int, repeats: int, device: str
) -> Iterator[dict]:
    """A row for each loss as it is called, and one for its CUDA graph where it can be captured."""
    inputs = make_inputs(size, dim, "bfloat16", device)
    steps = {name: Case(name, size, dim, "bfloat16", device).step(inputs) for name in names}
    functions: dict[tuple[str, bool], Callable] = {(n, False): f for n, f in steps.items()}
    shape = {"device": device, "batch_size": size, "dim": dim, "dtype": "bfloat16"}
    for name, function in steps.items() if inputs.x.is_cuda else ():
        try:
            functions[name, True] = captured(function)
        except RuntimeError as error:
            if name.startswith("fused_"):
                raise
            why = f"not captured: {str(error).strip()[:200]}"
            yield {"kind": "left_out", "loss": name, **shape, "reason": why}
    seconds = interleaved(functions, repeats, warmup=3, device=device, queued=False)
    for (name, graph), times in seconds.items():
        yield {"kind": "latency", "loss": name, "graph": graph, **shape, **summary(times)}


def captured(function: Callable) -> Callable[[], None]:
    """A CUDA graph of one call, to replay; its inputs and outputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes the libraries' handles and workspaces
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function()

    def replay(outputs=outputs) -> None:  # holds on to the outputs' memory
        graph.replay()

    return replay


def million(run: Run) -> Iterator[dict]:
    """One step on a batch whose pair matrix would take terabytes: seconds and peak memory."""
    size, dim = run.sizes.million
    warm_up = Case(run.fused, 4096 if run.on_gpu else 64, dim, "bfloat16", run.device)
    interleaved({"step": warm_up.step(warm_up.inputs())}, 1, 0, run.device)
    case = Case(run.fused, size, dim, "bfloat16", run.device)
    inputs = case.inputs()
    if run.on_gpu:
        torch.cuda.empty_cache()
    plan = plan_of(inputs, run.backend)
    times: list[float] = []

    def timed() -> tuple[torch.Tensor, ...]:
        result: list[tuple[torch.Tensor, ...]] = []
        function = case.step(inputs)
        seconds = interleaved({"step": lambda: result.append(function())}, 1, 0, run.device)
        times.extend(seconds["step"])
        return result[0]

    peak, outputs = peak_bytes(timed, run.device)
    yield {
        "kind": "million",
        "loss": case.loss,
        "batch_size": size,
        "dim": dim,
        "dtype": "bfloat16",
        "device": run.device,
        "seconds": times[0],
        "flops": case.products * 2 * size * size * dim,
        "peak_bytes": peak + sum(v.nbytes for v in inputs) if run.on_gpu else None,
        "rows": plan.rows,
        "cols": plan.cols,
        "finite": all(bool(v.isfinite().all()) for v in outputs),
    }
