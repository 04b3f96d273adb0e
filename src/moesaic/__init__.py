"""moesaic: what does sparse expert compute buy, and what does it cost in shared representation?"""

from moesaic._version import __version__ as __version__
