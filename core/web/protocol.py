"""OpenAI's HTTP protocol: what a request asks for, and the objects that answer it."""
import difflib
import json
import re
import time
import uuid
from typing import Any, NamedTuple

from core.net.draw import Sampling

# Fields that clients send by habit and that do not change the answer here.
HARMLESS = {'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key',
            'parallel_tool_calls', 'stream_options', 'prediction', 'return_token_ids',
            'prompt_cache_retention'}
# Fields that would change the answer and are not supported: allowed with these values only.
NEUTRAL = {'frequency_penalty': (None, 0), 'presence_penalty': (None, 0), 'logit_bias': (None, {}),
           'best_of': (None, 1), 'suffix': (None, ''), 'tools': (None, []), 'functions': (None, []),
           'tool_choice': (None, 'none', 'auto'), 'function_call': (None, 'none', 'auto'),
           'modalities': (None, ['text']), 'audio': (None,), 'reasoning_effort': (None,),
           'web_search_options': (None,), 'verbosity': (None, 'medium')}
ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}
# Numbers: least, largest, and what stands for null.
NUMBERS = {'temperature': (0.0, 2.0, 1.0), 'top_p': (1e-6, 1.0, 1.0), 'min_p': (0.0, 1.0, 0.0),
           'repetition_penalty': (0.1, 10.0, 1.0)}
WHOLE = {'top_k': (0, 1 << 31, 0), 'n': (1, 8, 1), 'top_logprobs': (0, 20, 0)}
BOOLEAN = ('stream', 'echo')
KNOWN = {*NUMBERS, *WHOLE, *BOOLEAN, *HARMLESS, *NEUTRAL, 'model', 'messages', 'prompt', 'seed',
         'stop', 'max_tokens', 'max_completion_tokens', 'logprobs', 'response_format'}
MOST_STOPS, LONGEST_STOP, MOST_FIELDS = 16, 200, 100


class Refused(Exception):
    """A request that is answered with an error: status, message, and the field that is wrong."""

    def __init__(self, message: str, field: str | None = None, status: int = 400,
                 code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.message, self.field, self.status, self.code = message, field, status, code
        self.headers = headers or {}

    def body(self) -> dict:
        kind = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error'}.get(
            self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
        return {'error': {'message': self.message, 'type': kind, 'param': self.field,
                          'code': self.code}}


class Asked(NamedTuple):
    """What a request asks for."""
    chat: bool
    prompts: list[Any]          # texts or lists of ids; of a chat one, its list of messages
    n: int                      # answers to each
    max_tokens: int | None      # None: as many as fit
    options: dict               # of Sampling
    seed: int | None
    stream: bool
    usage: bool                 # whether a stream ends with the numbers of tokens
    echo: bool
    logprobs: int               # rivals of each token; -1: no log-probabilities


def parse(body: bytes) -> dict:
    """The JSON object of a request. Raises Refused."""
    def refuse(constant):
        raise ValueError(f'{constant} is no JSON')
    try:
        found = json.loads(body.decode('utf-8'), parse_constant=refuse)
        if not isinstance(found, dict):
            raise Refused('the body must be a JSON object')
        for name, value in found.items():
            if re.search('[\ud800-\udfff]', json.dumps([name, value], ensure_ascii=False)):
                name = name.encode('ascii', 'backslashreplace').decode()
                raise Refused(f'{name}: half a surrogate pair is no text', name)
    except (ValueError, RecursionError) as e:
        raise Refused(f'the body is no JSON in UTF-8 ({str(e)[:100]})') from None
    return found


def read_request(body: dict, chat: bool) -> Asked:
    """What a request asks for. Raises Refused for what is wrong or not supported."""
    check_fields(body)
    numbers = {name: number(body, name, float, *limits) for name, limits in NUMBERS.items()}
    whole = {name: number(body, name, int, *limits) for name, limits in WHOLE.items()}
    stream, echo = (flag(body, name) for name in BOOLEAN)
    wanted = body.get('max_completion_tokens')
    field = 'max_tokens' if wanted is None else 'max_completion_tokens'
    least = 0 if echo and not chat else 1
    most = number(body, field, int, least, 1 << 31, None)
    if not chat and most is None:
        most = 16       # as in OpenAI's
    if chat:
        rivals = whole['top_logprobs'] if flag(body, 'logprobs') else -1
        if echo:
            raise Refused('echo: is for /v1/completions only', 'echo')
    else:
        rivals = number(body, 'logprobs', int, 0, 20, -1)
    options = numbers | {'top_k': whole['top_k'], 'stop_strings': stops(body)}
    prompts = [conversation(body)] if chat else texts(body)
    shown = body.get('stream_options') or {}
    if not isinstance(shown, dict):
        raise Refused('stream_options: must be an object', 'stream_options')
    return Asked(chat, prompts, whole['n'], most, options,
                 number(body, 'seed', int, -(1 << 63), 1 << 63, None), stream,
                 flag(shown, 'include_usage'), echo, rivals)


def check_fields(body: dict) -> None:
    """Raise Refused for a field that would change the answer and is not supported, or that is
    spelt almost like one that is known."""
    if len(body) > MOST_FIELDS:
        raise Refused(f'the body has {len(body):,} fields; {MOST_FIELDS} are allowed')
    for name, value in body.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise Refused(f'{name}: is not supported; leave it out', name)
        if name == 'response_format' and value is not None and \
                (not isinstance(value, dict) or value.get('type') != 'text'):
            raise Refused('response_format: only {"type": "text"} is supported: nothing here keeps '
                          'an answer to JSON', name)
        if name not in KNOWN and (near := difflib.get_close_matches(name, KNOWN, 1, 0.8)):
            raise Refused(f'{name[:40]}: no such field, did you mean {near[0]}?', name[:40])


def number(body: dict, name: str, kind: type, low, high, default) -> Any:
    """A number of a request, or what stands for null. Raises Refused."""
    value = body.get(name)
    if value is None:
        return default
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, float) and kind is int and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        what = 'an integer' if kind is int else 'a number'
        raise Refused(f'{name}: must be {what} from {low} to {high}, not {str(value)[:40]}', name)
    return value


def flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f'{name}: must be true or false', name)
    return bool(value)


def stops(body: dict) -> list[str]:
    found = body.get('stop')
    found = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(
            isinstance(text, str) and len(text) <= LONGEST_STOP for text in found):
        raise Refused(f'stop: must be a text or at most {MOST_STOPS} of them, each of at most '
                      f'{LONGEST_STOP} characters', 'stop')
    return [text for text in found if text]


def texts(body: dict) -> list:
    """The prompts of a completion: a text, texts, ids, or lists of ids."""
    prompt = body.get('prompt')
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(i) is int for i in prompt):
            return [prompt]
        if len(prompt) <= 64 and all(isinstance(p, str) or isinstance(p, list) and p and all(
                type(i) is int for i in p) for p in prompt):
            return prompt
    raise Refused('prompt: must be a text, a list of at most 64 texts, or lists of token ids',
                  'prompt')


def conversation(body: dict) -> list[dict]:
    """The messages of a chat, contents as texts."""
    messages, found = body.get('messages'), []
    if not isinstance(messages, list) or not messages:
        raise Refused('messages: must be a list of at least one {"role", "content"}', 'messages')
    for i, message in enumerate(messages):
        where = f'messages[{i}]'
        role = message.get('role') if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(f'{where}: must have a "role" of {", ".join(ROLES)}', 'messages')
        if message.get('tool_calls') or message.get('function_call'):
            raise Refused(f'{where}: calls of tools are not supported', 'messages')
        content = message.get('content')
        if isinstance(content, list):       # parts, as for texts with images
            if not all(isinstance(part, dict) and part.get('type') == 'text'
                       and isinstance(part.get('text'), str) for part in content):
                raise Refused(f'{where}: only parts of the type text are supported', 'messages')
            content = ''.join(part['text'] for part in content)
        if content is None and role == 'assistant':
            content = ''
        if not isinstance(content, str):
            raise Refused(f'{where}: "content" must be a text, or a list of texts', 'messages')
        found.append({'role': ROLES[role], 'content': content})
    return found


def sampling(asked: Asked, index: int, room: int, stop_tokens, seed: int) -> Sampling:
    """How answer number `index` is drawn; `room` tokens are left in the window."""
    return Sampling(room if asked.max_tokens is None else min(asked.max_tokens, room),
                    seed=f'{seed + index} 0', stop_tokens=stop_tokens, logprobs=asked.logprobs,
                    prompt_logprobs=asked.echo and asked.logprobs >= 0, **asked.options)


# ---------------------------------------------------------------------------------------------
# Answers


class Shape:
    """The objects that answer a request, all with the same id."""

    def __init__(self, asked: Asked, model: str, tokenizer):
        self.asked, self.tokenizer, self.offsets = asked, tokenizer, {}
        kind = 'chat.completion' + '.chunk' * asked.stream if asked.chat else 'text_completion'
        self.head = {'id': f'{"chatcmpl" if asked.chat else "cmpl"}-{uuid.uuid4().hex}',
                     'object': kind, 'created': int(time.time()), 'model': model}

    def body(self, choices: list[dict], **more) -> dict:
        return self.head | {'choices': choices} | more

    def role(self, index: int) -> dict:
        """The first piece of an answer in a chat."""
        return {'index': index, 'delta': {'role': 'assistant', 'content': ''}, 'logprobs': None,
                'finish_reason': None}

    def choice(self, index: int, text: str, ids: list[int], logs: list, reason: str | None) -> dict:
        """An answer, or in a stream a piece of it."""
        if not self.asked.chat:
            content: dict = {'text': text}
        elif self.asked.stream:
            content = {'delta': {'content': text} if text else {}}
        else:
            content = {'message': {'role': 'assistant', 'content': text, 'refusal': None}}
        return {'index': index, **content, 'logprobs': self.noted(index, ids, logs),
                'finish_reason': reason}

    def noted(self, index: int, ids: list[int], logs: list) -> dict | None:
        """The log-probabilities of ids; `logs` has None for one that nothing stands before."""
        if self.asked.logprobs < 0 or not ids:
            return None
        if self.asked.chat:
            return {'content': [self.token(i, x) | {
                'top_logprobs': [self.token(j, y) for j, y in rivals]}
                for i, (x, rivals) in zip(ids, logs)], 'refusal': None}
        texts, offsets = [self.text(i) for i in ids], []
        at = self.offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self.offsets[index] = at
        return {'tokens': texts, 'text_offset': offsets,
                'token_logprobs': [log and finite(log[0]) for log in logs],
                'top_logprobs': [log and dict(reversed([(self.text(j), finite(y))
                                                        for j, y in log[1]])) for log in logs]}

    def text(self, i: int) -> str:
        return self.tokenizer.decode([i])

    def token(self, i: int, log: float) -> dict:
        return {'token': self.text(i), 'logprob': finite(log),
                'bytes': list(self.tokenizer.tokens[i])}


def finite(log: float) -> float:
    """A log-probability as JSON can hold it: that of what is impossible is -9999, as OpenAI's."""
    return max(log, -9999.0)
