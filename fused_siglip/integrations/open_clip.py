"""open_clip: its trainer with the fused loss.

In your own loop pass the class, :class:`fused_siglip.SigLipLoss`, or call :func:`patch` before the
loss or the task is made. On the command line this module stands in for open_clip's trainer::

    torchrun --nproc-per-node 8 -m fused_siglip.integrations.open_clip --siglip ...
"""

from __future__ import annotations

import sys
from typing import Any

from ..modules import SigLipLoss
from . import require

_replaced: dict[str, type] = {}  # open_clip's own class, by the module that held it


def _modules() -> tuple[Any, Any]:
    require("open_clip_torch", ">=3.0,<5")
    import open_clip.factory
    import open_clip.loss

    return open_clip.loss, open_clip.factory


def patch() -> None:
    """Let open_clip make :class:`fused_siglip.SigLipLoss` wherever it makes its own SigLipLoss.

    That is in ``create_loss(args)`` with ``args.siglip`` and, from open_clip 4 on, in
    ``SigLIPTask`` and ``create_task(args, model)``. Losses that exist already, and names that were
    imported from ``open_clip.loss`` before, stay as they are. Patching twice is patching once.

    Raises:
        ImportError: open_clip is missing, or its version is not known to work.
    """
    for module in _modules():
        if module.SigLipLoss is not SigLipLoss:
            _replaced[module.__name__] = module.SigLipLoss
            module.SigLipLoss = SigLipLoss


def unpatch() -> None:
    """Give open_clip its own class back. Without a patch this does nothing."""
    for module in _modules():
        module.SigLipLoss = _replaced.pop(module.__name__, module.SigLipLoss)


def main(args: list[str] | None = None) -> None:
    """open_clip's command line trainer with the fused loss; its own arguments, ``--siglip`` among
    them."""
    patch()
    from open_clip_train.main import main as train
    from open_clip_train.params import parse_args

    args = sys.argv[1:] if args is None else args
    if not parse_args(args).siglip:
        raise SystemExit("--siglip is missing: without it open_clip trains with another loss")
    train(args)


if __name__ == "__main__":
    main()
