"""What comes from outside: read within limits, checked against its types, shown without harm.

A file may be damaged or made to harm. Its text is read with a limit on size and depth, what it
announces is compared with what it holds before memory is taken for it, and its words never reach a
terminal, a table or a page as anything but words. Readers raise `Unreadable`, whose message is a
reason; whoever knows which file it is about makes an error of this package of it.
"""

from compress.untrusted.archives import Member, open_archive
from compress.untrusted.expansion import check_expansion, open_gzip
from compress.untrusted.records import read_record
from compress.untrusted.text import Unreadable, decode, parse_json, parse_toml, read_json, read_text
from compress.untrusted.visible import visible, visible_json

__all__ = [
    "Member",
    "Unreadable",
    "check_expansion",
    "decode",
    "open_archive",
    "open_gzip",
    "parse_json",
    "parse_toml",
    "read_json",
    "read_record",
    "read_text",
    "visible",
    "visible_json",
]
