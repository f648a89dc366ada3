"""``python -m pygpukit_torch``."""

import sys

from pygpukit_torch.cli import main

sys.exit(main())
