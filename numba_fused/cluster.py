"""Sweeps on several GPUs or machines, through Dask.

``numba-fused sweep ... --gpus all`` starts one worker for each GPU of this machine (`on_gpus`).
``--scheduler tcp://host:8786`` uses a cluster that runs already; give it one worker of one thread
for each GPU, each with its own ``CUDA_VISIBLE_DEVICES``, as dask-cuda's ``dask cuda worker`` does.
On SLURM, with dask-jobqueue::

    from dask_jobqueue import SLURMCluster
    from distributed import Client

    from numba_fused import sweep

    cluster = SLURMCluster(
        cores=1, processes=1, memory="64GB", walltime="01:00:00",
        job_extra_directives=["--gres=gpu:1", "--exclusive"],
    )
    cluster.scale(jobs=4)
    keys = sweep.missing(sweep.plan([sweep.Sweep.read("batch")]), "rows.csv")
    with Client(cluster) as client:
        for row in sweep.run(keys, "rows.csv", client=client):
            print(row["case"], row["variant"], row["status"])

(or its ``cluster.scheduler_address`` as ``--scheduler``). Rows are written by the process that runs
the sweep, one by one. A worker that dies takes one unfinished measurement with it, which
Dask gives to another; a measurement that kills four is a failed row. Whatever runs the workers,
no two of a user's measurements share a GPU: `bench.gpu_to_itself`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from numba_fused import results
from numba_fused.results import Key, Row

if TYPE_CHECKING:
    from distributed import Client, Future

    from numba_fused.sweep import Measure


def visible_gpus() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` calls each GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return told.split(",")[:count] if told else [str(index) for index in range(count)]


def chosen_gpus(text: str) -> list[str]:
    """``"all"`` or ``"0,2"`` as a list.

    Raises
    ------
    ValueError
        There is no such GPU, or none at all.
    """
    there = visible_gpus()
    chosen = there if text == "all" else text.split(",")
    if not chosen or not set(chosen) <= set(there) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"--gpus takes all, or some of {', '.join(there) or '(no GPU is here)'} separated by "
            f"commas, but got {text!r}"
        )
    return chosen


@contextlib.contextmanager
def on_gpus(gpus: Sequence[str]) -> Iterator[Client]:
    """A client of a cluster on this machine: one worker process for each GPU, seeing only it.

    Parameters
    ----------
    gpus : sequence of str
        What ``CUDA_VISIBLE_DEVICES`` calls them.
    """
    distributed = _distributed()
    workers = {
        gpu: {
            "cls": distributed.Nanny,  # starts another worker in place of one that dies
            "options": {
                "nthreads": 1,
                "memory_limit": 0,
                "env": {"CUDA_VISIBLE_DEVICES": gpu},
                "preload": [__name__],
                "silence_logs": logging.ERROR,
            },
        }
        for gpu in gpus
    }
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard_address": None}}
    with (
        distributed.SpecCluster(workers, scheduler, silence_logs=logging.ERROR) as started,
        distributed.Client(started) as client,
    ):
        client.wait_for_workers(len(gpus))
        yield client


def dask_setup(worker: object) -> None:
    """What Dask calls in a worker of `on_gpus`: a terminal's Ctrl-C is for the sweep alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator[Client]:
    """A client of a cluster that runs already, when it has a worker.

    Raises
    ------
    OSError
        Nothing answers at that address.
    """
    with _distributed().Client(scheduler) as client:
        client.wait_for_workers(1)
        yield client


def gpu_names(client: Any) -> set[str]:
    """The names of the workers' GPUs."""
    return set(client.run(results.gpu_name).values())


def outcomes(
    client: Client, units: Sequence[Sequence[Key]], measure: Measure, until: float
) -> Generator[tuple[Key, Row | Exception]]:
    """Measure on the workers, and give each row, or what became of it, as it is there.

    There are as many units under way as workers, and one measurement of each. The next one of a
    unit is there as soon as the last one is done, when only the worker that did it is idle; so
    workers keep to a unit, whose inputs and right answers take longer than most measurements. No
    measurement waits anywhere but here, and stopping loses nothing.

    Parameters
    ----------
    client : distributed.Client
    units : sequence of sequence of Key
        Keys that share a workload.
    measure : callable
        As in `sweep.run`.
    until : float
        Of `time.monotonic`: nothing is started later.
    """
    waiting = deque(deque(unit) for unit in units)
    running: dict[Future, tuple[Key, deque[Key]]] = {}
    finished = _distributed().as_completed()

    def start(unit: deque[Key]) -> None:
        if not unit or time.monotonic() >= until:
            return
        key = unit.popleft()
        future = client.submit(_on_worker, measure, *key, pure=False)
        running[future] = key, unit
        finished.add(future)

    def next_unit() -> deque[Key]:
        if waiting:
            return waiting.popleft()
        # Nothing new is left: the idle worker takes half of what is behind the busiest one.
        rest = max((unit for _, unit in running.values()), key=len)
        return deque(reversed([rest.pop() for _ in range((len(rest) + 1) // 2)]))

    try:
        start(next_unit())
        while running:
            for _ in range(_workers(client) - len(running)):
                start(next_unit())
            future = next(finished)
            key, unit = running.pop(future)
            problem = future.exception()
            outcome = future.result() if problem is None else problem
            start(unit)
            if not running and waiting:
                start(next_unit())
            yield key, outcome
    finally:
        client.cancel(list(running))


def _workers(client: Any) -> int:
    """How many there are now: a cluster may grow, and workers die."""
    return len(client.nthreads())


def _on_worker(measure: Measure, *key: Any) -> Row:
    """Measure; a worker whose GPU is lost leaves instead, and Dask gives the key to another."""
    from numba_fused.sweep import GpuLostError

    try:
        return measure(*key)
    except GpuLostError:
        os._exit(1)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise RuntimeError(
            "several GPUs or machines need Dask: pip install 'numba_fused[sweeps]'"
        ) from None
    return distributed
