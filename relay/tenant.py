"""A tenant is whose everything is: endpoints, generations, events, keys. None sees what is another one's."""

# The operator's own.
DEFAULT = "default"
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
