"""Chat templates of other programs' models: Jinja, rendered as transformers renders it.

A template is a program that comes with a model. It runs in a process of its own, in Jinja's
sandbox, with limits on memory and time: python core/text/chat.py is that process.
"""
import json
import re
import select
import subprocess
import sys
from bisect import bisect_left, bisect_right
from itertools import accumulate

MEMORY, SECONDS, CHARACTERS = 1 << 29, 10, 1 << 22     # of a rendering, and of its result
GUARD = '\U0010fff0'    # parts the name of a special token in what people say: it is text there
BEGIN, END = '\U0010fff1', '\U0010fff2'    # around what stands in a {% generation %} block

# ---------------------------------------------------------------------------------------------
# The process that renders


def environment():
    """A Jinja environment with the filters, functions and blocks of transformers' templates."""
    from datetime import datetime

    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {'generation'}   # it stands around what the assistant says

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            mark = lambda text: jinja2.nodes.Output([jinja2.nodes.TemplateData(text)])
            return jinja2.nodes.Scope([mark(BEGIN), *body, mark(END)]).set_lineno(line)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    found.filters['tojson'] = tojson
    found.globals |= {'raise_exception': refuse,
                      'strftime_now': lambda form: datetime.now().strftime(form)}
    return found


def render_lines() -> None:
    """Read templates and conversations for the last one, one JSON object a line; answer each with
    one line."""
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    env, template, tokens = environment(), None, {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if 'template' in asked:
                template, tokens = env.from_string(asked['template']), asked['tokens']
                found = {'text': ''}
            else:
                text = template.render(messages=asked['messages'], tools=None, documents=None,
                                       add_generation_prompt=asked['reply'], **tokens)
                if len(text) > CHARACTERS:
                    raise ValueError(f'it gives {len(text):,} characters')
                found = {'text': text}
        except BaseException as e:      # whatever a template may raise
            found = {'error': f'{type(e).__name__}: {str(e)[:200]}'}
        print(json.dumps(found), flush=True)


# ---------------------------------------------------------------------------------------------
# What the project sees of it


class ChatTemplate:
    """How a model writes conversations: `source` (Jinja), the `tokens` that it names (bos_token and
    so on), and `ends`, the ids at which an answer ends. Raises ValueError if it cannot be used."""

    def __init__(self, source: str, tokens: dict[str, str], ends: list[int]):
        self.source, self.tokens, self.ends, self.process = source, tokens, set(ends), None
        self.render([{'role': 'user', 'content': 'Hello'}], True)

    def state(self) -> dict:
        """The arguments of the constructor."""
        return {'source': self.source, 'tokens': self.tokens, 'ends': sorted(self.ends)}

    def __getstate__(self) -> dict:
        return self.__dict__ | {'process': None}

    def __del__(self):
        self.close()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, question: dict) -> dict:
        """A line to the process, and its answer. Raises ValueError with what went wrong."""
        if not self.process:
            self.process = subprocess.Popen([sys.executable, __file__], text=True, encoding='utf-8',
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL)
            self.ask({'template': self.source, 'tokens': self.tokens})
        try:
            self.process.stdin.write(json.dumps(question) + '\n')
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout.fileno()], [], [], SECONDS)
            line = self.process.stdout.readline() if ready else ''
        except OSError:
            line = ''
        if not line:
            self.close()
            raise ValueError(f'the chat template takes more than {SECONDS} s or '
                             f'{MEMORY >> 20} MiB, or jinja2 is not installed: pip install jinja2')
        found = json.loads(line)
        if 'error' in found:
            raise ValueError(f'the chat template refuses it ({found["error"]})')
        return found

    def marked(self, messages: list[dict], reply: bool = False) -> str:
        """The conversation as text, with BEGIN and END around its {% generation %} blocks."""
        return self.ask({'messages': messages, 'reply': reply})['text']

    def render(self, messages: list[dict], reply: bool = False) -> str:
        """The conversation as text; with `reply` it ends where the assistant begins."""
        return unmarked(self.marked(messages, reply))

    def guarded(self, messages: list[dict], tokenizer) -> list[dict]:
        """The messages with a GUARD in each name of a special token, so that it stays text. A name
        that the tokenizer finds in any text, such as <think>, is left alone."""
        names = any_of(tokenizer.special.keys() - tokenizer.written.keys())
        part = lambda match: match[0][0] + GUARD + match[0][1:]
        return [{'role': m['role'],
                 'content': re.sub(names, part, unmarked(m['content'].replace(GUARD, '')))}
                for m in messages]

    def encode(self, tokenizer, messages: list[dict], reply: bool = False) -> list[int]:
        """The ids of a conversation."""
        return self.ids(tokenizer, self.render(self.guarded(messages, tokenizer), reply))

    def ids(self, tokenizer, text: str) -> list[int]:
        """The ids of rendered text: names of special tokens are these, all else is text."""
        found = []
        for part in re.split(f'({any_of(tokenizer.special)})', text):
            if part in tokenizer.special:
                found.append(tokenizer.special[part])
            elif part:
                found += tokenizer.encode(part.replace(GUARD, ''))
        return found

    def turns(self, tokenizer, messages: list[dict]):
        """For each message its ids in the whole conversation, and which of them the assistant says.

        That is what stands in {% generation %} blocks. Without these, an answer begins where the
        rendering of what comes before it ends, if that asks for a reply, and it ends with the first
        token of `ends`. What stands before an answer belongs to the message before it. Raises
        ValueError where an answer cannot be found so.
        """
        messages = self.guarded(messages, tokenizer)
        marked = self.marked(messages)
        ids = self.ids(tokenizer, unmarked(marked))
        ends = [*accumulate(len(tokenizer.tokens[i]) for i in ids)]     # in bytes
        answers = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
        at = lambda character: self.size(tokenizer, marked[:character])
        spans = [(bisect_right(ends, at(part.start())), bisect_left(ends, at(part.end())) + 1)
                 for part in re.finditer(f'{BEGIN}[^{END}]*{END}', marked)]
        if BEGIN not in marked:
            spans = [self.answer(tokenizer, messages[:i], marked, ids, ends) for i in answers]
        if len(spans) != len(answers):
            raise ValueError(f'the chat template of this model has {len(spans)} generation blocks '
                             f'for {len(answers)} answers')
        span_of, at = dict(zip(answers, spans)), 0
        for i in range(len(messages)):
            begin, end = span_of.get(i, (len(ids), at))
            if i == len(messages) - 1:
                last = len(ids)
            else:
                last = end if i in span_of else span_of.get(i + 1, (at, 0))[0]
            yield ids[at:last], [begin <= n < end for n in range(at, last)]
            at = last

    def end_of_answer(self, tokenizer) -> set[int]:
        """The special token that the template writes after an answer, if it does."""
        text = self.render([{'role': 'user', 'content': GUARD},
                            {'role': 'assistant', 'content': GUARD}])
        found = re.match(rf'\s*({any_of(tokenizer.special)})', text[text.rfind(GUARD) + 1:])
        return {tokenizer.special[found[1]]} if found else set()

    def answer(self, tokenizer, before: list[dict], whole: str, ids: list[int],
               ends: list[int]) -> tuple[int, int]:
        """The first token of the answer to the messages `before`, and the one after its last."""
        text = self.render(before, reply=True) if before else ''
        if not whole.startswith(text):
            raise ValueError('the chat template of this model writes earlier messages differently '
                             'when others follow, so that it cannot be said what the assistant '
                             'says; give conversations of one answer')
        begin = bisect_left([0, *ends], self.size(tokenizer, text))
        end = next((n for n in range(begin, len(ids)) if ids[n] in self.ends), -1)
        if end < 0:
            raise ValueError('the chat template of this model ends an answer with none of the '
                             f'tokens that end one: {sorted(self.ends)}')
        return begin, end + 1

    def size(self, tokenizer, text: str) -> int:
        """Bytes of the tokens of rendered text."""
        return len(tokenizer.known(unmarked(text.replace(GUARD, ''))).encode())


def unmarked(text: str) -> str:
    """A text without BEGIN and END."""
    return re.sub(f'[{BEGIN}{END}]', '', text)


def any_of(names) -> str:
    """A regular expression that finds these names, of two that begin alike the longer one."""
    return '|'.join(map(re.escape, sorted(names, key=len, reverse=True)))


if __name__ == '__main__':
    render_lines()
