"""`python -m hf_posext` is `hf-posext`."""

from .cli import main

if __name__ == "__main__":
    main()
