"""Train two small towers on several ranks, on the loss of the global batch.

    torchrun --nproc-per-node 2 examples/train_distributed.py

Runs anywhere: gloo on a CPU, NCCL where every rank has a GPU. The data are made up: an image and
its text are two noisy views of one hidden vector.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_siglip import siglip_loss

GLOBAL_BATCH, HIDDEN, IMAGE_SIZE, TEXT_SIZE, DIM = 256, 32, 64, 48, 32
STEPS = 30


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Linear(IMAGE_SIZE, DIM)
        self.text = nn.Linear(TEXT_SIZE, DIM)
        # the paper's start: t = 10 and b = -10
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            F.normalize(self.image(images), dim=-1),  # (b, DIM)
            F.normalize(self.text(texts), dim=-1),  # (b, DIM)
            self.log_scale.exp(),
            self.bias,
        )


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """All ranks' images (GLOBAL_BATCH, IMAGE_SIZE) and texts (GLOBAL_BATCH, TEXT_SIZE)."""
    views = torch.Generator().manual_seed(0)  # how the hidden vector is seen: always the same
    batch = torch.Generator().manual_seed(step + 1)
    hidden = torch.randn(GLOBAL_BATCH, HIDDEN, generator=batch)

    def view(size: int) -> Tensor:
        seen = hidden @ torch.randn(HIDDEN, size, generator=views)
        return seen + torch.randn(GLOBAL_BATCH, size, generator=batch)

    return view(IMAGE_SIZE), view(TEXT_SIZE)


def mean_over_ranks(loss: Tensor) -> float:
    """The loss of the global batch: the mean of what the ranks got."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # Without a name: gloo for CPU tensors and NCCL for CUDA's, so that sizes are agreed on without
    # waiting for the GPU.
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = TwoTowers().to(device)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    for step in range(STEPS):
        # rows rank, rank + W, ...: a batch that W does not divide is fine
        images, texts = (t[rank::world_size].to(device) for t in global_batch(step))
        loss = siglip_loss(*parallel(images, texts), group=dist.group.WORLD)
        optimizer.zero_grad()
        loss.backward()  # DDP averages over the ranks: the gradient of the global batch
        optimizer.step()
        value = mean_over_ranks(loss)
        if rank == 0 and (step % 5 == 0 or step + 1 == STEPS):
            print(f"step {step:2d}  loss {value:.4f}", flush=True)

    images, texts = (t.to(device) for t in global_batch(STEPS))
    with torch.no_grad():
        mine = (t[rank::world_size] for t in (images, texts))
        together = mean_over_ranks(siglip_loss(*model(*mine), group=dist.group.WORLD))
        alone = siglip_loss(*model(images, texts)).item()
    if rank == 0:
        print(f"the whole batch: {together:.6f} on {world_size} ranks, {alone:.6f} on one")
    dist.destroy_process_group()
    if abs(together - alone) > 1e-5 * abs(alone):
        raise SystemExit("the two losses differ")


if __name__ == "__main__":
    main()
