"""Several processes of one evaluation: torchrun --nproc-per-node 8 evaluate.py --name big ...

Pictures do not depend on each other and nor does their noise, so processes share nothing but a folder: each does its
shard, and the first writes the table when all have done theirs. gloo carries that on CPUs and GPUs alike, since no
tensor travels. A run that lost a worker is resumed like any other, by the same command and with any number of them.
"""

import atexit
import os
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from diffender.plans import Options, default_name, share

PATIENCE = timedelta(days=7)  # of the fastest worker for the slowest


def join(opts: Options) -> Options:
    """The options of this process: its share of --shard, its GPU, the name of all. Without torchrun, as given."""
    if not dist.is_torchelastic_launched():
        return opts
    dist.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    rank, workers = dist.get_rank(), dist.get_world_size()
    shard, shards = share(opts.shard)
    name = [opts.name or default_name(opts)]
    dist.broadcast_object_list(name)
    device = opts.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return replace(opts, shard=f"{shard * workers + rank}/{shards * workers}", name=name[0], device=device)


def is_first() -> bool:
    """Whether this is the worker that writes what all share; without torchrun it is."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Until all workers are here."""
    if dist.is_initialized():
        dist.barrier()
