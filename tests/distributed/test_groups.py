"""The group of a module: looked up when called, shared by copies, kept by name in pickles."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist

from fused_siglip import LearnableSigLipLoss, SigLipLoss, siglip_loss
from fused_siglip.distributed.groups import GroupRef
from fused_siglip.testing import eager_siglip_loss
from support.global_batch import shard
from support.inputs import make_inputs
from support.processes import launch, returned

ROWS = [5, 3]


def local_and_global(rank: int) -> tuple[list, float, float]:
    """This rank's features, and in float64 its own loss and its share of the global one."""
    whole = make_inputs(8, 8, 8)
    x, y = (t.detach() for t in whole.tensors()[:2])
    mine = [t.detach() for t in shard(whole, rank, ROWS, ROWS).tensors()[:2]]
    alone = eager_siglip_loss(*(t.double() for t in mine), 10.0, -10.0).item()
    rows = slice(0, 5) if rank == 0 else slice(5, 8)
    ids = torch.arange(8)
    share = eager_siglip_loss(
        x[rows].double(),
        y.double(),
        10.0,
        -10.0,
        image_ids=ids[rows],
        text_ids=ids,
        reduction="sum",
    )
    return mine, alone, share.item() * 2 / 8


def call(module, mine) -> float:
    if isinstance(module, SigLipLoss):
        return module(*mine, 10.0, -10.0).item()
    return module(*mine).item()


# made before there is a process group
WORLD = {
    "learnable": lambda: LearnableSigLipLoss(group="world"),
    "learnable, ring": lambda: LearnableSigLipLoss(group="world", dist_impl="ring"),
    "learnable, dist_impl alone": lambda: LearnableSigLipLoss(dist_impl="gather"),
    "learnable, None and dist_impl": lambda: LearnableSigLipLoss(
        group=dist.group.WORLD, dist_impl="gather"
    ),
    "open_clip's": lambda: SigLipLoss(group="world"),
    "open_clip's, ring": lambda: SigLipLoss(group="world", dist_impl="ring"),
}
LOCAL = {
    "learnable": lambda: LearnableSigLipLoss(),
    "open_clip's": lambda: SigLipLoss(),
}
TOO_EARLY = {
    "learnable": lambda: LearnableSigLipLoss(group=dist.group.WORLD),
    "open_clip's": lambda: SigLipLoss(group=dist.group.WORLD),
    "assigned": lambda: assigned(LearnableSigLipLoss(), dist.group.WORLD),
}


def assigned(module, group):
    module.group = group
    return module


def made_before(rank: int, world_size: int, modules: dict) -> None:
    mine, alone, share = local_and_global(rank)
    assert abs(alone - share) > 1e-2
    for name, module in modules["world"].items():
        assert call(module, mine) == pytest.approx(share, rel=1e-5), name
    for name, module in modules["local"].items():
        assert call(module, mine) == pytest.approx(alone, rel=1e-5), name
    for name, module in modules["too early"].items():
        with pytest.raises(ValueError, match=r"None before init_process_group.*group='world'"):
            call(module, mine)
        assert call(assigned(module, "world"), mine) == pytest.approx(share, rel=1e-5), name
    # with a process group there, None is what it says
    assert call(LearnableSigLipLoss(group=None), mine) == pytest.approx(alone, rel=1e-5)
    assert siglip_loss(*mine, 10.0, -10.0, group="world").item() == pytest.approx(share, rel=1e-5)
    for module in (SigLipLoss(rank=rank, world_size=2), SigLipLoss(group=dist.group.WORLD)):
        assert call(module, mine) == pytest.approx(share, rel=1e-5)
    with pytest.raises(ValueError, match=r"expected . and 2, as in the process group"):
        call(SigLipLoss(rank=0, world_size=3, group="world"), mine)
    compiled = torch.compile(modules["world"]["learnable"], backend="aot_eager", fullgraph=True)
    assert call(compiled, mine) == pytest.approx(share, rel=1e-5)


