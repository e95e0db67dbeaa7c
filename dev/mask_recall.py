"""How much personal data `prepare.py --mask_pii` finds: python dev/mask_recall.py [TEXT ...].

Telephone numbers of eleven countries, e-mail and IP addresses as the package faker makes them
(pip install faker; its formats are not ours) are planted in a sentence, 1,000 of each kind. Then
the masks are counted in the texts given, which should hold none. The last line is JSON.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core.text.clean import mask  # noqa: E402

COUNTRIES = ('en_US', 'en_GB', 'de_DE', 'fr_FR', 'es_ES', 'it_IT', 'pt_BR', 'hi_IN', 'ja_JP',
             'zh_CN', 'ru_RU')
KINDS = {'email': 'e-mail address', 'ipv4': 'IP address', 'ipv6': 'IP address'}
SENTENCE = 'You can reach me at {}, but not before nine.'


def recall(makes, name: str, n: int = 1000) -> tuple[float, str]:
    """The share of n made things that are masked as a whole, and the first that is not."""
    found = [(text := str(makes()), mask(SENTENCE.format(text))[0] == SENTENCE.format(f'[{name}]'))
             for _ in range(n)]
    return sum(ok for _, ok in found) / n, next((text for text, ok in found if not ok), '')


def main() -> None:
    from faker import Faker
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('texts', nargs='*', type=Path)
    result = {}
    Faker.seed(0)
    kinds = [(f'{where} phone', Faker(where).phone_number, 'phone number') for where in COUNTRIES]
    kinds += [(kind, getattr(Faker('en_US'), kind), name) for kind, name in KINDS.items()]
    for label, makes, name in kinds:
        result[label], missed = recall(makes, name)
        print(f'{label:12} {result[label]:6.3f}' + f'   not found: {missed}' * bool(missed))
    for path in parser.parse_args().texts:
        text = path.read_text(encoding='utf-8', errors='replace')
        counts = mask(text)[1]
        print(f'{path.name}: {len(text) / 1e6:.2f} million characters, {dict(counts)}')
        result[path.name] = {'characters': len(text), **counts}
    print(json.dumps(result))


if __name__ == '__main__':
    main()
