"""``python -m rd_train`` is ``rd-train``: what torchrun starts."""

import sys

from rd_train.cli import main

sys.exit(main())
