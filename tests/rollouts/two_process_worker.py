"""`two_process_worker.py FOLDER`: both commands in as many processes as are launched; each notes what it did."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from trl_blend.cli import main
from trl_blend.rollouts.writer import ShardWriter


def run(folder):
    written = []
    write = ShardWriter.write

    def noted(writer, index, *args):
        written.append([writer.folder.name, index])
        return write(writer, index, *args)

    ShardWriter.write = noted
    inputs = ["--model_name_or_path", f"{folder}/student", "--dataset_name", f"{folder}/prompts.jsonl"]
    settings = ["--max_completion_length", "6", "--rows_per_shard", "2", "--disable_tqdm"]
    rollouts = ["rollouts", *inputs, "--output_dir", f"{folder}/rollouts", *settings]
    teacher = ["--teacher_model_name_or_path", f"{folder}/teacher", "--rollouts", f"{folder}/rollouts"]
    score = ["score", *teacher, "--output_dir", f"{folder}/scored", "--disable_tqdm"]
    statuses = [main(rollouts), main(score)]
    # Found by the main process, said by all of them, and nobody waits for ever
    statuses.append(main([*rollouts, "--seed", "7"]))
    state = PartialState()  # as the commands have set it up
    found = {"num_processes": state.num_processes, "statuses": statuses, "written": written}
    Path(folder, f"rank-{state.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(sys.argv[1])
