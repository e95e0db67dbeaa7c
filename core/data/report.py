"""What preparing a dataset did: counted in a Tally, shown as report.html, a page without links."""
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

from core.settings import warn
from core.text.clean import LIMITS


class Tally:
    """Counts that can be added up over batches of documents, and the first examples of each kind.

    steps: name -> documents and characters before, documents and characters after
    rules: name -> documents outside of it, documents it dropped
    sizes: 'in' or 'out', number of the source, name of the step -> characters
    """

    def __init__(self):
        self.steps, self.rules, self.counts, self.sizes = {}, {}, Counter(), Counter()
        self.examples, self.bad = {}, []

    def step(self, name: str, before: list[str], after: list[str], source: int = 0) -> None:
        """Note what a step made of a document of a source: lists of texts."""
        counts = self.steps.setdefault(name, [0, 0, 0, 0])
        for i, end, texts in ((0, 'in', before), (2, 'out', after)):
            size = sum(map(len, texts))
            counts[i] += len(texts)
            counts[i + 1] += size
            self.sizes[f'{end} {source} {name}'] += size

    def step_of_all(self, name: str, source: np.ndarray, before: np.ndarray, after: np.ndarray
                    ) -> None:
        """Note what a step made of all documents, by their characters before and after it."""
        self.steps[name] = [int(n) for sizes in (before, after)
                            for n in (np.count_nonzero(sizes), sizes.sum())]
        for end, sizes in (('in', before), ('out', after)):
            self.sizes.update({f'{end} {i} {name}': int(n)
                               for i, n in enumerate(np.bincount(source, sizes))})

    def warn_of_losses(self, sources: list[str]) -> None:
        """Warn of each step that removed more than half of a source's characters, with the rule
        that dropped most documents, and an example."""
        for key, size in self.sizes.items():
            end, source, name = key.split(' ', 2)
            left = self.sizes[f'out {source} {name}']
            if end == 'in' and left < size / 2:
                if name == 'good by the rules':
                    name = max(self.rules, key=lambda rule: self.rules[rule][1])
                found = self.examples.get(name.removeprefix('without '), [])[:1]
                warn(f'{sources[int(source)]}: {1 - left / size:.0%} of the characters went in the '
                     f'step "{name}"' + ''.join(f', such as {where}: {text[:80]!r}'
                                                for where, text in found))

    def rule(self, name: str, dropped: bool, where: str, text: str, value: str) -> None:
        """Note that a document lies outside of a rule, and whether it was dropped for that."""
        counts = self.rules.setdefault(name, [0, 0])
        counts[0] += 1
        counts[1] += dropped
        self.example(name, f'{where}: {value}' if value else where, text)

    def example(self, kind: str, where: str, text: str) -> None:
        """Keep the beginning of a text, if it is one of the first three of its kind."""
        found = self.examples.setdefault(kind, [])
        if len(found) < 3:
            found.append([where, text[:300]])

    def add(self, other: dict) -> None:
        """Add the `vars` of another tally."""
        for mine, theirs in ((self.steps, other['steps']), (self.rules, other['rules'])):
            for name, counts in theirs.items():
                mine[name] = [a + b for a, b in zip(mine.get(name, [0] * 4), counts)]
        self.counts.update(other['counts'])
        self.sizes.update(other['sizes'])
        self.bad += other['bad']
        for kind, found in other['examples'].items():
            self.examples[kind] = [*self.examples.get(kind, []), *found][:3]


def print_summary(folder: Path, meta: dict) -> None:
    """What the dataset is and what was removed from it, on a few lines."""
    print(f'{folder}: {meta["about"]} ({meta["licence"]})\n'
          f'  {meta["documents"]:,} documents, {meta["characters"]:,} characters; '
          f'{meta["tokenizer"]} tokenizer of {meta["vocab_size"]:,} tokens\n'
          f'  {meta["train_tokens"]:,} tokens to train on, {meta["val_tokens"]:,} to validate on')
    for name, (documents_in, characters_in, documents_out, characters_out) in meta['steps'].items():
        if characters_in != characters_out:
            print(f'  {name}: {documents_in:,} -> {documents_out:,} documents, {characters_in:,} '
                  f'-> {characters_out:,} characters')
    if meta['leakage'] and meta['documents'] > 1:
        print('  validation documents like one in training: ' + ', '.join(
            f'{n:,} (Jaccard {low} or more)' for low, n in meta['leakage'].items()))
    for what, n in meta['counts'].items():
        if n and what.startswith(('U+FFFD', 'NUL', 'masked', 'files')):
            print(f'  {what}: {n:,}')
    if meta['n_bad']:
        print(f'  left out because it cannot be read: {meta["n_bad"]:,}')
    print(f'  what was removed and why: {folder}/report.html')


STYLE = '''
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8884;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; padding: .5rem;
      background: #8882; border-radius: .3rem; font-size: 85%; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
td.n { overflow-wrap: normal; white-space: nowrap; }
'''


