"""One process of a `Cluster`: reads scenarios from a connection, runs them, and answers."""

import datetime
import gc
import importlib
import sys
import traceback
import warnings
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch.distributed.tensor import debug


def main(connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What is imported once is not searched after each scenario.
    gc.freeze()
    while True:
        try:
            store, n_processes, rank, scenario, arguments = connection.recv()
        except EOFError:
            return
        connection.send(answer(store, n_processes, rank, scenario, arguments))


def answer(store, n_processes, rank, scenario, arguments):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        world_size=n_processes,
        rank=rank,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        module, function = scenario.split(":")
        result = getattr(importlib.import_module(f"tests.distributed.{module}"), function)(**arguments)
        # Whoever leaves first takes the store along.
        dist.barrier()
        return True, result
    except BaseException:
        return False, traceback.format_exc()
    finally:
        # DDP is part of cycles, and whoever drops the last reference to a group joins its threads. One of these
        # may wait for the GIL, which a destructor of DDP holds and that of the group itself does not.
        gc.collect()
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes():
    """Drop what PyTorch caches for all equal meshes: it has the names of process groups that are gone."""
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    for module, name in ((redistribute, "_gen_transform_infos"), (debug, "_clear_sharding_prop_cache")):
        cached = getattr(module, name, None)
        if cached is not None:
            getattr(cached, "cache_clear", cached)()
