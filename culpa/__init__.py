"""culpa: which stage of training is to be credited or blamed for what a model does."""

import lazy_loader  # pyright: ignore[reportMissingTypeStubs]

# The public names stand in __init__.pyi. Importing all of them takes half a second, which a
# command's --help, or a script that only records, need not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
