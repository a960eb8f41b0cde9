"""Modules sharded over two gloo ranks: embedded, and re-curated in training. A program, which Lightning
starts again for its second rank.

    python -m tests.support.sharded_runs FOLDER cpu|cuda SHARD...

leaves <run>-<rank>.jsonl of what each rank trained on.
"""

import sys
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from curated_data import RecurationCallback, ShardPool
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.embedding.sharded import unsharded
from tests.support.recuration_runs import TinyModule, datamodule, to_float
from tests.support.trainers import quiet_trainer


class Network(nn.Module):
    """Two blocks, one bias shared by both, a buffer, and a parameter outside the blocks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.blocks = nn.Sequential(nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.embedding_dimension = 16

    def embed(self, images):
        return self.scale * self.blocks(images.flatten(1))

    def eval_transform(self):
        return to_float

    def forward(self, images):
        return self.embed(images)


class ShardedModule(TinyModule):
    """TinyModule, its linear layer and the whole of it sharded by `fully_shard`."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.network[1], mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def embed_sharded(rank: int, folder: Path, shards: list[str]) -> None:
    for kind in ("plain", "fsdp", "fsdp-flat", "fully_shard"):
        torch.manual_seed(1)
        network = Network()
        root = None
        if kind.startswith("fsdp"):
            root = FullyShardedDataParallel(
                network,
                auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
                use_orig_params=kind == "fsdp",
                device_id=torch.device("cpu"),
            )
        elif kind == "fully_shard":
            fully_shard(network.blocks[0])
            fully_shard(network)
            root = network
        if root is not None:  # a training step, so that the state is one of the middle of a training
            optimizer = torch.optim.SGD(root.parameters(), lr=0.0)
            root(torch.ones(4, 192)).sum().backward()
            optimizer.step()
        whole = unsharded(network, root)
        whole.load_state_dict(whole.state_dict())
        for name, buffer in whole.named_buffers():  # the step above moved the statistics
            buffer.copy_(dict(Network().named_buffers())[name])
        # Each kind in a cache of its own; the shards are of unlike sizes, so ranks embed unlike numbers of
        # batches.
        store = embed_pool(
            ShardPool(shards),
            resolve_embedder(whole),
            folder / kind,
            batch_size=3,
            num_workers=0,
            dtype="float32",
        )
        if root is not None:  # the sharded module still trains
            root(torch.ones(4, 192)).sum().backward()
        if rank == 0:
            np.save(folder / f"{kind}.npy", store.as_array())
        dist.barrier()


def train(
    folder: Path, shards: list[str], run: str, module: type, strategy: object, accelerator: str = "cpu"
) -> None:
    lightning.seed_everything(0, verbose=False)
    callback = RecurationCallback(every_n_epochs=1)
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[callback], accelerator=accelerator, strategy=strategy,
        devices=2 if accelerator == "cpu" else "auto", default_root_dir=folder,
    )  # fmt: skip
    data = datamodule(shards, folder / f"cache-{run}", batch_size=8 // trainer.world_size)
    trainer.fit(module(str(folder / run)), data)
    assert callback.n_recurations == 2


def main() -> None:
    folder, accelerator, shards = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    if accelerator == "cuda":
        policy = FSDPStrategy(auto_wrap_policy={nn.Linear})
        train(folder, shards, "fsdp", TinyModule, policy, "cuda")
        return
    train(folder, shards, "ddp", TinyModule, "ddp")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    train(folder, shards, "sharded", ShardedModule, strategy)


if __name__ == "__main__":
    main()
