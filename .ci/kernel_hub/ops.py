"""The namespace of this build's operators, as kernel-builder writes it."""

import torch

ops = torch.ops.NAMESPACE


def add_op_namespace_prefix(op_name: str) -> str:
    return f"NAMESPACE::{op_name}"
