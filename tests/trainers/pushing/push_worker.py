"""Two processes that train and push: what each of them was told. Run by torchrun; writes `<rank>.json`."""

import json
import os
import sys
from pathlib import Path


RANK = int(os.environ["RANK"])
# Part of the user agent of every request: who has asked
os.environ["HF_HUB_USER_AGENT_ORIGIN"] = f"rank{RANK}"

import torch  # noqa: E402

from tests.trainers.pushing.pushing import PUSHING, build  # noqa: E402
from trl_blend.errors import HubError  # noqa: E402


def told(action) -> str | None:
    try:
        action()
    except HubError as error:
        return str(error)
    return None


def main(models: Path, folder: Path) -> None:
    settings = {**PUSHING, "per_device_train_batch_size": 4}
    trainer = build("offline", models, folder / "out", **settings)
    found = {"world_size": trainer.accelerator.num_processes}
    trainer.train()
    found["pushed"] = told(trainer.push_to_hub)
    found["refused_early"] = told(
        lambda: build("offline", models, folder / "refused", **{**settings, "hub_model_id": "other/run"})
    )
    unannounced = build("offline", models, folder / "unannounced", per_device_train_batch_size=4)
    unannounced.args.hub_model_id = "other/run"
    found["refused_late"] = told(unannounced.push_to_hub)
    torch.distributed.barrier()  # nobody waits for somebody who has left
    (folder / f"{RANK}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
