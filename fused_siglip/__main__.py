"""``python -m fused_siglip``: what runs here, and whether it is right."""

import sys

from .testing.selfcheck import main

sys.exit(main(sys.argv[1:]))
