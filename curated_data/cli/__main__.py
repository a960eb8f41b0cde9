"""`python -m curated_data.cli`."""

import sys

from curated_data.cli import main

sys.exit(main())
