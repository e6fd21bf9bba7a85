"""``make mutations``: break the package on purpose, one line at a time; some test must notice.

Every mutation is made in a scratch copy of the tree, where the quick tests run until the first
failure. The table says which test that was; a mutation that none catches is a status of 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The tests that run for a mutation, the first to fail being the one that caught it.
QUICK = {
    "torch": ["tests/test_properties.py", "tests/test_loss.py", "tests/test_autograd.py",
              "tests/test_negatives.py", "tests/test_totals.py", "tests/test_cpu_panels.py",
              "-k", "torch or not triton"],
    "triton": ["tests/test_triton_panel.py", "tests/test_properties.py", "tests/test_loss.py",
               "tests/test_negatives.py", "tests/test_totals.py", "-k", "triton"],
    "distributed": ["tests/test_distributed.py", "tests/test_negatives.py",
                    "-k", "test_every_split and (2 or 3)"],
}  # fmt: skip


class Mutation(NamedTuple):
    what: str
    tests: str  # which of QUICK
    file: str
    old: str  # occurs once
    new: str


ENGINE, AUTOGRAD, FUNCTIONAL, DISTRIBUTED = (
    f"fused_siglip/{name}.py" for name in ("engine", "autograd", "functional", "distributed")
)
NEGATIVES = "fused_siglip/negatives.py"
KERNELS = "kernels/__init__.py"
TORCH, TRITON, MATH, PRODUCTS, PRODUCTS_TRITON, TOTALS, TOTALS_TRITON = (
    f"kernels/{name}.py"
    for name in ("torch_panel", "triton_panel", "math", "products", "triton_products", "totals",
                 "triton_totals")
)  # fmt: skip

MUTATIONS = (
    # signs
    Mutation("positives keep the sign of negatives", "torch", TORCH, "values.diagonal(positive).neg_()", "values.diagonal(positive)"),
    Mutation("positives by id keep the sign", "torch", TORCH, "torch.where(positive, negated, values, out=values)", "values.copy_(values)"),
    Mutation("bias subtracted", "torch", TORCH, "u.add_(logit_bias)", "u.sub_(logit_bias)"),
    Mutation("g of positives not negated", "torch", TORCH, "self._negate_positives(u.sigmoid_(), positive)", "u.sigmoid_()"),
    Mutation("sign of a positive logit", "triton", TRITON, "tl.where(positive, -u, u)", "u"),
    Mutation("sign of a positive's g", "triton", TRITON, "        g = tl.where(positive, -g, g)\n", "        g = g\n"),
    Mutation("branches of the sigmoid swapped", "triton", MATH, "tl.where(u >= 0, 1.0, e)", "tl.where(u >= 0, e, 1.0)"),
    # masks
    Mutation("padded images take part", "torch", TORCH, "torch.where(positives.image_ids < 0, -torch.inf, 0.0)", "torch.where(positives.image_ids < 0, 0.0, 0.0)"),
    Mutation("padded texts take part", "torch", TORCH, "torch.where(positives.text_ids < 0, -torch.inf, logit_bias)", "torch.where(positives.text_ids < 0, logit_bias, logit_bias)"),
    Mutation("id 0 is padding", "torch", TORCH, "torch.where(positives.image_ids < 0,", "torch.where(positives.image_ids <= 0,"),
    Mutation("padding pairs with padding", "torch", TORCH, "torch.where(positives.text_ids < 0, -2, positives.text_ids)", "torch.where(positives.text_ids < 0, -1, positives.text_ids)"),
    Mutation("padded features are not blanked", "torch", ENGINE, "        copy.masked_fill_(ids[:, None] < 0, 0)\n", "        pass\n"),
    Mutation("features at an odd address are not copied", "torch", KERNELS, "return dense and at_aligned_address(features)", "return dense"),
    Mutation("ids compared in 32 bits", "torch", TORCH, "torch.eq(images[:, None], texts,", "torch.eq(images[:, None].int(), texts.int(),"),
    Mutation("negative_only forgotten with ids", "torch", FUNCTIONAL, "torch.where(text_ids < 0, -1, 1)", "torch.where(text_ids < 0, -1, 0)"),
    Mutation("padded texts take part", "triton", TRITON, "(image_ids >= 0)[:, None] & (text_ids >= 0)[None, :]", "(image_ids >= 0)[:, None] & (text_ids >= -1)[None, :]"),
    Mutation("id 0 is padding", "triton", TRITON, "valid = (image_ids >= 0)[:, None]", "valid = (image_ids > 0)[:, None]"),
    Mutation("NaN in padding reaches the sum of g*s", "triton", TRITON, "s = tl.where(valid, s, 0.0)  # a padded row may hold NaN", "s = s"),
    # off by one
    Mutation("last row of a panel left out", "torch", ENGINE, "min(i + plan.rows, m)", "min(i + plan.rows, m - 1)"),
    Mutation("last column of a panel left out", "torch", ENGINE, "min(j + plan.cols, n)", "min(j + plan.cols - 1, n)"),
    Mutation("diagonal moves the wrong way", "torch", ENGINE, "diagonal + i - j", "diagonal - i + j"),
    Mutation("one row too many at the edge", "triton", TRITON, "valid = (rows < M)[:, None]", "valid = (rows <= M)[:, None]"),
    Mutation("one column too few at the edge", "triton", TRITON, "& (cols < N)[None, :]", "& (cols < N - 1)[None, :]"),
    Mutation("tile edge taken for the inside", "triton", TRITON, "(row0 + BLOCK_M > M)", "(row0 + BLOCK_M > M + 1)"),
    Mutation("diagonal missed in a tile's last part", "triton", TRITON, "(row0 + diagonal < col0 + BLOCK_N)", "(row0 + diagonal < col0 + BLOCK_N - 1)"),
    Mutation("diagonal of the wrong sign", "triton", TRITON, "(rows + diagonal)[:, None] == cols", "(rows - diagonal)[:, None] == cols"),
    Mutation("last step of the product left out", "triton", TRITON, "for start in range(0, D, BLOCK_D):", "for start in range(0, D - D % BLOCK_D, BLOCK_D):"),
    Mutation("second band of tiles computes the first", "triton", TRITON, "first = pid // band * GROUP_M", "first = pid // band"),
    # precision
    Mutation("gradients accumulated in the features' dtype", "torch", AUTOGRAD, "torch.empty(x.shape, dtype=acc, device=x.device)", "torch.empty(x.shape, dtype=x.dtype, device=x.device)"),
    Mutation("logits rounded to bfloat16", "torch", TORCH, "alpha=scale, out=values)", "alpha=scale, out=values).copy_(values.bfloat16())"),
    Mutation("short path for logits that are not easy", "torch", TORCH, "_SATURATED_LOGIT = -1.0", "_SATURATED_LOGIT = 5.0"),
    Mutation("two of four pairs left out", "torch", TORCH, "torch.lerp(b, one, a, out=a)", "a"),
    Mutation("panel sums added up in bfloat16", "torch", TOTALS, "partials.tolist()", "partials.bfloat16().tolist()"),
    Mutation("default threshold of softplus", "torch", TORCH, "_SOFTPLUS_THRESHOLD = 40.0", "_SOFTPLUS_THRESHOLD = 20.0"),
    Mutation("float64 computed in float32", "torch", TORCH, "alpha=scale, out=values)", "alpha=scale, out=values).copy_(values.float())"),
    Mutation("product accumulated in bfloat16", "triton", TRITON, "s = tl.dot(x, y, s, input_precision=INPUT_PRECISION)", "s = tl.dot(x, y, s, input_precision=INPUT_PRECISION).to(tl.bfloat16).to(tl.float32)"),
    Mutation("fp16 g not scaled up when written", "triton", TRITON, "(g * GRAD_SCALE).to(", "g.to("),
    Mutation("fp16 g not scaled down in the products", "triton", ENGINE, "alpha = factor / GRAD_SCALE.get(plan.operand_dtype, 1.0)", "alpha = factor"),
    Mutation("short path for logits that are not easy", "triton", TRITON, "(tl.max(tile) * scale + bias <= SATURATED_LOGIT)", "(tl.min(tile) * scale + bias <= SATURATED_LOGIT)"),
    Mutation("short path where t is negative", "triton", TRITON, "easy = (scale >= 0) & (", "easy = ("),
    Mutation("short path on the diagonal and at the edge", "triton", TRITON, "        easy &= ~meets_diagonal_or_edge(row0, tile_n * BLOCK_N, M, N, diagonal, BLOCK_M, BLOCK_N)\n", ""),
    Mutation("a coefficient of the short path in its third digit", "triton", MATH, "0.9847315549850464", "0.9747315549850464"),
    Mutation("features beyond D are what memory held", "triton", ENGINE, "    copy[:, d:] = 0\n", ""),
    Mutation("a coefficient of log1p in its fourth digit", "triton", MATH, "q = q * e + 3.332132995128632e-1", "q = q * e + 3.331132995128632e-1"),
    # what is added to what
    Mutation("only the last panel's dX is kept", "torch", ENGINE, "fresh = cols.start == 0 and not add_to_grad_x", "fresh = True"),
    Mutation("dY starts from what memory held", "torch", ENGINE, "fresh = rows.start == 0", "fresh = False"),
    Mutation("scale missing from the gradients", "torch", TOTALS, "logit_scale.item() / factor", "1.0 / factor"),
    Mutation("upstream missing from the gradients", "torch", AUTOGRAD, "(upstream * factors).unbind()", "factors.unbind()"),
    Mutation("dt and db exchanged", "torch", AUTOGRAD, "zip(scalar_grads, scalars_like", "zip(scalar_grads[::-1], scalars_like"),
    Mutation("saved gradients reused where the graph is kept", "torch", AUTOGRAD, "if _graph_is_kept() or _is_hooked(slot):", "if _is_hooked(slot):"),
    Mutation("g*s of what other panels left in dX too", "torch", ENGINE, "gs_sum -= _inner", "gs_sum -= 0 * _inner"),
    Mutation("g*s of incomplete rows", "torch", ENGINE, "elif from_products and cols.stop == y.shape[0]:", "elif from_products:"),
    Mutation("mean over texts", "torch", AUTOGRAD, "divisor = max(x.shape[0], 1)", "divisor = max(y.shape[0], 1)"),
    Mutation("mean counts padding", "torch", AUTOGRAD, "divisor = (image_ids >= 0).sum().clamp(min=1)", "divisor = max(len(image_ids), 1)"),
    Mutation("nothing but padding divides by 0", "torch", AUTOGRAD, "(image_ids >= 0).sum().clamp(min=1)", "(image_ids >= 0).sum()"),
    Mutation("loss not divided", "triton", TOTALS_TRITON, "tl.store(out_ptr, tl.div_rn(total, divisor))", "tl.store(out_ptr, total)"),
    Mutation("scale missing from the gradients", "triton", TOTALS_TRITON, "tl.div_rn(tl.load(logit_scale_ptr), divisor)", "tl.div_rn(1.0, divisor)"),
    Mutation("only the first of the sums' parts", "triton", TOTALS_TRITON, "start += BLOCK", "start += count"),
    Mutation("sums of g*s and g exchanged", "triton", TRITON, "tl.store(partials_ptr + tiles + pid, tl.sum(gs_sum))", "tl.store(partials_ptr + tiles + pid, tl.sum(g_sum))"),
    # which negatives
    Mutation("hash shifts in the sign", "torch", TORCH, ".bitwise_and_((1 << 32 - shift) - 1)", ""),
    Mutation("what the hash keeps is dropped", "torch", TORCH, "torch.ge(h, kept.below, out=dropped)", "torch.lt(h, kept.below, out=dropped)"),
    Mutation("positives are dropped", "torch", TORCH, "        _except_positives(dropped, positive)\n", ""),
    Mutation("positives are counted among negatives", "torch", TORCH, "        _except_positives(counted, self._positive(s, positives))\n", ""),
    Mutation("padded texts are counted", "torch", TORCH, "counted.logical_and_(positives.text_ids >= 0)", "pass"),
    Mutation("a tie at the threshold is dropped", "torch", TORCH, "torch.lt(value, kept.least[:, None], out=dropped)", "torch.lt(value, (kept.least + 0.01)[:, None], out=dropped)"),
    Mutation("sparse product added to what memory held", "torch", PRODUCTS, "if a.is_sparse and fresh:", "if False:"),
    Mutation("texts' keys of another panel", "torch", ENGINE, "kept.block(rows, cols)", "kept.block(rows, slice(cols.stop - cols.start))"),
    Mutation("images' thresholds of another panel", "torch", ENGINE, "kept.block(rows, cols)", "kept.block(slice(rows.stop - rows.start), cols)"),
    Mutation("hard and easy exchanged where t is negative", "torch", NEGATIVES, "sign = logit_scale.sign() if", "sign = logit_scale.sign().abs() if"),
    Mutation("second step counts from the top again", "torch", NEGATIVES, "wanted - above", "wanted"),
    Mutation("share rounded down", "torch", NEGATIVES, "-(-counts.sum(1) * share >> _SHARE_BITS)", "counts.sum(1) * share >> _SHARE_BITS"),
    Mutation("what the hash keeps is dropped", "triton", TRITON, "text_keys[None, :]) < below", "text_keys[None, :]) >= below"),
    Mutation("hash stops after its first product", "triton", MATH, "    h *= 0x846CA68B\n", ""),
    Mutation("positives are dropped", "triton", TRITON, "valid & (positive | kept)", "valid & kept"),
    Mutation("what is a little above the threshold is dropped", "triton", TRITON, "~(placed(s, centres, factors) < least[:, None])", "~(placed(s, centres, factors) < least[:, None] + 0.01)"),
    Mutation("positives are counted among negatives", "triton", TRITON, "counted = valid & ~positive", "counted = valid"),
    Mutation("negative places in the wrong order", "triton", MATH, "~magnitude, magnitude)", "magnitude - _HALF, magnitude)"),
    Mutation("negative places in the wrong order", "torch", TORCH, "bins.bitwise_xor_(below_zero).add_(HALF)", "bins.add_(below_zero * HALF).add_(HALF)"),
    Mutation("tiles with gradient are skipped", "triton", TRITON, "(tile_loss != 0).to(tl.int32)", "(tile_loss > 1).to(tl.int32)"),
    Mutation("a tile left out of a line's list", "triton", PRODUCTS_TRITON, "tl.store(list_ptr, listed)", "tl.store(list_ptr, listed - 1)"),
    Mutation("skipped lines leave what memory held", "triton", PRODUCTS_TRITON, "if FRESH | (steps > 0):", "if steps > 0:"),
    Mutation("every rank hashes its images from 0", "distributed", DISTRIBUTED, "image_keys(seed, first_image, ", "image_keys(seed, 0, "),
    Mutation("every chunk hashes its texts from 0", "distributed", DISTRIBUTED, "text_keys(seed, chunk.first, ", "text_keys(seed, 0, "),
    Mutation("thresholds of the local texts' norms", "distributed", DISTRIBUTED, "                dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group)\n", "                pass\n"),
    # the global batch
    Mutation("ring: texts taken for those of another rank", "distributed", DISTRIBUTED, "owner = (ring.rank - step) % ring.size", "owner = (ring.rank + step) % ring.size"),
    Mutation("ring: every chunk has a diagonal", "distributed", DISTRIBUTED, "0 if step == 0 else None,", "0,"),
    Mutation("ring: what arrived is not added", "distributed", DISTRIBUTED, "computed.add_(arriving)", "computed"),
    Mutation("gather: diagonal of the first rank", "distributed", DISTRIBUTED, "rank * capacity)]", "0)]"),
    Mutation("loss divided by the local batch", "distributed", DISTRIBUTED, "images = sum(t.real_images for t in everyone)", "images = everyone[0].real_images * world_size"),
)  # fmt: skip


def check(root: Path, mutation: Mutation) -> str:
    """The text of the file; ValueError where the mutation does not name one place in it."""
    text = (root / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.what}: {mutation.file} holds {mutation.old!r} {text.count(mutation.old)} "
            "times: expected once"
        )
    return text


@contextmanager
def scratch_copy() -> Iterator[Path]:
    """The tree as it is installed: kernels lies inside the package."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "tree")
        ignore = shutil.ignore_patterns("__pycache__", ".*", "results", "*.png", "*.egg-info")
        for name in ("fused_siglip", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        shutil.copytree(ROOT / "kernels", root / "fused_siglip/kernels", ignore=ignore)
        (root / "kernels").symlink_to("fused_siglip/kernels")
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def _run_pytest(root: str, arguments: list[str], interpret: bool, output: str) -> None:
    """In a process of its own, which has torch but nothing of the package yet."""
    os.chdir(root)
    sys.path[:0] = [root, f"{root}/tests"]
    sys.dont_write_bytecode = True  # .pyc files cannot tell edits within a second apart
    os.environ |= {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    os.environ["COLUMNS"] = "250"  # pytest cuts what a test said to the width of the terminal
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import hypothesis
    import torch

    import fused_siglip.kernels

    if not fused_siglip.kernels.__file__.startswith(root):
        raise RuntimeError(f"not the scratch copy is imported but {fused_siglip.kernels.__file__}")
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("first failure", phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("first failure")  # and no time to make it smaller
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
    sys.exit(pytest.main(["-x", *quiet, *arguments]))


def first_failure(root: Path, group: str, arguments: list[str]) -> tuple[str, str] | None:
    """The first of these tests that fails in ``root`` and what it says, or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hypothesis", "pytest"])
    output = root.parent / "output"
    process = context.Process(
        target=_run_pytest, args=(str(root), arguments, group == "triton", str(output))
    )
    process.start()
    process.join()
    said = output.read_text()
    found = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$", said, re.MULTILINE)
    if process.exitcode == pytest.ExitCode.TESTS_FAILED and found:
        return found[1], found[2] or ""
    if process.exitcode != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {process.exitcode}:\n{said[-2000:]}")
    return None


def run(mutations: Sequence[Mutation]) -> Iterator[dict]:
    """A row for each mutation. At the end, what caught one must pass without any."""
    caught: dict[str, set[str]] = {}
    with scratch_copy() as root:
        for mutation in mutations:
            text = check(root, mutation)
            (root / mutation.file).write_text(text.replace(mutation.old, mutation.new))
            start = time.monotonic()
            failed = first_failure(root, mutation.tests, QUICK[mutation.tests])
            (root / mutation.file).write_text(text)
            if failed:
                caught.setdefault(mutation.tests, set()).add(failed[0])
            yield {
                "kind": "mutation",
                **mutation._asdict(),
                "caught_by": failed and failed[0].removeprefix("tests/"),
                "said": failed and failed[1],
                "seconds": time.monotonic() - start,
            }
        for group, tests in caught.items():
            failed = first_failure(root, group, sorted(tests))
            if failed:
                raise RuntimeError(f"{failed[0]} fails without a mutation")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutations", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="words of their descriptions")
    parser.add_argument("--tests", nargs="+", choices=QUICK, default=list(QUICK), help="groups")
    parser.add_argument("--output", type=Path, help="write a results file")
    args = parser.parse_args(arguments)
    # only here: the processes that run the tests must not have the package already
    from benchmarks.common.results import environment, write_results

    chosen = [m for m in MUTATIONS if m.tests in args.tests and any(w in m.what for w in args.only)]
    found, rows = environment(), []
    for row in run(chosen):
        rows.append(row)
        print(f"{row['what']} ({row['tests']}): {row['caught_by'] or 'CAUGHT BY NONE'}", flush=True)
        if args.output is not None:
            write_results("mutations", found, rows, args.output)
    missed = [row["what"] for row in rows if row["caught_by"] is None]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} caught")
    for what in missed:
        print(f"caught by none: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
