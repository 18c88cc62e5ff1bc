"""``python -m costmodel.calibrate``."""

import sys

from costmodel.commands.calibrate import main

sys.exit(main())
