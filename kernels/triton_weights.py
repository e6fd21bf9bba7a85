"""The part of the Triton panel kernel that only pairs with weights have: see pair_weights.py."""

import triton
import triton.language as tl

from .triton_math import saturated_softplus_sigmoid, softplus_sigmoid


@triton.jit
def positive_shares(weight_args, rows, cols, M, N):
    """The shares of a block's pairs if they are positive, (m, n)."""
    image_shares_ptr, text_shares_ptr, aligned_diagonal, aligned_share = weight_args
    shares = tl.load(image_shares_ptr + rows, mask=rows < M, other=0.0)[:, None]
    if text_shares_ptr is not None:
        shares += tl.load(text_shares_ptr + cols, mask=cols < N, other=0.0)[None, :]
    if aligned_diagonal is not None:
        aligned = (rows + aligned_diagonal)[:, None] == cols[None, :]
        shares = tl.where(aligned, aligned_share, shares)
    return shares


@triton.jit
def pair_targets(
    positive,  # (m, n), or None: no pair is positive
    shares,  # of positives: (m, n) or a number
    targets_ptr,  # (5,)
):
    """alpha and beta of pairs, before the weights of their rows and columns."""
    of_negatives = tl.load(targets_ptr + 4)
    if positive is None:
        return 1.0, of_negatives
    else:
        alpha = tl.load(targets_ptr + 1) * shares + tl.load(targets_ptr)
        beta = tl.load(targets_ptr + 3) * shares + tl.load(targets_ptr + 2)
        return tl.where(positive, alpha, 1.0), tl.where(positive, beta, of_negatives)


@triton.jit
def weighted_loss(
    s,  # (m, n) similarities of one subtile
    positive,  # (m, n) or None: no pair is positive
    valid,  # (m, n) or None: every pair takes part
    scale,
    bias,
    weight_args,  # image_weights_ptr to aligned_share of the panel kernel
    block,  # row0, col0, M, N
    SATURATED: tl.constexpr,  # negatives alone, and every logit is at most SATURATED_LOGIT
):
    """The loss and dlogits of pairs, (m, n) each, and s: all 0 where a pair takes no part.

    The loss is alpha * softplus(z) - beta * z. Where beta is nearer to alpha than to 0 it is
    written as one of u = -z, alpha * softplus(u) - (alpha - beta) * u: nothing cancels. Without
    targets that is the case for positives, and no term is left of beta.
    """
    image_weights_ptr, text_weights_ptr, image_shares_ptr, text_shares_ptr = weight_args[:4]
    targets_ptr, aligned_diagonal, aligned_share = weight_args[4:]
    row0, col0, M, N = block
    rows = row0 + tl.arange(0, s.shape[0])
    cols = col0 + tl.arange(0, s.shape[1])
    u = s * scale + bias
    alpha = 1.0
    flipped = positive
    if positive is not None and image_shares_ptr is not None:
        shares_args = image_shares_ptr, text_shares_ptr, aligned_diagonal, aligned_share
        alpha = positive_shares(shares_args, rows, cols, M, N)
    if targets_ptr is not None:
        alpha, beta = pair_targets(positive, alpha, targets_ptr)
        # Without positives there are several texts, and beta is at most 1/2.
        if positive is not None:
            flipped = beta > 0.5 * alpha
            beta = tl.where(flipped, alpha - beta, beta)
    elif positive is not None and image_shares_ptr is not None:
        alpha = tl.where(positive, alpha, 1.0)
    if image_weights_ptr is not None:
        weights = tl.load(image_weights_ptr + rows, mask=rows < M, other=0.0)[:, None]
        alpha = weights * alpha
        if targets_ptr is not None:
            beta = weights * beta
    if text_weights_ptr is not None:
        weights = tl.load(text_weights_ptr + cols, mask=cols < N, other=0.0)[None, :]
        alpha = weights * alpha
        if targets_ptr is not None:
            beta = weights * beta
    if flipped is not None:
        u = tl.where(flipped, -u, u)
    if valid is not None:
        u = tl.where(valid, u, 0.0)  # a padded row may hold NaN
        s = tl.where(valid, s, 0.0)
        alpha = tl.where(valid, alpha, 0.0)
        if targets_ptr is not None:
            beta = tl.where(valid, beta, 0.0)
    if SATURATED:
        softplus, sigmoid = saturated_softplus_sigmoid(u)
    else:
        softplus, sigmoid = softplus_sigmoid(u)
    loss = alpha * softplus
    dlogits = alpha * sigmoid
    if targets_ptr is not None:
        loss -= beta * u
        dlogits -= beta
    if flipped is not None:
        dlogits = tl.where(flipped, -dlogits, dlogits)
    return loss, dlogits, s
