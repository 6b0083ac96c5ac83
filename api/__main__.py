"""`python -m twinfer` is `twinfer`."""

import sys

from .commands.main import main

sys.exit(main())
