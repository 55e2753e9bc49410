"""The flags of `report`."""

from rwkv_rlhf.settings.command_line import Parser


def parser() -> Parser:
    """The flags of this command."""
    flags = Parser("Write the page of a run again, or one page that compares several runs.")
    flags.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (--proj_dir)")
    text = "page of several runs to write; absent = compare.html in the first one's folder"
    flags.add_argument("--output", default="", help=text)
    return flags
