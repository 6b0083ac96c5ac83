"""One rank of a pool that runs cases: `python worker.py RANK RANKS PORT`, then (name, arguments) from its parent.

Torch is imported once for all cases of a test module. The parent hosts the store.
"""

import datetime
import pickle
import sys
import traceback
from multiprocessing.connection import Client
from typing import Any

import cases  # beside this file
import torch
import torch.distributed as dist


def main(rank: int, ranks: int, port: int, listening: int) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parent: Any = Client(("127.0.0.1", listening), authkey=b"ranks")
    parent.send(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    while True:
        try:
            name, arguments = pickle.loads(
                parent.recv_bytes()
            )  # not the connection's own pickling: tensors would travel as files
        except EOFError:
            return
        try:
            answer = True, getattr(cases, name)(**arguments)
        except BaseException:
            answer = False, f"rank {rank}:\n{traceback.format_exc()}"
        parent.send_bytes(pickle.dumps(answer))


main(*map(int, sys.argv[1:]))
