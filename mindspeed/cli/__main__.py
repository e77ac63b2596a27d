"""`python -m mindspeed.cli` is the `mindspeed` command."""

from mindspeed.cli import main

if __name__ == "__main__":
    main()
