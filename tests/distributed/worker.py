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


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What is imported once is not searched after each scenario.
    importlib.import_module("tests.distributed.wrappers")
    gc.freeze()
    connection = Connection(int(sys.argv[1]))
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
        dist.destroy_process_group()
        gc.collect()


if __name__ == "__main__":
    main()
