"""
Runs `trl-blend` commands in processes of their own without importing everything again for each of them: a fresh
interpreter that has only imported the package forks for every line of JSON arguments it reads.

Every shard, batch and manifest is announced on standard output, with a pause in which it can be killed.
"""

import json
import os
import sys
import time

from trl_blend.cli import main
from trl_blend.rollouts import collect, score, writer  # noqa: F401
from trl_blend.rollouts.engines import local


PAUSES = {"sample": 0.02, "_score_batch": 0.02, "write_atomically": 0.05}


def announced(owner, name):
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        print(f"at {name}", flush=True)
        time.sleep(PAUSES[name])
        return result

    setattr(owner, name, wrapper)


def serve():
    announced(local.LocalEngine, "sample")
    announced(local, "_score_batch")
    announced(writer, "write_atomically")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(main(json.loads(line)))
        print(f"pid {pid}", flush=True)
        print(f"exit {os.waitpid(pid, 0)[1]}", flush=True)


if __name__ == "__main__":
    serve()
