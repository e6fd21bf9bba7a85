"""``python -m fused_siglip.estimate``: what a step costs on a cluster, before one has it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..distributed.exchange import choose_impl
from ..kernels import default_backend
from . import cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _scaled(value: float, unit: str, step: int, prefixes: Sequence[str]) -> str:
    power = 0
    while value >= step and power + 1 < len(prefixes):
        value /= step
        power += 1
    return f"{value:.4g} {prefixes[power]}{unit}"


def _bytes(value: float) -> str:
    return _scaled(value, "B", 1024, ("", "Ki", "Mi", "Gi", "Ti"))


def _rate(value: float, unit: str) -> str:
    return _scaled(value, unit, 1000, ("", "k", "M", "G", "T", "P"))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def table(costs: dict[str, cost.Cost]) -> str:
    lines = {
        "": list(costs),
        "peak memory": [_bytes(c.peak_bytes) for c in costs.values()],
        "bytes sent": [_bytes(c.bytes_sent) for c in costs.values()],
        "FLOPs": [_rate(c.flops, "") for c in costs.values()],
        "compute": [_ms(c.compute_seconds) for c in costs.values()],
        "communication": [_ms(c.communication_seconds) for c in costs.values()],
        "  hidden by compute": [_ms(c.hidden_seconds) for c in costs.values()],
        "loss and gradients": [_ms(c.seconds) for c in costs.values()],
    }
    return "\n".join(
        f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in lines.items()
    )


def assumptions(name: str, dtype: torch.dtype, world_size: int) -> str:
    device = cost.DEVICES[name]
    across = world_size > cost.RANKS_PER_NODE
    link = device.network if across else device.node
    where = "network, one port a GPU" if across else "NVLink"
    launches = f"{cost.PANEL_LAUNCHES * 1e6:.0f} us"
    lines = [
        "Per rank; the same batch on all; loss and all four gradients. Assumed, not measured here:",
        f"- {_rate(device.flops[dtype], 'FLOP/s')} sustained, or {launches} a panel to launch its "
        "kernels, whichever takes longer",
        f"- {_rate(link.bandwidth, 'B/s')} each way between neighbors ({where}): "
        f"{cost.SUSTAINED:.0%} of the line rate",
        f"- {cost.OPERATION * 1e6:.1f} us an exchange and {link.latency * 1e6:.1f} us a hop; a "
        "ring is as fast as its slowest link",
        "- ring: an exchange passes while its step computes, but for the last, which brings the",
        "  gradients home; gather: nothing overlaps",
        "- peak memory is what torch allocates beyond the features, the returned gradients",
        "  included, the transport's own buffers not",
        "- left out: the exchange of sizes (gloo: all to all on the hosts), passes",
        "  bound by memory, other traffic on the links",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_siglip.estimate", description=__doc__)
    parser.add_argument("--world-size", type=int, required=True, help="ranks")
    parser.add_argument("--local-batch", type=int, required=True, help="images of one rank")
    parser.add_argument("--dim", type=int, required=True, help="D, features of an embedding")
    parser.add_argument("--device", choices=cost.DEVICES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--dist-impl", choices=("ring", "gather"), help="one of them alone")
    args = parser.parse_args(arguments)
    for option in ("world_size", "local_batch", "dim"):
        if getattr(args, option) < 1:
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: {getattr(args, option)}: expected at least 1")

    sizes = (args.world_size, args.local_batch, args.dim)
    dtype, device = DTYPES[args.dtype], cost.DEVICES[args.device]
    backend = default_backend("cuda", dtype)
    impls = [args.dist_impl] if args.dist_impl else ["ring", "gather"]
    print(
        f"{args.world_size} x {args.device}, {args.local_batch} rows each (global batch "
        f"{args.world_size * args.local_batch}), D = {args.dim}, {args.dtype}, {backend} panels\n"
    )
    print(table({impl: cost.predict(impl, *sizes, dtype, device, backend) for impl in impls}))
    chosen = choose_impl(args.local_batch, args.dim, dtype, args.world_size, True)
    print(
        f"\ndist_impl=None chooses {chosen}.\n\n{assumptions(args.device, dtype, args.world_size)}"
    )


if __name__ == "__main__":
    main()
