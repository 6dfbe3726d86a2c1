"""`python -m gxr_batch` is `gxr-batch`."""

from gxr_batch.cli import main

if __name__ == "__main__":
    main(prog_name="gxr-batch")
