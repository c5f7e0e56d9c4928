"""`python -m trl_blend`, for `accelerate launch -m trl_blend ...` and `torchrun -m trl_blend ...`."""

import sys

from trl_blend.cli import main


if __name__ == "__main__":
    sys.exit(main())
