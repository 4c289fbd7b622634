"""What comes from outside: read within limits, checked against its types, shown without harm.

A file may be damaged or made to harm. Its text is read with a limit on size and depth, what it
announces is compared with what it holds before memory is taken for it, and its words never reach a
terminal, a table or a page as anything but words. Readers raise `Unreadable`, whose message is a
reason; whoever knows which file it is about makes an error of this package of it.
"""

from compress.untrusted.expansion import Member, check_expansion, open_archive, open_gzip
from compress.untrusted.printable import printable, visible_json
from compress.untrusted.records import read_record
from compress.untrusted.text import Unreadable, decode, parse_json, parse_toml, read_json, read_text

__all__ = [
    "Member",
    "Unreadable",
    "check_expansion",
    "decode",
    "open_archive",
    "open_gzip",
    "parse_json",
    "parse_toml",
    "printable",
    "read_json",
    "read_record",
    "read_text",
    "visible_json",
]
