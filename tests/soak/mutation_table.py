"""What ``make mutations`` breaks: a function of the package, an expression in it, and another.

See anchors.py for the patterns. An expression names what it does, not the line it stands in, and is
as short as one place allows.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    what: str
    tests: str  # the group of tests that must notice: a key of mutations.QUICK
    function: str  # "name" or "Class.method" in fused_siglip/ or kernels/, "" for a constant
    old: str  # an expression or a statement that occurs once in functions of this name
    new: str


MUTATIONS = (
    # signs
    Mutation("positives keep the sign of negatives", "torch", "_negate_positives", "values.diagonal(positive).neg_()", "values.diagonal(positive)"),
    Mutation("positives by id keep the sign", "torch", "_negate_positives", "torch.where(positive, *ANY, out=values)", "values.copy_(values)"),
    Mutation("bias subtracted", "torch", "_add_bias", "z.add_(logit_bias)", "z.sub_(logit_bias)"),
    Mutation("dlogits of positives not negated", "torch", "TorchPanel._strip", "self._negate_positives(z.sigmoid_(), positive)", "z.sigmoid_()"),
    Mutation("sign of a positive logit", "triton", "epilogue", "tl.where(positive, -u, u)", "u"),
    Mutation("sign of a positive's dlogits", "triton", "epilogue", "tl.where(positive, -dlogits, dlogits)", "dlogits"),
    Mutation("branches of the sigmoid swapped", "triton", "softplus_sigmoid", "tl.where(u >= 0, 1.0, e)", "tl.where(u >= 0, e, 1.0)"),
    # masks
    Mutation("padded images take part", "torch", "_add_bias", "torch.where(ANY1, -torch.inf, 0.0)", "torch.where(ANY1, 0.0, 0.0)"),
    Mutation("padded texts take part", "torch", "_add_bias", "torch.where(ANY1, -torch.inf, logit_bias)", "torch.where(ANY1, logit_bias, logit_bias)"),
    Mutation("id 0 is padding", "torch", "_add_bias", "pairs.ids.images < 0", "pairs.ids.images <= 0"),
    Mutation("padding pairs with padding", "torch", "TorchPanel._positive", "torch.where(ANY1, -2, ANY2)", "torch.where(ANY1, -1, ANY2)"),
    Mutation("padded features are not blanked", "torch", "_operand", "copy.masked_fill_(*ANY)", "copy"),
    Mutation("features at an odd address are not copied", "torch", "aligned", "dense and at_aligned_address(features)", "dense"),
    Mutation("ids compared in 32 bits", "torch", "TorchPanel._positive", "torch.eq(ANY1, ANY2, out=ANY3)", "torch.eq((ANY1).int(), (ANY2).int(), out=ANY3)"),
    Mutation("negative_only forgotten with ids", "torch", "_never_equal", "torch.where(text_ids < 0, -1, 1)", "torch.where(text_ids < 0, -1, 0)"),
    Mutation("padded texts take part", "triton", "pair_masks", "text_ids >= 0", "text_ids >= -1"),
    Mutation("id 0 is padding", "triton", "pair_masks", "image_ids >= 0", "image_ids > 0"),
    Mutation("NaN in padding reaches the sum of dlogits * s", "triton", "epilogue", "tl.where(valid, s, 0.0)", "s"),
    # off by one
    Mutation("last row of a panel left out", "torch", "__iter__", "min(i + plan.rows, m)", "min(i + plan.rows, m - 1)"),
    Mutation("last column of a panel left out", "torch", "__iter__", "min(j + plan.cols, n)", "min(j + plan.cols - 1, n)"),
    Mutation("diagonal moves the wrong way", "torch", "Pairs.block", "rows.start - cols.start", "cols.start - rows.start"),
    Mutation("one row too many at the edge", "triton", "pair_masks", "(rows < M)[:, None]", "(rows <= M)[:, None]"),
    Mutation("one column too few at the edge", "triton", "pair_masks", "(cols < N)[None, :]", "(cols < N - 1)[None, :]"),
    Mutation("tile edge taken for the inside", "triton", "meets_diagonal_or_edge", "row0 + BLOCK_M > M", "row0 + BLOCK_M > M + 1"),
    Mutation("diagonal missed in a tile's last part", "triton", "meets_diagonal_or_edge", "row0 + diagonal < col0 + BLOCK_N", "row0 + diagonal < col0 + BLOCK_N - 1"),
    Mutation("diagonal of the wrong sign", "triton", "pair_masks", "rows + diagonal", "rows - diagonal"),
    Mutation("last step of the product left out", "triton", "similarity", "range(0, D, BLOCK_D)", "range(0, D - D % BLOCK_D, BLOCK_D)"),
    Mutation("second band of tiles computes the first", "triton", "grouped_tile", "pid // band * GROUP_M", "pid // band"),
    # precision
    Mutation("gradients accumulated in the features' dtype", "torch", "_Batch.sweep", "torch.empty(x.shape, dtype=acc, device=x.device)", "torch.empty(x.shape, dtype=x.dtype, device=x.device)"),
    Mutation("logits rounded to bfloat16", "torch", "TorchPanel._product", "torch.addmm(ANY1, ANY2, ANY3, alpha=scale, out=values)", "torch.addmm(ANY1, ANY2, ANY3, alpha=scale, out=values).copy_(values.bfloat16())"),
    Mutation("logits that are not low go four at a time", "torch", "", "GROUPED_LOGIT = -1.0", "GROUPED_LOGIT = 5.0"),
    Mutation("two of four pairs left out", "torch", "_grouped_strip", "torch.lerp(b, one, a, out=a)", "a"),
    Mutation("panel sums added up in bfloat16", "torch", "finish", "partials.tolist()", "partials.bfloat16().tolist()"),
    Mutation("default threshold of softplus", "torch", "", "_SOFTPLUS_THRESHOLD = 40.0", "_SOFTPLUS_THRESHOLD = 20.0"),
    Mutation("float64 computed in float32", "torch", "TorchPanel._product", "torch.addmm(ANY1, ANY2, ANY3, alpha=scale, out=values)", "torch.addmm(ANY1, ANY2, ANY3, alpha=scale, out=values).copy_(values.float())"),
    Mutation("product accumulated in bfloat16", "triton", "similarity", "tl.dot(x, y, s, input_precision=ANY1)", "tl.dot(x, y, s, input_precision=ANY1).to(tl.bfloat16).to(tl.float32)"),
    Mutation("fp16 dlogits not scaled up when written", "triton", "epilogue", "dlogits * GRAD_SCALE", "dlogits"),
    Mutation("fp16 dlogits not scaled down in the products", "triton", "sweep", "ANY1 / GRAD_SCALE.get(*ANY)", "ANY1"),
    Mutation("logits that are not low go four at a time", "triton", "panel_kernel", "tl.max(tile) * scale + bias", "tl.min(tile) * scale + bias"),
    Mutation("short path where t is negative", "triton", "panel_kernel", "scale >= 0", "scale == scale"),
    Mutation("short path on the diagonal and at the edge", "triton", "panel_kernel", "saturated &= ANY", "pass"),
    Mutation("a coefficient of the short path in its third digit", "triton", "saturated_softplus_sigmoid", "0.9847315549850464", "0.9747315549850464"),
    Mutation("features beyond D are what memory held", "triton", "_operand", "copy[:, d:] = 0", "pass"),
    Mutation("a coefficient of log1p in its fourth digit", "triton", "log1p_unit", "3.332132995128632e-1", "3.331132995128632e-1"),
    # what is added to what
    Mutation("only the last panel's dX is kept", "torch", "_add_products", "block.cols.start > 0 or out.accumulate_x", "False"),
    Mutation("dY starts from what memory held", "torch", "_add_products", "block.rows.start > 0", "True"),
    Mutation("scale missing from the gradients", "torch", "finish", "logit_scale.item() / factor", "1.0 / factor"),
    Mutation("upstream missing from the gradients", "torch", "SigLipFunction.backward", "upstream * factors", "factors"),
    Mutation("dt and db exchanged", "torch", "SigLipFunction.backward", "zip(scalar_grads, scalars_like, **ANY)", "zip(scalar_grads[::-1], scalars_like)"),
    Mutation("saved gradients reused where the graph is kept", "torch", "_multiply", "_graph_is_kept() or _is_hooked(slot)", "_is_hooked(slot)"),
    Mutation("dlogits * s of what other panels left in dX too", "torch", "before_products", "self.total -= ANY", "pass"),
    Mutation("dlogits * s of incomplete rows", "torch", "after_products", "block.cols.stop == self.y.shape[0]", "True"),
    Mutation("mean over texts", "torch", "Local.divisor", "max(self.images, 1)", "max(len(self.y), 1)"),
    Mutation("mean counts padding", "torch", "Local.divisor", "(self.pairs.ids.images >= 0).sum().clamp(min=1)", "max(self.images, 1)"),
    Mutation("nothing but padding divides by 0", "torch", "Local.divisor", "ANY1.clamp(min=1)", "ANY1"),
    Mutation("loss not divided", "triton", "finish_kernel", "tl.div_rn(total, divisor)", "total"),
    Mutation("scale missing from the gradients", "triton", "finish_kernel", "tl.load(logit_scale_ptr)", "1.0"),
    Mutation("only the first of the sums' parts", "triton", "finish_kernel", "start += BLOCK", "start += count"),
    Mutation("sums of dlogits * s and dlogits exchanged", "triton", "panel_kernel", "tl.sum(dscale_sum)", "tl.sum(dbias_sum)"),
    # which negatives
    Mutation("hash shifts in the sign", "torch", "TorchSelection._drop", "ANY1.bitwise_and_((1 << 32 - shift) - 1)", "ANY1"),
    Mutation("what the hash selects is dropped", "torch", "TorchSelection._drop", "torch.ge(h, *ANY, **ANY)", "torch.lt(h, selection.hash_cutoff, out=dropped)"),
    Mutation("positives are dropped", "torch", "TorchSelection._drop", "_except_positives(*ANY)", "dropped"),
    Mutation("positives are counted among negatives", "torch", "_count_strip", "_except_positives(*ANY)", "counted"),
    Mutation("padded texts are counted", "torch", "_count_strip", "counted.logical_and_(pairs.ids.texts >= 0)", "counted"),
    Mutation("a tie at the threshold is dropped", "torch", "TorchSelection._drop", "selection.threshold[:, None]", "(selection.threshold + 0.01)[:, None]"),
    Mutation("sparse product added to what memory held", "torch", "add_product", "a.is_sparse and not accumulate", "False"),
    Mutation("texts' keys of another panel", "torch", "sweep", "selection.block(ANY1, ANY2)", "selection.block(ANY1, slice(ANY2.stop - ANY2.start))"),
    Mutation("images' thresholds of another panel", "torch", "sweep", "selection.block(ANY1, ANY2)", "selection.block(slice(ANY1.stop - ANY1.start), ANY2)"),
    Mutation("hard and easy exchanged where t is negative", "torch", "score_normalizer", "ANY1 if kind == 'hardest' else ANY2", "(ANY1 if kind == 'hardest' else ANY2) * logit_scale.sign()"),
    Mutation("second step counts from the top again", "torch", "search_thresholds", "wanted - above", "wanted"),
    Mutation("share rounded down", "torch", "search_thresholds", "-(-counts.sum(1) * share >> _SHARE_BITS)", "counts.sum(1) * share >> _SHARE_BITS"),
    Mutation("what the hash selects is dropped", "triton", "selected_negatives", "pair_hash(ANY1, ANY2) < ANY3", "pair_hash(ANY1, ANY2) >= ANY3"),
    Mutation("hash stops after its first product", "triton", "pair_hash", "h *= 0x846CA68B", "pass"),
    Mutation("positives are dropped", "triton", "epilogue", "positive | selection", "selection"),
    Mutation("what is a little above the threshold is dropped", "triton", "selected_negatives", "threshold[:, None]", "threshold[:, None] + 0.01"),
    Mutation("positives are counted among negatives", "triton", "count_kernel", "valid & ~positive", "valid"),
    Mutation("negative keys in the wrong order", "triton", "float_key", "~magnitude", "magnitude - _HALF"),
    Mutation("negative keys in the wrong order", "torch", "TorchSelection._keys", "keys.bitwise_xor_(below_zero)", "keys.add_(below_zero * HALF)"),
    Mutation("tiles with gradient are skipped", "triton", "panel_kernel", "tile_loss != 0", "tile_loss > 1"),
    Mutation("flags of weighted tiles from a sum that cancels", "triton", "panel_kernel", "sums[3]", "loss"),
    Mutation("a tile left out of a line's list", "triton", "list_tiles_kernel", "tl.store(list_ptr, listed)", "tl.store(list_ptr, listed - 1)"),
    Mutation("skipped lines leave what memory held", "triton", "product_kernel", "(not ACCUMULATE) | (steps > 0)", "steps > 0"),
    Mutation("every rank hashes its images from 0", "distributed", "_Batch._selection", "self.exchange.first_image", "0"),
    Mutation("every chunk hashes its texts from 0", "distributed", "_Batch._selection", "texts.first", "0"),
    Mutation("thresholds of the local texts' norms", "distributed", "GroupExchange.all_reduce", "all_reduce(*ANY)", "tensor"),
    # the global batch
    Mutation("ring: texts taken for those of another rank", "distributed", "Ring.for_each", "(self.rank - step) % self.size", "(self.rank + step) % self.size"),
    Mutation("ring: every chunk has a diagonal", "distributed", "Ring.for_each", "0 if step == 0 else None", "0"),
    Mutation("ring: what arrived is not added", "distributed", "Ring.for_each", "computed.add_(arriving)", "computed"),
    Mutation("gather: diagonal of the first rank", "distributed", "Gather.for_each", "self.rank * capacity", "0"),
    Mutation("loss divided by the local batch", "distributed", "GroupExchange.divisor", "self.total_images", "self.real_images * self.size"),

    # weights
    Mutation("no weights of texts", "triton", "weighted_loss", "text_weights_ptr is not None", "False"),
    Mutation("negatives take the positives' share", "triton", "weighted_loss", "tl.where(positive, alpha, 1.0)", "alpha"),
    Mutation("aligned pairs share as others do", "triton", "positive_shares", "tl.where(aligned, aligned_share, shares)", "shares"),
    Mutation("loss of a high target cancels", "triton", "weighted_loss", "tl.where(flipped, alpha - beta, beta)", "beta"),
    Mutation("dlogits of -z keep their sign", "triton", "weighted_loss", "tl.where(flipped, -dlogits, dlogits)", "dlogits"),
    Mutation("weights past the edge count", "triton", "weighted_loss", "tl.where(valid, alpha, 0.0)", "alpha"),
    Mutation("targets of pairs that take no part", "triton", "weighted_loss", "tl.where(valid, beta, 0.0)", "beta"),
    Mutation("negatives have no target", "triton", "pair_targets", "tl.where(positive, beta, of_negatives)", "tl.where(positive, beta, 0.0)"),
    Mutation("images' losses of the last tile column alone", "triton", "TritonPanel.__call__", "losses.sum(0)", "losses[-1]"),
)  # fmt: skip
