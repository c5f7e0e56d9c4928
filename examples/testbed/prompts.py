"""
Write prompts of the test-bed to a JSON-lines file, for the command line of `trl-blend`:

```sh
python examples/testbed/prompts.py --n 3840 --output prompts.jsonl
```
"""

import argparse
import sys
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the package importable, and hide this folder's module names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from testbed.task import build_prompt_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="train", choices=["train", "validation", "test"])
    parser.add_argument("--n", type=int, required=True, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="file, .jsonl")
    args = parser.parse_args()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    build_prompt_dataset(args.split, args.n, args.seed).to_json(args.output)
    print(f"{args.n} prompts written to {args.output}.")


if __name__ == "__main__":
    main()
