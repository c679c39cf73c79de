"""`python -m ddss_lightning` is `ddss`."""

import sys


def main() -> None:
    """Console entry point, see `ddss_lightning.cli.main`; imports take seconds, in which Ctrl+C may come too."""
    try:
        from ddss_lightning.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
