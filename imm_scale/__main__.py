"""`python -m imm_scale` is `imm-scale`."""

import sys

from imm_scale.cli import main

sys.exit(main())
