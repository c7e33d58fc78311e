"""``python -m diffaccel.distill``: the same as ``diffaccel distill``, for ``accelerate launch -m``."""

import sys

from ..cli import main

main(["distill", *sys.argv[1:]])
