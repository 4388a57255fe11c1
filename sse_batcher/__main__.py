"""`python -m sse_batcher`."""

import sys

from .cli import main

sys.exit(main())
