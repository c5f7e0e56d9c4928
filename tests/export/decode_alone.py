"""
Decodes exported policies in a process that has torch and transformers only. Imports nothing of this package.

`python -I decode_alone.py jobs.json results.pt`: each job names a `repository`, `how` it is used (`"auto"`, or
`"custom"` with the plain model `student`), a file of `inputs`, a `seed` and the `settings` of `generate`. The result
of a job is a dictionary with `sequences`, `scores`, what the streamer got (`streamed`) and the models that were
`loaded`; or with `error`.
"""

import importlib.machinery
import json
import sys
from pathlib import Path


BLOCKED = {"accelerate", "datasets", "peft", "trl", "trl_blend"}


class Blocking(importlib.machinery.PathFinder):
    """Finds nothing of `BLOCKED`, so that to transformers these packages are not installed."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in BLOCKED else super().find_spec(fullname, path, target)


class Collecting:
    """A streamer."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def main(jobs_file, results_file, blocked=True):
    if blocked:
        sys.meta_path = [Blocking if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    import torch

    torch.set_num_threads(1)
    jobs = json.loads(Path(jobs_file).read_text())
    results = [decode(torch, **job) for job in jobs]
    assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
    torch.save(results, results_file)


def decode(torch, *, repository, how, inputs, settings, seed=0, student=None, stream=False):
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

    loaded, original = [], PreTrainedModel.from_pretrained.__func__

    def counting(cls, name, *args, **kwargs):
        loaded.append(str(name))
        return original(cls, name, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(counting)
    streamer = Collecting() if stream else None
    try:
        trusted = {"trust_remote_code": True}
        if how == "auto":
            model, extra = AutoModelForCausalLM.from_pretrained(repository, **trusted), {}
        else:
            model, extra = AutoModelForCausalLM.from_pretrained(student), {"custom_generate": repository, **trusted}
        if "generation_config" in settings:
            settings = {**settings, "generation_config": GenerationConfig(**settings["generation_config"])}
        torch.manual_seed(seed)
        details = {"return_dict_in_generate": True, "output_scores": True}
        output = model.generate(**torch.load(inputs), **settings, **details, **extra, streamer=streamer)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        PreTrainedModel.from_pretrained = classmethod(original)
    tokens = streamer and (streamer.tokens, streamer.ended)
    return {"sequences": output.sequences, "scores": torch.stack(output.scores), "streamed": tokens, "loaded": loaded}


if __name__ == "__main__":
    main(*sys.argv[1:3], blocked="--not-blocked" not in sys.argv)
