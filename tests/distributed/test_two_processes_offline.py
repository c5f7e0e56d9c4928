"""
Two CPU processes against one, for the offline trainer beside `test_common.py`: metrics.
"""

import pytest

from tests.distributed import offline_worker


pytestmark = pytest.mark.distributed

RUNS = [(launch, name) for launch in ("ddp", "fsdp2") for name in offline_worker.UPDATES]
RUNS += [("ddp", name) for name in offline_worker.PEFT_UPDATES]


@pytest.mark.parametrize(("launch", "name"), RUNS)
def test_metrics_are_those_of_one_process(launched_offline, launch, name):
    (single,), ranks = launched_offline("single"), launched_offline(launch)
    expected = single[name]["log"]
    compared = set()
    for rank in ranks:
        for found, entry in zip(rank[name]["log"], expected, strict=True):
            for key in entry:
                if "offline/" in key and "per_second" not in key:
                    assert found[key] == pytest.approx(entry[key], rel=1e-4, abs=1e-5), key
                    compared.add(key)
    assert {"offline/advantage", "offline/advantage_std", "offline/drift_kl"} <= compared
    assert ("eval_offline/reverse_kl" in compared) == (name == "weighted_evaluated")
    evaluated = [
        [entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in (ranks[0][name]["log"], expected)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    losses = [entry["loss"] for entry in expected if "loss" in entry]
    assert len(losses) == offline_worker.NUM_STEPS
    assert [entry["loss"] for entry in ranks[0][name]["log"] if "loss" in entry] == pytest.approx(losses, rel=1e-4)
