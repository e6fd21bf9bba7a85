"""Tables that several pages have: time, memory and errors of every loss."""

from __future__ import annotations

from collections.abc import Iterable

from ..common.markdown import number, table
from ..common.results import MIB, fused_name, main_shape, select

NAMES = {
    "fused_torch": "**fused_siglip**, torch backend",
    "fused_triton": "**fused_siglip**, Triton backend",
    "siglip_kernel": "siglip-kernel",
    "compiled": "torch.compile of eager",
    "eager": "eager",
    "open_clip": "open_clip's SigLipLoss",
    "row_chunked": "rows in chunks of 512, under autograd",
    "one_rounding": "the exact gradient, rounded once",
    "library_fp32": "library product, elementwise kernel",
    "library_in_place": "the same in place, rounded similarities",
    "portable": "fused_siglip, its portable kernel",
}


def label(name: str) -> str:
    return NAMES.get(name, name)


def ordered(names: Iterable[str]) -> list[str]:
    """Baselines: ours first, then the fastest peers."""
    known = list(NAMES)
    return sorted(set(names), key=lambda n: known.index(n) if n in known else len(known))


COLUMNS = {  # title: (field of a row, format, factor)
    "x floor": ("ratio_to_floor", ".2f", 1.0),
    "ms": ("seconds", ".2f", 1e3),
    "MiB": ("peak_extra_bytes", ".0f", 1 / MIB),
}


def cost_table(
    rows: list[dict], sizes: Iterable[int] | None = None, columns: Iterable[str] = tuple(COLUMNS)
) -> str:
    """Time and memory of every baseline, at the dim and dtype of the first row."""
    cost = select(rows, mode="full", **main_shape(rows))
    timed = sorted({row["batch_size"] for row in cost if row["seconds"] is not None})
    shown = [(size, c) for size in sizes or timed if size in timed for c in columns]

    def cell(name: str, size: int, column: str) -> str:
        field, spec, factor = COLUMNS[column]
        (row,) = select(cost, loss=name, batch_size=size) or [{}]
        return number(row.get(field), spec, factor)

    first = next(iter(columns))
    header = [f"{c}, B = {size}" if c == first else c for size, c in shown]
    names = ordered(row["loss"] for row in cost)
    return table(["", *header], ([label(n), *(cell(n, *at) for at in shown)] for n in names))


def _operands(row: dict) -> str:
    return "tf32" if row["matmul_precision"] == "high" else row["dtype"]


def shapes_table(rows: list[dict], shown: Iterable[tuple[str, str]]) -> str:
    """A line for each dtype, shape and t that was timed; ``shown`` are (loss, column) pairs."""
    full = select(rows, mode="full")
    keys = ("dtype", "matmul_precision", "dim", "logit_scale", "batch_size")
    main = [row[key] for row in full[:1] for key in keys[:2]]
    shapes = sorted(
        {tuple(row[key] for key in keys) for row in full},
        key=lambda shape: (list(shape[:2]) != main, *shape),
    )
    shown = list(shown)

    def cells(shape: tuple) -> list[str]:
        here = select(full, **dict(zip(keys, shape, strict=True)))
        found = [_operands(here[0]), *(format(n, "g") for n in shape[2:4]), str(shape[4])]
        for loss, column in shown:
            field, spec, factor = COLUMNS[column]
            (row,) = select(here, loss=loss) or [{}]
            found.append(number(row.get(field), spec, factor))
        return found

    header = [column if loss == "" else f"{label(loss)}, {column}" for loss, column in shown]
    return table(["operands", "D", "t", "B", *header], map(cells, shapes))


def accuracy_table(rows: list[dict], **fields: object) -> str:
    """Root mean square errors of the feature gradients, over those of the gradients themselves."""
    chosen = select(rows, kind="accuracy", **fields)
    names = ordered(row["loss"] for row in chosen)
    keys = ("dtype", "matmul_precision", "logit_scale", "batch_size", "dim")
    shapes = list(dict.fromkeys(tuple(row.get(key) for key in keys) for row in chosen))

    def cells(shape: tuple) -> list[str]:
        at = dict(zip(keys, shape, strict=True))
        found = [_operands(at), f"{at['logit_scale']:g}", str(at["batch_size"]), str(at["dim"])]
        for name in names:
            here = [row for row in chosen if row["loss"] == name]
            here = [row for row in here if all(row.get(key) == at[key] for key in keys)]
            errors = here[0]["errors"] if here else None
            worst = errors and max(errors[k]["rms"] for k in ("image_grad", "text_grad"))
            found.append(number(worst, ".1e"))
        return found

    return table(["dtype", "t", "B", "D", *map(label, names)], map(cells, shapes), left=1)


def savings(rows: list[dict]) -> str:
    """What a frozen tower and no gradients cost, at the largest size where that was timed."""
    fused = fused_name(rows)
    timed = [row for row in select(rows, kind="cost", loss=fused) if row["seconds"]]
    frozen = max(select(timed, mode="frozen"), key=lambda row: row["batch_size"], default=None)
    if frozen is None:
        return ""
    at = {k: frozen[k] for k in ("batch_size", "dim", "dtype", "logit_scale") if k in frozen}
    (full,), (forward,) = (select(timed, mode=mode, **at) for mode in ("full", "no_grad"))
    return (
        f"At B = {at['batch_size']}, D = {at['dim']} a step with a frozen image tower takes "
        f"{frozen['seconds'] / full['seconds']:.2f} of the full time, and one under `no_grad` "
        f"{forward['ratio_to_floor']:.2f} times the one product that it needs."
    )
