"""
Writers that die, run as a script in a process of their own.

    python -m tests.rollouts.killed_writer run FOLDER NUM_SHARDS RANK WORLD_SIZE   one job; its parent may kill it
    python -m tests.rollouts.killed_writer everywhere FOLDER NUM_SHARDS   die before every change of the folder, then
                                                                          start again

The second one forks, so that each of the many jobs costs milliseconds, and writes one folder per point of death.
"""

import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

from tests.rollouts.stores import make_manifest, random_rows
from trl_blend.rollouts import writer as writing
from trl_blend.rollouts.writer import ShardWriter


CHANGES = ("fsync", "replace", "unlink")


# A manifest after every shard: as many states between the two as there can be
@patch.object(writing, "MANIFEST_INTERVAL", 0.0)
def job(folder, num_shards, rank=0, world_size=1, pause=0.0):
    writer = ShardWriter(folder, make_manifest(num_shards=num_shards), is_main_process=rank == 0)
    print("started", flush=True)
    for index in range(rank, num_shards, world_size):
        if not writer.done(index, f"input {index}"):
            writer.write(index, random_rows(index), f"input {index}")
            print(f"wrote {index}", flush=True)
        writer.update_manifest()
        time.sleep(pause)
    if world_size == 1:
        writer.update_manifest(complete=True)


def die_before(number):
    """The change of the folder with this number is not made: the process is gone. Returns the list of changes."""
    made = []

    def counted(name, function):
        def call(*args, **kwargs):
            if len(made) == number:
                os.kill(os.getpid(), 9)
            made.append(name)
            return function(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, counted(name, getattr(os, name)))
    return made


def in_child(function):
    """Exit status of `function` in a forked process: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def everywhere(folder, num_shards):
    def dying(target, number):
        die_before(number)
        job(target, num_shards)

    job(Path(folder) / "warm", num_shards)  # what is imported and set up at first use is not done in every child
    number = 0
    while True:
        target = Path(folder) / str(number)
        first = in_child(lambda target=target, number=number: dying(target, number))
        left = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
        for further in (number % 4, number % 7):  # the second and third start die too
            in_child(lambda target=target, further=further: dying(target, further))
        last = in_child(lambda target=target: job(target, num_shards))
        print(json.dumps({"number": number, "codes": [first, last], "left": left}), flush=True)
        if first == 0:
            return
        number += 1


if __name__ == "__main__":
    mode, folder, *numbers = sys.argv[1:]
    {"run": job, "everywhere": everywhere}[mode](folder, *map(int, numbers))
