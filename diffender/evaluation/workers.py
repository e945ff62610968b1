"""Several processes of one job: torchrun --nproc-per-node 8 evaluate.py --name big ..., or train.py.

Images of an evaluation do not depend on each other, nor does their noise, so processes share nothing but a folder:
each does its shard, and the first writes the table when all have done theirs. A run that lost a worker is resumed like
any other, by the same command and with any number of them. Tuning splits each batch and adds up the gradients of the
context vectors, 8 KiB for the embedded model and 96 for SD1.5. gloo carries all that on CPUs and GPUs alike.
"""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from diffender.evaluation.options import Options, shard_of
from diffender.evaluation.plan import default_name
from diffender.utils.options import change

PATIENCE = timedelta(days=7)  # of the fastest worker for the slowest


def start() -> tuple[int, int]:
    """The rank of this process and how many there are, once all are here; (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def own_device(name: str) -> str:
    """`auto` is this process's GPU; processes share them where there are fewer."""
    local = os.environ.get("LOCAL_RANK")
    if name != "auto" or local is None or not torch.cuda.is_available():
        return name
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def join(opts: Options) -> Options:
    """The options of this process: its share of --shard, its GPU, the name of all. Without torchrun, as given."""
    rank, workers = start()
    if workers == 1:
        return opts
    shard, shards = shard_of(opts.shard)
    name = [opts.name or default_name(opts)]
    dist.broadcast_object_list(name)
    shard = f"{shard * workers + rank}/{shards * workers}"
    return change(opts, shard=shard, name=name[0], device=own_device(opts.run.device))


def is_first() -> bool:
    """Whether this is the worker that writes what all share; without torchrun it is."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Until all workers are here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over all workers, in place."""
    for t in tensors if dist.is_initialized() else ():
        total = t.cpu()
        dist.all_reduce(total)
        t.copy_(total)
