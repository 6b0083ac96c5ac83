"""`python -m twinfer` is `twinfer`."""

import sys

from .cli import main

sys.exit(main())
