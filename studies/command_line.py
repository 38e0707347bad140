"""The parser of a study's command line; no program."""

from argparse import RawDescriptionHelpFormatter

from runs import dmash


def parser_of(program, text):
    """A parser whose --help begins with `text`, the docstring of the program."""
    layout = RawDescriptionHelpFormatter
    return dmash.Parser(program, description=text, formatter_class=layout, allow_abbrev=False)
