"""Lets torchvision, whose wheel is built against a CUDA torch, be imported beside a CPU build."""

import torch


def define_schemas() -> None:
    """Define the operators that torchvision registers kernels for when it is imported.

    Its library with the real ones does not load beside another build of torch; nothing here calls
    them.
    """
    if torch.cuda.is_available():
        return
    for name, arguments in (
        ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", arguments)