def test_modules_that_were_made_before_the_process_group():
    kinds = {"world": WORLD, "local": LOCAL, "too early": TOO_EARLY}
    modules = {k: {n: make() for n, make in kind.items()} for k, kind in kinds.items()}
    returned(launch(made_before, 2, modules))


def test_without_a_process_group_this_process_is_the_world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    x, y = (t.detach() for t in make_inputs(6, 6, 8).tensors()[:2])
    alone = siglip_loss(x, y, 10.0, -10.0)
    modules = [make() for name, make in WORLD.items() if "None" not in name and "alone" not in name]
    modules += [make() for make in TOO_EARLY.values()]
    assert [call(module, (x, y)) for module in modules] == pytest.approx([alone.item()] * 7)
    assert torch.equal(siglip_loss(x, y, 10.0, -10.0, group="world", dist_impl="ring"), alone)
    compiled = torch.compile(
        LearnableSigLipLoss(group="world"), backend="aot_eager", fullgraph=True
    )
    assert compiled(x, y).item() == pytest.approx(alone.item())


def test_torchrun_without_a_process_group_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    x, y = (t.detach() for t in make_inputs(6, 6, 8).tensors()[:2])
    calls = [
        lambda: siglip_loss(x, y, 10.0, group="world"),
        lambda: LearnableSigLipLoss(group="world")(x, y),
        lambda: SigLipLoss(group="world")(x, y, 10.0, -10.0),
    ]
    for function in calls:
        with pytest.raises(ValueError, match=r"WORLD_SIZE is 2.*expected init_process_group"):
            function()
    assert LearnableSigLipLoss()(x, y).isfinite()


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


PICKLES = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


def copied(rank: int, world_size: int) -> list:
    mine, _, share = local_and_global(rank)
    sub = dist.new_group([0, 1])  # with a name of its own
    other = dist.new_group([rank], use_local_synchronization=True)
    for group in (dist.group.WORLD, sub, "world"):
        for loss in (LearnableSigLipLoss(group=group), SigLipLoss(group=group)):
            for name, copier in {**COPIES, **PICKLES}.items():
                again = copier(Model(loss)).loss
                assert call(again, mine) == pytest.approx(share, rel=1e-5), name
                if name in COPIES:
                    assert again.group is loss.group
    state = pickle.dumps(LearnableSigLipLoss(group=sub))
    renamed = GroupRef(None)
    renamed.saved = (other.group_name, [0, 1])  # the name is another group's here
    with pytest.raises(ValueError, match=r"saved with the process group .* of ranks"):
        renamed.get()
    module = LearnableSigLipLoss(group=sub)
    dist.destroy_process_group(sub)
    with pytest.raises(ValueError, match=r"group is a process group that was destroyed"):
        call(module, mine)
    return [state, pickle.dumps(SigLipLoss(group=dist.group.WORLD))]


def test_a_group_that_outlived_all_process_groups():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"group is a process group that was destroyed"):
        siglip_loss(x, x, 1.0, group=dist.ProcessGroup(0, 1))


def test_copies_share_the_group_and_pickles_keep_its_name(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (of_sub, of_world), _ = returned(launch(copied, 2))
    x, y = (t.detach() for t in make_inputs(6, 6, 8).tensors()[:2])
    module = pickle.loads(of_sub)  # here, where there is no such group
    with pytest.raises(ValueError, match=r"saved with the process group .* of ranks \[0, 1\]"):
        module(x, y)
    alone = siglip_loss(x, y, 10.0, -10.0).item()
    assert call(pickle.loads(of_world), (x, y)) == pytest.approx(alone)
    assert call(assigned(module, None), (x, y)) == pytest.approx(alone)


def test_wrong_groups():
    for make in (LearnableSigLipLoss, SigLipLoss):
        with pytest.raises(TypeError, match=r"group is 'all': expected None, 'world' or a torch"):
            make(group="all")
        with pytest.raises(TypeError, match=r"group is a int: expected a torch.distributed"):
            make(group=0)
