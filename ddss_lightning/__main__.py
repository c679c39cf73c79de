"""`python -m ddss_lightning` is `ddss`."""

from ddss_lightning.cli import main

main()
