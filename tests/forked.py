"""Processes as torchrun starts them, but forked from the one that tests: they import nothing again."""

import multiprocessing
import os
import socket
import sys


def start(targets, outputs=None):
    """Launch a process for each function, with torchrun's variables, and return them; they are still running.

    outputs: a path for each, which gets what it prints. Threads of the parent are not in a child: tests that fork have
    the fixture one_thread.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def child(rank, target):
        os.environ |= {"WORLD_SIZE": str(len(targets)), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if outputs is not None:
            sys.stdout = sys.stderr = outputs[rank].open("w", buffering=1)
        target()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=pair) for pair in enumerate(targets)]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    """Return the exit statuses of processes, when they end, -9 of one that was killed."""
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]
