"""`python -m ckptsched` is the command `ckptsched`."""

from .cli.commands import main

if __name__ == "__main__":
    main(prog_name="ckptsched")
