"""Text as it comes -> text worth learning from."""
import re

# "*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***" and "*** END OF ...", in all their spellings.
MARKER = re.compile(r'^\*\*\* ?(START|END) OF (?:THIS|THE) PROJECT GUTENBERG EBOOK.*?\*\*\*$',
                    re.MULTILINE | re.DOTALL)
# The book's end as the volunteers wrote it, and, after its start, who they were.
END_LINE = re.compile(r'^End of (?:the |this )?Project Gutenberg.*\Z', re.MULTILINE | re.DOTALL)
CREDITS = re.compile(r'\A\s*(?:Produced by|E-text prepared by|Special thanks are due)'
                     r'(?:.+\n)+?\n')


def strip_gutenberg(text: str) -> str:
    """A Project Gutenberg book without its header, licence and credits; other text unchanged."""
    marks = {found[1]: found.span() for found in MARKER.finditer(text)}
    if set(marks) != {'START', 'END'}:
        return text
    text = END_LINE.sub('', text[marks['START'][1]:marks['END'][0]])
    return CREDITS.sub('', text).strip() + '\n'


def gutenberg_encoding(raw: bytes) -> str:
    """The encoding that the header of a Project Gutenberg file states; utf-8 where it says none."""
    found = re.search(rb'^Character set encoding: *([\w-]+)', raw[:5000], re.MULTILINE)
    return found[1].decode() if found else 'utf-8'
