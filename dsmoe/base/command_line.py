"""Command lines whose mistakes are UserErrors, so that one rank alone prints them, as one line."""

import argparse
from typing import NoReturn

from dsmoe.base.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and without its own exit on a mistake; knows --local_rank.

    `description` keeps its line breaks. ConfigError on what argparse would refuse.
    """

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help.")
