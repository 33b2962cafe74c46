"""`python -m toolchain` is `hptool`."""

from toolchain.cli import main

if __name__ == "__main__":
    main()
