"""`python -m moai COMMAND` is `moai COMMAND`."""

from moai.cli import run

if __name__ == "__main__":
    run()
