"""outlast: train models that outlast their training data.

Importing the package costs nothing: it loads neither torch nor any of the rooms. Import the room you need, for example
``from outlast.robust import SAM``.
"""

__version__ = "0.1.0.dev0"

__all__ = ["__version__"]
