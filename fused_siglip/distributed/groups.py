"""The process group of a loss: given when a module is made, looked up when it is called.

`torch.distributed.group.WORLD` is None before `init_process_group`. A module that bound it then
would compute the loss of each rank's own batch, and nothing would say so.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from .collectives import resolve_group

WORLD = "world"


class _Omitted:
    """Default of ``group``: told apart from a None that was meant as a group."""

    def __repr__(self) -> str:
        return "None"


OMITTED: Any = _Omitted()


def is_ready() -> bool:
    """Whether this process has a default process group."""
    return dist.is_available() and dist.is_initialized()


def check_group_type(group: object) -> None:
    if group is None or group is OMITTED:
        return
    if isinstance(group, str):
        if group != WORLD:
            raise TypeError(
                f"group is {group!r}: expected None, 'world' or a torch.distributed.ProcessGroup"
            )
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        kind = f"{type(group).__module__}.{type(group).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"group is a {kind}: expected a torch.distributed.ProcessGroup this rank is in "
            "('world' for all ranks)"
        )


def look_up(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The process group that "world" (or None, for the default) stands for now.

    None where there is no process group at all and this process is the world.

    Raises:
        ValueError: torchrun started several processes and nobody called ``init_process_group``, or
            the group was destroyed.
    """
    if not is_ready():
        if group is not None and group != WORLD:
            raise ValueError(_DESTROYED)
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched not in ("", "1"):
            raise ValueError(
                f"group is 'world' and WORLD_SIZE is {launched}, but there is no process group: "
                "expected init_process_group before the loss, or group=None for the loss of this "
                "process's own batch"
            )
        return None
    if group is None or isinstance(group, str):
        return dist.group.WORLD
    try:
        dist.get_rank(group)
    except (ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise ValueError(_DESTROYED) from error
    return group


_DESTROYED = (
    "group is a process group that was destroyed: expected one that exists, or 'world', which is "
    "looked up when the loss is called"
)


class GroupRef:
    """The group a module was made with. Copies share it; a pickle keeps its name and ranks."""

    def __init__(self, group: dist.ProcessGroup | str | None):
        check_group_type(group)
        self.group = None if group is OMITTED else group
        # what dist.group.WORLD is before init_process_group
        self.bound_too_early = group is None and not is_ready()
        self.saved: tuple[str, list[int]] | None = None

    def get(self, none_is_world: bool = False) -> dist.ProcessGroup | str | None:
        """What to hand to :func:`fused_siglip.siglip_loss` as its group.

        none_is_world: None means the default group here, so it is no mistake.

        Raises:
            ValueError: a None from before ``init_process_group``, or a saved group that this
                process does not have.
        """
        if self.saved is not None:
            return _find(*self.saved)
        if self.bound_too_early and not none_is_world and is_ready() and dist.get_world_size() > 1:
            raise ValueError(
                "group was given as None before init_process_group, which is what "
                "torch.distributed.group.WORLD is there: expected group='world' for the loss of "
                "the global batch, or no group argument for the loss of each rank's own batch"
            )
        return self.group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupRef:
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self.group is None or self.group == WORLD:
            return state
        if is_ready() and self.group is dist.group.WORLD:
            return state | {"group": WORLD}
        group = look_up(self.group)
        assert group is not None  # which only the whole world may be
        saved = (group.group_name, dist.get_process_group_ranks(group))
        return state | {"group": None, "saved": saved}


def _find(name: str, ranks: list[int]) -> dist.ProcessGroup:
    """The group of that name, if it has the same ranks: names are counted and may be another's."""
    try:
        group = resolve_group(name)
        if dist.get_process_group_ranks(group) == ranks:
            return group
    except (RuntimeError, ValueError, KeyError, AttributeError, LookupError):
        pass
    raise ValueError(
        f"group: this module was saved with the process group {name!r} of ranks {ranks}, which is "
        "not there: expected new_group to make it as before, or an assignment to the module's group"
    )
