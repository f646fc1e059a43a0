"""Several processes for tests: started once, each joins a new gloo group for each call.

    with several() as run:
        results = run(2, function, *args)   # a list by rank; function and arguments travel by pickle

What a function raises comes back as the first rank's error, in rank order; a call that takes too long is ended.

They are forked, as those of `forking` are, from a process that sees no card, where there is one too: what CUDA has
begun in a process, none of its forks can use.
"""
import multiprocessing
import os
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from queue import Empty
from unittest.mock import patch

MOST = 3
SLOW = [  # to import: once, by the process of which all workers are forked
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.nn", "torch.profiler", "torch._dynamo",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.generation",
    "peft", "bitsandbytes", "accelerate", "pandas", "pytest", "hypothesis",
    "qlora_lab.train", "qlora_lab.loading", "qlora_lab.cli", "qlora_lab.engine.sharded_base",
    "qlora_lab.engine.planner",
]


def forking():
    "A context whose processes are forked from one that has imported what is slow, and sees no card."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""): forkserver.ensure_running()
    return context


def _work(rank, asked, told):
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    while (task := asked.get()) is not None:
        count, place, function, args = task
        try:
            store = dist.FileStore(place, count)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
            told.put((rank, function(*args), None))
        except BaseException as e: told.put((rank, None, e))
        finally:
            if dist.is_initialized(): dist.destroy_process_group()
    told.close()
    told.join_thread()
    os._exit(0)  # threads of a group that is gone would keep the interpreter for seconds


@contextmanager
def several(most=MOST):
    "A function that has some processes carry out a function together, and gives their results by rank."
    context = forking()
    asked, told = [context.Queue() for _ in range(most)], context.Queue()
    workers = [context.Process(target=_work, args=(i, asked[i], told), daemon=True) for i in range(most)]
    for worker in workers: worker.start()

    def run(count, function, *args, seconds=120):
        with tempfile.TemporaryDirectory() as folder:
            for queue in asked[:count]: queue.put((count, str(Path(folder) / "store"), function, args))
            found = {}
            for _ in range(count):
                try: rank, value, error = told.get(timeout=seconds)
                except Empty: raise TimeoutError(f"{count - len(found)} of {count} processes did not answer") from None
                found[rank] = value, error
        for rank in sorted(found):
            if found[rank][1] is not None: raise found[rank][1]
        return [found[rank][0] for rank in range(count)]

    try: yield run
    finally:
        for queue in asked: queue.put(None)
        for worker in workers: worker.join(1)
        for worker in workers: worker.kill()
