"""Settings: from a TOML file, the environment and systemd credentials to checked data.

`load` is the way in. Profiles (`profiles/*.toml`) describe how one kind of agent lays out its memory.
"""

from config.load import Configuration, find_config_file, load

__all__ = ["Configuration", "find_config_file", "load"]
