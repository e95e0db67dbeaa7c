"""core/clean.py: Project Gutenberg's wrapping."""
from core.clean import gutenberg_encoding, strip_gutenberg

BOOK = '''The Project Gutenberg EBook of Tales, by A. Writer

This eBook is for the use of anyone anywhere at no cost

Character set encoding: {encoding}

*** START OF {this} PROJECT GUTENBERG EBOOK TALES,
AND MORE ***



Produced by An Anonymous Volunteer
and another one



TALES

by A. Writer

It was night. *** The End of the world was near.

End of the line.



End of the Project Gutenberg EBook of Tales, by A. Writer

*** END OF {this} PROJECT GUTENBERG EBOOK TALES ***

***** This file should be named 1.txt *****
Project Gutenberg-tm License
'''
STORY = '''TALES

by A. Writer

It was night. *** The End of the world was near.

End of the line.
'''


def test_header_licence_and_credits_go():
    for this in ('THIS', 'THE'):
        assert strip_gutenberg(BOOK.format(this=this, encoding='UTF-8')) == STORY


def test_other_texts_stay():
    for text in ('', STORY, '*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nno end\n'):
        assert strip_gutenberg(text) == text


def test_encoding():
    for name in ('UTF-8', 'ISO-8859-1', 'ASCII'):
        assert gutenberg_encoding(BOOK.format(this='', encoding=name).encode()) == name
    assert gutenberg_encoding(b'once upon a time') == 'utf-8'
