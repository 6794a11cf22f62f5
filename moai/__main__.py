"""`python -m moai COMMAND` is `moai COMMAND`."""

from moai.core.stopping import stop_at_once

if __name__ == "__main__":
    stop_at_once()  # all that is imported below takes its time

from moai.cli import run

if __name__ == "__main__":
    run()
