"""One process of a `Cluster`: reads scenarios from a connection, runs them, and answers."""

import datetime
import gc
import importlib
import traceback
import warnings
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist


def main(connection: Connection, store: str, n_processes: int, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What is imported once is not searched after each scenario.
    gc.freeze()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        world_size=n_processes,
        rank=rank,
        timeout=datetime.timedelta(seconds=60),
    )
    while True:
        try:
            scenario, arguments = connection.recv()
        except EOFError:
            return
        connection.send(answer(scenario, arguments))


def answer(scenario, arguments):
    try:
        module, function = scenario.split(":")
        result = getattr(importlib.import_module(f"tests.distributed.{module}"), function)(**arguments)
        # What is left of a scenario is not found by the next one: DDP is part of cycles.
        gc.collect()
        return True, result
    except BaseException:
        return False, traceback.format_exc()