def write_report(path: Path, meta: dict) -> None:
    """Write the page of a dataset whose meta.json is `meta`."""
    page = [f'<h1>{escape(meta["name"])}</h1><p>{escape(meta["about"])}</p>']
    sizes = [('documents', f'{meta["documents"]:,}'), ('characters', f'{meta["characters"]:,}'),
             ('tokens to train on', f'{meta["train_tokens"]:,}'),
             ('tokens to validate on', f'{meta["val_tokens"]:,}'),
             *((f'validation documents like one in training (Jaccard {low} or more)', f'{n:,}')
               for low, n in meta['leakage'].items()),
             ('tokenizer', f'{meta["tokenizer"]}, {meta["vocab_size"]:,} tokens'),
             ('bytes per token', f'{meta["bytes_per_token"]:.3f}'),
             ("bytes per token of GPT-2's tokenizer on the same text",
              f'{meta["gpt2_bytes_per_token"]:.3f}' if meta['gpt2_bytes_per_token']
              else 'not measured: its file is not on this machine'),
             ('licence', meta['licence'])]
    page += [table('', [], sizes), '<h2>What went in and what came out</h2>',
             table('The steps in their order. Where a line is the same twice, nothing was removed.',
                   ['step', 'documents in', 'out', 'characters in', 'out', 'left'],
                   [(name, f'{a:,}', f'{b:,}', f'{c:,}', f'{d:,}', f'{d / max(1, c):.2%}')
                    for name, (a, c, b, d) in meta['steps'].items()])]
    settings, n_tokens = meta['settings'], meta['train_tokens'] + meta['val_tokens']
    if settings['quality'] or settings['count_quality']:
        page.append(table(
            f'Quality rules; applied: {escape(settings["quality"] or "none")}. The others would '
            'have dropped what lies outside.', ['rule', 'allowed', 'documents outside', 'dropped'],
            [(rule, allowed(rule.partition(': ')[2]), f'{n:,}', f'{dropped:,}')
             for rule, (n, dropped) in sorted(meta['rules'].items(), key=lambda r: -r[1][0])]
            or [('no document lies outside of any rule', '', '0', '0')]))
    else:
        page.append('<p>Quality rules were not looked at; with --count_quality they are counted.')
    page.append(table('Also counted', ['what', 'how many'],
                      [(what, f'{n:,}') for what, n in meta['counts'].items() if n]))
    if meta['bad']:
        page.append(table(f'Left out because it cannot be read: {meta["n_bad"]:,}', ['what'],
                          [(message,) for message in meta['bad'][:20]]))
    page += ['<h2>Length of the documents</h2>',
             table('', ['characters', 'documents', 'of all'],
                   [(f'{low:,} to {high - 1:,}', f'{n:,}', f'{n / meta["documents"]:.2%}')
                    for low, high, n in meta['lengths']]),
             '<h2>Most frequent tokens</h2>',
             table('', ['token', 'how often', 'of all'],
                   [(repr(token), f'{n:,}', f'{n / n_tokens:.2%}')
                    for token, n in meta['frequent']]),
             '<h2>Examples of what was removed, or would have been</h2>']
    for kind, found in sorted(meta['examples'].items()):
        page.append(f'<h3>{escape(kind)}</h3>' + ''.join(
            f'<div>{escape(where)}</div><pre>{escape(str(text))}</pre>' for where, text in found))
    page += ['<h2>Sources</h2>', table(
        f'{meta["n_inputs"]:,} files, {meta["input_bytes"]:,} bytes'
        + (', the first of them:' if meta['n_inputs'] > len(meta['inputs']) else ''),
        ['file', 'bytes', 'SHA-256'],
        [(f['file'], f'{f["bytes"]:,}', f['sha256'][:16] + '…') for f in meta['inputs'][:200]]),
        '<h2>Settings</h2>',
        table('', ['setting', 'value'], [(k, str(v)) for k, v in settings.items()])]
    path.write_text(f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
                    f'<meta name="viewport" content="width=device-width">'
                    f'<title>{escape(meta["name"])}</title><style>{STYLE}</style></head><body>\n'
                    + '\n'.join(page) + '\n</body></html>\n', encoding='utf-8', errors='replace')


def allowed(measure: str) -> str:
    """What the rules allow of a measure: '50 to 100,000', 'at most 0.3'."""
    low, high = LIMITS.get(measure, (None, None))
    if low is not None and high is not None:
        return f'{low:,} to {high:,}'
    if low is None and high is None:
        return 'lines that end as sentences do'
    return f'at least {low:,}' if high is None else f'at most {high:,}'


def table(title: str, head: list[str], rows: list[tuple]) -> str:
    """An HTML table; columns of numbers are set to the right."""
    right = [i > 0 and all(str(row[i])[:1].isdigit() for row in rows) for i in range(len(head))]
    cell = lambda tag, i, text: (f'<{tag}{" class=n" if right[i:i + 1] == [True] else ""}>'
                                 f'{escape(str(text))}</{tag}>')
    return (f'<p>{title}</p>' * bool(title) + '<table>'
            + ''.join(f'<tr>{"".join(cell(tag, i, text) for i, text in enumerate(row))}</tr>'
                      for tag, row in [('th', head)] * bool(head) + [('td', r) for r in rows])
            + '</table>')
