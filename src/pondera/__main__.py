"""``python -m pondera``: same as the command ``pondera``."""

import sys

from pondera.cli.main import main

sys.exit(main())
