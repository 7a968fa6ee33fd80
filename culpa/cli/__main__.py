"""``python -m culpa.cli``."""

from culpa.cli import main

if __name__ == "__main__":
    main()
