"""Where cards that were published by earlier versions look for what is now in `compress.networks.reload`."""

from compress.networks.reload import Reloaded, check_named, read_facts, reload

__all__ = ["Reloaded", "check_named", "read_facts", "reload"]
